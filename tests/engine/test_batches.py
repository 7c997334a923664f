"""Results that are the same alone and in a batch, for any number of threads and on processors without AVX-512."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import ROOT
from blip.engine import kernels
from blip.engine.linears import PackedLinear
from tests.engine.test_generate import skip_unless_supported

#: What limits oneDNN, MKL and torch to the instructions of older processors.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
AVX = {"ONEDNN_MAX_CPU_ISA": "AVX", "MKL_ENABLE_INSTRUCTIONS": "AVX", "ATEN_CPU_CAPABILITY": "default"}


@pytest.mark.parametrize(
    ("dtype", "threads", "settings"),
    [
        *(("float32", threads, settings) for threads in (1, 4, 16) for settings in ({}, AVX2)),
        ("float32", 4, AVX),
        ("bfloat16", 4, {}),
        ("bfloat16", 16, {}),
        ("int8", 4, {}),
    ],
    ids=lambda value: value.get("ONEDNN_MAX_CPU_ISA", "all") if isinstance(value, dict) else str(value),
)
def test_no_result_of_a_full_width_model_depends_on_its_batch(
    tmp_path: Path, dtype: str, threads: int, settings: dict[str, str]
) -> None:
    skip_unless_supported(dtype)
    program = [sys.executable, "-m", "tests.programs.batches", str(tmp_path), str(threads), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **settings}
    ended = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("", 0), ended.stderr


@pytest.mark.parametrize("several", [True, False], ids=["AVX2", "AVX"])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_the_inputs_and_of_the_rows_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, gelu: bool, bias: bool, several: bool
) -> None:
    if not kernels.has_onednn():
        pytest.skip("this processor has no oneDNN")
    monkeypatch.setattr(kernels, "UNSHARED_THREADS", 0)  # as with many threads
    monkeypatch.setattr(kernels, "_have_one_order", lambda _, rows: several and rows == 2)
    torch.manual_seed(0)
    linear = nn.Linear(2500, 40, bias=bias).requires_grad_(False)
    layer = PackedLinear(linear, gelu=gelu)
    for rows in (1, 3, 16, 17, 70, 90):
        x = torch.randn(5, rows, 2500)
        plain = linear(x)
        torch.testing.assert_close(layer(x), F.gelu(plain) if gelu else plain, atol=1e-5, rtol=1e-4)
    pairs = torch.randn(20, 2500)
    torch.testing.assert_close(layer(pairs), F.gelu(linear(pairs)) if gelu else linear(pairs), atol=1e-5, rtol=1e-4)
