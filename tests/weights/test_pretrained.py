"""Upstream's checkpoints become a bundle: exactly the needed weights, whatever happens on the way."""

import contextlib
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import ROOT
from benchmarks.parity import logits
from benchmarks.small_upstream import NAMES, upstream, write_upstream
from blip import lavis
from blip.engine import Search
from blip.errors import BundleError
from blip.lavis import fill
from blip.weights import download
from blip.weights.bundle import TASKS, BundleWriter, digest, open_bundle
from blip.weights.load import load_models, load_tokenizer
from blip.weights.making import DTYPES
from blip.weights.pretrained import Upstream, build, ensure, published
from tests.weights.forks import forked
from tests.weights.small_upstream import Mirror


@dataclass
class Published:
    """Small checkpoints, the mirror that serves them, and the weights that a bundle of them must hold."""

    directory: Path
    mirror: Mirror
    needed: dict[str, dict[str, Tensor]]

    @property
    def upstream(self) -> Upstream:
        return upstream(self.directory, self.mirror.url)

    def assert_bundle(self, path: Path, dtype: str = "float16") -> None:
        """The bundle at `path` is whole, verified and right, and alone but for the lock."""
        bundle = open_bundle(path)
        bundle.verify()
        assert (bundle.name, bundle.dtype) == ("pretrained", dtype)
        for task, needed in self.needed.items():
            tensors = bundle.tensors(task)
            assert tensors.keys() == needed.keys()
            assert all(torch.equal(tensors[name], needed[name].to(DTYPES[dtype])) for name in needed)
        assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.0)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Published]:
    directory = tmp_path / "published"
    needed = write_upstream(directory)
    mirror = Mirror(directory)
    yield Published(directory, mirror, needed)
    mirror.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "pretrained"


def change(small: Published, task: str, edit: Any) -> Path:
    """Apply `edit` to the state dict of a published checkpoint."""
    path = small.directory / NAMES[task]
    content = torch.load(path)
    edit(content["model"])
    torch.save(content, path)
    return path


