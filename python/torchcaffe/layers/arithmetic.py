"""Layers that combine numbers across elements or blobs: products with a matrix, sums of blobs, softmax, reductions."""
from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe.layers.base import Layer, Shape, layer
from torchcaffe.layers.layout import alike


@layer("InnerProduct")
class InnerProduct(Layer):
    """A fully connected layer: the axes from `axis` (1) on become one vector x of K numbers; W x + b of num_output numbers.

    W is (num_output, K), or (K, num_output) with `transpose`.  Caffe: inner_product_layer.cpp.
    """

    in_place = False

    def setup(self, x: Shape) -> None:
        p = self.param.inner_product_param
        self.require(p.num_output > 0, "num_output must be positive")
        self.size = prod(x[self.axis(p.axis, len(x)):])
        shape = (self.size, p.num_output) if p.transpose else (p.num_output, self.size)
        self.declare(shape, p.weight_filler)
        if p.bias_term:
            self.declare((p.num_output,), p.bias_filler)

    def top_shapes(self, x: Shape) -> list[Shape]:
        p = self.param.inner_product_param
        self.kept = x[:self.axis(p.axis, len(x))]
        size = prod(x[len(self.kept):])
        self.require(size == self.size, f"has weights for vectors of {self.size} numbers, but the bottom of shape {x} gives {size}")
        return [(*self.kept, p.num_output)]

    @property
    def is_plain(self) -> bool:
        """Whether it has a bias, and a vector for each item."""
        p = self.param.inner_product_param
        return p.bias_term and not p.transpose and len(self.kept) == 1

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.params[0], self.params[1] if len(self.params) > 1 else None
        x = x.reshape(*x.shape[:len(self.kept)], self.size)                    # the items of several nets may come together
        return F.linear(x, weight.t() if self.param.inner_product_param.transpose else weight, bias)


