"""Where the records of an LMDB lie in its file, found by walking the B-tree once, and the records themselves.

LMDB's own library maps the file and believes what it says: a damaged one kills the process.  Here all that the file says is held
against the file before it is used, and nothing is mapped, so that damage is an error.  Nothing can be told of bytes that no page
depends on, which are those of the values.  The format is that of LMDB 0.9 on machines of 64 bits, little-endian (mdb.c: MDB_meta, MDB_page,
MDB_node).
"""
from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple
from weakref import finalize

import numpy as np

from torchcaffe.errors import CaffeError
from torchcaffe.files import require_regular

_DB = "IHHQQQQQ"                                # page size or unused, flags, depth, branch, leaf and overflow pages, entries, root
_META = struct.Struct(f"<QHHIIIQQ{_DB}{_DB}QQ")  # a page's header; magic, version, address, map size; two databases; last page, transaction
_PAGE = struct.Struct("<QHHHH")                 # number, unused, kind, end of the nodes' places, begin of the nodes
_OVERFLOW = struct.Struct("<QHHI")              # number, unused, kind, how many pages
_NODE = struct.Struct("<HHHH")                  # value's size or child's number, in three parts with the flags; size of the key
_NUMBER = struct.Struct("<Q")
MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8       # kinds of pages
DIRTY = 0x10                                    # a mark on a page that means nothing once it is written
BIG = 1                                         # flag of a node whose value is in overflow pages
NOWHERE = 2**64 - 1                             # the root of an empty tree
DEEPEST = 32


class _Meta(NamedTuple):
    """What one of the two meta pages says."""
    page_size: int
    depth: int
    entries: int
    root: int
    last: int                                   # the last page's number
    transaction: int


class Pages:
    """The records of the file `path`, in the order of their keys; `shown` is how errors name the database."""

    def __init__(self, path: str, shown: str):
        self.shown = shown
        try:
            require_regular(path)
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CaffeError(f"cannot read the LMDB {shown}: {error.strerror or error}") from None
        finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        self._meta = self._newest()
        self._seen: set[int] = set()
        found = list(self._walk(self._meta.root, 1)) if self._meta.root != NOWHERE else []
        if len(found) != self._meta.entries:
            raise self._damaged(0, f"it has {len(found):,} records and speaks of {self._meta.entries:,}")
        self.keys = [key for key, _, _ in found]
        self._sizes = np.array([size for _, size, _ in found], np.int64)
        self._places = np.array([place for _, _, place in found], np.int64)     # in the file; of a value in overflow pages, less than 0

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> bytes:
        """The value of a record."""
        size, place = int(self._sizes[position]), int(self._places[position])
        if place >= 0:
            return self._read(place, size)
        data = self._read(-place, _OVERFLOW.size + size)
        number, _, kind, count = _OVERFLOW.unpack_from(data)
        if number != -place // self._meta.page_size or kind & ~DIRTY != OVERFLOW or count * self._meta.page_size < len(data):
            raise self._damaged(-place // self._meta.page_size, "it does not hold the value that it should")
        return data[_OVERFLOW.size:]

    def _read(self, place: int, size: int) -> bytes:
        try:
            data = os.pread(self._file, size, place)
        except OSError as error:
            raise CaffeError(f"cannot read the LMDB {self.shown}: {error.strerror or error}") from None
        if len(data) != size:
            raise CaffeError(f"the LMDB {self.shown} has been cut off while it was open; write it again")
        return data

    def _damaged(self, page: int, why: str) -> CaffeError:
        return CaffeError(f"the LMDB {self.shown} is damaged (page {page}: {why}); write it again")

    # -- the pages that the whole depends on -------------------------------------------------------------------------
    def _newest(self) -> _Meta:
        """The newer one of the meta pages, which are the first two, held against the size of the file."""
        first = self._meta_page(0, 0)
        if not 256 <= first.page_size <= 65536 or first.page_size & (first.page_size - 1):
            raise self._damaged(0, f"pages cannot have {first.page_size} bytes")
        second = self._meta_page(1, first.page_size)
        numbers = first.transaction, second.transaction          # transactions take turns at the pages; both are 0 before the first
        if abs(numbers[0] - numbers[1]) > 1 or (any(numbers) and (numbers[0] % 2, numbers[1] % 2) != (0, 1)):
            raise self._damaged(0, "its transactions do not follow each other")
        meta = max(first, second, key=lambda meta: meta.transaction)._replace(page_size=first.page_size)
        needed = (meta.last + 1) * meta.page_size
        if self._size < needed:
            raise CaffeError(f"the LMDB {self.shown} is only half there ({self._size:,} bytes of {needed:,}), or damaged; write it again")
        return meta

    def _meta_page(self, page: int, place: int) -> _Meta:
        if self._size < place + _META.size:
            raise CaffeError(f"the LMDB {self.shown} is only half there ({self._size:,} bytes); write it again")
        number, _, kind, _, magic, version, _, _, page_size, *_, flags, depth, _, _, _, entries, root, last, transaction = _META.unpack(
            self._read(place, _META.size))
        if (number, kind, magic, version) != (page, META, MAGIC, VERSION):
            raise self._damaged(page, "it does not begin as an LMDB of 64 bits does")
        if flags:
            raise CaffeError(f"the LMDB {self.shown} keeps several values for a key or other keys than bytes, which Caffe does not write")
        return _Meta(page_size, depth, entries, root, last, transaction)

    # -- the tree ----------------------------------------------------------------------------------------------------
    def _walk(self, number: int, level: int) -> Iterator[tuple[bytes, int, int]]:
        """Key, size of the value and place of the value, of all records below a page."""
        page, places = self._page(number, LEAF if level == self._meta.depth else BRANCH, level)
        for place in places:
            low, high, flags, length = _NODE.unpack_from(page, place)
            key = page[place + _NODE.size:place + _NODE.size + length]
            if level < self._meta.depth:
                yield from self._walk(low | high << 16 | flags << 32, level + 1)
            else:
                yield key, low | high << 16, self._value(number, page, place + _NODE.size + length, low | high << 16, flags)

    def _page(self, number: int, kind: int, level: int) -> tuple[bytes, list[int]]:
        """A page of the tree and where its nodes begin."""
        size = self._meta.page_size
        if number > self._meta.last or number in self._seen or level > min(self._meta.depth, DEEPEST):
            raise self._damaged(number, "it is not a page of the tree")
        self._seen.add(number)
        page = self._read(number * size, size)
        own, _, flags, lower, upper = _PAGE.unpack_from(page)
        if own != number or flags & ~DIRTY != kind or not _PAGE.size < lower <= upper <= size:
            raise self._damaged(number, "it does not begin as a page of the tree does")
        places = np.frombuffer(page, "<u2", (lower - _PAGE.size) // 2, _PAGE.size)
        if places.min() < upper or places.max() > size - _NODE.size:
            raise self._damaged(number, "its nodes lie outside of it")
        return page, places.tolist()

    def _value(self, number: int, page: bytes, place: int, size: int, flags: int) -> int:
        """Where the value of a leaf's node lies in the file; less than 0 for one in overflow pages."""
        end = place + (_NUMBER.size if flags == BIG else size)
        if flags not in (0, BIG) or end > len(page):
            raise self._damaged(number, "a node does not end in it")
        if flags == 0:
            return number * len(page) + place
        first: int = _NUMBER.unpack_from(page, place)[0]
        if not 1 < first <= self._meta.last or first * len(page) + _OVERFLOW.size + size > (self._meta.last + 1) * len(page):
            raise self._damaged(number, "a value lies outside of the file")
        return -first * len(page)
