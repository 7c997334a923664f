"""Bundles of full-size models in each layout, with random weights: made, loaded, and equal to their library."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import EXAMPLES
from benchmarks.random_blip import FULL, FULL_VOCABULARY, SPECIAL, WORDS, random_blip, random_pixels, tokenizer
from benchmarks.scenes import texts_of
from blip import engine
from blip.pictures.pool import Pool
from blip.tasks import TASKS
from blip.weights import published
from blip.weights.bundle import open_bundle
from blip.weights.download import File
from blip.weights.load import load_models
from blip.weights.make import make
from blip.weights.sources import find
from tests.engine.test_generate import lavis_captions, lavis_matches
from tests.weights.hf_oracle import Oracle
from tests.weights.small_upstream import Mirror

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
HF_SIZES: dict[str, Any] = {
    "text": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": FULL_VOCABULARY + 2,
        "max_position_embeddings": 512,
        "bos_token_id": FULL_VOCABULARY,
        "sep_token_id": 3,
        "pad_token_id": 0,
    },
    "vision": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 384,
        "patch_size": 16,
    },
    "shared": 256,
    "gain": 1.75,
}
LONG = [*SPECIAL, *WORDS, *(f"w{index}" for index in range(FULL_VOCABULARY - len(SPECIAL + WORDS)))]


def megabytes(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 1e6:.0f} MB"


@pytest.mark.parametrize(("task", "model_type"), [("caption", "large_coco"), ("match", "large")])
def test_the_large_models_of_lavis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, model_type: str) -> None:
    """A checkpoint of random weights lies where LAVIS's address points to."""
    folder = tmp_path / "published"
    folder.mkdir()
    words = tokenizer(folder, FULL_VOCABULARY)
    file, config = published.checkpoint(task, model_type)
    dimensions = {**FULL, "vision": config["vision"], "text": {**FULL["text"], "encoder_width": 1024}}
    net = random_blip(task, 0, words, {**dimensions, "gain": 1.0 if task == "match" else 1.6}, end=1.0)
    torch.save({"model": net.state_dict()}, folder / file.name)
    mirror = Mirror(folder)
    monkeypatch.setenv("BLIP_MIRROR", mirror.url)
    monkeypatch.setattr(published, "vocabulary", lambda: File(f"{mirror.url}/vocab.txt", None))
    make(tmp_path / "bundle", {task: find(task, model_type)}, "float32", print)
    mirror.close()
    print(f"{file.name}: {megabytes(folder / file.name)}, the bundle in float32 {megabytes(tmp_path / 'bundle')}")
    (folder / file.name).unlink()
    pixels = random_pixels(2, 0, 384)
    texts = ["a red circle", "two dogs"]
    expected: Any = lavis_captions(net, pixels) if task == "caption" else lavis_matches(net, pixels, texts)
    del net
    model = load_models(open_bundle(tmp_path / "bundle"), CPU, "float32")[task]
    if model.search:
        assert texts_of(model.net, engine.caption(model.net, pixels, model.search)) == expected
    else:
        found = torch.tensor(engine.match(model.net, pixels, texts))
        assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("task", ["caption", "answer", "match"])
def test_models_of_hugging_face(oracle: Oracle, tmp_path: Path, task: str) -> None:
    changes = {**HF_SIZES, "gain": 1.0} if task == "match" else HF_SIZES
    directory = oracle.make(tmp_path / "hf", task, words=LONG, **changes)
    images = sorted(EXAMPLES.glob("*.jpg"))
    texts = None if task == "caption" else ["What colour is the dog?"] * len(images)
    expected, pixels = oracle.run(directory, images, texts)
    make(tmp_path / "bundle", {task: find(task, str(directory))}, "float32", print)
    print(f"{task}: {megabytes(directory)}, the bundle in float32 {megabytes(tmp_path / 'bundle')}")
    model = load_models(open_bundle(tmp_path / "bundle"), CPU, "float32")[task]
    served = next(kind for kind in TASKS if kind.bundle_name == task)(model)
    pool = Pool()
    pool.wait()
    samples = [
        served.prepare(asyncio.run(pool.pixels(image, model.image_size, model.library)), text)
        for image, text in zip(images, texts or [""] * len(images), strict=True)
    ]
    pool.close()
    normal: Tensor = engine.encoders.normalise(model.net.pixel_values, samples[0].pixels[None])
    assert torch.equal(normal.flatten(), torch.tensor(pixels))
    found = served.run(samples)
    if task == "match":
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)
    else:
        assert [each.ids for each in found] == expected  # type: ignore[union-attr]
