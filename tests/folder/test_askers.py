"""How many pictures a server is asked about at a time."""

import asyncio
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


def test_where_no_server_answers_every_picture_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askers, "PATIENCE", 2.0)
    pictures = 3 * AT_A_TIME

    async def ask_all() -> list[object]:
        asker = Remote([url], {})
        try:
            asking = [asker.ask(EXAMPLES / "pair.jpg", Question("image_captioning")) for _ in range(pictures)]
            return list(await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), DEADLINE))
        finally:
            asker.close()

    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}"
        found = asyncio.run(ask_all())
    sentence = f"No server has answered for 2 s; {url} last: no server answered (ConnectionError)."
    assert [(type(error), str(error)) for error in found] == [(NoServerError, sentence)] * pictures


def test_a_picture_that_cannot_be_read_says_nothing_about_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askers, "PATIENCE", 2.0)

    async def ask_both() -> list[object]:
        asker = Remote([url], {})
        names = [EXAMPLES / "pair.jpg", *[Path("/none.jpg")] * AT_A_TIME]
        try:
            asking = [asker.ask(name, Question("image_captioning")) for name in names]
            return list(await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), DEADLINE))
        finally:
            asker.close()

    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}"
        found = asyncio.run(ask_both())
    assert isinstance(found[0], NoServerError)
    assert [str(error) for error in found[1:]] == ["No such file or directory"] * AT_A_TIME
