"""The check against published results: what counts as the same, and what the program prints and returns."""

import os
import shutil
from pathlib import Path

import pytest

from benchmarks.harness import ROOT
from blip.commands.verify import CHECKPOINTS, Case, Checkpoint, agree, made, main, verify
from blip.weights.bundle import open_bundle
from blip.weights.sources import find
from tests.deploy.refusing import refusing_port
from tests.peers import FileServer
from tests.weights.hf_oracle import Oracle

MATCH = "The image and text are matched with a probability of {}%.\nThe image feature ... cosine similarity of {}."


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("Answer: singapore", "Answer: singapore", True),
        ("Answer: singapore", "Answer: Singapore", False),
        (MATCH.format("99.7700", "0.5178"), MATCH.format("98.7800", "0.5270"), True),
        (MATCH.format("99.7700", "0.5178"), MATCH.format("98.7600", "0.5178"), False),
        (MATCH.format("99.7700", "0.5178"), MATCH.format("99.7700", "0.5290"), False),
        (MATCH.format("99.7700", "0.5178"), "Answer: 99.7700", False),
    ],
)
def test_texts_must_be_equal_and_scores_close(expected: str, got: str, same: bool) -> None:
    assert agree(expected, got) is same


def test_a_difference_is_shown_side_by_side_and_fails(
    files: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "weights" / "demo", tmp_path / "pretrained")
    image = f"{files.url}/pair.jpg"
    caption = Case(image, "image_captioning", "Caption: a large red circle to the left of a small blue square")
    answer = Case(image, "visual_question_answering", "Answer: 3", question="how many objects are there?")
    environment = {**os.environ, "BLIP_CACHE": str(tmp_path), "BLIP_DEVICE": "cpu"}
    assert verify([caption], environment) == 0
    assert verify([caption, answer], environment) == 1
    output = capsys.readouterr().out
    assert "ok: image_captioning, pair.jpg" in output
    assert "DIFFERENT: visual_question_answering, pair.jpg" in output
    assert "    expected  Answer: 3\n    got       Answer: 2\n" in output


def test_another_checkpoint_is_made_with_its_settings_and_compared(
    files: FileServer, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption", end=1.0)
    checkpoint = Checkpoint("caption", str(directory), (), ("caption.num_beams=2",))
    environment = {**os.environ, "BLIP_CACHE": str(tmp_path / "cache"), "BLIP_DEVICE": "cpu"}
    (path,) = {made(checkpoint, environment) for _ in range(2)}
    assert open_bundle(Path(path)).changes == ["caption.num_beams=2"]
    case = Case(f"{files.url}/pair.jpg", "image_captioning", "Caption: something else")
    assert verify([case], environment, checkpoint) == 1
    assert "DIFFERENT: image_captioning, pair.jpg" in capsys.readouterr().out


def test_what_is_published_can_be_asked_of_its_checkpoint() -> None:
    for checkpoint in CHECKPOINTS.values():
        find(checkpoint.task, checkpoint.source)
        assert checkpoint.cases
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])


def test_a_checkpoint_that_is_not_known_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["huge"]) == 1
    assert capsys.readouterr().err.startswith("verify_pretrained: huge is not known; choose of large_coco, large, ")


def test_without_a_network_it_says_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}/merlion.png"
        assert verify([Case(url, "image_captioning", "")], os.environ) == 1
    problem = f"verify_pretrained: {url} cannot be fetched (ConnectionError); check the network.\n"
    assert capsys.readouterr().err == problem


def test_a_wrong_setting_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([], {"BLIP_DEVICE": "abacus"}) == 1
    problem = "verify_pretrained: BLIP_DEVICE=abacus is not known; set it to auto, cpu or cuda.\n"
    assert capsys.readouterr().err == problem


def test_help_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: verify_pretrained [-h] [NAME ...]\n")
