"""The bundle on disk: what is written is what is read, and nothing else is accepted."""

import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from blip.errors import BundleError
from blip.weights.bundle import (
    FILES,
    MANIFEST,
    TASKS,
    WEIGHTS,
    Bundle,
    BundleWriter,
    open_bundle,
    read_manifest,
    remove_leftovers,
)
from blip.weights.exchange import exchange
from tests.weights.forks import forked

TENSORS = {"layer.weight": torch.arange(200.0).reshape(10, 20), "layer.bias": torch.ones(10)}


def write(path: Path, name: str = "small") -> None:
    with BundleWriter(path, name=name, dtype="float32", source="the tests", note="Small.") as writer:
        writer.vocabulary(["[PAD]", "naïve", "\u2028"])
        for task in TASKS:
            writer.model(task, {"image_size": 16}, TENSORS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_what_was_written_is_read_back(path: Path) -> None:
    bundle = open_bundle(path)
    bundle.verify()
    assert (bundle.name, bundle.dtype, bundle.source, bundle.note) == ("small", "float32", "the tests", "Small.")
    assert (path / "vocab.txt").read_text().split("\n") == ["[PAD]", "naïve", "\u2028", ""]
    assert bundle.config("match") == {"image_size": 16}
    tensors = bundle.tensors("answer")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no weights bundle at .*manifest\.json is missing"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_short_file_is_named_at_once(path: Path, name: str) -> None:
    file = path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"{file} has {file.stat().st_size} bytes"):
        open_bundle(path)
    file.unlink()
    with pytest.raises(BundleError, match=rf"{file} is missing"):
        open_bundle(path)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_named_when_the_bundle_is_verified(path: Path, name: str) -> None:
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{path / name} was altered"):
        open_bundle(path).verify()


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    edit(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_a_newer_format_is_refused_with_both_numbers(path: Path) -> None:
    edit_manifest(path, lambda manifest: manifest.update(format=3))
    with pytest.raises(BundleError, match="bundle format 3 and this release reads format 2; update the software"):
        open_bundle(path)


def test_a_bundle_of_the_first_format_is_read_and_has_every_task(path: Path) -> None:
    edit_manifest(path, lambda manifest: manifest.update(format=1))
    assert open_bundle(path).tasks == TASKS
    edit_manifest(path, lambda manifest: manifest["files"].pop("answer/config.json"))
    with pytest.raises(BundleError, match=rf"{path / MANIFEST} is incomplete .*answer/config\.json"):
        open_bundle(path)


@pytest.mark.parametrize("tasks", [("caption",), ("answer", "match")])
def test_a_bundle_may_have_one_task_or_two(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    with BundleWriter(tmp_path / "some", name="some", dtype="float32", source="", note="") as writer:
        writer.vocabulary(["[PAD]"])
        for task in tasks:
            writer.model(task, {}, TENSORS)
        writer.vocabulary(["[PAD]", "dog"], tasks[-1])
    bundle = open_bundle(tmp_path / "some")
    bundle.verify()
    assert bundle.tasks == tasks
    assert bundle.vocabulary(tasks[-1]).read_text() == "[PAD]\ndog\n"
    assert bundle.vocabulary(tasks[0]).parent.name == (tasks[0] if len(tasks) == 1 else "some")


@pytest.mark.parametrize(
    "name", ["../secret", "caption/../../secret", "/etc/passwd", "caption/other", "more/config.json"]
)
def test_a_manifest_that_names_other_files_is_refused(path: Path, name: str) -> None:
    edit_manifest(path, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": ""}}))
    with pytest.raises(BundleError, match=rf"incomplete .*it names {name}, which no bundle has"):
        open_bundle(path)


def test_every_difference_is_named(path: Path) -> None:
    (path / "caption" / "config.json").unlink()
    short = path / "match" / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    content = bytearray((path / "vocab.txt").read_bytes())
    content[0] ^= 1
    (path / "vocab.txt").write_bytes(content)
    (path / "caption" / "more.txt").write_text("?")
    bundle = read_manifest(path)
    found = [*bundle.missing(), *bundle.altered(), *bundle.unknown()]
    assert [line.partition(" ")[0].removeprefix(f"{path}/") for line in found] == [
        "caption/config.json",
        "match/model.safetensors",
        "vocab.txt",
        "caption/more.txt",
    ]


@pytest.mark.parametrize("key", ["name", "dtype", "source", "note", "files"])
def test_a_manifest_without_a_field_is_refused(path: Path, key: str) -> None:
    edit_manifest(path, lambda manifest: manifest.pop(key))
    with pytest.raises(BundleError, match=rf"{path / MANIFEST} is incomplete .*{key}"):
        open_bundle(path)


ODD: tuple[Any, ...] = (
    None,
    True,
    7,
    1.5,
    "",
    "x",
    "\ud800",
    [],
    [1],
    [None],
    {},
    {"caption": 1},
    {"x": {"size": "1"}},
)


@pytest.mark.parametrize("key", ["format", "name", "dtype", "source", "note", "files", "recipe", "changes"])
@pytest.mark.parametrize("value", ODD, ids=ascii)
def test_a_manifest_with_a_value_of_another_kind_is_one_sentence_or_works(path: Path, key: str, value: Any) -> None:
    edit_manifest(path, lambda manifest: manifest.update({key: value}))
    try:
        bundle = open_bundle(path)
    except BundleError as error:
        said = str(error)
        assert said.startswith(f"{path / MANIFEST} ")
        assert "\n" not in said
    else:
        for text in (bundle.name, bundle.source, bundle.note, *bundle.recipe.values(), *bundle.changes):
            text.encode()


@pytest.mark.parametrize(
    "entry", [*ODD, {"size": True, "sha256": ""}, {"size": 1, "sha256": 5}, {"size": 1}], ids=ascii
)
def test_an_entry_of_another_kind_is_one_sentence(path: Path, entry: Any) -> None:
    edit_manifest(path, lambda manifest: manifest["files"].update({"vocab.txt": entry}))
    with pytest.raises(BundleError, match=rf"{path / MANIFEST} is incomplete"):
        open_bundle(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"format": 1, "files": []}', "\udcff"])
def test_a_manifest_that_is_something_else_is_refused(path: Path, content: str) -> None:
    (path / MANIFEST).write_text(content, errors="surrogateescape")
    with pytest.raises(BundleError, match=f"{path / MANIFEST}"):
        open_bundle(path)


def test_weights_that_are_no_safetensors_file_are_named(path: Path) -> None:
    (path / "caption" / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(BundleError, match=r"caption/model\.safetensors is not a readable safetensors file"):
        Bundle(path, "", "", "", "", {}).tensors("caption")


def test_a_writer_that_fails_leaves_the_bundle_that_was_there(path: Path) -> None:
    before = open_bundle(path)
    writer = BundleWriter(path, name="new", dtype="float32", source="", note="")
    with pytest.raises(BundleError, match="is incomplete"), writer:
        writer.vocabulary(["[PAD]"])  # and no models
    assert open_bundle(path) == before
    assert list(path.parent.iterdir()) == [path]


def test_a_new_bundle_replaces_an_old_one_and_an_empty_directory(path: Path) -> None:
    write(path, name="new")
    assert open_bundle(path).name == "new"
    (path.parent / "empty").mkdir()
    write(path.parent / "empty")
    open_bundle(path.parent / "empty").verify()


def test_a_directory_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"precious")
    with pytest.raises(BundleError, match="photos exists and is not a weights bundle"):
        write(tmp_path / "photos")
    assert (tmp_path / "photos" / "1.jpg").read_bytes() == b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]


def test_a_bundle_is_replaced_where_the_disk_cannot_exchange_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip.weights.bundle.exchange", lambda *_: False)
    write(path, name="new")
    assert open_bundle(path).name == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_kill_between_two_renames_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_at(name: str) -> None:
        def work() -> None:
            rename = Path.rename

            def until(self: Path, target: Path) -> Path:
                if Path(target).name == name:
                    os._exit(9)
                return rename(self, target)

            monkeypatch.setattr("blip.weights.bundle.exchange", lambda *_: False)
            monkeypatch.setattr(Path, "rename", until)
            write(path, name="new")

        process = forked(work)
        process.join()
        assert process.exitcode == 9

    killed_at(path.name)
    assert not path.exists()
    remove_leftovers(path)
    open_bundle(path).verify()
    assert open_bundle(path).name == "small"
    assert list(path.parent.iterdir()) == [path]


def test_two_directories_change_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "one", tmp_path / "two"):
        assert [file.name for file in (tmp_path / "one").iterdir()] == ["two"]
        assert [file.name for file in (tmp_path / "two").iterdir()] == ["one"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "three")


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A directory for files of a user who is not allowed everything."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_looked_at() -> None:
    with as_nobody() as folder:
        path = folder / "bundle"
        write(path)
        (path / "caption" / "model.safetensors").chmod(0)
        (path / "match" / "config.json").write_bytes((path / "match" / "config.json").read_bytes().swapcase())
        assert [line.removeprefix(f"{path}/") for line in read_manifest(path).altered()] == [
            "caption/model.safetensors cannot be read (Permission denied)",
            "match/config.json was altered: its SHA-256 is not the one in manifest.json",
        ]
        with pytest.raises(BundleError, match=r"caption/model\.safetensors cannot be read .*; restore the bundle\.$"):
            open_bundle(path).verify()
        (path / "answer").chmod(0)
        missing = [line.removeprefix(f"{path}/") for line in read_manifest(path).missing()]
        assert missing == [f"answer/{name} cannot be read (Permission denied)" for name in ("config.json", WEIGHTS)]
        (path / "answer").chmod(0o700)
        (path / MANIFEST).chmod(0)
        with pytest.raises(BundleError, match=r"manifest\.json cannot be read \(Permission denied\); "):
            open_bundle(path)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else_is(path: Path) -> None:
    killed = BundleWriter(path, name="", dtype="", source="", note="").__enter__()
    killed.vocabulary(["[PAD]"])
    (path.parent / ".bundle.other").mkdir()
    remove_leftovers(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".bundle.other", "bundle"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While it lasts, a write beyond `size` bytes fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with largest_file(500), pytest.raises(BundleError, match=r"model\.safetensors cannot be written .*make room"):
        write(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
