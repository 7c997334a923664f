"""The check against published results: what counts as the same, and what the program prints and returns."""

import importlib.machinery
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_upstream import Mirror

ROOT = Path(__file__).resolve().parent.parent
MATCH = "The image and text are matched with a probability of {}%.\nThe image feature ... cosine similarity of {}."


@pytest.fixture
def program() -> ModuleType:
    name = "verify_pretrained"
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    serving = Mirror(ROOT / "examples")
    yield serving
    serving.close()


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
def test_texts_must_be_equal_and_scores_close(program: Any, expected: str, got: str, same: bool) -> None:
    assert program.agree(expected, got) is same


def test_a_difference_is_shown_side_by_side_and_fails(
    program: Any,
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(ROOT / "weights" / "demo", tmp_path / "pretrained")
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("BLIP_DEVICE", "cpu")
    monkeypatch.setenv("BLIP_WEIGHTS", "")
    image = f"{mirror.url}/pair.jpg"
    monkeypatch.setattr(program, "MERLION", image)
    monkeypatch.setattr(program, "DEMO", image)
    cases = (
        program.Case(image, "image_captioning", "Caption: a large red circle to the left of a small blue square"),
        program.Case(image, "visual_question_answering", "Answer: 3", question="how many objects are there?"),
    )
    monkeypatch.setattr(program, "CASES", cases)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 1
    output = capsys.readouterr().out
    assert "ok: image_captioning, pair.jpg" in output
    assert "DIFFERENT: visual_question_answering" in output
    assert "    expected  Answer: 3\n    got       Answer: 2\n" in output


def test_without_a_network_it_says_one_sentence(program: Any, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.close()
    monkeypatch.setattr(program, "MERLION", f"{mirror.url}/merlion.png")
    with pytest.raises(SystemExit, match=r"merlion\.png cannot be fetched \(ConnectionError\); check the network"):
        program.main()
