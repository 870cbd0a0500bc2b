"""A file of rows of 64-bit words, which several processes read and write at once and may be killed over at any moment.

Every row has a seal, a hash of its number and its words, which is written after the words.  A row counts as known only while its seal fits:
one that was never written, half written, lost by the disk or changed on it does not, and is made again.  Two who make the
same row write the same bytes, so nobody locks anything.  What the words mean is the business of remembered.py.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.streams import WEYL, mixed

HEADER, WORD = 4096, 8                                      # bytes; what lies behind the header begins with a page


class Damaged(CaffeError):
    """A file is not what its name says."""


class Table:
    """`count` rows of `words` 64-bit words each, in the file `path`, made if it is not there.

    File: a page of text that says what it holds, zeros behind it; the seals; the rows.  `key` is part of that text and of every seal.
    Raises CaffeError where there cannot be such a file, Damaged where there is another one of that name.
    """

    def __init__(self, path: Path, key: str, count: int, words: int):
        self.path, self.count, self.words = path, count, words
        header = f"torchcaffe remembers, version 1: {count} rows of {words} words of {WORD} bytes\n{key}\n".encode()
        self._header = header.ljust(HEADER, b"\0")
        self._salt = int.from_bytes(hashlib.sha256(header).digest()[:8], "little", signed=True)
        self._factors = mixed(torch.arange(words) * WEYL) | 1
        try:
            self.is_new = self._make()
            contents = self._open()
        except OSError as error:
            raise CaffeError(f"{path}: {error.strerror or error}") from None
        self.seals, self.rows = contents[:count], contents[count:].view(count, words)

    @staticmethod
    def bytes(count: int, words: int) -> int:
        """The size of such a file."""
        return HEADER + count * (1 + words) * WORD

    def _make(self) -> bool:
        """Put an empty file there, which appears whole; whether there was none.  All its blocks are its own from the beginning: a disk
        that gets full later would kill a process that writes through a map.
        """
        if self.path.exists():
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size, free = self.bytes(self.count, self.words), shutil.disk_usage(self.path.parent).free
        if size > free // 2:
            raise CaffeError(f"{self.path} would take {size / 1e6:,.0f} MB, more than half of what is free on the disk")
        handle, part = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            os.write(handle, self._header)
            os.posix_fallocate(handle, 0, size)
            os.link(part, self.path)
        except FileExistsError:                             # somebody was faster
            return False
        finally:
            os.close(handle)
            os.unlink(part)
        return True

    def _open(self) -> Tensor:
        """All that lies behind the header, as words."""
        with self.path.open("rb") as file:
            if file.read(HEADER) != self._header or os.fstat(file.fileno()).st_size != self.bytes(self.count, self.words):
                raise Damaged(f"{self.path} is damaged")
        return torch.from_numpy(np.memmap(self.path, np.int64, "r+", HEADER))

    def discard(self) -> None:
        """Delete the file; who has it open keeps what they have."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def known(self) -> int:
        """How many rows have been written."""
        return int(np.count_nonzero(self.seals.numpy()))

    def has(self, numbers: Tensor) -> Tensor:
        """Whether rows of these numbers have been written, (n,) bool."""
        return self.seals.index_select(0, numbers) != 0

    def read(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of these numbers, (n, words), and which of them are whole, (n,) bool."""
        seals, rows = self.seals.index_select(0, numbers), self.rows.index_select(0, numbers)
        return rows, seals == self._seal(numbers, rows)

    def write(self, numbers: Tensor, rows: Tensor) -> None:
        """Keep rows under their numbers: first the words, then the seals."""
        self.rows[numbers] = rows
        self.seals[numbers] = self._seal(numbers, rows)

    def _seal(self, numbers: Tensor, rows: Tensor) -> Tensor:
        """A word for each row, never 0; a multilinear hash with odd factors, so that no single changed word goes unseen."""
        folded = rows ^ ((rows >> 32) & 0xFFFFFFFF)
        return mixed(folded.mv(self._factors) + numbers * WEYL + self._salt) | 1
