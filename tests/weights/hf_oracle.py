"""Hugging Face's newest BLIP in a process of its own, and small models for it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from benchmarks.harness import ROOT
from benchmarks.hf_environment import hf_packages
from benchmarks.random_blip import SPECIAL, WORDS

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


class Oracle:
    """The process; used as a context manager."""

    def __enter__(self) -> "Oracle":
        path = os.pathsep.join([str(hf_packages()), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", ROOT / "tests" / "programs" / "hf_blip.py"],
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()

    def make(self, directory: Path, task: str, seed: int = 0, words: list[str] = VOCABULARY, **changes: Any) -> Path:
        """A model with random weights, saved as transformers saves it."""
        dimensions = sizes(**changes)
        if task == "answer" and "vision" not in changes:
            # transformers has one width for what its decoder and its text encoder attend to.
            dimensions["vision"] |= {"hidden_size": 48, "intermediate_size": 192}
        self._ask(make=str(directory), kind=KINDS[task], seed=seed, sizes=dimensions, words=words)
        return directory

    def run(self, directory: Path, images: list[Path], texts: list[str] | None = None, **generate: Any) -> Any:
        """Its outputs for each image, and the pixels that it made of the first."""
        found = self._ask(load=str(directory), images=list(map(str, images)), texts=texts, generate=generate)
        return found["outputs"], found["pixels"]

    def _ask(self, **asked: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="session")
def oracle() -> Iterator[Oracle]:
    with Oracle() as running:
        yield running
