"""Where a task's model can come from: a model of LAVIS's, a checkpoint file, or a model in Hugging Face's layout."""

import errno
import fnmatch
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from blip.errors import BundleError
from blip.weights import hugging_face, published
from blip.weights.bundle import reading
from blip.weights.checkpoint import read_checkpoint
from blip.weights.download import Report, fetch, received, sized
from blip.weights.making import check_room, describe, read_vocabulary
from blip.weights.shapes import PURPOSES, check_kind, dimensions

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
FILE_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Model:
    """A model that is ready to be converted.

    Attributes:
        config: its config.json in the bundle.
        vocabulary: tokens by id.
        path: the file or directory that it is read from, for errors.
    """

    config: Mapping[str, Any]
    vocabulary: list[str]
    path: Path


class Source(ABC):
    """What a user named. `open` comes first, then `fetch`, `origin` and `state`.

    Attributes:
        is_known: whether its weights are a publisher's; what a user gave must not have weights of another model.
    """

    is_known: ClassVar[bool] = False

    @abstractmethod
    def recipe(self) -> str:
        """What it is, with the hash of each file that a user gave."""

    @abstractmethod
    def open(self, downloads: Path, report: Report) -> Model:
        """Find out all but the weights.

        Raises:
            BundleError: it is not a BLIP for the task, or cannot be reached.
        """

    def missing_bytes(self, downloads: Path) -> int:  # noqa: ARG002
        """How much is still to be downloaded."""
        return 0

    def fetch(self, downloads: Path, report: Report) -> None:  # noqa: B027 - most have nothing to fetch
        """Download what is still missing.

        Raises:
            BundleError: it cannot be fetched.
        """

    def origin(self) -> str:
        """What it is made from: the recipe, or more."""
        return self.recipe()

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All weights by LAVIS's names, and what else the file has.

        Raises:
            BundleError: it is damaged.
        """

    def discard(self) -> None:  # noqa: B027
        """Remove what was downloaded and turned out to be damaged, so that the next run fetches it again."""

    def downloaded(self, downloads: Path) -> list[Path]:  # noqa: ARG002
        """Where what was fetched lies."""
        return []


class Published(Source):
    """A model that LAVIS names."""

    is_known = True

    def __init__(self, task: str, model_type: str) -> None:
        self._name = f"{published.MODELS[task][0]} {model_type}"
        self._file, self._config = published.checkpoint(task, model_type)
        self._path: Path | None = None

    def recipe(self) -> str:
        """LAVIS's name."""
        return self._name

    def open(self, downloads: Path, report: Report) -> Model:
        """Fetch the vocabulary, and ask how long the checkpoint is."""
        words = read_vocabulary(fetch(published.vocabulary(), downloads, report))
        self._file = sized(self._file, downloads, report)
        return Model(self._config, words, downloads / self._file.name)

    def missing_bytes(self, downloads: Path) -> int:
        """Of the checkpoint."""
        return (self._file.size or 0) - received(self._file, downloads)

    def origin(self) -> str:
        """LAVIS's name, and the file with its hash."""
        assert self._path is not None
        return f"{self._name}, {describe(self._path)}"

    def fetch(self, downloads: Path, report: Report) -> None:
        """Download the checkpoint."""
        self._path = fetch(self._file, downloads, report)

    def state(self) -> dict[str, Tensor]:
        """Read the checkpoint."""
        assert self._path is not None
        return read_checkpoint(self._path)

    def discard(self) -> None:
        """Remove the checkpoint."""
        assert self._path is not None
        self._path.unlink()

    def downloaded(self, downloads: Path) -> list[Path]:
        """The vocabulary and the checkpoint."""
        return [downloads / file.name for file in (published.vocabulary(), self._file)]


class Checkpoint(Source):
    """A checkpoint file of LAVIS or BLIP. Its vocabulary lies beside it as vocab.txt, or is BERT's."""

    def __init__(self, task: str, path: Path) -> None:
        self._task, self._path = task, path
        self._beside = path.with_name("vocab.txt")

    def recipe(self) -> str:
        """The file with its size and hash, and so the vocabulary beside it."""
        return self._described

    @cached_property
    def _described(self) -> str:
        return " with ".join(describe(path) for path in (self._path, self._beside) if path.is_file())

    def open(self, downloads: Path, report: Report) -> Model:
        """Read the dimensions off the weights."""
        shapes = _shapes(self.state())
        check_kind(self._task, shapes, self._path)
        defaults = published.DEFAULTS[self._task]
        config = {**defaults, **dimensions(self._task, shapes, self._path)}
        config["max_txt_len"] = min(config["max_txt_len"], config["text"]["max_position_embeddings"])
        own = self._beside.is_file()
        words = read_vocabulary(self._beside if own else fetch(published.vocabulary(), downloads, report))
        size = config["text"]["vocab_size"]
        added = [token for token in ("[DEC]", "[ENC]") if token not in words]
        if len(words) + len(added) != size:
            raise BundleError(
                f"{self._path} has embeddings of {size} tokens and its vocabulary {len(words) + len(added)}; "
                f"put its own beside it as {self._beside.name}."
            )
        return Model(config, words, self._path)

    def state(self) -> dict[str, Tensor]:
        """Read it again; between the two another source may have needed the memory."""
        return _plain(read_checkpoint(self._path))

    def downloaded(self, downloads: Path) -> list[Path]:
        """BERT's vocabulary, where it was taken."""
        return [] if self._beside.is_file() else [downloads / published.vocabulary().name]


