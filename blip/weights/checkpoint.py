"""PyTorch checkpoints (.pth) read without running anything that they contain.

A pickle can name any function and have it called. PyTorch's own restricted reader refuses files
that hold other objects (a training configuration, say); those are read a second time by an
unpickler that knows how to rebuild tensors and puts an inert placeholder for everything else.
"""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from blip.errors import BundleError


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of the state dict in `path`: under "model" or "state_dict" if there is such a key, else at the top.

    Both formats of torch.save are read. Those of the zip format stay on disk, memory-mapped, until
    they are used; the older format is read whole.

    Raises:
        BundleError: the file is damaged or is not such a checkpoint.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_records(path)
        try:
            content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
        except pickle.UnpicklingError:
            content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=False, pickle_module=_inert)
    except Exception as error:  # on a malformed file the parsers can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BundleError(f"{path} is not a readable PyTorch checkpoint ({reason}); fetch it again.") from error
    state = content.get("model", content.get("state_dict", content)) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise BundleError(f"{path} holds no model weights; fetch the checkpoint again.")
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise BundleError(f"{path} has {name} as something else than an array of numbers; save it as one.")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether each of its numbers is in the file, in a way that every operation understands."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    # A view may show one number many times: a small file would take any amount of memory.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_records(path: Path) -> None:
    """Check the CRC-32 of every record, which memory-mapping would skip."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("it was packed again with compression")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its record {damaged} is damaged")


class _Placeholder:
    """Stands for an object of any unknown class: takes whatever the pickle gives it and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    tensor: Tensor = torch._utils._rebuild_tensor(storage, offset, size, stride)
    return tensor


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


class _Unpickler(pickle._Unpickler):
    """Calls only three functions, all from this file, and sets no object's attributes.

    The pure-Python unpickler is the base because the C one cannot be told to skip BUILD, the
    instruction that runs `__setstate__` or sets attributes.
    """

    _known: ClassVar[Mapping[tuple[str, str], Callable[..., Any]]] = {
        ("collections", "OrderedDict"): dict,
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
    }

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        return self._known.get((module, name), _Placeholder)

    def _build(self) -> None:
        self.stack.pop()

    def _binpersid(self) -> None:
        reference = self.stack.pop()
        is_class = isinstance(reference, tuple) and reference[:1] == ("module",)  # torch would compare its source
        self.stack.append(_Placeholder if is_class else self.persistent_load(reference))

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _build,
        pickle.BINPERSID[0]: _binpersid,
    }


# What torch.load asks of a `pickle_module`; it subclasses Unpickler to resolve storages.
_inert = SimpleNamespace(
    __name__="inert", Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load()
)
