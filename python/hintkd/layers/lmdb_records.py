"""Images and labels of an LMDB of Datum messages, read with numpy alone: what layers need that read records in any pycaffe.

Records are counted in the byte order of their keys.  The format is that of LMDB 0.9 on machines of 64 bits (mdb.c: MDB_meta, MDB_page,
MDB_node) and of Caffe's Datum with raw bytes; files that hold anything else are refused, and damage is found when it is met.
"""
from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap

import numpy as np

_META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")      # magic, version, address, map size; free and main tree; last page, transaction
_HEADER, _LEAF, _BIG, _NOWHERE = 16, 2, 1, 2 ** 64 - 1       # bytes of a page's header; kind of a page; flag of a value in pages of its own
_CHANNELS, _HEIGHT, _WIDTH, _DATA, _LABEL = range(1, 6)     # fields of a Datum


class Records:
    """The records of the LMDB in the folder `path`: len(), image(i) as uint8 (channels, height, width), labels() as int64 (records,).

    Raises ValueError where there is no LMDB, or a record is not a Datum of raw bytes.
    """

    def __init__(self, path: str):
        self.path = path
        file = os.path.join(path, "data.mdb")
        if not os.path.isfile(file):
            raise ValueError(f"there is no LMDB {path} (a folder with data.mdb in it); prepare the data set, or write another path")
        with open(file, "rb") as opened:
            self.bytes = mmap(opened.fileno(), 0, access=ACCESS_READ)
        try:
            size = self._meta(_HEADER)[4]
            meta = max((self._meta(_HEADER), self._meta(size + _HEADER)), key=lambda each: each[-1])
            self.places = list(self._walk(meta[19], size)) if meta[19] != _NOWHERE else []
        except struct.error:
            raise ValueError(f"the LMDB {path} is damaged; write it again") from None
        if not self.places:
            raise ValueError(f"the LMDB {path} holds no records")

    def _meta(self, place: int) -> tuple[int, ...]:
        found = _META.unpack_from(self.bytes, place)
        if found[:2] != (0xBEEFC0DE, 1):
            raise ValueError(f"{self.path} does not begin as an LMDB of 64 bits does")
        return found

    def _walk(self, page: int, size: int) -> Iterator[tuple[int, int]]:
        """Place and length of the values of all records below a page."""
        start = page * size
        kind, end = struct.unpack_from("<HH", self.bytes, start + 10)
        for (node,) in struct.iter_unpack("<H", self.bytes[start + _HEADER:start + end]):
            low, high, flags, key = struct.unpack_from("<HHHH", self.bytes, start + node)
            place = start + node + 8 + key
            if not kind & _LEAF:
                yield from self._walk(low | high << 16 | flags << 32, size)
            elif flags & _BIG:
                yield struct.unpack_from("<Q", self.bytes, place)[0] * size + _HEADER, low | high << 16
            else:
                yield place, low | high << 16

    def __len__(self) -> int:
        return len(self.places)

    def fields(self, position: int) -> dict[int, int]:
        """The numbers in a record, and where its bytes begin and how many they are, by the numbers of their fields."""
        place, length = self.places[position]
        end, found = place + length, {}
        while place < end:
            tag, place = self._varint(place)
            kind, field = tag & 7, tag >> 3
            if kind == 0:
                found[field], place = self._varint(place)
            elif kind == 2 and field == _DATA:
                found[-_DATA], place = self._varint(place)
                found[_DATA] = place
                place += found[-_DATA]
            else:
                break
        if place != end or found.get(7):
            raise ValueError(f"record {position} of {self.path} is not a Datum of raw bytes")
        return found

    def _varint(self, place: int) -> tuple[int, int]:
        """The number that begins at a place, and where it ends."""
        value = shift = 0
        while True:
            byte = self.bytes[place]
            value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
            if byte < 128:
                return value, place

    def image(self, position: int) -> np.ndarray:
        """One image, a view of the file."""
        found = self.fields(position)
        shape = tuple(found.get(field, 0) for field in (_CHANNELS, _HEIGHT, _WIDTH))
        if found.get(-_DATA, 0) != np.prod(shape) or min(shape) < 1:
            raise ValueError(f"record {position} of {self.path} holds {found.get(-_DATA, 0)} bytes for an image of {shape}")
        return np.frombuffer(self.bytes, np.uint8, found[-_DATA], found[_DATA]).reshape(shape)

    def label(self, position: int) -> int:
        return self.fields(position).get(_LABEL, 0)

    def labels(self) -> np.ndarray:
        """Of all records."""
        return np.array([self.label(position) for position in range(len(self))], np.int64)


_known: dict[str, Records] = {}


def records(path: str) -> Records:
    """The LMDB in a folder, read once by a process."""
    if path not in _known:
        _known[path] = Records(path)
    return _known[path]
