"""Layers that move elements about and compute nothing: join, cut, copy, repeat, select, rename axes.

They keep Caffe's order of elements (row by row over the axes), whatever the memory layout of a tensor.
"""
from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from torchcaffe.layers.base import Layer, Shape, layer
from torchcaffe.layers.layout import alike


@layer("Concat")
class Concat(Layer):
    """The bottoms one after the other along `axis` (1; concat_dim in old nets).  Caffe: concat_layer.cpp."""

    bottoms, in_place = (1, None), False

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        p, first = self.param.concat_param, bottoms[0]
        self.require(not (p.HasField("axis") and p.HasField("concat_dim")), "write axis or concat_dim, not both")
        self.along = self.axis(p.concat_dim if p.HasField("concat_dim") else p.axis, len(first))
        for x in bottoms:
            self.require(len(x) == len(first) and all(a == b for i, (a, b) in enumerate(zip(x, first, strict=True)) if i != self.along),
                         f"bottoms of shapes {first} and {x} do not fit together along axis {self.along}")
        return [(*first[:self.along], sum(x[self.along] for x in bottoms), *first[self.along + 1:])]

    def forward(self, *bottoms: Tensor) -> Tensor:
        return bottoms[0] if len(bottoms) == 1 else torch.cat(list(alike(bottoms)), self.along)


@layer("Slice")
class Slice(Layer):
    """Pieces of the bottom along `axis` (1; slice_dim in old nets): equal ones, or cut at the slice_points.  Caffe: slice_layer.cpp."""

    tops, in_place = (1, None), False

    def top_shapes(self, x: Shape) -> list[Shape]:
        p, count = self.param.slice_param, len(self.param.top)
        self.require(not (p.HasField("axis") and p.HasField("slice_dim")), "write axis or slice_dim, not both")
        self.along = self.axis(p.slice_dim if p.HasField("slice_dim") else p.axis, len(x))
        size = x[self.along]
        if p.slice_point:
            self.require(len(p.slice_point) == count - 1, f"{len(p.slice_point)} slice_points for {count} tops; there must be {count - 1}")
            borders = [0, *p.slice_point, size]
            self.require(all(a < b for a, b in pairwise(borders)),
                         f"slice_points {list(p.slice_point)} must grow and lie inside axis {self.along} of the bottom's shape {x}")
        else:
            self.require(size % count == 0, f"axis {self.along} of the bottom's shape {x} cannot be cut into {count} equal pieces")
            borders = [size * i // count for i in range(count + 1)]
        self.pieces = [b - a for a, b in pairwise(borders)]
        return [(*x[:self.along], n, *x[self.along + 1:]) for n in self.pieces]

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(x.split(self.pieces, self.along))


@layer("Split")
class Split(Layer):
    """The bottom, once per top; the gradients add up.  Nets insert it where a blob is used twice.  Caffe: split_layer.cpp."""

    tops, in_place = (1, None), False

    def top_shapes(self, x: Shape) -> list[Shape]:
        return [x] * len(self.param.top)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x] * len(self.param.top)


@layer("Flatten")
class Flatten(Layer):
    """The axes from `axis` (1) to end_axis (the last) made one.  Caffe: flatten_layer.cpp."""

    in_place = False

    def top_shapes(self, x: Shape) -> list[Shape]:
        p = self.param.flatten_param
        start, stop = self.axis(p.axis, len(x)), self.axis(p.end_axis, len(x)) + 1
        self.require(start <= stop, f"axis {p.axis} lies behind end_axis {p.end_axis} for a bottom of shape {x}")
        self.shape = (*x[:start], prod(x[start:stop]), *x[stop:])
        return [self.shape]

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape)


@layer("Reshape")
class Reshape(Layer):
    """The same elements in other axes: those from `axis` on (num_axes of them, -1 for all) are replaced by `shape`.

    In `shape`, 0 copies the bottom's size at the same place and one -1 stands for what is left.  A negative `axis` counts from
    behind the last axis, so that -1 appends.  Caffe: reshape_layer.cpp.
    """

    in_place = False

    def top_shapes(self, x: Shape) -> list[Shape]:
        p = self.param.reshape_param
        start = p.axis if p.axis >= 0 else len(x) + p.axis + 1
        self.require(0 <= start <= len(x), f"axis {p.axis} is out of range for a bottom of shape {x}")
        self.require(p.num_axes >= -1, f"num_axes {p.num_axes} is neither -1 nor a count")
        stop = len(x) if p.num_axes == -1 else start + p.num_axes
        self.require(stop <= len(x), f"num_axes {p.num_axes} from axis {start} reaches beyond the bottom's shape {x}")
        dims = list(p.shape.dim)
        self.require(dims.count(-1) <= 1 and min(dims, default=0) >= -1, f"shape {dims} must have at most one -1 and nothing below")
        for i, dim in enumerate(dims):
            if dim == 0:
                self.require(start + i < len(x), f"the 0 at place {i} of shape {dims} has no axis to copy in a bottom of shape {x}")
                dims[i] = x[start + i]
        shape = [*x[:start], *dims, *x[stop:]]
        if -1 in dims:
            known = prod(d for d in shape if d != -1)
            self.require(known > 0 and prod(x) % known == 0, f"the bottom's shape {x} cannot be divided to {tuple(shape)}")
            shape[start + dims.index(-1)] = prod(x) // known
        self.require(prod(shape) == prod(x), f"the bottom's shape {x} and {tuple(shape)} do not hold the same number of elements")
        self.shape = tuple(shape)
        return [self.shape]

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape)


