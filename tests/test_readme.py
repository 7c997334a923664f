"""README, cog.yaml, the lock and predict() say the same."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Optional, Union, get_args, get_origin

import pytest
import yaml

from benchmarks.harness import ROOT
from blip.config import Limits, Settings
from predict import Predictor, StreamingPredictor

README = (ROOT / "README.md").read_text()
COG = yaml.safe_load((ROOT / "cog.yaml").read_text())
LOCK = (ROOT / "requirements.txt").read_text()


def rows(first_column: str) -> list[list[str]]:
    """The cells of the README's table whose heading begins with `first_column`."""
    table = re.search(rf"^\| {first_column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table, f"the README has no table of {first_column}s"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


@pytest.mark.parametrize("predictor", [Predictor, StreamingPredictor])
def test_the_table_of_inputs_is_what_predict_takes(predictor: type[Predictor]) -> None:
    parameters = list(inspect.signature(predictor.predict).parameters.values())[1:]
    table = rows("input")
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
    defaults = {name.strip("`"): default for name, default, _ in rows("variable")}
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


def test_the_versions_are_those_of_the_lock() -> None:
    assert f"Python {COG['build']['python_version']}" in README
    for name in ("cog", "salesforce-lavis", "torch", "torchvision", "transformers"):
        version = re.search(rf"^{name}==(\S+)", LOCK, re.MULTILINE)
        assert version
        assert f"{name} {version[1]}" in README
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
    mapped = paths_in(README.split("## Files")[1].split("## License")[0])
    assert [name for name in mapped if not (ROOT / name).exists()] == []
    assert {f"scripts/{path.name}" for path in ROOT.glob("scripts/*")} - {"scripts/run"} <= mapped


def test_the_architecture_has_every_room_and_only_what_exists() -> None:
    rooms = paths_in((ROOT / "docs" / "architecture.md").read_text().split("## The way")[0])
    assert [name for name in rooms if "/" in name and not (ROOT / name).exists()] == []
    modules = {f"blip/{path.name}" for path in (ROOT / "blip").iterdir() if path.name[0] not in "_."}
    assert modules <= rooms


def test_every_class_that_extends_cog_is_in_the_architecture_and_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("## How Cog is extended")[1]
    named = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)[1:]
    for module, name in (part.strip("`").split(".") for cell in named for part in cell.split(", ") if "." in part):
        assert hasattr(importlib.import_module(f"blip.server.{module}"), name)
