"""A bundle of any BLIP: what LAVIS does with the same checkpoint, settings within the model, nothing half made."""

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import EXAMPLES, ROOT, Server, data_uri
from benchmarks.random_blip import SMALL, SPECIAL, WORDS, normalised, random_blip, random_pixels, tokenizer
from benchmarks.scenes import texts_of
from blip import engine, lavis
from blip.config import DEMO
from blip.errors import BundleError
from blip.weights import download, published
from blip.weights.bundle import BundleWriter, open_bundle
from blip.weights.download import File
from blip.weights.load import load_models
from blip.weights.make import change, make
from blip.weights.sources import Source, find
from tests.engine.test_generate import QUESTIONS, lavis_answers, lavis_captions, lavis_matches
from tests.weights.forks import forked
from tests.weights.hf_oracle import Oracle
from tests.weights.hub import Hub
from tests.weights.small_upstream import Mirror

CPU = torch.device("cpu")
TASKS = ("caption", "answer", "match")
#: Heads of 64, as all published models have: a checkpoint does not tell how many there are. In "large" the image's
#: states are wider than the text's, as in ViT-large beside BERT base.
TEXT = {**SMALL["text"], "hidden_size": 128, "num_attention_heads": 2}
DIMENSIONS: dict[str, dict[str, Any]] = {
    "base": {
        **SMALL,
        "gain": 2.0,
        "text": {**TEXT, "encoder_width": 128},
        "vision": {"patch_size": 6, "embed_dim": 128, "depth": 2, "num_heads": 2},
    },
    "large": {
        **SMALL,
        "gain": 2.0,
        "text": {**TEXT, "encoder_width": 192},
        "vision": {"patch_size": 6, "embed_dim": 192, "depth": 4, "num_heads": 3},
    },
}


def quiet(_: str) -> None:
    pass


@pytest.fixture
def words(tmp_path: Path) -> Any:
    return tokenizer(tmp_path)


def save(path: Path, task: str, words: Any, size: str = "base", seed: int = 0) -> Any:
    """A checkpoint with random weights and its vocabulary beside it; returns LAVIS's model with the same weights."""
    path.parent.mkdir(exist_ok=True)
    net = random_blip(task, seed, words, DIMENSIONS[size], end=2.0)
    torch.save({"model": net.state_dict(), "epoch": 3}, path)
    (path.parent / "vocab.txt").write_text("".join(f"{token}\n" for token in SPECIAL + WORDS))
    return net


def made(path: Path, task: str, checkpoint: Path, *changes: str, image_size: int | None = None) -> Any:
    """The model of a bundle that is made of a checkpoint."""
    make(path, {task: find(task, str(checkpoint))}, "float32", quiet, image_size=image_size)
    if changes:
        change(path, changes, quiet)
    return load_models(open_bundle(path), CPU, "float32")[task]


@pytest.mark.parametrize("size", DIMENSIONS)
@pytest.mark.parametrize("search", [{}, {"num_beams": 5, "max_length": 15, "min_length": 3}, {"num_beams": 1}], ids=str)
def test_captions_of_a_checkpoint_are_those_of_lavis(
    tmp_path: Path, words: Any, size: str, search: dict[str, int]
) -> None:
    net, pixels = save(tmp_path / "in" / "my.pth", "caption", words, size), random_pixels(6, 1)
    model = made(
        tmp_path / "bundle", "caption", tmp_path / "in" / "my.pth", *(f"caption.{k}={v}" for k, v in search.items())
    )
    with torch.no_grad():
        expected = list(net.generate({"image": normalised(pixels)}, **search))
    assert texts_of(model.net, engine.caption(model.net, pixels, model.search)) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("prompt", ["a picture of ", "the Dog", ""])
def test_captions_with_another_prompt_are_those_of_lavis(tmp_path: Path, words: Any, prompt: str) -> None:
    net, pixels = save(tmp_path / "in" / "my.pth", "caption", words), random_pixels(6, 2)
    model = made(tmp_path / "bundle", "caption", tmp_path / "in" / "my.pth", f"caption.prompt={prompt}")
    net.prompt = f"{prompt.strip().lower()} ".lstrip()
    assert texts_of(model.net, engine.caption(model.net, pixels, model.search)) == lavis_captions(net, pixels)


