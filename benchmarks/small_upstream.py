"""Upstream's files with small dimensions: models of a few thousand parameters, for the tests and quick benchmarks."""

from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.checkpoints import write_checkpoint
from blip.lavis import make_tokenizer
from blip.weights.download import File
from blip.weights.pretrained import Upstream

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a picture of the dog".split()]
NAMES = {"caption": "small_caption.pth", "answer": "small_vqa.pth", "match": "small_retrieval.pth"}
LEGACY = ("answer",)


def configs() -> dict[str, dict[str, Any]]:
    """The three config.json."""
    text = {
        "hidden_size": 32,
        "encoder_width": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "vocab_size": len(VOCABULARY) + 2,
        "add_type_embeddings": False,
        "add_cross_attention": True,
    }
    common = {
        "image_size": 16,
        "max_txt_len": 12,
        "vision": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        "text": text,
    }
    generation = {"num_beams": 3, "max_length": 10, "min_length": 1}
    return {
        "caption": {**common, **generation, "prompt": "a picture of "},
        "answer": {**common, **generation},
        "match": {**common, "embed_dim": 16},
    }


def write_upstream(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Write the vocabulary and the three checkpoints; returns the needed parameters by task, fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("".join(f"{token}\n" for token in VOCABULARY))
    tokenizer = make_tokenizer(vocabulary)
    return {
        task: write_checkpoint(directory / NAMES[task], task, config, tokenizer, legacy=task in LEGACY, queue=64)
        for task, config in configs().items()
    }


def upstream(directory: Path, url: str) -> Upstream:
    """The files of `directory` as published below `url`."""

    def file(name: str) -> File:
        return File(f"{url}/{name}", (directory / name).stat().st_size)

    return Upstream(file("vocab.txt"), {task: file(name) for task, name in NAMES.items()}, configs())
