"""Print every change of a server's health. Standard library only.

With --until-ready it ends with exit status 0 at READY, and 1 when the server reports a failed setup or its process
ends first.
"""

import argparse
import json
import os
import time
import urllib.request
from collections.abc import Sequence


def health(url: str) -> str:
    """The server's status, or "no answer" while nothing listens."""
    try:
        with urllib.request.urlopen(f"{url}/health-check", timeout=5) as response:
            return str(json.load(response)["status"])
    except (OSError, ValueError, KeyError):
        return "no answer"


def alive(pid: int) -> bool:
    """Whether the process is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(given: Sequence[str]) -> int:
    """Print every change until --until-ready ends it, or Ctrl-C."""
    parser = argparse.ArgumentParser("watch_health", description="Print every change of a server's health.")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:5000")
    parser.add_argument("--until-ready", metavar="PID", type=int, help="end at READY, or when this process ends")
    arguments = parser.parse_args(given)
    try:
        return watch(arguments.url, arguments.until_ready)
    except KeyboardInterrupt:
        return 0


def watch(url: str, pid: int | None) -> int:
    """Poll five times a second and print what changes; with a `pid`, return the exit status when it is decided."""
    started, last = time.monotonic(), ""
    while True:
        status = health(url)
        if status != last:
            print(f"{time.monotonic() - started:6.1f} s  {status}", flush=True)
            last = status
        if pid is not None:
            if status in ("READY", "BUSY"):
                return 0
            if status in ("SETUP_FAILED", "DEFUNCT") or not alive(pid):
                return 1
        time.sleep(0.2)
