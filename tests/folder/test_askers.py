"""How many pictures a server is asked about at a time."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT
from blip.config import Settings
from blip.folder import askers
from blip.folder.askers import AT_A_TIME, NoServerError, Remote
from blip.folder.questions import Question
from tests.deploy.refusing import refusing_port


def test_a_server_runs_a_whole_batch_while_more_wait_and_has_slots_left() -> None:
    slots = yaml.safe_load((ROOT / "cog.yaml").read_text())["concurrency"]["max"]
    assert Settings.from_environment({}).max_batch < AT_A_TIME < slots


def answers_of_nobody(pictures: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[object]]:
    """The address of a server that is down, and what comes of asking it about pictures."""
    monkeypatch.setattr(askers, "PATIENCE", 2.0)

    async def ask() -> list[object]:
        asker = Remote([url], {})
        try:
            asking = [asker.ask(picture, Question("image_captioning")) for picture in pictures]
            return list(await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), DEADLINE))
        finally:
            asker.close()

    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}"
        return url, asyncio.run(ask())


def test_where_no_server_answers_every_picture_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [EXAMPLES / "pair.jpg"] * 3 * AT_A_TIME
    url, found = answers_of_nobody(pictures, monkeypatch)
    sentence = f"No server has answered for 2 s; {url} last: no server answered (ConnectionError)."
    assert [(type(error), str(error)) for error in found] == [(NoServerError, sentence)] * len(pictures)


def test_a_picture_that_cannot_be_read_says_nothing_about_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [EXAMPLES / "pair.jpg", *[Path("/none.jpg")] * AT_A_TIME]
    _, found = answers_of_nobody(pictures, monkeypatch)
    assert isinstance(found[0], NoServerError)
    assert [str(error) for error in found[1:]] == ["No such file or directory"] * AT_A_TIME
