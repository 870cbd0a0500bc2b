"""pycaffe's vectors: what its nets, layers and solvers hand out where one would expect a list.

They have the operations that Boost.Python gives a C++ vector (len, indices, slices without a step, `in`, iteration, append, extend, del)
and refuse elements of another type; index, count and comparison with a list are torchcaffe's own.  A layer computes with whatever blobs
are in its BlobVec.  Caffe: python/caffe/_caffe.cpp; boost/python/suite/indexing/vector_indexing_suite.hpp.
"""
from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, SupportsIndex, TypeVar, cast, overload

import torch

from torchcaffe.errors import CaffeTypeError
from torchcaffe.graph.blob import Blob

T = TypeVar("T")


class Vector(Sequence[T]):
    """A list of elements of one type.  Raises IndexError and TypeError where Boost.Python does."""

    holds: ClassVar[type | tuple[type, ...]] = object

    def __init__(self, items: Iterable[T] = ()):
        self._items = [self._checked(item) for item in items]

    def _changes(self) -> None:
        """Called before any change."""

    def _checked(self, item: Any) -> T:
        if not isinstance(item, self.holds):
            raise TypeError(f"a {type(self).__name__} takes no {type(item).__name__}")
        return cast(T, item)

    def _index(self, index: SupportsIndex) -> int:
        """Where an element is."""
        try:
            found = operator.index(index)
        except TypeError:
            raise TypeError(f"a {type(self).__name__} has whole numbers and slices as indices, not {index!r}") from None
        if not -len(self) <= found < len(self):
            raise IndexError(f"index {found} is out of range for a {type(self).__name__} of {len(self)}")
        return found

    def _range(self, index: slice) -> slice:
        """A slice between ends that are there."""
        if index.step is not None:
            raise IndexError(f"slices of a {type(self).__name__} have no step")
        start, stop, _ = index.indices(len(self))
        return slice(start, stop)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Vector[T]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> T | Vector[T]:
        """An element; of a slice a new vector of the same elements."""
        return type(self)(self._items[self._range(index)]) if isinstance(index, slice) else self._items[self._index(index)]

    def __setitem__(self, index: SupportsIndex | slice, value: Any) -> None:
        """Put an element into a place, or one or several into that of a slice."""
        if not isinstance(index, slice):
            place, item = self._index(index), self._checked(value)
            self._changes()
            self._items[place] = item
            return
        span = self._range(index)
        items: list[T] = [self._checked(item) for item in ([value] if isinstance(value, self.holds) else value)]
        if span.start <= span.stop:
            self._changes()
            self._items[span] = items

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        place = self._range(index) if isinstance(index, slice) else self._index(index)
        self._changes()
        del self._items[place]

    def append(self, item: T) -> None:
        """Add an element at the end."""
        self.extend([item])

    def extend(self, items: Iterable[T]) -> None:
        """Add elements at the end."""
        more = [self._checked(item) for item in items]
        self._changes()
        self._items += more

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (Vector, list)) else NotImplemented

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items!r})"


class BlobVec(Vector[Blob]):
    """A layer's parameters.

    `changed`: an element has been put in or taken away since the net was built, so that the layer computes with other blobs than the
    solver updates, as in Caffe.
    """

    holds = Blob

    def __init__(self, items: Iterable[Blob] = (), device: torch.device | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(items)
        self.device, self.dtype = device or torch.device("cpu"), dtype
        self.changed = False

    def _changes(self) -> None:
        self.changed = True

    def add_blob(self, *shape: int) -> None:
        """Add a parameter of zeros; a Python layer's is saved, restored and shared with test nets like any other."""
        self.append(Blob(shape, self.device, self.dtype, fixed=True))


class RawBlobVec(Vector[Blob]):
    """The bottoms or the tops of a Python layer."""
    holds = Blob


class LayerVec(Vector[Any]):
    """The layers of a net, which stay those it was built with."""

    def _changes(self) -> None:
        raise CaffeTypeError("the layers of a net stay those it was built with; write the net that you want, "
                             "or change the blobs of its layers")


class StringVec(Vector[str]):
    """Names."""
    holds = str


class IntVec(Vector[int]):
    """Numbers of blobs."""
    holds = int


class DtypeVec(Vector[float]):
    """Loss weights."""
    holds = (float, int)


class BoolVec(Vector[bool]):
    """Whether a Python layer propagates to each of its bottoms."""
    holds = (bool, int)