def write_empty_bundle(path: Path, name: str) -> None:
    with BundleWriter(path, name=name, dtype="float32", source="", note="") as writer:
        writer.vocabulary(["[PAD]"])
        for task in TASKS:
            writer.model(task, {}, {"weight": torch.zeros(1)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bundle_has_exactly_the_parameters_of_the_models(small: Published, out: Path, dtype: str) -> None:
    build(small.upstream, out, dtype, print)
    small.assert_bundle(out, dtype)
    loaded = load_models(open_bundle(out), torch.device("cpu"), "float32")
    assert loaded["caption"].search == Search(num_beams=3, min_length=1, max_length=10)


@pytest.mark.parametrize("task", NAMES)
def test_the_logits_are_those_of_lavis_with_its_own_loader(
    small: Published, out: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    build(small.upstream, out, "float32", print)
    bundle = open_bundle(out)
    config = bundle.config(task)
    ours = lavis.build(task, config, load_tokenizer(bundle, task))
    fill(ours, bundle.tensors(task), torch.device("cpu"), torch.float32, where=task)
    monkeypatch.setattr(lavis, "_MetaParameters", contextlib.nullcontext)
    stock = lavis.build(task, config, load_tokenizer(bundle, task))
    stock.load_checkpoint(str(small.directory / NAMES[task]))
    found, expected = (logits(task, net.eval(), config["image_size"]) for net in (ours, stock))
    assert torch.equal(found, expected)
    assert expected.std() > 0


def test_the_manifest_records_the_sha256_of_every_source(small: Published, out: Path) -> None:
    build(small.upstream, out, "float16", print)
    source = open_bundle(out).source
    for name in NAMES.values():
        path = small.directory / name
        assert f"{name} {path.stat().st_size} bytes sha256:{digest(path)}" in source


def test_downloaded_files_are_used_where_they_are_and_left_there(small: Published, out: Path) -> None:
    before = sorted(small.directory.iterdir())
    build(small.upstream, out, "float16", print, source=small.directory)
    small.assert_bundle(out)
    assert not small.mirror.requests
    assert sorted(small.directory.iterdir()) == before


def test_a_vocabulary_that_was_not_downloaded_with_the_rest_is_fetched(
    small: Published, out: Path, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "hub" / "checkpoints"
    shutil.copytree(small.directory, checkpoints)
    (checkpoints / "vocab.txt").unlink()
    build(small.upstream, out, "float16", print, source=checkpoints)
    small.assert_bundle(out)
    assert list(small.mirror.requests) == ["vocab.txt"]


def test_downloads_are_kept_when_asked(small: Published, out: Path) -> None:
    build(small.upstream, out, "float16", print, keep=True)
    kept = out.parent / "blip-downloads"
    assert sorted(path.name for path in kept.iterdir()) == sorted(["vocab.txt", *NAMES.values()])


def test_files_that_are_given_are_left_also_where_downloads_would_lie(small: Published, out: Path) -> None:
    given = out.parent / "blip-downloads"
    shutil.copytree(small.directory, given)
    before = sorted(given.iterdir())
    build(small.upstream, out, "float16", print, source=given)
    assert sorted(given.iterdir()) == before


def test_a_finished_bundle_is_verified_and_not_built_again(small: Published, out: Path) -> None:
    build(small.upstream, out, "float16", print)
    created = out.stat().st_ino
    small.mirror.requests.clear()
    build(small.upstream, out, "float16", print)
    assert out.stat().st_ino == created
    assert not small.mirror.requests


def test_a_damaged_bundle_and_one_of_another_dtype_are_replaced(small: Published, out: Path) -> None:
    build(small.upstream, out, "float32", print)
    build(small.upstream, out, "float16", print)
    small.assert_bundle(out)
    weights = out / "match" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    lines: list[str] = []
    build(small.upstream, out, "float16", lines.append)
    small.assert_bundle(out)
    assert f"{weights} was altered" in lines[0]


def test_another_bundle_or_directory_in_the_way_is_not_touched(small: Published, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(BundleError, match="exists and is not a weights bundle"):
        build(small.upstream, out, "float16", print)
    assert (out / "thesis.txt").read_text() == "precious"
    write_empty_bundle(out.parent / "demo", "demo")
    with pytest.raises(BundleError, match="holds the bundle 'demo'"):
        build(small.upstream, out.parent / "demo", "float16", print)
    assert not small.mirror.requests


def test_the_faults_of_a_network_are_survived(small: Published, out: Path) -> None:
    small.mirror.faults["vocab.txt"] = [503]
    small.mirror.faults[NAMES["caption"]] = ["drop", "drop"]
    small.mirror.faults[NAMES["answer"]] = ["short", 500]
    small.mirror.faults[NAMES["match"]] = ["wrong"]
    build(small.upstream, out, "float16", print)
    small.assert_bundle(out)


def test_a_byte_that_changed_on_the_way_is_noticed_and_fetched_again(small: Published, out: Path) -> None:
    small.mirror.hashes = False
    small.mirror.faults[NAMES["match"]] = ["wrong"]
    with pytest.raises(BundleError, match=r"small_retrieval\.pth is not a readable PyTorch checkpoint"):
        build(small.upstream, out, "float16", print)
    assert not out.exists()
    build(small.upstream, out, "float16", print)
    small.assert_bundle(out)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda state: state.pop("visual_encoder.cls_token"), "lacks the weight visual_encoder.cls_token"),
        (
            lambda state: state.update({"visual_encoder.cls_token": torch.zeros(1, 1, 31)}),
            r"visual_encoder.cls_token with shape \[1, 1, 31\] instead of \[1, 1, 32\]",
        ),
        (
            lambda state: state.update({"text_decoder.cls.predictions.decoder.weight": torch.zeros(12, 32)}),
            "different values for text_decoder.bert.embeddings.word_embeddings.weight and "
            "text_decoder.cls.predictions.decoder.weight",
        ),
        (lambda state: state["visual_encoder.cls_token"].fill_(float("nan")), "visual_encoder.cls_token that"),
        (
            lambda state: state["visual_encoder.cls_token"].fill_(1e6),
            "visual_encoder.cls_token too large for float16; use float32",
        ),
        (lambda state: state.clear(), "lacks the weight"),
    ],
    ids=["missing", "misshapen", "untied", "not a number", "too large", "empty"],
)
def test_a_checkpoint_with_other_weights_is_refused_by_file_and_key(
    small: Published, out: Path, edit: Any, sentence: str
) -> None:
    path = change(small, "caption", edit)
    with pytest.raises(BundleError, match=f"{path} .*{sentence}"):
        build(small.upstream, out, "float16", print, source=small.directory)
    assert sorted(entry.name for entry in out.parent.iterdir()) == []
    assert path.exists()


def test_a_tied_weight_may_be_saved_under_either_name(small: Published, out: Path) -> None:
    change(small, "caption", lambda state: state.pop("text_decoder.bert.embeddings.word_embeddings.weight"))
    build(small.upstream, out, "float16", print, source=small.directory)
    small.assert_bundle(out)


def test_checkpoints_in_each_others_place_are_refused(small: Published, out: Path) -> None:
    swapped = small.upstream
    checkpoints = {**swapped.checkpoints, "answer": swapped.checkpoints["match"]}
    with pytest.raises(BundleError, match=r"small_retrieval\.pth lacks the weight text_decoder"):
        build(replace(swapped, checkpoints=checkpoints), out, "float16", print, source=small.directory)


def test_a_missing_or_short_file_given_with_from_is_named(small: Published, out: Path) -> None:
    expected = small.upstream
    path = small.directory / NAMES["answer"]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"{path} has {size - 1} bytes instead of {size}"):
        build(expected, out, "float16", print, source=small.directory)
    path.unlink()
    with pytest.raises(BundleError, match=rf"{path} is missing; download it from http"):
        build(expected, out, "float16", print, source=small.directory)
    assert not out.exists()


def test_too_little_disk_is_said_before_the_checkpoints_are_downloaded(
    small: Published, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(BundleError, match=rf"{out.parent} has 0\.00 GB free and the bundle with its downloads needs"):
        build(small.upstream, out, "float16", print)
    assert list(small.mirror.requests) == ["vocab.txt"]


@pytest.mark.parametrize("downloaded", [False, True], ids=["while downloading", "while writing"])
def test_a_disk_that_fills_up_ends_in_one_sentence_and_can_be_continued(
    small: Published, out: Path, downloaded: bool
) -> None:
    source = small.directory if downloaded else None
    weights = sum(tensor.nbytes for tensor in small.needed["answer"].values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights // 2, hard))  # as a full disk, for every larger file
    try:
        with pytest.raises(BundleError, match=r"cannot be written.*make room"):
            build(small.upstream, out, "float32", print, source=source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    build(small.upstream, out, "float32", print, source=source)
    small.assert_bundle(out, "float32")


def test_a_directory_that_cannot_be_made_is_named(small: Published, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match=rf"{tmp_path / 'file'} cannot be written"):
        build(small.upstream, tmp_path / "file" / "pretrained", "float16", print)


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_and_started_again_it_ends_in_a_right_bundle(small: Published, out: Path, kills: int) -> None:
    small.mirror.delay = 0.005
    started = time.monotonic()
    build(small.upstream, out, "float16", print)
    duration = time.monotonic() - started
    chance = random.Random(kills)
    states = []
    for _ in range(kills):
        process = forked(lambda: build(small.upstream, out, "float16", lambda _: None))
        process.join(chance.uniform(0, duration))
        process.kill()
        process.join()
        states.append(sorted(str(path.relative_to(out.parent)) for path in out.parent.rglob("*")))
        if out.exists():
            build(small.upstream, out, "float16", print)
            small.assert_bundle(out)
            shutil.rmtree(out.parent)
    print(f"{kills} kills, {len({str(state) for state in states})} different states left")
    build(small.upstream, out, "float16", print)
    small.assert_bundle(out)


def test_two_at_once_build_one_bundle_and_download_once(small: Published, out: Path) -> None:
    small.mirror.delay = 0.005
    processes = [forked(lambda: build(small.upstream, out, "float16", lambda _: None)) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    small.assert_bundle(out)
    assert small.mirror.requests == dict.fromkeys(["vocab.txt", *NAMES.values()], 1)


def test_an_existing_bundle_is_used_as_it_is_without_a_request(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP_MIRROR", "http://127.0.0.1:9")
    write_empty_bundle(out, "pretrained")
    ensure(out, "float16", pytest.fail)


def test_the_published_files_are_those_of_lavis_or_of_a_mirror(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BLIP_MIRROR", raising=False)
    found = published()
    google = "https://storage.googleapis.com/sfr-vision-language-research"
    assert {task: file.url for task, file in found.checkpoints.items()} == {
        "caption": f"{google}/LAVIS/models/BLIP/blip_coco_caption_base.pth",
        "answer": f"{google}/BLIP/models/model_base_vqa_capfilt_large.pth",
        "match": f"{google}/BLIP/models/model_base_retrieval_coco.pth",
    }
    assert {task: config["image_size"] for task, config in found.configs.items()} == {
        "caption": 384,
        "answer": 480,
        "match": 384,
    }
    assert found.configs["caption"]["prompt"] == "a picture of "
    monkeypatch.setenv("BLIP_MIRROR", "http://mirror.test/blip/")
    assert published().checkpoints["match"].url == "http://mirror.test/blip/model_base_retrieval_coco.pth"
    assert published().vocabulary.url == "http://mirror.test/blip/vocab.txt"


def test_the_program_says_one_sentence_and_fails_where_there_is_no_network(tmp_path: Path) -> None:
    ended = subprocess.run(
        [ROOT / "scripts" / "download_models", "--out", tmp_path / "bundle"],
        env={**os.environ, "BLIP_MIRROR": "ftp://localhost"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("download_models: ftp://localhost/vocab.txt cannot be downloaded")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "bundle").exists()