@layer("Silence")
class Silence(Layer):
    """Uses up blobs, so that they are no outputs of the net; their gradient is 0.  Caffe: silence_layer.cpp."""

    bottoms, tops = (1, None), 0

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        return []

    def forward(self, *bottoms: Tensor) -> list[Tensor]:
        return []


@layer("Tile")
class Tile(Layer):
    """The bottom `tiles` times along `axis`.  Caffe: tile_layer.cpp."""

    in_place = False

    def top_shapes(self, x: Shape) -> list[Shape]:
        p = self.param.tile_param
        self.require(p.tiles > 0, "tiles must be given and positive")
        along = self.axis(p.axis, len(x))
        self.repeats = [p.tiles if i == along else 1 for i in range(len(x))]
        return [tuple(n * r for n, r in zip(x, self.repeats, strict=True))]

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(self.repeats)


@layer("Crop")
class Crop(Layer):
    """The part of the first bottom, from `axis` (2) on, that has the second's shape and begins at `offset` (0, one for all, or each).

    The second bottom's contents do not matter.  Caffe: crop_layer.cpp.
    """

    bottoms, in_place = 2, False

    def top_shapes(self, x: Shape, like: Shape) -> list[Shape]:
        p, axis = self.param.crop_param, self.axis(self.param.crop_param.axis, len(x))
        self.require(len(like) == len(x), f"bottoms of shapes {x} and {like} differ in their number of axes")
        cropped = len(x) - axis
        self.require(len(p.offset) in (0, 1, cropped), f"{len(p.offset)} offsets for {cropped} axes; write none, one or one for each")
        offsets = list(p.offset) * (1 if len(p.offset) == cropped else cropped) or [0] * cropped
        self.places = [(axis + i, offset, like[axis + i]) for i, offset in enumerate(offsets)]
        for i, offset, size in self.places:
            self.require(offset + size <= x[i], f"{size} from {offset} on reaches beyond axis {i} of the bottom's shape {x}")
        return [(*x[:axis], *like[axis:])]

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        for axis, offset, size in self.places:
            x = x.narrow(axis, offset, size)
        return x


@layer("BatchReindex")
class BatchReindex(Layer):
    """The items of the first bottom that the second names, in its order, repeats allowed.  Caffe: batch_reindex_layer.cpp."""

    bottoms, in_place, not_differentiable = 2, False, frozenset({1})

    def top_shapes(self, x: Shape, index: Shape) -> list[Shape]:
        self.require(len(x) > 0 and len(index) == 1, f"needs items and a one-axis index, not shapes {x} and {index}")
        return [(index[0], *x[1:])]

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index.long())


@layer("Filter")
class Filter(Layer):
    """The items of each bottom for which the last bottom (one value per item) is not 0; the tops' batch axis shrinks to their number.

    Caffe: filter_layer.cpp.
    """

    bottoms, tops, in_place, needs_host = (2, None), (1, None), False, True

    def setup(self, *bottoms: Shape) -> None:
        last = len(bottoms) - 1
        self.not_differentiable = frozenset({last})
        self.require(len(self.param.top) == last, f"needs {last} tops, one for each bottom before the selector, not {len(self.param.top)}")

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        *items, selector = bottoms
        self.require(len(selector) > 0 and prod(selector[1:]) == 1, f"the selector of shape {selector} must hold one value per item")
        for x in items:
            self.require(x[:1] == selector[:1], f"a bottom of shape {x} has not as many items as the selector of shape {selector}")
        return items

    def forward(self, *bottoms: Tensor) -> list[Tensor]:
        *items, selector = bottoms
        chosen = selector.flatten().nonzero().flatten()
        return [x.index_select(0, chosen) for x in items]
