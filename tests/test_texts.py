"""Long texts are cut; those that a model can use stay as they are."""

from pathlib import Path

import pytest

from benchmarks.random_blip import tokenizer
from blip.lavis import import_lavis
from blip.texts import MAX_CHARACTERS, MAX_MARKS, cut


@pytest.mark.parametrize(
    "text",
    ["", "what is red?", "Où est le café? 日本語 ☃", "a\u0301\u0323" * 100, "e" + "\u0301" * MAX_MARKS, "w " * 5000],
)
def test_a_text_that_fits_stays_as_it_is(text: str) -> None:
    assert cut(text) == text


def test_what_is_beyond_the_length_is_cut_off() -> None:
    assert cut("ab" * MAX_CHARACTERS) == "ab" * (MAX_CHARACTERS // 2)


def test_marks_in_a_row_are_cut_and_what_follows_them_stays() -> None:
    assert cut("a" + "\u0301" * 5000 + "b\u0323") == "a" + "\u0301" * MAX_MARKS + "b\u0323"


def test_marks_that_are_cut_change_no_token(tmp_path: Path) -> None:
    words, process = tokenizer(tmp_path), import_lavis().blip_processors.BlipQuestionProcessor()
    text = "what colour is the re" + "\u0301\u0323" * 40 + "d dog"
    assert cut(text) != text
    assert words(process(cut(text))).input_ids == words(process(text)).input_ids
