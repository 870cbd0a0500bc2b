"""Publishers' files: where they are, their digests, and how to download or find them.  What is in them is for mnist.py and cifar.py."""
from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from data_prep.split import Progress, silent
from hintkd.errors import UserError

CHUNK = 1 << 18
TIMEOUT = 60                                   # seconds without a byte


@dataclass(frozen=True)
class Source:
    """A published file: its name, the MD5 of its bytes, and the folders on the web that hold it."""
    file: str
    md5: str
    mirrors: tuple[str, ...]


_MNIST = ("https://storage.googleapis.com/cvdf-datasets/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist",
          "http://yann.lecun.com/exdb/mnist")
_TORONTO = ("https://www.cs.toronto.edu/~kriz", "http://www.cs.toronto.edu/~kriz")

MNIST = (
    Source("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", _MNIST),
    Source("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", _MNIST),
    Source("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", _MNIST),
    Source("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", _MNIST),
)
CIFAR10 = (Source("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", _TORONTO),)
CIFAR100 = (Source("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", _TORONTO),)


class _MirrorError(Exception):
    """Why one mirror was of no use."""


def fetch(source: Source, folder: Path, progress: Progress = silent) -> Path:
    """The file in `folder`, downloaded unless it is already there with the right digest.

    Mirrors are tried in turn; a file appears under its name only when it is complete.  Raises UserError when none delivers it,
    and OSError when it cannot be written.
    """
    path = folder / source.file
    if path.exists() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == source.md5:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for mirror in source.mirrors:
        try:
            _download(f"{mirror}/{source.file}", source.md5, path, progress)
            return path
        except _MirrorError as error:
            failures.append(f"{mirror}: {error}")
    raise UserError(f"cannot download {source.file} ({'; '.join(failures)}); get it some other way and name its folder with --from")


def _download(url: str, md5: str, path: Path, progress: Progress) -> None:
    partial = path.with_name(f".{path.name}.partial")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(partial, "wb") as file:
            for chunk in _chunks(url, path.name, progress):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != md5:
            raise _MirrorError(f"what it sent has MD5 {digest.hexdigest()}, not {md5}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _chunks(url: str, name: str, progress: Progress) -> Iterator[bytes]:
    """The bytes behind `url`; network trouble becomes _MirrorError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            size = response.headers.get("Content-Length", "")
            chunks = iter(lambda: response.read(CHUNK), b"")
            yield from progress(chunks, f"downloading {name}", -(-int(size) // CHUNK) if size.isdigit() else None)
    except (OSError, HTTPException, ValueError) as error:
        raise _MirrorError(str(getattr(error, "reason", "")) or str(error) or "no reason was given") from None
