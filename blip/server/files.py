"""The temporary files of this server: closed and removed by code, also those of a server that was killed."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from types import TracebackType

from blip.errors import ConfigError, FetchError

PREFIX = "blip-server-"


class Files:
    """A directory of its own for each server, which is locked as long as the server lives.

    Raises:
        ConfigError: no directory can be made.
    """

    def __init__(self) -> None:
        try:
            parent = Path(tempfile.gettempdir())
            _remove_leftovers(parent)
            self._directory, self._lock = _locked(parent)
        except OSError as error:
            raise ConfigError(
                f"TMPDIR has no room for a directory ({error.strerror}); free some, or set it to another."
            ) from error

    def new(self) -> Path:
        """A path that nothing is at yet."""
        return self._directory / uuid.uuid4().hex

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)


class Writer:
    """A new file at `path`, in a `with` block.

    Raises:
        FetchError: the image cannot be stored.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("xb", buffering=0)  # nothing is left to be written when it is closed
        except OSError as error:
            raise _not_stored(error) from error

    def write(self, block: bytes | memoryview) -> int:
        """Write all of `block`; its size."""
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _not_stored(error) from error
        return len(block)

    def close(self) -> None:
        """Close it, whatever state it is in."""
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _not_stored(error: OSError) -> FetchError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FetchError(
            "image could not be stored: the server's disk is full; try again later or send a smaller file."
        )
    return FetchError(f"image could not be stored by the server ({error.strerror}); try again later.")


def _locked(parent: Path) -> tuple[Path, int]:
    """A new directory and its descriptor, which keeps it locked."""
    while True:  # until it is one that no other server, which starts as well, takes for a leftover and removes
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(directory, os.O_RDONLY)
            if _lock(descriptor) and directory.exists():
                return directory, descriptor
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock it, where there are locks; False where another has it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def _remove_leftovers(parent: Path) -> None:
    """Remove the directories of this user's servers that do not live any more: nobody has them locked."""
    for directory in parent.glob(f"{PREFIX}*/"):
        with contextlib.suppress(OSError):  # it is in use, or has just been removed by another server
            if directory.is_symlink() or directory.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(descriptor)
