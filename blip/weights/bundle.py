"""The weights bundle: one directory that holds everything the predictor loads.

    manifest.json                       format, name, dtype, source, note; size and SHA-256 of every file
    vocab.txt                           WordPiece vocabulary, one token a line
    caption/ answer/ match/             config.json (dimensions) + model.safetensors

A bundle is written under a temporary name and renamed when it is complete, so a directory
with the final name is always whole.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from blip.errors import BundleError

if TYPE_CHECKING:  # a bundle can be verified while torch is being imported
    from torch import Tensor

FORMAT = 1
TASKS = ("caption", "answer", "match")
MANIFEST = "manifest.json"
VOCABULARY = "vocab.txt"
FILES = (VOCABULARY, *(f"{task}/{name}" for task in TASKS for name in ("config.json", "model.safetensors")))


@dataclass(frozen=True)
class Entry:
    """The manifest's entry for one file: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `open_bundle` has checked the manifest and the sizes; `verify` checks the hashes."""

    path: Path
    name: str
    dtype: str
    source: str
    note: str
    files: Mapping[str, Entry]

    def verify(self) -> None:
        """Hash every file, two at a time (hashlib releases the GIL).

        Raises:
            BundleError: a file's content is not what the manifest says.
        """
        with ThreadPoolExecutor(2) as pool:
            digests = pool.map(lambda name: digest(self.path / name), self.files)
            for (name, entry), found in zip(self.files.items(), digests, strict=True):
                if found != entry.sha256:
                    raise BundleError(
                        f"{self.path / name} was altered: its SHA-256 is not the one in {MANIFEST}; restore the bundle."
                    )

    def config(self, task: str) -> dict[str, Any]:
        """The dimensions, image size, prompt and lengths of one task's model."""
        return _read_json(self.path / task / "config.json")

    def tensors(self, task: str) -> "dict[str, Tensor]":
        """One task's weights by parameter name, in the bundle's dtype, on the CPU.

        Large ones are memory-mapped in groups; a group is freed with the last of its tensors.

        Raises:
            BundleError: the file is not a safetensors file.
        """
        path = self.path / task / "model.safetensors"
        tensors = {}
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for start in range(0, len(names), 10):
                with safe_open(path, framework="pt") as file:  # a mapping of its own
                    for name in names[start : start + 10]:
                        tensor = file.get_tensor(name)
                        tensors[name] = tensor.clone() if tensor.nbytes < 1 << 16 else tensor
        except SafetensorError as error:
            raise BundleError(f"{path} is not a readable safetensors file ({error}); restore the bundle.") from error
        return tensors


def open_bundle(path: Path) -> Bundle:
    """Open the bundle at `path`, checking its manifest and that every file has its size.

    Raises:
        BundleError: there is no bundle, its format is not ours, or a file is missing or short.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise BundleError(
            f"There is no weights bundle at {path}: {MANIFEST} is missing; "
            "set BLIP_WEIGHTS to demo, pretrained or a bundle directory."
        )
    manifest = _read_json(manifest_path)
    if manifest.get("format") != FORMAT:
        raise BundleError(
            f"{manifest_path} has bundle format {manifest.get('format')!r} and this release reads format {FORMAT}; "
            "update the software or rebuild the bundle with scripts/download_models."
        )
    try:
        files = {name: Entry(**manifest["files"][name]) for name in FILES}
        bundle = Bundle(path, manifest["name"], manifest["dtype"], manifest["source"], manifest["note"], files)
    except (KeyError, TypeError) as error:
        raise BundleError(f"{manifest_path} is incomplete ({error}); restore the bundle.") from error
    for name, entry in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise BundleError(f"{file} {found} and {MANIFEST} says {entry.size} bytes; restore the bundle.")
    return bundle


class BundleWriter:
    """Writes a bundle, one model at a time so that only one has to be in memory.

    Used as a context manager: leaving it normally renames the finished directory to `path`
    (replacing a bundle that is there), leaving it by an exception removes what was written.
    """

    def __init__(self, path: Path, *, name: str, dtype: str, source: str, note: str) -> None:
        self.path = path
        self._manifest = {"format": FORMAT, "name": name, "dtype": dtype, "source": source, "note": note}

    def __enter__(self) -> "BundleWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=_temporary_prefix(self.path), dir=self.path.parent))
        return self

    def vocabulary(self, tokens: Sequence[str]) -> None:
        """Write the WordPiece vocabulary; a token's line number is its id."""
        (self._partial / VOCABULARY).write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")

    def model(self, task: str, config: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> None:
        """Write one task's config and weights; tied weights are given once."""
        from safetensors.torch import save_file

        directory = self._partial / task
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        path = directory / "model.safetensors"
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

    def _publish(self) -> None:
        files = {
            name: {"size": (self._partial / name).stat().st_size, "sha256": digest(self._partial / name)}
            for name in FILES
        }
        manifest = json.dumps({**self._manifest, "files": files}, indent=2) + "\n"
        (self._partial / MANIFEST).write_text(manifest, encoding="utf-8")
        self._partial.chmod(0o755)  # mkdtemp makes it private
        if self.path.exists():
            check_replaceable(self.path)
            retired = Path(tempfile.mkdtemp(prefix=_temporary_prefix(self.path), dir=self.path.parent))
            self.path.rename(retired / self.path.name)
            self._partial.rename(self.path)
            shutil.rmtree(retired)
        else:
            self._partial.rename(self.path)


def check_replaceable(path: Path) -> None:
    """Refuse a `path` that a new bundle must not replace: anything but a bundle or an empty directory.

    Raises:
        BundleError: something else is there.
    """
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise BundleError(f"{path} exists and is not a weights bundle; remove it or choose another directory.")


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of the bundle `path` left behind; no writer may be running."""
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(_temporary_prefix(path)):
            shutil.rmtree(leftover)


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def digest(path: Path, algorithm: str = "sha256") -> str:
    """A file's digest in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}); restore the bundle.") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} does not hold a JSON object; restore the bundle.")
    return content
