"""The documents say what is so: of predict(), the settings, the lock, the files, the messages."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Optional, Union, get_args, get_origin

import pytest
import yaml

from benchmarks import plots
from benchmarks.harness import ROOT
from blip.config import HIDDEN, SHOWN, Limits, Settings
from predict import Predictor, StreamingPredictor
from tests.documents import DOCUMENTS

API = (ROOT / "docs" / "api.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
OPERATING = (ROOT / "docs" / "operating.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
COG = yaml.safe_load((ROOT / "cog.yaml").read_text())
SHELLS = ("Argument list too long",)  # said by the shell, not by us
LOCK = (ROOT / "requirements.txt").read_text()


def rows(document: str, first_column: str) -> list[list[str]]:
    """The cells of the document's table whose heading begins with `first_column`."""
    table = re.search(rf"^\| {first_column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", document, re.MULTILINE)
    assert table, f"there is no table of {first_column}s"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


@pytest.mark.parametrize("predictor", [Predictor, StreamingPredictor])
def test_the_table_of_inputs_is_what_predict_takes(predictor: type[Predictor]) -> None:
    parameters = list(inspect.signature(predictor.predict).parameters.values())[1:]
    table = rows(API, "input")
    assert [row[0] for row in table] == [f"`{parameter.name}`" for parameter in parameters]
    for parameter, (_, kind, default, description) in zip(parameters, table, strict=True):
        field = parameter.default
        assert field.description == description
        if field.json_schema_extra:
            assert re.findall("`(.*?)`", kind) == field.json_schema_extra["enum"]
            assert default == f"`{field.default}`"
        elif field.is_required():
            assert default == "required"
        else:
            assert default == "none"
            assert get_origin(parameter.annotation) is Union
            assert parameter.annotation == Optional[get_args(parameter.annotation)[0]]


def test_the_table_of_settings_has_every_variable_and_its_default() -> None:
    defaults = {name.strip("`"): default for name, default, _ in rows(OPERATING, "variable")}
    settings = Settings.from_environment({})
    assert defaults["BLIP_WEIGHTS"].startswith(f"`{settings.weights}`")
    assert defaults["BLIP_DEVICE"] == f"`{settings.device}`"
    assert Path(defaults["BLIP_CACHE"].strip("`")).expanduser() == settings.cache
    assert defaults["COG_MAX_CONCURRENCY"] == f"`{COG['concurrency']['max']}`"
    assert defaults["COG_PREDICT_TYPE_STUB"] == f"`{COG['predict']}`"
    assert defaults["BLIP_MAX_BATCH"] == f"`{settings.max_batch}`"
    limits = Limits.from_environment({})
    assert defaults["BLIP_MAX_IMAGE_BYTES"] == f"`{limits.max_image_bytes}`"
    assert defaults["BLIP_EGRESS"].startswith(f"`{limits.egress}`")
    sources = ROOT.glob("blip/**/*.py")
    named = {name for path in sources for name in re.findall(r"BLIP_[A-Z_]*[A-Z]", path.read_text())}
    assert named == {name for name in defaults if name.startswith("BLIP_")}
    assert {*SHOWN, *HIDDEN} == set(defaults)


def test_the_versions_are_those_of_the_lock() -> None:
    assert f"Python {COG['build']['python_version']}" in ARCHITECTURE
    for name in ("cog", "salesforce-lavis", "torch", "torchvision", "transformers"):
        version = re.search(rf"^{name}==(\S+)", LOCK, re.MULTILINE)
        assert version
        assert f"{name} {version[1]}" in ARCHITECTURE
    assert COG["build"]["python_requirements"] == "requirements.txt"


def test_every_direct_dependency_is_in_the_lock_with_hashes() -> None:
    for line in (ROOT / "requirements.in").read_text().splitlines():
        requirement = line.split("#")[0].strip()
        if requirement:
            pinned = requirement if "==" in requirement else f"{requirement}=="
            assert re.search(rf"^{re.escape(pinned)}.*\\\n +--hash=sha256:", LOCK, re.MULTILINE), requirement


def paths_in(text: str) -> set[str]:
    """What looks like a path of this repository between back quotes."""
    return {name.rstrip("/") for name in re.findall(r"`([\w./]+)`", text)}


def test_every_file_that_is_mapped_exists_and_every_script_is_mapped() -> None:
    mapped = paths_in(ARCHITECTURE.split("## Files")[1])
    assert [name for name in mapped if not (ROOT / name).exists()] == []
    assert {f"scripts/{path.name}" for path in ROOT.glob("scripts/*")} - {"scripts/run"} <= mapped


def test_the_architecture_has_every_room_and_only_what_exists() -> None:
    rooms = paths_in(ARCHITECTURE.split("## The way")[0])
    assert [name for name in rooms if "/" in name and not (ROOT / name).exists()] == []
    modules = {f"blip/{path.name}" for path in (ROOT / "blip").iterdir() if path.name[0] not in "_."}
    assert modules <= rooms


def test_every_class_that_extends_cog_is_in_the_architecture_and_exists() -> None:
    text = ARCHITECTURE.split("## How Cog is extended")[1].split("\n## ")[0]
    named = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)[1:]
    for module, name in (part.strip("`").split(".") for cell in named for part in cell.split(", ") if "." in part):
        assert hasattr(importlib.import_module(f"blip.server.{module}"), name)


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in (link for link in links if not link.startswith(("http://", "https://"))):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def sentences() -> set[str]:
    """Every string of the programs, with an ellipsis where something is filled in."""
    found = set()
    for path in ROOT.glob("blip/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found | {path.read_text(errors="ignore") for path in ROOT.glob("scripts/*")}


def test_the_messages_of_troubleshooting_are_those_that_people_see() -> None:
    said = sentences()
    messages = [message for cell, _ in rows_of_all(TROUBLESHOOTING) for message in re.findall("`(.*?)`", cell)]
    assert len(messages) >= 25
    for message in messages:
        parts = [part.strip() for part in re.split("…|; ", message) if len(part.strip()) > 3]  # with what is filled in
        assert message in SHELLS or all(any(part in sentence for sentence in said) for part in parts), message


def rows_of_all(document: str) -> list[list[str]]:
    """The cells of all rows of all tables but their headings."""
    lines = re.findall(r"^\|(.*)\|$", document, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines if "`" in line.split(" | ")[0]]


def test_the_plots_are_drawn_from_the_results_that_are_kept(tmp_path: Path) -> None:
    plots.main([str(tmp_path)])
    for drawn in tmp_path.iterdir():
        texts = re.findall(r"<text .*?>(.*?)</text>", drawn.read_text())
        assert len(texts) > 10
        assert texts == re.findall(r"<text .*?>(.*?)</text>", (ROOT / "docs" / drawn.name).read_text())
