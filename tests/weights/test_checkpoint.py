"""Checkpoints are read in both of PyTorch's formats, and nothing in them ever runs."""

import argparse
import contextlib
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blip.errors import BundleError
from blip.weights.checkpoint import read_checkpoint

STATE = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), half=torch.ones(4, dtype=torch.float16))

WRAPS: list[Callable[[Any], Any]] = [
    lambda state: state,
    lambda state: {"model": state, "epoch": 3},
    lambda state: {"state_dict": state, "epoch": 3},
]
both_formats = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(content: Any, path: Path, legacy: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_state(found: dict[str, Tensor]) -> None:
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in STATE.items())


@both_formats
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_state_dict_is_read_at_the_top_or_under_its_key(
    tmp_path: Path, legacy: bool, wrap: Callable[[Any], Any]
) -> None:
    assert_state(read_checkpoint(save(wrap(STATE), tmp_path / "x.pth", legacy)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 3).to_sparse(),
        lambda: torch.ones(3, 3).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.ones(1).expand(10**12),
    ],
    ids=["sparse", "csr", "quantized", "meta", "nested", "expanded"],
)
@pytest.mark.filterwarnings("ignore")  # torch's own, of kinds that it calls prototypes
def test_what_is_no_array_of_numbers_is_refused_by_name(tmp_path: Path, make: Callable[[], Tensor]) -> None:
    path = save({"model": {"layer.weight": make()}}, tmp_path / "x.pth", False)
    with pytest.raises(
        BundleError, match=r"x\.pth (has layer\.weight as something else than an array|is not a readable)"
    ):
        read_checkpoint(path)


@both_formats
def test_parameters_views_and_shared_storages_keep_their_values(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(12.0)
    state = {"parameter": nn.Parameter(base[:4]), "view": base[2:8].view(2, 3).t(), "tied": base, "again": base}
    read = read_checkpoint(save({"model": state, "by": argparse.Namespace()}, tmp_path / "x.pth", legacy))
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert read["tied"].data_ptr() == read["again"].data_ptr()


class Configuration(dict[str, Any]):
    """A class of a training program: with state, items and attributes of its own."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("this must not run")

    def __reduce__(self) -> Any:
        return Configuration, (), {"state": 1}, iter([1]), iter([("key", "value")])

    def extend(self, _: Any) -> None:
        raise AssertionError("this must not run")


@both_formats
@pytest.mark.parametrize(
    "foreign",
    [
        argparse.Namespace(lr=1e-4),
        Configuration(),
        Path("/tmp"),
        nn.Linear(2, 2),
        torch.optim.SGD,
        [{1: Configuration()}],
    ],
    ids=["namespace", "own class", "path", "module", "type", "nested"],
)
def test_other_objects_beside_the_weights_are_skipped(tmp_path: Path, legacy: bool, foreign: Any) -> None:
    assert_state(read_checkpoint(save({"config": foreign, "model": STATE}, tmp_path / "x.pth", legacy)))


class Call:
    """Pickles to a call of `function` with `arguments`, whatever it is."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def attacks(marker: Path) -> dict[str, Any]:
    """Objects that create `marker` when they are unpickled as pickle would."""
    program = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, program),
        "exec": Call(exec, program),
        "mknod": Call(os.mknod, str(marker)),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "map": Call(list, Call(map, eval, [program])),
        "as a key": {Call(eval, program): 1},
        "torch's own functions": Call(torch.save, {}, str(marker)),
        "torch.load": Call(torch.hub.load, str(marker)),
        "nested pickle": Call(pickle.loads, pickle.dumps(Call(eval, program))),
    }


@both_formats
@pytest.mark.parametrize("name", attacks(Path("x")))
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, legacy: bool, name: str) -> None:
    marker = tmp_path / "it-ran"
    path = save({"model": STATE, "x": attacks(marker)[name]}, tmp_path / "x.pth", legacy)
    try:
        assert_state(read_checkpoint(path))
    except BundleError as error:
        assert str(path) in str(error)  # noqa: PT017
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    for name in ("os.system", "eval", "exec", "mknod", "map", "as a key", "nested pickle"):
        pickle.loads(pickle.dumps(attacks(marker)[name]))
        assert marker.exists(), name
        marker.unlink()


