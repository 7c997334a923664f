"""A server whose disk is full: run by test_files.py in a new mount namespace."""

import base64
import contextlib
import os
import subprocess
from pathlib import Path

from benchmarks.harness import EXAMPLES, Peer, Server, data_uri
from benchmarks.processes import opened_by

FULL = "image could not be stored: the server's disk is full; try again later or send a smaller file."


def test_a_full_disk_is_one_sentence_and_takes_nothing_for_good(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(tmp_path)], check=True)
    large = os.urandom(5_000_000)
    with Server({"TMPDIR": str(tmp_path)}) as server, contextlib.closing(Peer()) as peer:
        server.wait_for("READY")
        peer.files["/large"] = large
        for image in (f"data:;base64,{base64.b64encode(large).decode()}", f"{peer.url}/large") * 3:
            assert server.predict(input={"image": image}).json()["error"] == FULL
            good = server.predict(input={"image": data_uri(EXAMPLES / "pair.jpg")}).json()
            assert good["status"] == "succeeded"
        disk = tmp_path.stat().st_dev
        opened = opened_by(server.process.pid).values()
        assert not [file for file in opened if file.st_dev == disk and not file.st_nlink]
        filled = tmp_path / "filled"
        with contextlib.suppress(OSError), filled.open("wb", 0) as file:
            while True:
                file.write(bytes(1 << 12))
        for _ in range(3):
            assert server.predict(input={"image": data_uri(EXAMPLES / "pair.jpg")}).json()["error"] == FULL
        filled.unlink()
        assert server.predict(input={"image": data_uri(EXAMPLES / "pair.jpg")}).json()["status"] == "succeeded"
