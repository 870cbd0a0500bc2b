"""Loss layers, and Accuracy.

A loss has a top of shape () and counts in the net's total with loss_weight 1 unless another is written.  Labels are class numbers
stored as floats, one for each prediction; no gradient goes to them.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from google.protobuf.message import DecodeError
from torch import Tensor

from torchcaffe import formats
from torchcaffe.files import read_bytes
from torchcaffe.layers.base import Count, Layer, Shape, layer
from torchcaffe.proto import caffe_pb2

FLT_MIN = torch.finfo(torch.float32).tiny           # the least probability in SoftmaxWithLoss, in float64 too
LOG_THRESHOLD = 1e-20                               # the least probability in InfogainLoss and MultinomialLogisticLoss


class _AtLeast(torch.autograd.Function):
    """max(x, low) with the gradient of x: Caffe bounds the probability in a logarithm, not the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float) -> Tensor:
        return x.clamp(min=low)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class Loss(Layer):
    """Predictions and something to compare them with, as many items of each; a scalar top, made up by the net if none is named."""

    bottoms: ClassVar[Count] = 2
    tops: ClassVar[Count] = 1
    auto_tops, in_place = True, False
    no_force = not_differentiable = frozenset({1})

    def top_shapes(self, *bottoms: Any, **named: Any) -> list[Shape]:
        x, other = bottoms[:2]
        self.require(x[:1] == other[:1], f"the bottoms of shapes {x} and {other} differ in their number of items")
        return [()]

    def normalisation(self, default: caffe_pb2.LossParameter.NormalizationMode) -> caffe_pb2.LossParameter.NormalizationMode:
        """The normalization that is written, or meant by the old field `normalize`, or else the default."""
        p = self.param.loss_param
        if p.HasField("normalize") and not p.HasField("normalization"):
            return p.VALID if p.normalize else p.BATCH_SIZE
        return p.normalization if p.HasField("normalization") else default

    def normaliser(self, mode: caffe_pb2.LossParameter.NormalizationMode, outer: int, inner: int, counted: Tensor | None) -> Tensor | int:
        """What a sum over outer * inner predictions is divided by, at least 1; `counted` says which are not ignored (None: all are)."""
        p = self.param.loss_param
        if mode == p.VALID and counted is not None:
            return counted.sum().clamp(min=1)
        return max({p.FULL: outer * inner, p.VALID: outer * inner, p.BATCH_SIZE: outer, p.NONE: 1}[mode], 1)


class Classified(Layer):
    """What layers share that compare scores along a class axis with labels: scores are seen as (outer, classes, inner)."""

    def place(self, scores: Shape, labels: Shape, axis: int) -> None:
        """Remember the sizes; refuse labels that do not fit."""
        self.along = self.axis(axis, len(scores))
        self.outer, self.classes, self.inner = prod(scores[:self.along]), scores[self.along], prod(scores[self.along + 1:])
        self.require(prod(labels) == self.outer * self.inner,
                     f"labels of shape {labels} for scores of shape {scores}: there must be {self.outer * self.inner}, one class number "
                     f"for each place but those of the class axis {self.along}")

    def by_class(self, scores: Tensor) -> Tensor:
        """Scores as (outer, classes, inner)."""
        return scores.reshape(self.outer, self.classes, self.inner)

    def labels(self, labels: Tensor, ignored: int | None) -> tuple[Tensor, Tensor | None]:
        """Labels as class numbers (outer, 1, inner), and which of them count (None: all).  Ignored ones become 0."""
        labels = labels.detach().reshape(self.outer, 1, self.inner).long()
        counted = None if ignored is None else labels != ignored
        if counted is not None:
            labels = labels.where(counted, 0)
        if labels.device.type == "cpu" and labels.numel() and not self.context.traced:      # else torch's own check stops the process
            low, high = (int(limit) for limit in labels.aminmax())
            self.require(low >= 0 and high < self.classes,
                         f"label {low if low < 0 else high} is not one of the classes 0 to {self.classes - 1}")
        return labels, counted


