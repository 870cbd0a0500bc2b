"""Files that users name, read: regular ones only, since a device has no end and a pipe may keep its reader waiting for ever.

What is in them, and the sentence for what is wrong with it, is the caller's business.
"""
from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

StrPath = str | os.PathLike[str]


def require_regular(path: StrPath) -> None:
    """Raise OSError, as opening it might, for a path where there is nothing, a folder, a device, a pipe or a socket."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a device, a pipe or a socket, not a file", str(path))


def read_bytes(path: StrPath) -> bytes:
    """The content of a regular file.  Raises OSError."""
    require_regular(path)
    return Path(path).read_bytes()


def read_text(path: StrPath, errors: str = "strict") -> str:
    """The content of a regular file of UTF-8.  Raises OSError, and UnicodeDecodeError where `errors` is strict."""
    return read_bytes(path).decode("utf-8", errors)
