"""Large files over HTTP: resumed, repeated, checked.

A download grows under a `.partial` name and gets its own name when it is complete and checked, so
a file with its own name is always whole.
"""

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import requests

from blip.errors import BundleError
from blip.weights.bundle import digest

ATTEMPTS = 5  # in a row that bring no new byte
BACKOFF = 1.0  # seconds before the first repetition, doubled for each further one
TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
REPORT_EVERY = 10.0  # seconds

Report = Callable[[str], None]  # takes one line of progress


@dataclass(frozen=True)
class File:
    """A file as its publisher serves it; `size` in bytes, None where only the server knows it."""

    url: str
    size: int | None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The file's own name, without the directories of its URL."""
        return self.url.rpartition("/")[2]

    def check(self, path: Path) -> Path:
        """`path`, when it holds this file.

        Raises:
            BundleError: it is missing, or its size or SHA-256 is wrong.
        """
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise BundleError(f"{path} is missing; download it from {self.url}.")
        if self.size is not None and size != self.size:
            raise BundleError(f"{path} has {size} bytes instead of {self.size}; download it again from {self.url}.")
        if self.sha256 and digest(path) != self.sha256:
            raise BundleError(f"{path} was altered: its SHA-256 is not {self.sha256}; download it again.")
        return path


def received(file: File, directory: Path) -> int:
    """How many bytes of `file` are already in `directory`."""
    paths = (directory / file.name, directory / f"{file.name}.partial")
    return max((path.stat().st_size for path in paths if path.exists()), default=0)


def sized(file: File, directory: Path, report: Report) -> File:
    """`file` with its size: as it is published, as it lies in `directory`, or as its server says.

    Raises:
        BundleError: the server cannot be reached, or does not say.
    """
    path = directory / file.name
    if file.size is not None or path.exists():
        return replace(file, size=path.stat().st_size if file.size is None else file.size)
    for attempt in range(ATTEMPTS):
        try:
            headers = {"Accept-Encoding": "identity"}
            with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                _check_status(file, response.status_code, 200)
                length = response.headers.get("Content-Length", "")
            break
        except requests.RequestException as error:
            if attempt == ATTEMPTS - 1 or isinstance(error, ValueError):  # ValueError: not an http(s) URL
                raise _unreachable(file, error) from error
            report(f"{file.name}: {type(error).__name__}, trying again.")
            time.sleep(BACKOFF * 2**attempt)
    if not length.isdecimal():
        raise BundleError(f"{file.url} does not say how long it is; download it yourself and give the file.")
    return replace(file, size=int(length))


def _check_status(file: File, status: int, *good: int) -> None:
    """Raise HTTPError for what may be different in a moment, BundleError for what will not."""
    if status in (408, 429) or status >= 500:
        raise requests.HTTPError(f"status {status}")
    if status not in good:
        raise BundleError(f"{file.url} was refused with HTTP status {status}; check the network or BLIP_MIRROR.")


def _unreachable(file: File, error: Exception) -> BundleError:
    return BundleError(
        f"{file.url} cannot be downloaded ({type(error).__name__}); check the network, set BLIP_MIRROR, or give the "
        "files yourself as docs/models.md says."
    )


def fetch(file: File, directory: Path, report: Report) -> Path:
    """Download `file` into `directory`, continuing what is there, and return its path.

    A connection that breaks is tried again until several attempts in a row have brought nothing.

    Raises:
        BundleError: the server cannot be reached, refuses, or has another file.
    """
    directory.mkdir(exist_ok=True)
    file = sized(file, directory, report)
    assert file.size is not None
    path, partial = directory / file.name, directory / f"{file.name}.partial"
    best, failures = received(file, directory), 0
    with requests.Session() as session:
        while not path.exists():
            try:
                _receive(session, file, partial, report)
                _check(file, partial)
                partial.rename(path)
            except requests.RequestException as error:
                size = received(file, directory)
                failures = 0 if size > best else failures + 1
                best = max(best, size)
                if failures == ATTEMPTS or isinstance(error, ValueError):  # ValueError: not an http(s) URL
                    raise _unreachable(file, error) from error
                report(f"{file.name}: {type(error).__name__}, trying again.")
                time.sleep(BACKOFF * 2 ** max(0, failures - 1))
    return file.check(path)


def _receive(session: requests.Session, file: File, partial: Path, report: Report) -> None:
    """Complete `partial` to the whole of `file` with one request.

    A second file records which version of `file` it is part of. If the server now has another version,
    or does not say, the download starts over.
    """
    origin_path = partial.with_suffix(".origin")
    try:
        origin = json.loads(origin_path.read_text())
        offset = partial.stat().st_size
    except (OSError, ValueError):
        origin, offset = {"version": None}, 0
    headers = {"Accept-Encoding": "identity"}
    if origin["version"] and offset:
        headers.update({"Range": f"bytes={offset}-", "If-Range": origin["version"]})
    assert file.size is not None
    if offset == file.size:
        return
    with session.get(file.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        _check_status(file, status, 200, 206)
        if status == 200:
            total = response.headers.get("Content-Length", str(file.size))
            if int(total) != file.size:
                raise BundleError(f"{file.url} has {total} bytes instead of {file.size}: it is another file.")
            partial.unlink(missing_ok=True)
            offset = 0
            origin_path.write_text(json.dumps(_origin(response)))
        elif (
            _origin(response)["version"] != origin["version"] or f" {offset}-" not in response.headers["Content-Range"]
        ):
            partial.unlink()
            raise requests.HTTPError("another version or range than the one asked for")
        with partial.open("ab") as out:
            reported = time.monotonic()
            for block in response.iter_content(1 << 16):
                offset += out.write(block)
                if time.monotonic() - reported > REPORT_EVERY:
                    reported = time.monotonic()
                    report(f"{file.name}: {offset / 1e6:.0f} of {file.size / 1e6:.0f} MB")
    if offset < file.size:
        raise requests.ConnectionError("the body ended early")


def _origin(response: requests.Response) -> dict[str, str | None]:
    """What identifies the version of the file that the server has, and its MD5 where it gives one."""
    tag = response.headers.get("ETag", "")
    version = response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
    hashes = dict(item.strip().split("=", 1) for item in response.headers.get("x-goog-hash", "").split(",") if item)
    md5 = base64.b64decode(hashes["md5"]).hex() if "md5" in hashes else None
    return {"version": version, "md5": md5}


def _check(file: File, partial: Path) -> None:
    """Compare a complete download with the digests that are known, and remove it when it is damaged."""
    origin_path = partial.with_suffix(".origin")
    md5 = json.loads(origin_path.read_text())["md5"]
    if (
        partial.stat().st_size != file.size
        or (md5 and digest(partial, "md5") != md5)
        or (file.sha256 and digest(partial) != file.sha256)
    ):
        partial.unlink()
        raise requests.RequestException("damaged on the way")
    origin_path.unlink()
