"""`from blip import Blip`: the tasks for programs, installed as a package too."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, wait_until
from blip import Blip, Match, UserError

PAIR = EXAMPLES / "pair.jpg"
CAPTION = "a large red circle to the left of a small blue square"
PROGRAM = f"""
from blip import Blip
with Blip({str(ROOT / "weights" / "demo")!r}, device="cpu") as blip:
    print(blip.caption({str(PAIR)!r}))
"""


def test_the_three_tasks_answer_programs() -> None:
    with Blip("demo", device="cpu") as blip:
        assert blip.caption(PAIR) == CAPTION
        assert blip.answer(str(PAIR), "what color is the circle?") == "red"
        found = blip.match(PAIR, "a red circle")
        assert isinstance(found, Match)
        assert (found.probability, found.similarity) == pytest.approx((0.9936706, 0.1592902), abs=1e-5)
        with ThreadPoolExecutor(8) as threads:  # as one batch, or several
            assert list(threads.map(blip.caption, [PAIR] * 20)) == [CAPTION] * 20
        with pytest.raises(UserError, match=r"^image is not a picture"):
            blip.caption(ROOT / "README.md")
        with pytest.raises(UserError, match=r"^question is required"):
            blip.answer(PAIR, " ")


def test_a_close_ends_all_and_leaves_nobody_waiting() -> None:
    before = set(threading.enumerate())
    blip = Blip("demo", device="cpu")
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(blip.caption, PAIR) for _ in range(200)]
        blip.close()
        blip.close()
        for one in asked:
            if error := one.exception(DEADLINE):
                assert isinstance(error, RuntimeError)
            else:
                assert one.result() == CAPTION
    with pytest.raises(RuntimeError, match=r"^This Blip is closed; make a new one\.$"):
        blip.caption(PAIR)
    wait_until(lambda: {thread.name for thread in set(threading.enumerate()) - before} <= {"asyncio_0"}, "its threads")


def test_other_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path))
    (tmp_path / "pretrained").mkdir()
    with pytest.raises(UserError, match=rf"^There is no weights bundle at {tmp_path}/pretrained: "):
        Blip(device="cpu")


def test_what_cannot_be_used_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^BLIP_DEVICE=tpu is not known; set it to auto, cpu or cuda\.$"):
        Blip("demo", device="tpu")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, blip; print(blip.__version__, 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split()[1] == "False"
    with pytest.raises(ImportError, match="cannot import name 'Blib' from 'blip'"):
        from blip import Blib  # noqa: F401


@pytest.mark.slow
def test_it_is_installed_by_pip_and_prints_only_what_the_program_does(tmp_path: Path) -> None:
    """Without the packages that it needs, which are this environment's; building takes setuptools from the index."""
    source, site = tmp_path / "source", tmp_path / "site"  # building leaves files in the source
    shutil.copytree(ROOT / "blip", source / "blip", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.in", "README.md"):
        shutil.copy(ROOT / name, source)
    install: list[str | Path] = [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--target", site, source]
    subprocess.run(install, check=True, timeout=DEADLINE)
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    )
    assert ended.stdout == f"{CAPTION}\n"
    assert (site / "blip" / "server" / "page.html").exists()
