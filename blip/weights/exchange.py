"""Two names on a disk change places at once, so that a kill cannot come between and leave one of them empty."""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100  # of Linux's fcntl.h
_RENAME_EXCHANGE = 2
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # by the kernel, or by this kind of disk


def exchange(one: Path, other: Path) -> bool:
    """Let each have the name of the other; False where the system cannot.

    Raises:
        OSError: one is missing, or may not be renamed.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(other))