class _Rows(torch.autograd.Function):
    """Row i of a table (rows, D) for each i of an index; gradients are summed in float64, as one row may be read very often."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(table)
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        index, = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(dy.double(), index, ctx.count, -1, False).to(dy.dtype)


@layer("Embed")
class Embed(Layer):
    """Row x of a table (input_dim, num_output), plus a bias, for every index x in the bottom; the top has one axis more.

    Caffe: embed_layer.cpp.
    """

    in_place, not_differentiable = False, frozenset({0})

    def setup(self, x: Shape) -> None:
        p = self.param.embed_param
        self.require(p.num_output > 0 and p.input_dim > 0, "num_output and input_dim must be positive")
        self.declare((p.input_dim, p.num_output), p.weight_filler)
        if p.bias_term:
            self.declare((p.num_output,), p.bias_filler)

    def top_shapes(self, x: Shape) -> list[Shape]:
        return [(*x, self.param.embed_param.num_output)]

    def forward(self, x: Tensor) -> Tensor:
        table, *bias = self.params
        y: Tensor = _Rows.apply(x.long(), table)
        return y + bias[0] if bias else y


@layer("Eltwise")
class Eltwise(Layer):
    """Sum (with a coeff per bottom), product or maximum of blobs of one shape.

    Of equal numbers MAX takes the second of the first two bottoms, but a later one only if it is larger; the gradient goes
    there alone.  The product's gradient is the true one also where Caffe, with stable_prod_grad: false, divides 0 by 0.
    In place, Caffe would lose the first bottom, so that is refused.  Caffe: eltwise_layer.cpp.
    """

    bottoms, in_place = (2, None), False

    def setup(self, *bottoms: Shape) -> None:
        p = self.param.eltwise_param
        self.require(not p.coeff or p.operation == p.SUM, "coeff is for SUM only")
        self.require(len(p.coeff) in (0, len(bottoms)), f"{len(p.coeff)} coeff for {len(bottoms)} bottoms; write one for each or none")

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        for x in bottoms:
            self.require(x == bottoms[0], f"the bottoms have the shapes {bottoms[0]} and {x}; all must have one shape")
        return [bottoms[0]]

    @property
    def is_plain_sum(self) -> bool:
        """Whether every bottom counts once."""
        p = self.param.eltwise_param
        return p.operation == p.SUM and set(p.coeff) <= {1}

    def forward(self, *bottoms: Tensor) -> Tensor:
        p = self.param.eltwise_param
        y, *rest = alike(bottoms)
        if p.operation == p.SUM:
            coeff = list(p.coeff) or [1.0] * len(bottoms)
            y = y if coeff[0] == 1 else y * coeff[0]
            for x, c in zip(rest, coeff[1:], strict=True):
                y = torch.add(y, x, alpha=c)
        elif p.operation == p.PROD:
            for x in rest:
                y = y * x
        else:
            y = torch.where(y > rest[0], y, rest[0])
            for x in rest[1:]:
                y = torch.where(x > y, x, y)
        return y


@layer("Softmax")
class Softmax(Layer):
    """exp(x) / sum of exp(x) along `axis` (1).  Caffe: softmax_layer.cpp."""

    def top_shapes(self, x: Shape) -> list[Shape]:
        self.along = self.axis(self.param.softmax_param.axis, len(x))
        return [x]

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, self.along)


@layer("Reduction")
class Reduction(Layer):
    """Sum, sum of magnitudes (ASUM), sum of squares or mean over the axes from `axis` (0: all) on, times coeff.

    To be a loss it needs a loss_weight.  Caffe: reduction_layer.cpp.
    """

    in_place = False

    def top_shapes(self, x: Shape) -> list[Shape]:
        axis = self.axis(self.param.reduction_param.axis, len(x))
        self.over = tuple(range(axis, len(x)))
        return [x[:axis]]

    def forward(self, x: Tensor) -> Tensor:
        p = self.param.reduction_param
        if p.operation == p.MEAN:
            y = x.mean(self.over)
        else:
            y = (x.abs() if p.operation == p.ASUM else x.square() if p.operation == p.SUMSQ else x).sum(self.over)
        return y if p.coeff == 1 else y * p.coeff


@layer("ArgMax")
class ArgMax(Layer):
    """The places of the top_k largest numbers, best first; of equal ones the later place comes first.

    Along `axis` if written: places, or with out_max_val the numbers themselves.  Otherwise over all axes but the first, into
    (N, 1, top_k), with out_max_val (N, 2, top_k) (places, then numbers), and further axes of 1 up to the bottom's number.
    Caffe: argmax_layer.cpp.
    """

    in_place, not_differentiable = False, "all"

    def top_shapes(self, x: Shape) -> list[Shape]:
        p = self.param.argmax_param
        if p.HasField("axis"):
            self.along: int | None = self.axis(p.axis, len(x))
            candidates, shape = x[self.along], (*x[:self.along], p.top_k, *x[self.along + 1:])
        else:
            self.require(len(x) > 0, "needs a bottom with at least one axis")
            self.along, candidates = None, prod(x[1:])
            shape = (x[0], 2 if p.out_max_val else 1, p.top_k, *[1] * (len(x) - 3))
        self.require(1 <= p.top_k <= candidates, f"top_k {p.top_k} is not between 1 and {candidates}, for a bottom of shape {x}")
        self.shape = shape
        return [shape]

    def forward(self, x: Tensor) -> Tensor:
        p = self.param.argmax_param
        rows = x.reshape(x.shape[0], prod(x.shape[1:])) if self.along is None else x
        along = -1 if self.along is None else self.along
        values, places = rows.flip(along).sort(dim=along, descending=True, stable=True)
        values, places = values.narrow(along, 0, p.top_k), rows.shape[along] - 1 - places.narrow(along, 0, p.top_k)
        if not p.out_max_val:
            return places.to(x.dtype).reshape(self.shape)
        return values if self.along is not None else torch.stack([places.to(x.dtype), values], 1).reshape(self.shape)
