"""The requests of cog 0.16.12's docs/http.md, with a picture as the input: documented.py URL PICTURE."""

import base64
import json
import queue
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

url, picture = sys.argv[1:]
image = f"data:image/jpeg;base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
events: queue.Queue[dict[str, Any]] = queue.Queue()
over = threading.Event()


class Peer(BaseHTTPRequestHandler):
    """Takes events; its picture does not come while anything is asked."""

    def do_POST(self) -> None:
        """Keep an event."""
        events.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        """Make the other side wait."""
        over.wait(60)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def ask(method: str, path: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}{path}", data, {"Content-Type": "application/json", **headers}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def until_completed() -> list[str]:
    """The statuses of the events up to a final one."""
    seen = []
    while not seen or seen[-1] in ("starting", "processing"):
        seen.append(events.get(timeout=60)["status"])
    return seen


peer = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
threading.Thread(target=peer.serve_forever, daemon=True).start()
receiver = f"http://127.0.0.1:{peer.server_port}/hook"
later = {"Prefer": "respond-async"}

# Predictions, synchronous and not, idempotent and not.
status, made = ask("POST", "/predictions", {"input": {"image": image}})
assert (status, made["status"], made["output"][:9]) == (200, "succeeded", "Caption: "), made
status, made = ask("PUT", "/predictions/wjx3whax6rf4vphkegkhcvpv6a", {"input": {"image": image}})
assert (status, made["status"], made["id"]) == (200, "succeeded", "wjx3whax6rf4vphkegkhcvpv6a"), made
status, made = ask("PUT", "/predictions/another", {"input": {"image": image}, "webhook": receiver}, **later)
assert (status, made["id"]) == (202, "another"), made
assert until_completed() == ["processing", "succeeded"]

# A webhook for the end only.
hooked = {"input": {"image": image}, "webhook": receiver, "webhook_events_filter": ["completed"]}
assert ask("POST", "/predictions", hooked, **later)[0] == 202
assert until_completed() == ["succeeded"]

# Cancelling.
waiting = {"id": "abcd1234", "input": {"image": f"http://127.0.0.1:{peer.server_port}/slow.png"}, "webhook": receiver}
assert ask("POST", "/predictions", waiting, **later)[0] == 202
assert ask("POST", "/predictions/abcd1234/cancel")[0] == 200
assert until_completed()[-1] == "canceled"
over.set()
assert ask("POST", "/predictions/nobody/cancel")[0] == 404

assert "/predictions" in ask("GET", "/openapi.json")[1]["paths"]