def test_answers_of_a_checkpoint_are_those_of_lavis(tmp_path: Path, words: Any) -> None:
    net, pixels = save(tmp_path / "in" / "my.pth", "answer", words), random_pixels(6, 3)
    model = made(tmp_path / "bundle", "answer", tmp_path / "in" / "my.pth")
    questions = QUESTIONS[:6]
    found = texts_of(model.net, engine.answer(model.net, pixels, questions, model.search))
    net.max_txt_len = model.net.max_txt_len
    assert found == lavis_answers(net, pixels, questions)


@pytest.mark.parametrize("size", DIMENSIONS)
def test_matches_of_a_checkpoint_are_those_of_lavis(tmp_path: Path, words: Any, size: str) -> None:
    net, pixels = save(tmp_path / "in" / "my.pth", "match", words, size), random_pixels(6, 4)
    model = made(tmp_path / "bundle", "match", tmp_path / "in" / "my.pth")
    found = torch.tensor([list(pair) for pair in engine.match(model.net, pixels, QUESTIONS[:6])])  # type: ignore[arg-type]
    net.max_txt_len = model.net.max_txt_len
    assert torch.allclose(found, torch.tensor(lavis_matches(net, pixels, QUESTIONS[:6])), atol=2e-5)


@pytest.mark.parametrize("side", [24, 48])
def test_another_image_size_has_the_positions_that_lavis_interpolates(
    tmp_path: Path, words: Any, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in" / "my.pth"
    save(path, "caption", words)
    model = made(tmp_path / "bundle", "caption", path, image_size=side)
    assert model.image_size == side
    monkeypatch.setattr(lavis, "_MetaParameters", contextlib.nullcontext)
    stock = lavis.build("caption", open_bundle(tmp_path / "bundle").config("caption"), words)
    stock.load_from_pretrained(str(path))
    pixels = random_pixels(4, 5, side)
    assert texts_of(model.net, engine.caption(model.net, pixels, model.search)) == lavis_captions(stock.eval(), pixels)


@pytest.mark.parametrize("side", [25, 0, -6, 6000])
def test_an_image_size_that_patches_do_not_fill_is_refused(tmp_path: Path, words: Any, side: int) -> None:
    save(tmp_path / "in" / "my.pth", "caption", words)
    with pytest.raises(BundleError, match=rf"--image-size {side} is not possible .*; use a multiple of 6 up to 1020"):
        made(tmp_path / "bundle", "caption", tmp_path / "in" / "my.pth", image_size=side)


def test_training_state_is_left_out_and_told(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "in" / "my.pth"
    net = save(path, "match", words)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    state["module.text_encoder_m.embeddings.word_embeddings.weight"] = torch.zeros(3)
    state["module.image_queue"] = torch.zeros(3, 5)
    state["module.temp"] = torch.tensor(0.07)
    torch.save(state, path)
    lines: list[str] = []
    make(tmp_path / "bundle", {"match": find("match", str(path))}, "float32", lines.append)
    told = next(line for line in lines if "left out" in line)
    assert told.startswith("my.pth: left out 3 tensors of its training (image_queue, temp, text_encoder_m.")


def test_a_pretraining_checkpoint_captions_and_matches_and_does_not_answer(tmp_path: Path, words: Any) -> None:
    folder = tmp_path / "in"
    parts = [save(folder / f"{task}.pth", task, words).state_dict() for task in ("caption", "match")]
    torch.save({"model": {**parts[0], **parts[1]}}, folder / "pretrained.pth")
    for task in ("caption", "match"):
        made(tmp_path / task, task, folder / "pretrained.pth")
    with pytest.raises(BundleError, match="is a pretraining checkpoint, which cannot answer questions"):
        made(tmp_path / "answer", "answer", folder / "pretrained.pth")


@pytest.mark.parametrize(
    ("task", "edit", "sentence"),
    [
        ("answer", lambda _: None, r"my\.pth is a model for captions; give it with --caption\.$"),
        (
            "caption",
            lambda state: state.update({"Qformer.bert.x": torch.zeros(1)}),
            r"is a BLIP-2 model and not a BLIP",
        ),
        (
            "caption",
            lambda state: state.update({"visual.conv1.weight": torch.zeros(1)}),
            r"is a CLIP model and not a B",
        ),
        (
            "caption",
            lambda state: state.update(extra=torch.zeros(1), more=torch.zeros(1)),
            r"does not use: extra, more",
        ),
        ("caption", lambda state: state.pop("visual_encoder.pos_embed"), r"lacks the weight visual_encoder\.pos_embed"),
        (
            "caption",
            lambda state: state.pop("visual_encoder.norm.bias"),
            r"lacks the weight visual_encoder\.norm\.bias",
        ),
        (
            "caption",
            lambda state: state.update({"visual_encoder.pos_embed": torch.zeros(1, 8, 128)}),
            r"has 8 position embeddings, which fit no square image",
        ),
        (
            "caption",
            lambda state: state.update({"visual_encoder.pos_embed": torch.zeros(26, 128)}),
            r"visual_encoder\.pos_embed with shape \[26, 128\], which no BLIP has",
        ),
        (
            "caption",
            lambda state: state.update({"visual_encoder.blocks.9999.norm1.bias": torch.zeros(1)}),
            r"lacks the weights visual_encoder\.blocks\.2: it is not whole; fetch it again\.$",
        ),
        (
            "caption",
            lambda state: state.update(
                {"text_decoder.bert.encoder.layer.0.crossattention.self.key.weight": torch.zeros(128, 64)}
            ),
            r"has images of width 128 and its texts look at 64; give a whole model",
        ),
        (
            "caption",
            lambda state: state.update({"visual_encoder.pos_embed": torch.zeros(1, 1 + 171**2, 128)}),
            r"is for images of 1026 pixels; give a model for 1024 at most\.$",
        ),
        (
            "caption",
            lambda state: state.update({"my_queue_net.weight": torch.zeros(1)}),
            r"not use: my_queue_net\.weight;",
        ),
        (
            "caption",
            lambda state: state.clear(),
            r"lacks the weight visual_encoder\.pos_embed: it is not a BLIP for cap",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_one_sentence(
    tmp_path: Path, words: Any, task: str, edit: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    path = tmp_path / "in" / "my.pth"
    state = dict(save(path, "caption", words).state_dict())
    edit(state)
    torch.save({"model": state}, path)
    with pytest.raises(BundleError, match=sentence):
        made(tmp_path / "bundle", task, path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "vocab.txt"]


def test_a_truncated_checkpoint_is_one_sentence(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "in" / "my.pth"
    save(path, "caption", words)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(BundleError, match=r"my\.pth is not a readable PyTorch checkpoint"):
        made(tmp_path / "bundle", "caption", path)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "in" / "my.pth"
    save(path, "caption", words)
    with (path.parent / "vocab.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(
        BundleError, match=r"has embeddings of \d+ tokens and its vocabulary \d+; put its own beside it"
    ):
        made(tmp_path / "bundle", "caption", path)


@pytest.mark.parametrize(
    ("task", "given", "sentence"),
    [
        ("caption", "vqav2", r"^vqav2 is a model for answers to questions; give it with --answer\.$"),
        ("match", "blip_caption/large_coco", r"give it with --caption\.$"),
        ("caption", "huge_coco", r"^huge_coco is no model of LAVIS's for captions \(base_coco, large_coco\), no file"),
        ("caption", "missing/my.pth", r"no file and no directory; give one of them\.$"),
        ("caption", "", r"^--caption '' names no model; give one"),
        ("caption", "a\udcff", r"^--caption 'a\\udcff' names no model; give one, or rename it in plain letters\.$"),
        ("answer", "https://hf.co/Salesforce/blip-vqa-base", r"no address; give Salesforce/blip-vqa-base\.$"),
    ],
)
def test_a_source_that_names_nothing_is_one_sentence(task: str, given: str, sentence: str) -> None:
    with pytest.raises(BundleError, match=sentence):
        find(task, given)


def test_every_model_of_lavis_has_its_address_and_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLIP_MIRROR", raising=False)
    google = "https://storage.googleapis.com/sfr-vision-language-research"
    found = {
        (task, model_type): published.checkpoint(task, model_type)
        for task, (_, types) in published.MODELS.items()
        for model_type in types
    }
    assert {key: file.url.removeprefix(f"{google}/") for key, (file, _) in found.items()} == {
        ("caption", "base_coco"): "LAVIS/models/BLIP/blip_coco_caption_base.pth",
        ("caption", "large_coco"): "BLIP/models/model_large_caption.pth",
        ("answer", "vqav2"): "BLIP/models/model_base_vqa_capfilt_large.pth",
        ("answer", "okvqa"): "LAVIS/models/BLIP/blip_okvqa.pth",
        ("answer", "aokvqa"): "LAVIS/models/BLIP/blip_aokvqa.pth",
        ("match", "base"): "BLIP/models/model_base_retrieval_coco.pth",
        ("match", "large"): "BLIP/models/model_large_retrieval_coco.pth",
    }
    widths = {
        key: (config["vision"]["embed_dim"], config["text"]["encoder_width"]) for key, (_, config) in found.items()
    }
    assert {key for key, pair in widths.items() if pair == (1024, 1024)} == {
        ("caption", "large_coco"),
        ("match", "large"),
    }
    assert {pair for key, pair in widths.items() if key[1] not in ("large_coco", "large")} == {(768, 768)}
    for form in ("large_coco", "blip_caption large_coco", "blip_caption/large_coco"):
        assert find("caption", form).recipe() == "blip_caption large_coco"


class Small:
    """Small checkpoints that stand where LAVIS's names point to, on a mirror."""

    def __init__(self, directory: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.configs: dict[str, dict[str, Any]] = {}
        for task in TASKS:
            save(directory / f"{task}.pth", task, words)
            checkpoint = find(task, str(directory / f"{task}.pth"))
            self.configs[task] = dict(checkpoint.open(directory, quiet).config)
        self.mirror = Mirror(directory)
        monkeypatch.setattr(published, "checkpoint", self.checkpoint)
        monkeypatch.setattr(published, "vocabulary", lambda: File(f"{self.mirror.url}/vocab.txt", None))

    def checkpoint(self, task: str, _: str) -> tuple[File, dict[str, Any]]:
        return File(f"{self.mirror.url}/{task}.pth", None), self.configs[task]

    def sources(self) -> dict[str, Source]:
        return {"caption": find("caption", "large_coco"), "match": find("match", "large")}


@pytest.fixture
def small(tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    published = Small(tmp_path / "published", words, monkeypatch)
    yield published
    published.mirror.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "bundles" / "mine"


def assert_made(out: Path) -> None:
    bundle = open_bundle(out)
    bundle.verify()
    assert bundle.tasks == ("caption", "match")
    assert sorted(entry.name for entry in out.parent.iterdir()) == [out.name]


def test_models_of_lavis_are_fetched_and_their_files_recorded(small: Small, out: Path) -> None:
    small.mirror.faults["caption.pth"] = [503, "drop", "drop"]
    make(out, small.sources(), "float16", quiet)
    assert_made(out)
    size = (small.directory / "caption.pth").stat().st_size
    assert open_bundle(out).source.startswith(f"caption: blip_caption large_coco, caption.pth {size} bytes sha256:")


def test_a_bundle_that_is_made_already_is_left_and_another_is_not_replaced(small: Small, out: Path) -> None:
    make(out, small.sources(), "float16", quiet)
    created = out.stat().st_ino
    small.mirror.requests.clear()
    make(out, small.sources(), "float16", quiet)
    assert out.stat().st_ino == created
    assert not small.mirror.requests
    for sources, dtype in ((small.sources(), "float32"), ({"answer": find("answer", "okvqa")}, "float16")):
        with pytest.raises(BundleError, match=r"mine holds another bundle \(made\); remove it or choose another"):
            make(out, sources, dtype, quiet)
    assert out.stat().st_ino == created


def test_a_damaged_download_is_fetched_again_by_the_next_run(small: Small, out: Path) -> None:
    small.mirror.hashes = False
    small.mirror.faults["match.pth"] = ["drop", "wrong"]  # the first tells the length
    with pytest.raises(BundleError, match=r"match\.pth is not a readable PyTorch checkpoint"):
        make(out, small.sources(), "float16", quiet)
    assert not out.exists()
    make(out, small.sources(), "float16", quiet)
    assert_made(out)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_and_started_again_it_ends_in_a_right_bundle(small: Small, out: Path, kills: int) -> None:
    small.mirror.delay = 0.002
    started = time.monotonic()
    make(out, small.sources(), "float16", quiet)
    duration = time.monotonic() - started
    chance, finished = random.Random(kills), 0
    for _ in range(kills):
        process = forked(lambda: make(out, small.sources(), "float16", quiet))
        process.join(chance.uniform(0, duration))
        process.kill()
        process.join()
        if out.exists():
            finished += 1
            assert open_bundle(out).tasks == ("caption", "match")
            open_bundle(out).verify()
            shutil.rmtree(out.parent)
    make(out, small.sources(), "float16", quiet)
    assert_made(out)
    print(f"{kills} kills, {finished} of them after the end")


def test_two_at_once_make_one_bundle_and_download_once(small: Small, out: Path) -> None:
    small.mirror.delay = 0.002
    processes = [forked(lambda: make(out, small.sources(), "float16", quiet)) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_made(out)


def test_a_place_that_is_none_is_one_sentence(small: Small, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, sentence in {
        Path("/"): r"^/ is no place for a bundle; choose a directory in it\.$",
        tmp_path / ("x" * 255): r"File name too long; choose a shorter name for the bundle\.$",
        tmp_path / "file" / "bundle": r"; choose another directory\.$",
    }.items():
        with pytest.raises(BundleError, match=sentence):
            make(out, small.sources(), "float16", quiet)


def test_a_disk_that_fills_up_ends_in_one_sentence_and_can_be_continued(small: Small, out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(BundleError, match=r"cannot be written.*make room"):
            make(out, small.sources(), "float16", quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    make(out, small.sources(), "float16", quiet)
    assert_made(out)


def test_too_little_disk_is_said_before_the_checkpoints_are_downloaded(
    small: Small, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(BundleError, match=r"has 0\.00 GB free and the bundle with its downloads needs"):
        make(out, small.sources(), "float16", quiet)


def test_a_server_that_does_not_have_the_file_is_one_sentence(small: Small, out: Path) -> None:
    (small.directory / "match.pth").unlink()
    with pytest.raises(BundleError, match=r"match\.pth was refused with HTTP status 404; check the network or BLIP_M"):
        make(out, small.sources(), "float16", quiet)


def bundle_command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "blip", "bundle", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_repository_of_the_hub_is_fetched_and_made(oracle: Oracle, tmp_path: Path) -> None:
    directory = oracle.make(tmp_path / "repository", "caption", end=1.0)
    (directory / "tf_model.h5").write_bytes(b"not asked for")
    hub = Hub("someone/my-blip", directory)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    ended = bundle_command("make", tmp_path / "out", "--caption", "someone/my-blip", **environment)
    assert ended.returncode == 0, ended.stderr
    bundle = open_bundle(tmp_path / "out")
    assert bundle.source.startswith(f"caption: someone/my-blip@{hub.commit}: config.json ")
    assert "processor_config.json " in bundle.source
    assert "tf_model.h5" not in hub.requests
    assert not (tmp_path / "blip-downloads").exists()
    hub.commit = f"f{hub.commit[1:]}"  # the model was trained on
    ended = bundle_command("make", tmp_path / "out", "--caption", "someone/my-blip", **environment)
    assert "holds another bundle (made); remove it or choose another" in ended.stderr
    ended = bundle_command("make", tmp_path / "other", "--caption", "someone/nothing", **environment)
    hub.close()
    assert ended.returncode == 1
    assert ended.stderr.startswith("bundle make: someone/nothing cannot be fetched from the hub (RepositoryNotFound")
    assert ended.stderr.count("\n") == 1


def test_a_damaged_file_of_the_hub_is_fetched_again_and_a_full_disk_said_before(oracle: Oracle, tmp_path: Path) -> None:
    directory = oracle.make(tmp_path / "repository", "caption")
    hub = Hub("someone/my-blip", directory)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-4] + b"\xff" * 4)  # not a number
    ended = bundle_command("make", tmp_path / "out", "--caption", "someone/my-blip", **environment)
    assert "that are no numbers; fetch it again" in ended.stderr
    (directory / "model.safetensors").write_bytes(whole)
    ended = bundle_command("make", tmp_path / "out", "--caption", "someone/my-blip", **environment)
    assert ended.returncode == 0, ended.stderr
    hub.requests.clear()
    hub.sizes["model.safetensors"] = 10**15
    ended = bundle_command("make", tmp_path / "other", "--caption", "someone/my-blip", **environment)
    hub.close()
    assert "GB free and the bundle with its downloads needs 1000000.00 GB" in ended.stderr
    assert "model.safetensors" not in hub.requests


def test_a_bundle_of_one_task_is_shown_changed_verified_and_served(tmp_path: Path, words: Any) -> None:
    save(tmp_path / "in" / "my.pth", "caption", words)
    path = tmp_path / "mine"
    ended = bundle_command("make", path, "--caption", tmp_path / "in" / "my.pth", "--dtype", "float32")
    assert ended.returncode == 0, ended.stderr
    ended = bundle_command("set", path, "caption.num_beams=1", "caption.max_length=12", "caption.prompt=the dog")
    assert ended.returncode == 0, ended.stderr
    shown = bundle_command("show", path).stdout
    assert "num_beams=1, min_length=10, max_length=12" in shown
    assert "prompt='the dog '" in shown
    assert "set caption.max_length=12" in shown
    assert "from caption: my.pth " in shown
    assert bundle_command("verify", path).returncode == 0
    with Server({"BLIP_WEIGHTS": str(path)}) as server:
        server.wait_for("READY")
        picture = data_uri(EXAMPLES / "pair.jpg")
        assert server.predict(input={"image": picture}).json()["output"].startswith("Caption: ")
        failed = server.predict(input={"image": picture, "task": "image_text_matching", "caption": "a dog"}).json()
        assert failed["error"] == (
            "task image_text_matching is not possible: this server's weights are for image_captioning only; "
            "ask for that."
        )
        assert server.health()["status"] == "READY"
    (path / "caption" / "config.json").write_text("{}")
    ended = bundle_command("verify", path)
    assert (ended.returncode, ended.stdout.count("\n")) == (1, 1)


def test_another_vocabulary_beside_a_checkpoint_makes_another_bundle(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "in" / "my.pth"
    save(path, "caption", words)
    made(tmp_path / "bundle", "caption", path)
    source = open_bundle(tmp_path / "bundle").source
    assert source.startswith("caption: my.pth ") and " with vocab.txt " in source
    vocabulary = path.with_name("vocab.txt")
    vocabulary.write_text(vocabulary.read_text().replace("dog\n", "cat\n"))
    with pytest.raises(BundleError, match=r"holds another bundle \(made\)"):
        made(tmp_path / "bundle", "caption", path)


def test_only_what_a_run_has_fetched_is_removed(small: Small, out: Path) -> None:
    make(out, small.sources(), "float16", quiet, keep=True)
    downloads = out.parent / "blip-downloads"
    kept = {"caption.pth", "match.pth", "vocab.txt"}
    assert set(os.listdir(downloads)) == kept
    shutil.copy(downloads / "caption.pth", downloads / "mine.pth")
    make(out.with_name("two"), {"caption": find("caption", str(downloads / "mine.pth"))}, "float16", quiet)
    change(out, ["caption.num_beams=1"], quiet)
    assert set(os.listdir(downloads)) == {*kept, "mine.pth"}
    make(out.with_name("three"), small.sources(), "float16", quiet)
    assert os.listdir(downloads) == ["mine.pth"]


def test_what_a_run_left_that_was_killed_at_its_end_is_removed_by_the_next(small: Small, out: Path) -> None:
    make(out, small.sources(), "float16", quiet, keep=True)
    make(out, small.sources(), "float16", quiet)
    assert_made(out)


def test_a_bundle_is_changed_where_it_lies_and_not_where_a_link_is(
    tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "in" / "my.pth", "caption", words)
    made(tmp_path / "mine", "caption", tmp_path / "in" / "my.pth")
    (tmp_path / "link").symlink_to("mine")
    change(tmp_path / "link", ["caption.num_beams=1"], quiet)
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "mine").config("caption")["num_beams"] == 1
    monkeypatch.chdir(tmp_path / "mine")
    change(Path(), ["caption.num_beams=2", "caption.prompt=the  Dog"], quiet)
    bundle = open_bundle(tmp_path / "mine")
    bundle.verify()
    assert bundle.changes == ["caption.num_beams=2", "caption.prompt=the dog "]
    assert sorted(os.listdir(tmp_path)) == ["in", "link", "mine", "vocab.txt"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match=r"loop is no place for a bundle .*; choose another directory\.$"):
        change(tmp_path / "loop", ["caption.num_beams=1"], quiet)


def test_a_file_that_somebody_put_into_a_bundle_is_not_lost(tmp_path: Path, words: Any) -> None:
    save(tmp_path / "in" / "my.pth", "caption", words)
    made(tmp_path / "mine", "caption", tmp_path / "in" / "my.pth")
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(BundleError, match=r"notes\.txt is not in manifest\.json and would be lost; move it away"):
        change(tmp_path / "mine", ["caption.num_beams=1"], quiet)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


def test_a_bundle_is_changed_on_a_disk_without_hard_links(
    tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError

    save(tmp_path / "in" / "my.pth", "caption", words)
    made(tmp_path / "mine", "caption", tmp_path / "in" / "my.pth")
    monkeypatch.setattr(Path, "hardlink_to", refused)
    change(tmp_path / "mine", ["caption.num_beams=1"], quiet)
    open_bundle(tmp_path / "mine").verify()


def test_a_change_that_is_killed_at_random_leaves_a_whole_bundle(tmp_path: Path, words: Any) -> None:
    save(tmp_path / "in" / "my.pth", "caption", words)
    path = tmp_path / "mine"
    made(path, "caption", tmp_path / "in" / "my.pth")

    def change_for_ever() -> None:
        for beams in itertools.cycle((1, 2, 3)):
            change(path, [f"caption.num_beams={beams}"], quiet)

    chance = random.Random(0)
    for _ in range(10):
        process = forked(change_for_ever)
        process.join(chance.uniform(0.1, 0.4))
        process.kill()
        process.join()
        open_bundle(path).verify()
    change(path, ["caption.num_beams=5"], quiet)
    assert sorted(os.listdir(tmp_path)) == ["in", "mine", "vocab.txt"]


@pytest.mark.parametrize(
    ("change_to", "sentence"),
    [
        ("caption.num_beams=0", r"caption\.num_beams=0 is beyond the model; set it to a number from 1 to \d+\."),
        ("caption.num_beams=33", r"caption\.num_beams=33 is beyond the model"),
        ("caption.num_beams=many", r"caption\.num_beams=many is no number; write one, such as caption\.num_beams=5\."),
        ("caption.max_length=41", r"caption\.max_length=41 is beyond the model; set it to a number from 5 to 40\."),
        ("caption.max_length=4", r"caption\.max_length=4 is beyond the model; set it to a number from 5 to 40\."),
        ("caption.min_length=31", r"caption\.min_length=31 is beyond the model; set it to a number from 0 to 30\."),
        ("caption.temperature=1", r"no setting of caption, which has num_beams, min_length, max_length, prompt\."),
        ("answer.num_beams=3", r"is about a task that the bundle does not have; it has caption\."),
        ("num_beams=3", r"num_beams=3 is no setting; write TASK\.SETTING=VALUE, such as caption\.num_beams=5\."),
        ("caption.prompt=a zebra", r"caption\.prompt=a zebra has a word that the model's vocabulary lacks"),
        ("caption.prompt=do n't", r"caption\.prompt=do n't is written don't in captions, which is another; use other"),
        (
            "caption.prompt=a \udcff dog",
            r"caption\.prompt=a \\udcff dog has characters that cannot be shown; use words",
        ),
        ("caption.prompt=[SEP] dog", r"caption\.prompt=\[SEP\] dog has a special token; use words\."),
        (
            "caption.prompt=" + "dog " * 29,
            r"caption\.max_length=30 is beyond the model; set it to a number from 31 to 40",
        ),
        ("caption.prompt=" + "dog" * 1000, r"caption\.prompt has 3000 characters; use 1000 at most\."),
    ],
)
def test_a_setting_beyond_the_model_is_refused_and_changes_nothing(
    tmp_path: Path, words: Any, change_to: str, sentence: str
) -> None:
    save(tmp_path / "in" / "my.pth", "caption", words)
    made(tmp_path / "mine", "caption", tmp_path / "in" / "my.pth")
    before = (tmp_path / "mine" / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match=sentence):
        change(tmp_path / "mine", [change_to], quiet)
    assert (tmp_path / "mine" / "manifest.json").read_bytes() == before


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    ended = bundle_command("make", tmp_path / "x")
    assert ended.stderr == "bundle make: no model is named; give one or more of --caption, --answer and --match.\n"
    ended = bundle_command("show", tmp_path)
    assert ended.stderr.startswith(f"bundle show: There is no weights bundle at {tmp_path}")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"vision": 5, "text": "x", "image_size": 30},
        {"vision": {"depth": 1, "embed_dim": 2}, "text": [], "image_size": 30},
    ],
    ids=str,
)
def test_a_config_that_is_none_is_one_sentence(tmp_path: Path, config: dict[str, Any]) -> None:
    with BundleWriter(tmp_path / "odd", name="odd", dtype="float32", source="", note="") as writer:
        writer.vocabulary(SPECIAL)
        writer.model("caption", config, {"weight": torch.zeros(1)})
    sentence = r"odd/caption/config\.json is not the configuration of a model \(.*\); make the bundle anew\.$"
    with pytest.raises(BundleError, match=sentence):
        load_models(open_bundle(tmp_path / "odd"), CPU, "float32")
    for arguments in (["caption.num_beams=2"], ["caption.prompt=a"]):
        with pytest.raises(BundleError, match=sentence):
            change(tmp_path / "odd", arguments, quiet)
    ended = bundle_command("show", tmp_path / "odd")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)


def load_with(tmp_path: Path, config: dict[str, Any]) -> None:
    with BundleWriter(tmp_path / "odd", name="odd", dtype="float32", source="", note="") as writer:
        writer.vocabulary(SPECIAL)
        writer.model("caption", config, {"weight": torch.zeros(1)})
    load_models(open_bundle(tmp_path / "odd"), CPU, "float32")


@pytest.mark.parametrize("setting", ["num_beams", "min_length", "max_length"])
def test_a_config_that_lacks_a_setting_of_the_search_is_one_sentence(tmp_path: Path, setting: str) -> None:
    config = open_bundle(DEMO).config("caption")
    del config[setting]
    with pytest.raises(BundleError, match=rf"is not the configuration of a model \(KeyError: '{setting}'\); make the"):
        load_with(tmp_path, config)


@pytest.mark.parametrize(
    "setting", ["num_beams=0", 'num_beams="3"', "num_beams=2.5", "num_beams=true", "max_length=2", "min_length=31"]
)
def test_a_config_written_by_hand_that_no_model_can_follow_is_one_sentence(tmp_path: Path, setting: str) -> None:
    name, _, value = setting.partition("=")
    config = {**open_bundle(DEMO).config("caption"), name: json.loads(value)}
    with pytest.raises(
        BundleError, match=rf"^caption\.{name}=.+ is beyond the model; set it to a number from \d+ to \d+\.$"
    ):
        load_with(tmp_path, config)
