"""Training from drawn scenes to a bundle, for two steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import DEADLINE, ROOT
from blip.weights.bundle import FILES, open_bundle
from blip.weights.load import load_models
from demo.evaluate import evaluate, report


def train(out: Path) -> Path:
    """Train in a process of its own: it forks, which a process with threads should not."""
    command = [sys.executable, "-m", "tests.demo.two_steps", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "drew 128 scenes" in ended.stdout
    assert "step 2/2" in ended.stdout
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "demo")


@pytest.mark.slow
def test_two_steps_make_a_bundle_that_can_be_evaluated(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = open_bundle(trained)
    bundle.verify()
    assert bundle.note == "Trained on drawn scenes by scripts/train_demo --seed 0 --steps 2."
    models = load_models(bundle, torch.device("cpu"), "float32")
    report(evaluate(models, ["test-0", "test-1"]))
    table = capsys.readouterr().out.splitlines()
    rows = {name.strip(): int(of) for _, name, _, of, _, _ in (line.split("|") for line in table[2:])}
    assert (rows["captions"], rows["match, all"], rows["cosine, true above false caption"]) == (2, 8, 2)
    assert rows["answers, yes-no"] == 2


@pytest.mark.slow
def test_the_same_seed_and_steps_give_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    again = train(tmp_path / "again")
    assert [name for name in FILES if (trained / name).read_bytes() != (again / name).read_bytes()] == []
