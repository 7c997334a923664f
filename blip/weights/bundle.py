"""The weights bundle: one directory that holds everything the predictor loads.

    manifest.json                       format, name, dtype, source, note; size and SHA-256 of every file
    vocab.txt                           WordPiece vocabulary, one token a line
    caption/ answer/ match/             config.json (dimensions) + model.safetensors, and vocab.txt where it is another

It has one task, two, or all three. A bundle is written under a temporary name and renamed when it is complete, so a
directory with the final name is always whole.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from blip.errors import BundleError
from blip.weights.exchange import exchange

if TYPE_CHECKING:  # a bundle can be verified while torch is being imported
    from torch import Tensor

FORMAT = 2
READABLE = (1, FORMAT)  # format 1 always has three tasks of LAVIS's
TASKS = ("caption", "answer", "match")
DTYPES = ("float16", "float32")  # that weights are stored in
MANIFEST = "manifest.json"
VOCABULARY = "vocab.txt"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = (VOCABULARY, *(f"{task}/{name}" for task in TASKS for name in (CONFIG, WEIGHTS)))  # of one with all tasks


@dataclass(frozen=True)
class Entry:
    """The manifest's entry for one file: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `open_bundle` has checked the manifest and the sizes; `verify` checks the hashes.

    Attributes:
        path: its directory.
        name: "demo", "pretrained", or "made" by `python -m blip bundle make`.
        dtype: what the weights are stored as.
        source: what it was made from, with sizes and hashes.
        note: one sentence.
        files: what it consists of, beside the manifest.
        recipe: what `bundle make` was asked for, by task; empty for the others.
        changes: what `bundle set` has changed since, in order.
    """

    path: Path
    name: str
    dtype: str
    source: str
    note: str
    files: Mapping[str, Entry]
    recipe: Mapping[str, str] = field(default_factory=dict)
    changes: Sequence[str] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that it has a model for."""
        return tuple(task for task in TASKS if f"{task}/{CONFIG}" in self.files)

    def vocabulary(self, task: str) -> Path:
        """The vocabulary of one task's model."""
        own = f"{task}/{VOCABULARY}"
        return self.path / (own if own in self.files else VOCABULARY)

    def verify(self) -> None:
        """Hash every file.

        Raises:
            BundleError: a file's content is not what the manifest says.
        """
        for difference in chain(self.missing(), self.altered()):
            raise BundleError(f"{difference}; restore the bundle.")

    def missing(self) -> Iterator[str]:
        """Name the files that are not there in the size that the manifest says."""
        for name, entry in self.files.items():
            file = self.path / name
            try:
                size = _size(file)
            except OSError as error:
                yield f"{file} cannot be read ({error.strerror})"
                continue
            if size != entry.size:
                found = "is missing" if size is None else f"has {size} bytes"
                yield f"{file} {found} and {MANIFEST} says {entry.size} bytes"

    def altered(self) -> Iterator[str]:
        """Name the files of the right size whose content is not what the manifest says."""
        whole = {self.path / name: entry for name, entry in self.files.items() if self._is_long(name, entry)}
        with ThreadPoolExecutor(2) as pool:  # hashlib releases the GIL
            for difference in pool.map(_difference, whole, whole.values()):
                if difference:
                    yield difference

    def _is_long(self, name: str, entry: Entry) -> bool:
        with suppress(OSError):
            return _size(self.path / name) == entry.size
        return False

    def unknown(self) -> Iterator[str]:
        """Name the files that the manifest does not know."""
        known = {self.path / name for name in (*self.files, MANIFEST)}
        for file in sorted(self.path.rglob("*")):
            if not file.is_dir() and file not in known:
                yield f"{file} is not in {MANIFEST}"

    def config(self, task: str) -> dict[str, Any]:
        """The dimensions, image size, prompt and lengths of one task's model."""
        return read_json(self.path / task / CONFIG)

    def tensors(self, task: str) -> "dict[str, Tensor]":
        """One task's weights by parameter name, in the bundle's dtype, on the CPU.

        Large ones are memory-mapped in groups; a group is freed with the last of its tensors.

        Raises:
            BundleError: the file is not a safetensors file.
        """
        path = self.path / task / WEIGHTS
        tensors = {}
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for start in range(0, len(names), 10):
                with safe_open(path, framework="pt") as file:  # a mapping of its own
                    for name in names[start : start + 10]:
                        tensor = file.get_tensor(name)
                        tensors[name] = tensor.clone() if tensor.nbytes < 1 << 16 else tensor
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} is not a readable safetensors file ({error}); restore the bundle.") from error
        return tensors


