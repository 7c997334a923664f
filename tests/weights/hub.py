"""A hub of one repository, as far as huggingface_hub asks it."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from benchmarks.harness import Peer, Request

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubRequest(Request):
    """GET and HEAD."""

    def do_HEAD(self) -> None:
        self.server.get(self)


class Hub(Peer):
    """Serves a directory as the repository `name`.

    Attributes:
        requests: how often each file was asked for with GET.
        commit: what the branch is at.
        sizes: of files that it says to have another size than they have.
    """

    commit = COMMIT

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.requests: Counter[str] = Counter()
        self.sizes: dict[str, int] = {}
        super().__init__()
        self.RequestHandlerClass = HubRequest

    def get(self, request: Request) -> None:
        """Answer what the library asks for."""
        path = request.path.partition("?")[0]
        if path.startswith(f"/api/models/{self.name}/revision/") or path == f"/api/models/{self.name}":
            sizes = {entry.name: entry.stat().st_size for entry in sorted(self.directory.iterdir())} | self.sizes
            files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            about = {"id": self.name, "sha": self.commit, "siblings": files}
            request.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            return
        file = self.directory / path.rpartition("/")[2]
        if not path.startswith(f"/{self.name}/resolve/") or not file.is_file():
            request.answer(404, b"", X_Error_Code="RepoNotFound")
            return
        body = file.read_bytes()
        headers: dict[str, str | None] = {
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X_Repo_Commit": self.commit,
            "Content_Length": str(len(body)),
        }
        if request.command == "HEAD":
            body = b""
        else:
            self.requests[file.name] += 1
        request.answer(200, body, **headers)