class HuggingFace(Source):
    """A directory in the layout of Hugging Face's transformers."""

    def __init__(self, task: str, directory: Path) -> None:
        self._task, self.directory = task, directory

    def recipe(self) -> str:
        """Its files, each with its size and hash."""
        return self._described

    @cached_property
    def _described(self) -> str:
        files = {self.directory / name for name in hugging_face.FILES if (self.directory / name).is_file()}
        files |= set(hugging_face.weight_files(self.directory))
        return f"{self.directory.name}: {', '.join(describe(path) for path in sorted(files))}"

    def open(self, downloads: Path, report: Report) -> Model:  # noqa: ARG002
        """Read its settings and compare them with the shapes of its weights."""
        hugging_face.check_architecture(self.directory, self._task)
        shapes = _shapes(self.state())
        check_kind(self._task, shapes, self.directory)
        return Model(*hugging_face.settings(self.directory, self._task, shapes), self.directory)

    def state(self) -> dict[str, Tensor]:
        """Read its weights."""
        return hugging_face.state(self.directory)


class Hub(Source):
    """A repository on Hugging Face's hub, or on the server that HF_ENDPOINT names."""

    def __init__(self, task: str, repository: str) -> None:
        self._task, self._repository = task, repository
        self._local: HuggingFace | None = None

    @cached_property
    def _info(self) -> Any:
        """What the hub tells of it: its commit and its files."""
        from huggingface_hub import HfApi

        with self._reaching():
            return HfApi().model_info(self._repository, files_metadata=True)

    def recipe(self) -> str:
        """Its name and the commit that it has now."""
        return f"{self._repository}@{self._info.sha or 'main'}"

    def open(self, downloads: Path, report: Report) -> Model:
        """Download it: the hub's own library resumes and checks."""
        directory = self._directory(downloads)
        self._fetch([*hugging_face.FILES], directory)
        hugging_face.check_architecture(directory, self._task)
        sizes = {file.rfilename: file.size or 0 for file in self._info.siblings or []}
        for pattern in hugging_face.WEIGHT_PATTERNS:
            if names := [name for name in fnmatch.filter(sizes, pattern) if "/" not in name]:
                check_room(downloads.parent, sum(sizes[name] for name in names if not (directory / name).is_file()))
                report(f"Fetching the weights of {self._repository}.")
                self._fetch(names, directory)
                break
        self._local = HuggingFace(self._task, directory)
        return self._local.open(downloads, report)

    def origin(self) -> str:
        """Its name and commit, and its files with their hashes."""
        assert self._local is not None
        return self._local.recipe().replace(self._local.directory.name, self.recipe(), 1)

    def state(self) -> dict[str, Tensor]:
        """Read its weights."""
        assert self._local is not None
        return self._local.state()

    def discard(self) -> None:
        """Remove its files."""
        assert self._local is not None
        shutil.rmtree(self._local.directory)

    def downloaded(self, downloads: Path) -> list[Path]:
        """Its directory."""
        return [self._directory(downloads)]

    def _directory(self, downloads: Path) -> Path:
        return downloads / self._repository.replace("/", "--")

    def _fetch(self, patterns: list[str], directory: Path) -> None:
        from huggingface_hub import snapshot_download

        with self._reaching():
            snapshot_download(self._repository, revision=self._info.sha, allow_patterns=patterns, local_dir=directory)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library has many, and those of the library under it
            if getattr(error, "errno", None) in DISK:
                raise
            raise BundleError(
                f"{self._repository} cannot be fetched from the hub ({type(error).__name__}); check its name, the "
                "network and HF_TOKEN, or give a directory."
            ) from error


def find(task: str, given: str) -> Source:
    """The source that `given` names for a task.

    Raises:
        BundleError: it names nothing.
    """
    for other, (model, types) in published.MODELS.items():
        prefix, _, name = given.replace("/", " ").partition(" ")
        name = name if prefix == model else given
        if name in types:
            if other != task:
                raise BundleError(f"{given} is a model for {PURPOSES[other]}; give it with --{other}.")
            return Published(task, name)
    if not given.strip() or not given.isprintable():
        raise BundleError(f"--{task} {given!a} names no model; give one, or rename it in plain letters.")
    if address := re.fullmatch(r"https?://[^/]+/([\w-][\w.-]*/[\w-][\w.-]*)(/.*)?", given):
        raise BundleError(f"--{task} takes the name of a repository and no address; give {address[1]}.")
    path = Path(os.path.expanduser(given))
    with reading(path, "check the path"):
        if path.is_dir():
            return HuggingFace(task, path.resolve())
        if path.is_file():
            is_part = path.suffix == ".bin" and path.with_name("config.json").is_file()
            if is_part or path.suffix == ".safetensors":
                raise BundleError(f"{path} is a part of a model; give its directory, {path.parent}.")
            return Checkpoint(task, path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given) and path.suffix not in FILE_ENDINGS:
        return Hub(task, given)
    known = ", ".join(published.MODELS[task][1])
    raise BundleError(
        f"{given} is no model of LAVIS's for {PURPOSES[task]} ({known}), no file and no directory; give one of them."
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that training programs give all names."""
    for prefix in ("_orig_mod.", "module.", "model."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
