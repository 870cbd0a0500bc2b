"""LMDBs of Datum messages, read by position.

Records are counted in the byte order of their keys, as Caffe's cursor meets them; lmdb_pages.py finds them.  A database is open once per
process, shared by all who ask for it with the images that are decoded already, and closed when nobody holds it.
"""
from __future__ import annotations

import hashlib
import os
from functools import cached_property, partial
from weakref import WeakValueDictionary

import numpy as np

from torchcaffe.data import datum
from torchcaffe.data.images import Images
from torchcaffe.data.lmdb_pages import Pages
from torchcaffe.errors import CaffeError


class Database:
    """An LMDB opened for reading, without locks.  Made by open_database."""

    def __init__(self, path: str, shown: str):
        self.path, self._file = shown, os.path.join(path, "data.mdb")
        self._images: WeakValueDictionary[bool | None, Images] = WeakValueDictionary()
        self._pages = Pages(os.path.join(path, "data.mdb"), shown)
        self.keys = self._pages.keys
        if not self.keys:
            raise CaffeError(f"the LMDB {shown} holds no records")

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def digest(self) -> str:
        """Of all that the file holds, SHA-256 in hexadecimal."""
        with open(self._file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __getitem__(self, position: int) -> bytes:
        return self._pages[position]

    def where(self, position: int) -> str:
        """How an error names a record."""
        return f"record {position} (key {self.keys[position]!r}) of {self.path}"

    def images(self, color: bool | None = None) -> Images:
        """The decoded records; `color` as in datum.image."""
        images = self._images.get(color)
        if images is None:
            images = self._images[color] = Images(len(self), partial(self._image, color))
        return images

    def _image(self, color: bool | None, position: int) -> tuple[np.ndarray, int]:
        where = self.where(position)
        message = datum.parse(self[position], where)
        return datum.image(message, where, color), message.label


_open: WeakValueDictionary[tuple[int, int], Database] = WeakValueDictionary()


def open_database(path: str | os.PathLike[str]) -> Database:
    """The database in folder `path`.  Raises CaffeError where there is none, an empty, a truncated or a damaged one."""
    shown, real = os.fspath(path), os.path.realpath(path)
    try:
        file = os.stat(os.path.join(real, "data.mdb"))
    except OSError:
        raise CaffeError(f"there is no LMDB {shown} (a folder with data.mdb in it); prepare the data set, or write another path") from None
    identity = file.st_dev, file.st_ino         # not the path: a folder may be renamed while it is open
    database = _open.get(identity)
    if database is None:
        database = _open[identity] = Database(real, shown)
    return database
