"""Hugging Face's newest BLIP in a process of its own, and small models for it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hf_environment import hf_packages
from benchmarks.random_blip import SPECIAL, WORDS
from benchmarks.responder import Responder

KINDS = {
    "caption": "BlipForConditionalGeneration",
    "answer": "BlipForQuestionAnswering",
    "match": "BlipForImageTextRetrieval",
}
#: The vocabulary; the decoder's first token has the id behind it, and there is one more, as in the published models.
VOCABULARY = [*SPECIAL, *WORDS]


def sizes(**changes: Any) -> dict[str, Any]:
    """Small dimensions in which no two are the same."""
    count = len(VOCABULARY)
    return {
        "text": {
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": count + 2,
            "max_position_embeddings": 40,
            "bos_token_id": count,
            "sep_token_id": 3,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        "vision": {
            "hidden_size": 40,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 30,
            "patch_size": 6,
        },
        **changes,
    }


class Oracle(Responder):
    """The process; used as a context manager."""

    def __init__(self) -> None:
        # Before our own packages, and after what Python finds where it starts.
        environment = {"PYTHONPATH": str(hf_packages()), "TRANSFORMERS_VERBOSITY": "error"}
        super().__init__(Path(sys.executable), ["tests.programs.hf_blip"], environment)

    def make(self, directory: Path, task: str, seed: int = 0, words: list[str] = VOCABULARY, **changes: Any) -> Path:
        """A model with random weights, saved as transformers saves it."""
        dimensions = sizes(**changes)
        if task == "answer" and "vision" not in changes:
            # transformers has one width for what its decoder and its text encoder attend to.
            dimensions["vision"] |= {"hidden_size": 48, "intermediate_size": 192}
        asked = {"make": str(directory), "kind": KINDS[task], "seed": seed, "sizes": dimensions, "words": words}
        self.ask(json.dumps(asked))
        return directory

    def run(self, directory: Path, images: list[Path], texts: list[str] | None = None, **generate: Any) -> Any:
        """Its outputs for each image, and the pixels that it made of the first."""
        asked = {"load": str(directory), "images": list(map(str, images)), "texts": texts, "generate": generate}
        found = self.ask(json.dumps(asked))
        return found["outputs"], found["pixels"]

    def encode(self, directory: Path, texts: list[str]) -> Any:
        """The ids that its processor makes of each text."""
        return self.ask(json.dumps({"encode": str(directory), "texts": texts}))


@pytest.fixture(scope="session")
def oracle() -> Iterator[Oracle]:
    with Oracle() as running:
        yield running
