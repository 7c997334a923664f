"""Nothing is asked of the network when a bundle is there."""

import subprocess
import sys

from benchmarks.harness import EXAMPLES, ROOT


def test_setup_and_every_task_work_with_the_network_cut_off() -> None:
    program = ["-m", "tests.programs.predict_offline", str(EXAMPLES / "pair.jpg")]
    ended = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, *program],
        cwd=ROOT,
        env={"BLIP_WEIGHTS": "demo", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Caption: a large red circle to the left of a small blue square\nAnswer: 2\n" in ended.stdout