PREAMBLE: list[Any] = [0x1950A86A20F9469CFC6C, 1001, {}]  # of the legacy format: magic number, version, system
HEADER = b"".join(pickle.dumps(value, 2) for value in PREAMBLE)


def text(value: str) -> bytes:
    """The instruction that pushes a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def test_no_function_is_reached_through_another_and_none_is_changed(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    system = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n" + text("os") + b"\x85R" + text("system") + b"tR"
    call = system + text(f"touch {marker}") + b"\x85R"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    change = rebuild + b"}" + text("__defaults__") + b")sb" + rebuild + b"(N}" + text("__name__") + text("x") + b"stb"
    os_again = b"cos\nsystem\n" + text(f"touch {marker}") + b"\x85\x81" + b"(ios\nsystem\n"
    for number, program in enumerate((call, change, os_again)):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(HEADER + b"\x80\x02" + program + b"0}." + pickle.dumps([], 2))
        with contextlib.suppress(BundleError):
            read_checkpoint(path)
    assert not marker.exists()
    function = torch._utils._rebuild_tensor_v2
    assert (function.__name__, function.__defaults__) == ("_rebuild_tensor_v2", (None,))


GLOBALS = [
    (b"os", b"system"),
    (b"builtins", b"eval"),
    (b"builtins", b"getattr"),
    (b"collections", b"OrderedDict"),
    (b"torch._utils", b"_rebuild_tensor_v2"),
    (b"torch._utils", b"_rebuild_parameter"),
    (b"torch", b"FloatStorage"),
]
OPERATIONS = [
    *(b"c" + module + b"\n" + name + b"\n" for module, name in GLOBALS),
    *(b"i" + module + b"\n" + name + b"\n" for module, name in GLOBALS[:4]),
    *(bytes([code]) for code in b"(.0212tlad}]ebsuRoQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"),
    b"K\x05",
    text("touch x"),
    text("storage"),
    b"q\x00",
    b"h\x00",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=25))
def test_any_sequence_of_pickle_instructions_reads_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, operations: list[bytes]
) -> None:
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("it ran"))
    path = tmp_path / "x.pth"
    path.write_bytes(HEADER + b"\x80\x02" + b"".join(operations) + b"." + pickle.dumps([], 2))
    try:
        read_checkpoint(path)
    except BundleError as error:
        assert str(path) in str(error)  # noqa: PT017


@both_formats
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_checkpoint_reads_or_is_refused_by_name(
    tmp_path: Path, legacy: bool, place: float, value: int, cut: bool
) -> None:
    content = bytearray(save({"model": STATE}, tmp_path / "x.pth", legacy).read_bytes())
    position = int(place * len(content))
    content[position] ^= value
    path = tmp_path / "damaged.pth"
    path.write_bytes(content[:position] if cut else content)
    try:
        read = read_checkpoint(path)
    except BundleError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert legacy or all(torch.equal(read[name], STATE[name]) for name in read.keys() & STATE.keys())


def test_a_changed_byte_in_a_tensor_of_a_zip_file_is_noticed(tmp_path: Path) -> None:
    path = save(STATE, tmp_path / "x.pth", legacy=False)
    content = path.read_bytes()
    value = STATE["weight"].numpy().tobytes()
    assert content.count(value) == 1
    path.write_bytes(content.replace(value, value[:-1] + b"\xff"))
    with pytest.raises(BundleError, match=r"x\.pth is not a readable PyTorch checkpoint \(its record .* is damaged\)"):
        read_checkpoint(path)


def test_a_checkpoint_that_was_packed_again_is_refused(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(save(STATE, tmp_path / "x.pth", legacy=False)) as original,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in original.namelist():
            packed.writestr(record, original.read(record))
    with pytest.raises(BundleError, match="packed again"):
        read_checkpoint(tmp_path / "y.pth")


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "x.pth"))
    with pytest.raises(BundleError, match="not a readable PyTorch checkpoint"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04", bytes(1000)])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(BundleError, match=r"x\.pth is not a readable PyTorch checkpoint"):
        read_checkpoint(tmp_path / "x.pth")


@both_formats
@pytest.mark.parametrize("content", [[1], {"model": 3}, {"model": None}])
def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path: Path, legacy: bool, content: Any) -> None:
    with pytest.raises(BundleError, match="holds no model weights"):
        read_checkpoint(save(content, tmp_path / "x.pth", legacy))
