"""Results that are the same alone and in a batch, for any number of threads and on processors without AVX-512."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import ROOT
from tests.engine.test_generate import skip_unless_supported

#: What limits oneDNN, MKL and torch to the instructions of older processors.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.parametrize(
    ("dtype", "threads", "settings"),
    [
        *(("float32", threads, settings) for threads in (1, 4, 16) for settings in ({}, AVX2)),
        ("bfloat16", 4, {}),
        ("bfloat16", 16, {}),
        ("int8", 4, {}),
    ],
    ids=lambda value: ("AVX2" if value else "all") if isinstance(value, dict) else str(value),
)
def test_no_result_of_a_full_width_model_depends_on_its_batch(
    tmp_path: Path, dtype: str, threads: int, settings: dict[str, str]
) -> None:
    skip_unless_supported(dtype)
    program = [sys.executable, "-m", "tests.programs.batches", str(tmp_path), str(threads), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **settings}
    ended = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("", 0), ended.stderr