def open_bundle(path: Path) -> Bundle:
    """Open the bundle at `path`, checking its manifest and that every file has its size.

    Raises:
        BundleError: there is no bundle, its format is not ours, or a file is missing or short.
    """
    bundle = read_manifest(path)
    for difference in bundle.missing():
        raise BundleError(f"{difference}; restore the bundle.")
    return bundle


def read_manifest(path: Path) -> Bundle:
    """The bundle that the manifest in `path` describes; its files are not looked at.

    Raises:
        BundleError: there is no manifest, or it is not one of ours.
    """
    manifest_path = path / MANIFEST
    with reading(manifest_path):
        is_there = manifest_path.is_file()
    if not is_there:
        raise BundleError(
            f"There is no weights bundle at {path}: {MANIFEST} is missing; "
            "set BLIP_WEIGHTS to demo, pretrained or a bundle directory."
        )
    manifest = read_json(manifest_path)
    if manifest.get("format") not in READABLE:
        raise BundleError(
            f"{manifest_path} has bundle format {manifest.get('format')!r} and this release reads format {FORMAT}; "
            "update the software or make the bundle anew."
        )
    try:
        return _described(path, manifest)
    except (KeyError, TypeError) as error:
        reason = str(error.args[0])
        raise BundleError(f"{manifest_path} is incomplete ({reason}); restore the bundle.") from error


def _described(path: Path, manifest: Mapping[str, Any]) -> Bundle:
    """The bundle of a manifest in which every value has its type.

    Raises:
        KeyError, TypeError: one has not, or a file is missing or strange.
    """
    texts = {name: _typed(manifest[name], str, name) for name in ("name", "dtype", "source", "note")}
    if texts["dtype"] not in DTYPES:
        raise TypeError(f"its dtype is {texts['dtype']!r}")
    files = {}
    for name, entry in _typed(manifest["files"], dict, "files").items():
        size, sha256 = (_typed(entry, dict, name).get(key) for key in ("size", "sha256"))
        files[name] = Entry(_typed(size, int, f"size of {name}"), _typed(sha256, str, f"sha256 of {name}"))
    recipe = _typed(manifest.get("recipe", {}), dict, "recipe")
    changes = _typed(manifest.get("changes", []), list, "changes")
    for text in (*recipe.values(), *changes):
        _typed(text, str, "recipe or changes")
    tasks = TASKS if manifest["format"] == 1 else [task for task in TASKS if f"{task}/{CONFIG}" in files]
    needed = {VOCABULARY, *(f"{task}/{name}" for task in tasks for name in (CONFIG, WEIGHTS))}
    absent = sorted(needed - files.keys()) if tasks else ["a task"]
    strange = sorted(files.keys() - needed - {f"{task}/{VOCABULARY}" for task in tasks})
    if absent or strange:
        raise KeyError(", ".join(absent) if absent else f"it names {strange[0]}, which no bundle has")
    return Bundle(path, **texts, files=files, recipe=recipe, changes=changes)


def _typed(value: Any, kind: type, name: str) -> Any:
    is_odd = isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value
    if not isinstance(value, kind) or isinstance(value, bool) or is_odd:
        raise TypeError(f"its {name} is {ascii(value)[:50]}")
    return value