class ClassLoss(Classified, Loss):
    """A loss of scores (outer, classes, inner) and labels."""

    def labels_and_divisor(self, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | int]:
        """Class numbers, which of them count, and what their sum is divided by; VALID is the default."""
        p = self.param.loss_param
        index, counted = self.labels(labels, p.ignore_label if p.HasField("ignore_label") else None)
        return index, counted, self.normaliser(self.normalisation(p.VALID), self.outer, self.inner, counted)


@layer("SoftmaxWithLoss")
class SoftmaxWithLoss(ClassLoss):
    """-log of each label's softmax probability (at least FLT_MIN), summed over the labels and normalised.

    The gradient p - y is not bounded.  Caffe documents a second top with the probabilities but cannot build such a net, so it
    is refused.  Caffe: softmax_loss_layer.cpp.
    """

    tops = (1, 2)

    def setup(self, x: Shape, labels: Shape) -> None:
        self.require(len(self.param.top) <= 1, "a second top (the probabilities) is refused, as by Caffe; take them from a Softmax layer")

    def top_shapes(self, x: Shape, labels: Shape) -> list[Shape]:
        self.place(x, labels, self.param.softmax_param.axis)
        return super().top_shapes(x, labels)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        index, counted, divisor = self.labels_and_divisor(labels)
        logs = _AtLeast.apply(self.by_class(F.log_softmax(x, self.along)).gather(1, index), math.log(FLT_MIN))
        return (logs if counted is None else logs.where(counted, 0)).sum() / -divisor

    def with_gradient(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The loss, and what gives the gradient of x from the loss's, without autograd."""
        index, counted, divisor = self.labels_and_divisor(labels)
        logs = self.by_class(F.log_softmax(x, self.along))
        chosen = logs.gather(1, index).clamp_min(math.log(FLT_MIN))

        def gradient(dy: Tensor) -> Tensor:
            dx = logs.exp()
            dx.scatter_add_(1, index, torch.full(index.shape, -1, dtype=dx.dtype))
            return dx.mul_(dy / divisor if counted is None else counted * (dy / divisor)).reshape(x.shape)
        return (chosen if counted is None else chosen.where(counted, 0)).sum() / -divisor, gradient


@layer("InfogainLoss")
class InfogainLoss(ClassLoss):
    """As SoftmaxWithLoss, with a matrix H (classes, classes) in place of the identity: -sum over k of H[label, k] * log p[k].

    H is the third bottom or the file `source`.  p counts as at least 1e-20.  A second top holds the probabilities.
    Caffe: infogain_loss_layer.cpp.
    """

    bottoms, tops = (2, 3), (1, 2)
    not_differentiable = frozenset({1, 2})

    def setup(self, *bottoms: Shape) -> None:
        p = self.param.infogain_loss_param
        if len(bottoms) == 2:
            self.require(p.source, "needs the matrix: a third bottom, or infogain_loss_param { source: ... }")
            blob = caffe_pb2.BlobProto()
            try:
                blob.ParseFromString(read_bytes(p.source))
            except (OSError, DecodeError) as error:
                self.require(False, f"cannot read the matrix from source '{p.source}': {error}")
            self.matrix = torch.from_numpy(formats.blob_to_array(blob)).to(self.context.device, self.context.dtype)

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        self.place(bottoms[0], bottoms[1], self.param.infogain_loss_param.axis)
        shape = bottoms[2] if len(bottoms) == 3 else tuple(self.matrix.shape)
        self.require(prod(shape) == self.classes ** 2, f"the matrix of shape {shape} is not one of {self.classes} x {self.classes} classes")
        return [*super().top_shapes(*bottoms), bottoms[0]][:max(len(self.param.top), 1)]

    def forward(self, x: Tensor, labels: Tensor, matrix: Tensor | None = None) -> list[Tensor]:
        index, counted, divisor = self.labels_and_divisor(labels)
        table = (self.matrix if matrix is None else matrix.detach()).reshape(self.classes, self.classes)
        logs = F.log_softmax(x, self.along)
        bounded = _AtLeast.apply(self.by_class(logs), math.log(LOG_THRESHOLD))
        gain = (F.embedding(index[:, 0], table).transpose(1, 2) * bounded).sum(1, keepdim=True)
        loss = (gain if counted is None else gain.where(counted, 0)).sum() / -divisor
        return [loss, logs.detach().exp()][:max(len(self.param.top), 1)]


class PerItem(Classified, Loss):
    """A loss with one label per item; whatever follows the batch axis are the classes."""

    def top_shapes(self, x: Shape, labels: Shape) -> list[Shape]:
        self.require(len(x) > 0, "needs a bottom with a batch axis")
        self.place((x[0], prod(x[1:])), labels, 1)
        return super().top_shapes(x, labels)


@layer("MultinomialLogisticLoss")
class MultinomialLogisticLoss(PerItem):
    """-log of each label's probability (at least 1e-20), averaged over the items; for bottoms that are probabilities already.

    Caffe: multinomial_logistic_loss_layer.cpp.
    """

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        index, _ = self.labels(labels, None)
        return _AtLeast.apply(self.by_class(x).gather(1, index), LOG_THRESHOLD).log().sum() / -self.outer


@layer("HingeLoss")
class HingeLoss(PerItem):
    """One against the rest: sum over classes of max(0, 1 + x), with -x for the label's class, or of its square (norm L2); per item.

    Caffe: hinge_loss_layer.cpp.
    """

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        index, _ = self.labels(labels, None)
        sign = torch.ones_like(self.by_class(x)).scatter(1, index, -1)
        margin = F.relu(1 + sign * self.by_class(x))
        p = self.param.hinge_loss_param
        return (margin if p.norm == p.L1 else margin.square()).sum() / self.outer


class _HalfSquares(torch.autograd.Function):
    """Half the sum of (a - b)^2, in three passes over the blobs and one back; autograd's own formula takes twice as long.

    A vector norm would save a pass, but adds the squares one after the other, which is wrong by 2e-5 for 8 MiB.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        difference = a - b
        ctx.save_for_backward(difference)
        return difference.square().sum() / 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        da = ctx.saved_tensors[0] * dy
        return da, -da if ctx.needs_input_grad[1] else None


@layer("EuclideanLoss")
class EuclideanLoss(Loss):
    """Half the squared distance per item: sum((a - b)^2) / (2 N) for bottoms a, b of N items.

    Not an element mean: the gradient grows with the size of an item, which is why hint training uses small rates.  The shapes
    may differ if the counts per item agree.  Gradients go to both bottoms.  Caffe: euclidean_loss_layer.cpp.
    """

    no_force = not_differentiable = frozenset()

    def top_shapes(self, a: Shape, b: Shape) -> list[Shape]:
        self.require(len(a) > 0 and prod(a[1:]) == prod(b[1:]), f"the bottoms of shapes {a} and {b} differ in size per item")
        return super().top_shapes(a, b)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return _HalfSquares.apply(a, b.reshape(a.shape)) / a.shape[0]


@layer("SigmoidCrossEntropyLoss")
class SigmoidCrossEntropyLoss(Loss):
    """-sum of t log s(x) + (1 - t) log(1 - s(x)), s the sigmoid, for targets t of as many elements; BATCH_SIZE by default.

    Targets may be soft, but are cut to integers before they are compared with ignore_label: with ignore_label 0, a target of
    0.7 is ignored.  Caffe: sigmoid_cross_entropy_loss_layer.cpp.
    """

    def top_shapes(self, x: Shape, targets: Shape) -> list[Shape]:
        self.require(len(x) > 0 and prod(x) == prod(targets), f"predictions of shape {x} and targets of shape {targets} differ in size")
        return super().top_shapes(x, targets)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        p = self.param.loss_param
        targets = targets.detach().reshape(x.shape)
        counted = targets.trunc() != p.ignore_label if p.HasField("ignore_label") else None
        weight = None if counted is None else counted.to(x.dtype)
        total = F.binary_cross_entropy_with_logits(x, targets, weight, reduction="sum")
        return total / self.normaliser(self.normalisation(p.BATCH_SIZE), x.shape[0], prod(x.shape[1:]), counted)


class _Contrast(torch.autograd.Function):
    """The summed loss of pairs with differences d (N, C).

    Caffe's gradient for unlike pairs divides by distance + 1e-4, so that it is 0 and not undefined at distance 0.
    """

    @staticmethod
    def forward(ctx: Any, d: Tensor, alike: Tensor, margin: float, legacy: bool) -> Tensor:
        squared = d.square().sum(1)
        distance = squared.sqrt()
        gap = (margin - (squared if legacy else distance)).clamp(min=0)
        pull = (gap > 0).to(d.dtype) if legacy else gap / (distance + 1e-4)
        ctx.save_for_backward(2 * d * torch.where(alike, 1.0, -pull)[:, None])
        return torch.where(alike, squared, gap if legacy else gap.square()).sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, = ctx.saved_tensors
        return dy * gradient, None, None, None


@layer("ContrastiveLoss")
class ContrastiveLoss(Loss):
    """Half the mean over pairs (a, b) of d^2 where they are alike (third bottom not 0), else of max(margin - d, 0)^2; d = |a - b|.

    legacy_version takes max(margin - d^2, 0) for the latter.  Caffe: contrastive_loss_layer.cpp; Hadsell et al. 2006.
    """

    bottoms = 3
    no_force, not_differentiable = frozenset({2}), frozenset()

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        a, b, alike = bottoms
        self.require(len(a) >= 2 and a == b and prod(a[2:]) == 1, f"needs two bottoms of one shape (N, C) or (N, C, 1, 1), not {a} and {b}")
        self.require(prod(alike) == a[0] and alike[:1] == a[:1], f"the third bottom of shape {alike} is not one number per pair of {a}")
        return super().top_shapes(*bottoms)

    def forward(self, a: Tensor, b: Tensor, alike: Tensor) -> Tensor:
        p = self.param.contrastive_loss_param
        same = alike.detach().flatten().trunc() != 0
        return _Contrast.apply((a - b).flatten(1), same, p.margin, p.legacy_version) / (2 * a.shape[0])


@layer("Accuracy")
class Accuracy(Classified):
    """The share of labels whose score is among the top_k; a second top has the share for each class, 0 for one that does not occur.

    A class with the same score counts as better, so ties are wrong; so a net full of NaN is always right.  If all labels are
    ignored the accuracy is 0.  Caffe: accuracy_layer.cpp.
    """

    bottoms, tops, in_place, not_differentiable = 2, (1, 2), False, "all"

    def top_shapes(self, x: Shape, labels: Shape) -> list[Shape]:
        p = self.param.accuracy_param
        self.place(x, labels, p.axis)
        self.require(1 <= p.top_k <= self.classes, f"top_k {p.top_k} is not between 1 and the number of classes, {self.classes}")
        return [(), (self.classes,)][:len(self.param.top)]

    def forward(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        p = self.param.accuracy_param
        index, counted = self.labels(labels, p.ignore_label if p.HasField("ignore_label") else None)
        scores = self.by_class(x)
        better = (scores >= scores.gather(1, index)).sum(1, keepdim=True) - 1
        weight = torch.ones_like(index, dtype=x.dtype) if counted is None else counted.to(x.dtype)
        right = (better < p.top_k) * weight
        tops = [right.sum() / weight.sum().clamp(min=1)]
        if len(self.param.top) > 1:
            zero = x.new_zeros(self.classes)
            hits, occurrences = (zero.scatter_add(0, index.flatten(), w.flatten()) for w in (right, weight))
            tops.append(hits / occurrences.clamp(min=1))
        return tops
