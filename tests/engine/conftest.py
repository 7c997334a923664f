"""The engine is tested with as many threads as it is served with."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.random_blip import tokenizer


@pytest.fixture(autouse=True, scope="package")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """BLIP's tokenizer on a small vocabulary."""
    return tokenizer(tmp_path_factory.mktemp("vocabulary"))
