"""The locks have all that is needed, and no more."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, data_uri

LOCK = ROOT / "requirements.txt"
PAIR = data_uri(EXAMPLES / "pair.jpg")
#: Python and whatever it starts see only what is in the lock, as in the image.
ONLY_LOCKED = {"PYTHONPATH": str(ROOT / "tests" / "programs" / "only_locked")}


def packages(path: Path) -> dict[str, str]:
    """The version and the marker of each package of a lock, by its name."""
    return dict(re.findall(r"^([\w.-]+)==(\S+(?: ; [^\\]+)?) \\", path.read_text(), re.MULTILINE))


def test_what_is_not_locked_is_hidden() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import torch; import pytest"], env={**os.environ, **ONLY_LOCKED}, capture_output=True
    )
    assert ended.stderr.endswith(b"No module named 'pytest'\n")


@pytest.mark.parametrize("predictor", ["Predictor", "StreamingPredictor"])
def test_the_server_needs_only_what_is_locked(predictor: str) -> None:
    with Server({**ONLY_LOCKED, "COG_PREDICT_TYPE_STUB": f"predict.py:{predictor}"}) as server:
        server.wait_for("READY")
        for inputs in (
            {},
            {"task": "visual_question_answering", "question": "what color is the circle?"},
            {"task": "image_text_matching", "caption": "a red circle"},
        ):
            assert server.predict(input={"image": PAIR, **inputs}).json()["status"] == "succeeded"
        for path in ("/docs", "/docs/swagger-ui-bundle.js", "/openapi.json", "/metrics", "/readyz"):
            assert requests.get(f"{server.url}{path}", timeout=DEADLINE).status_code == 200, path
        with (EXAMPLES / "pair.jpg").open("rb") as picture:
            uploaded = requests.post(f"{server.url}/predictions", files={"image": picture}, timeout=DEADLINE)
        assert uploaded.json()["status"] == "succeeded"


def test_training_the_demo_needs_only_what_is_locked(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.demo.two_steps", str(tmp_path / "bundle")],
        cwd=ROOT,
        env={**os.environ, **ONLY_LOCKED},
        check=True,
        timeout=DEADLINE,
    )


def test_the_lock_for_cpus_differs_in_pytorch_and_cuda_only() -> None:
    cuda, cpu = packages(LOCK), packages(ROOT / "requirements-cpu.txt")
    assert {name for name in cuda if name.startswith("nvidia-") or name == "triton"} == cuda.keys() - cpu.keys()
    assert cpu.keys() <= cuda.keys()
    assert [name for name in cpu if cpu[name] != cuda[name]] == ["torch"]
    text = (ROOT / "requirements-cpu.txt").read_text()
    assert f"torch=={cuda['torch']}+cpu ; platform_machine == 'x86_64' \\\n    --hash=sha256:" in text
