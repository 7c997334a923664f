"""What every making of a bundle does: alone in its directory, with room on the disk, from weights that fit."""

import contextlib
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from blip.errors import BundleError
from blip.lavis import interpolate_positions
from blip.weights import bundle
from blip.weights.bundle import digest, reading, remove_leftovers
from blip.weights.download import Report

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in bundle.DTYPES}
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that a weight may be given in
DOWNLOADS = "blip-downloads"  # beside the bundle; what was fetched for it is removed when it is finished
LOCK = ".blip.lock"  # beside the bundle, while one is made
_FIXES = {
    errno.ENAMETOOLONG: "choose a shorter name for the bundle",
    errno.EEXIST: "choose another directory",
    errno.ENOTDIR: "choose another directory",
}
POSITIONS = "visual_encoder.pos_embed"


@contextmanager
def alone(out: Path, report: Report) -> Iterator[Path]:
    """Have the directory of the bundle `out` for this process; gives its path without links.

    What a killed process left is removed first.

    Raises:
        BundleError: the disk is full, or nothing can be written there.
    """
    try:
        out = out.resolve()
    except (OSError, RuntimeError) as error:  # the second of links that lead to themselves
        raise BundleError(f"{out} is no place for a bundle ({error}); choose another directory.") from error
    if not out.name:
        raise BundleError(f"{out} is no place for a bundle; choose a directory in it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out.parent / LOCK, report):
            remove_leftovers(out)
            yield out
    except OSError as error:
        where = error.filename or out.parent
        fix = _FIXES.get(error.errno or 0, "make room or set its permissions and run again")
        raise BundleError(f"{where} cannot be written: {error.strerror or error}; {fix}.") from error


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards."""
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"Waiting for another process that makes a bundle in {path.parent}.")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file.fileno()):
                continue  # its last holder removed it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_downloads(paths: Iterable[Path]) -> None:
    """Remove files and directories that were downloaded, and the directory of downloads where it is empty then."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def check_room(directory: Path, needed: int) -> None:
    """Refuse to begin where the disk of `directory` has less than `needed` bytes.

    Raises:
        BundleError: it says both numbers.
    """
    free = shutil.disk_usage(directory).free
    if free < needed * 1.01:
        raise BundleError(
            f"{directory} has {free / 1e9:.2f} GB free and the bundle with its downloads needs "
            f"{needed / 1e9:.2f} GB; free space or choose another disk."
        )


def stored_size(net: nn.Module, dtype: str) -> int:
    """The bytes of the parameters of `net` in a bundle of that dtype."""
    return sum(parameter.numel() for parameter in net.parameters()) * DTYPES[dtype].itemsize


def strip(net: nn.Module, state: dict[str, Tensor], path: Path, dtype: str) -> dict[str, Tensor]:
    """The parameters of `net` from a checkpoint's `state` in `dtype`, each tied one once; nothing else.

    Position embeddings for another size of image are interpolated, as LAVIS does when it loads them.

    Raises:
        BundleError: naming `path` and the weight that is missing, misshapen, ambiguous or not finite.
    """
    names: dict[nn.Parameter, list[str]] = {}  # parameters compare by identity
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name in state.keys() - {name for tied in names.values() for name in tied}:
        del state[name]  # an old-format checkpoint is all in memory
    tensors = {}
    for parameter, (name, *others) in names.items():
        copies = [state.pop(copy) for copy in (name, *others) if copy in state]
        if not copies:
            raise BundleError(f"{path} lacks the weight {name}; give the checkpoint that belongs here.")
        if any(copy.dtype not in NUMBERS for copy in copies):
            raise BundleError(f"{path} has the weight {name} in {copies[0].dtype}; save it in float16 or float32.")
        tensor = copies[0]
        if name == POSITIONS:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints
                tensor = interpolate_positions(tensor, net)
        if tensor.shape != parameter.shape:
            shapes = f"{list(tensor.shape)} instead of {list(parameter.shape)}"
            raise BundleError(f"{path} has the weight {name} with shape {shapes}; give the right checkpoint.")
        if not all(torch.equal(tensor, copy) for copy in copies[1:]):
            raise BundleError(
                f"{path} has different values for {name} and {others[0]}, which are one weight here; "
                "give a model that ties them."
            )
        tensors[name] = tensor.to(DTYPES[dtype])
        if not tensors[name].isfinite().all():
            if tensor.isfinite().all():
                raise BundleError(f"{path} has values in the weight {name} too large for {dtype}; use float32.")
            raise BundleError(f"{path} has values in the weight {name} that are no numbers; fetch it again.")
    return tensors


def describe(path: Path) -> str:
    """A file's name, size and hash, as a manifest says what a bundle was made from."""
    return f"{path.name} {path.stat().st_size} bytes sha256:{digest(path)}"


def read_vocabulary(path: Path) -> list[str]:
    """The tokens of a vocabulary file, in the order of their ids.

    Raises:
        BundleError: it is not UTF-8, or not a vocabulary.
    """
    try:
        with reading(path):
            text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8; give the model's own vocabulary.") from error
    return check_vocabulary(path, text.replace("\r\n", "\n").removesuffix("\n").split("\n"))


def check_vocabulary(path: Path, words: list[str]) -> list[str]:
    """`words`, when each is a token of its own that fits on a line.

    Raises:
        BundleError: one is there twice, has a line break, or a token that every BLIP needs is missing.
    """
    seen: set[str] = set()
    for word in words:
        if word in seen or "\n" in word or "\r" in word or (not word.isascii() and _has_surrogates(word)):
            shown = ascii(word[:50])
            raise BundleError(f"{path} has the token {shown} twice, in two lines or damaged; give the model's own.")
        seen.add(word)
    for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
        if token not in seen:
            raise BundleError(f"{path} lacks the token {token}, which a BLIP needs; give the model's own vocabulary.")
    return words


def _has_surrogates(word: str) -> bool:
    """Whether it cannot be written as UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in word)
