"""A new LMDB, written record by record: the folder appears under its name when all of it is on disk, or not at all."""
from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import lmdb

from torchcaffe.errors import CaffeError

BATCH = 1000                                    # records per transaction: what waits in memory
START_BYTES = 1 << 24                           # the database's first size limit, doubled as often as needed
FULL = 1 << 20                                  # bytes that are free on a disk that has no room


class LmdbWriter:
    """`with LmdbWriter(path) as database: database.put(key, value)`.  Raises CaffeError where `path` is taken or cannot be written."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._size = START_BYTES
        self._waiting: list[tuple[bytes, bytes, bool]] = []      # key, value, whether the key is behind all before it
        self._last = b""

    def __enter__(self) -> LmdbWriter:
        if self.path.exists():
            raise CaffeError(f"{self.path} exists already; remove it, or write to another folder")
        try:
            self._partial.mkdir()
            self._environment = lmdb.open(str(self._partial), map_size=self._size, lock=False, sync=False)
        except (OSError, lmdb.Error) as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._fail(error)
        return self

    def put(self, key: bytes, value: bytes) -> None:
        """Add a record, in the place of one with the same key.  Pages are packed as long as keys come in their order."""
        self._waiting.append((key, value, key > self._last))
        self._last = max(self._last, key)
        if len(self._waiting) == BATCH:
            self._commit()

    def _commit(self) -> None:
        try:
            while not self._fits():
                self._size *= 2
                self._environment.set_mapsize(self._size)
        except lmdb.BadValsizeError:
            longest = max(self._waiting, key=lambda record: len(record[0]))[0]
            raise CaffeError(f"{self.path}: the key {longest[:40]!r}... has {len(longest)} bytes; LMDB takes "
                             f"1 to {self._environment.max_key_size()}, so shorten the names") from None
        except (OSError, lmdb.Error) as error:
            self._fail(error)
        self._waiting.clear()

    def _fits(self) -> bool:
        """Write what waits, unless the database's size limit is in the way."""
        try:
            with self._environment.begin(write=True) as transaction:
                for key, value, is_last in self._waiting:
                    transaction.put(key, value, append=is_last)
        except lmdb.MapFullError:
            return False
        return True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
                self._environment.sync(True)
                self._environment.close()
                for entry in (self._partial / "data.mdb", self._partial):
                    _sync(entry)
                os.rename(self._partial, self.path)
                _sync(self.path.parent)
        except (OSError, lmdb.Error) as problem:
            self._fail(problem)
        finally:
            self._environment.close()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _fail(self, error: Exception) -> NoReturn:
        if isinstance(error, lmdb.Error) and shutil.disk_usage(self.path.parent).free < FULL:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))         # LMDB calls a write that was cut short an I/O error
        raise CaffeError(f"cannot write the LMDB {self.path} ({getattr(error, 'strerror', None) or error})") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