@contextmanager
def understanding(path: Path, task: str) -> Iterator[None]:
    """Say in one sentence where a config.json lacks a setting, or has one of another type, while it is worked with.

    Raises:
        BundleError: in place of what Python raises then.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        where = path / task / CONFIG
        raise BundleError(f"{where} is not the configuration of a model ({reason}); make the bundle anew.") from error


class BundleWriter:
    """Writes a bundle, one model at a time so that only one has to be in memory.

    Used as a context manager: leaving it normally renames the finished directory to `path`
    (replacing a bundle that is there), leaving it by an exception removes what was written.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        dtype: str,
        source: str,
        note: str,
        recipe: Mapping[str, str] | None = None,
        changes: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "dtype": dtype,
            "source": source,
            "note": note,
            **({"recipe": dict(recipe)} if recipe else {}),
            **({"changes": list(changes)} if changes else {}),
        }
        self._files: dict[str, Entry | None] = {}  # in order; None for what is still to be hashed

    def __enter__(self) -> "BundleWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=temporary_prefix(self.path), dir=self.path.parent))
        return self

    def vocabulary(self, tokens: Sequence[str], task: str | None = None) -> None:
        """Write the WordPiece vocabulary, or that of one task where it is another; a token's line is its id."""
        path = self._place(VOCABULARY if task is None else f"{task}/{VOCABULARY}")
        path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")

    def config(self, task: str, config: Mapping[str, Any]) -> None:
        """Write one task's config."""
        self._place(f"{task}/{CONFIG}").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def link(self, name: str, source: Path, entry: Entry) -> None:
        """Take a file of another bundle as it is, with what its manifest says of it."""
        path = self._place(name)
        try:
            path.hardlink_to(source)
        except OSError:  # on another disk, or one without hard links, or not allowed for another's file
            shutil.copyfile(source, path)
        self._files[name] = entry

    def model(self, task: str, config: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> None:
        """Write one task's config and weights; tied weights are given once."""
        from safetensors.torch import save_file

        self.config(task, config)
        path = self._place(f"{task}/{WEIGHTS}")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            path.chmod(0o644)  # safetensors makes it private
        except SafetensorError as error:
            raise BundleError(f"{path} cannot be written ({error}); make room and run again.") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _place(self, name: str) -> Path:
        path = self._partial / name
        path.parent.mkdir(exist_ok=True)
        self._files[name] = None
        return path

    def _publish(self) -> None:
        files = {
            name: asdict(entry or Entry((self._partial / name).stat().st_size, digest(self._partial / name)))
            for name, entry in self._files.items()
        }
        manifest = json.dumps({**self._manifest, "files": files}, indent=2) + "\n"
        (self._partial / MANIFEST).write_text(manifest, encoding="utf-8")
        read_manifest(self._partial)
        self._partial.chmod(0o755)  # mkdtemp makes it private
        if not self.path.exists():
            self._partial.rename(self.path)
            return
        check_replaceable(self.path)
        if not exchange(self._partial, self.path):
            self.path.rename(_retired(self.path))
            try:
                self._partial.rename(self.path)
            finally:
                remove_leftovers(self.path)


def check_replaceable(path: Path) -> None:
    """Refuse a `path` that a new bundle must not replace: anything but a bundle or an empty directory.

    Raises:
        BundleError: something else is there.
    """
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise BundleError(f"{path} exists and is not a weights bundle; remove it or choose another directory.")


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of the bundle `path` left behind; no writer may be running.

    A bundle that was being replaced comes back where the new one did not get its name.
    """
    if _retired(path).exists() and not path.exists():
        _retired(path).rename(path)
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(temporary_prefix(path)):
            shutil.rmtree(leftover)


def temporary_prefix(path: Path) -> str:
    """How the names begin of what is written beside `path` before it is complete."""
    return f".{path.name}.partial-"


def _retired(path: Path) -> Path:
    """Where a bundle lies for a moment while another gets its name."""
    return path.with_name(f"{temporary_prefix(path)}retired")


def _size(file: Path) -> int | None:
    """In bytes; None where there is no file."""
    return file.stat().st_size if file.is_file() else None


def digest(path: Path, algorithm: str = "sha256") -> str:
    """A file's digest in hex.

    Raises:
        BundleError: the file cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _difference(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file of the right size."""
    try:
        if digest(path) != entry.sha256:
            return f"{path} was altered: its SHA-256 is not the one in {MANIFEST}"
    except BundleError as error:
        return str(error).partition(";")[0]
    return None


@contextmanager
def reading(path: Path, fix: str = "set its permissions or restore it") -> Iterator[None]:
    """Say in one sentence that a file or directory cannot be read, and the `fix`.

    Raises:
        BundleError: in place of what Python raises then.
    """
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror or error}); {fix}.") from error


def read_json(path: Path, fix: str = "restore the bundle") -> dict[str, Any]:
    """A JSON object.

    Raises:
        BundleError: the file is missing or something else; its sentence ends with `fix`.
    """
    try:
        with reading(path, fix):
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise BundleError(f"{path} is not a file; {fix}.")
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); {fix}.") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} does not hold a JSON object; {fix}.")
    return content
