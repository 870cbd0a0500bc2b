"""Passes of nets so small that autograd costs more than the arithmetic: gradients by functions that call each other, as in Caffe.

Each operation that learns gives its tops and the function that takes the gradients of these to those of its bottoms and parameters.
What residual nets are made of is called without autograd; all else asks autograd for its own part.  What a pass computes is
program.py's Program.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor

from torchcaffe.graph.work import is_tiny
from torchcaffe.layers.arithmetic import Eltwise, InnerProduct
from torchcaffe.layers.layout import channels_last
from torchcaffe.layers.loss import SoftmaxWithLoss
from torchcaffe.layers.norm import BatchNorm
from torchcaffe.layers.per_channel import column_sums, normalise_little, rows
from torchcaffe.layers.vision import Convolution, Pooling, taken
from torchcaffe.net import Net
from torchcaffe.step.dense import Dense, is_dense
from torchcaffe.step.folding import is_plain_relu
from torchcaffe.step.operations import Operation, Tops, add_to_channels, padded_sum
from torchcaffe.step.program import Program

Gradients = Sequence[Tensor | None]
Back = Callable[[Gradients], tuple[Gradients, Gradients]]   # gradients of the tops -> of the bottoms, of the parameters that learn
Form = Callable[[list[Tensor]], tuple[Tops, Back]]


def suits(net: Net) -> bool:
    """Whether passes of the net are so small; bf16's casts are autograd's business."""
    return is_tiny(net.graph) and net.context.precision == "fp32"


class Tiny(Program):
    """A program whose passes leave a tape of functions: gradients() calls them, last one first."""

    def __init__(self, net: Net, at_rest: Set[int]):
        super().__init__(net, at_rest)
        self._forms: dict[Operation, Form] = {op: _form(op) for op in self.operations if op.learns}
        self._owners = {op: [owner for node in op.nodes if node.need_backward
                             for owner, need in zip(node.owners, node.param_need, strict=True) if need] for op in self._forms}
        self._seeds = {op: {name: torch.full(net.blobs[name].shape, weight, dtype=net.context.dtype) for name, weight in losses.items()}
                       for op, losses in self.losses.items()}
        self._shapes = [item.blob.data_slot.value().shape for item in self.graph.learnable]
        self._tape: list[tuple[Operation, Back]] = []
        self._is_taped = False

    def forward(self, fed: Mapping[str, Tensor] | None = None, done: Collection[Operation] = ()) -> Tensor | None:
        """As Program.forward; the loss needs no gradient: the tape has it."""
        self._tape, self._is_taped = [], torch.is_grad_enabled()
        with torch.no_grad():
            return super().forward(fed, done)

    def perform(self, op: Operation, bottoms: list[Tensor]) -> Tops:
        if not self._is_taped or not op.learns:
            return op.run(*bottoms)
        tops, back = self._forms[op](bottoms)
        self._tape.append((op, back))
        return tops

    @torch.no_grad()
    def gradients(self, loss: Tensor | None) -> list[Tensor | None]:
        """As Program.gradients, of the loss of the last pass."""
        learned: list[Tensor | None] = [None] * len(self.graph.learnable)
        known: dict[str, Tensor] = {}                       # of blobs
        for op, back in reversed(self._tape):
            for name, seed in self._seeds.get(op, {}).items():
                known[name] = known[name] + seed if name in known else seed
            tops = [known.pop(name, None) for name in op.tops]
            if all(gradient is None for gradient in tops):
                continue
            bottoms, parameters = back(tops)
            for name, stop, gradient in zip(op.bottoms, op.stop, bottoms, strict=True):
                if gradient is not None and not stop:
                    known[name] = known[name] + gradient if name in known else gradient
            for owner, gradient in zip(self._owners[op], parameters, strict=True):
                if gradient is not None:
                    before, shape = learned[owner], self._shapes[owner]
                    gradient = gradient if gradient.shape == shape else gradient.reshape(shape)
                    learned[owner] = gradient if before is None else before + gradient
        self._tape = []
        return learned


# -- operations without autograd ---------------------------------------------------------------------------------------------
def _form(op: Operation) -> Form:
    """How an operation that learns is called: without autograd where that is known."""
    node, layer = op.nodes[0], op.nodes[0].layer
    if isinstance(layer, BatchNorm) and len(op.nodes) > 1 and layer.is_little(node.bottoms[0].shape):
        return _for_its_shape(op, partial(_normalised, op, layer))
    if layer.type == "Split":
        return partial(_forked, op, op.run.args[0]) if isinstance(op.run, partial) else _split(len(op.tops))
    if op.run is padded_sum:
        return _padded
    if len(op.nodes) > 1:
        return partial(_by_autograd, op)
    if isinstance(layer, Convolution) and layer.channel_axis == 1 and len(op.bottoms) == 1 and not layer.subsamples:
        return _for_its_shape(op, _dense(op, layer, Dense(node))) if is_dense(node) else partial(_convolved, op, layer)
    if isinstance(layer, Eltwise) and layer.is_plain_sum and len(op.bottoms) == 2:
        return partial(_summed, layer)
    if is_plain_relu(node):
        return _rectified
    if isinstance(layer, InnerProduct) and layer.is_plain:
        return partial(_multiplied, op, layer)
    if isinstance(layer, Pooling) and layer.averages and layer.pool.takes_all(node.bottoms[0].shape):
        return _for_its_shape(op, _averaged)
    if isinstance(layer, SoftmaxWithLoss):
        return partial(_classified, layer)
    return partial(_by_autograd, op)


def _for_its_shape(op: Operation, form: Form) -> Form:
    """A form that is right for bottoms of the shape the net was built with: somebody may have given it other inputs since."""
    shape = op.nodes[0].bottoms[0].shape
    return lambda bottoms: form(bottoms) if bottoms[0].shape == shape else _by_autograd(op, bottoms)


def _by_autograd(op: Operation, bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """Any operation."""
    with torch.enable_grad():
        leaves = [x if stop else x.detach().requires_grad_() for x, stop in zip(bottoms, op.stop, strict=True)]
        made = op.run(*leaves)
    tops = [made] if isinstance(made, Tensor) else list(made)
    parameters = [node.layer.params[i] for node in op.nodes if node.need_backward for i, need in enumerate(node.param_need) if need]

    def back(gradients: Gradients) -> tuple[Gradients, Gradients]:
        pairs = [(top, dy) for top, dy in zip(tops, gradients, strict=True) if dy is not None and top.requires_grad]
        wanted = [leaf for leaf, stop in zip(leaves, op.stop, strict=True) if not stop]
        found = torch.autograd.grad([top for top, _ in pairs], [*wanted, *parameters], [dy for _, dy in pairs],
                                    allow_unused=True) if pairs else [None] * (len(wanted) + len(parameters))
        of_bottoms = iter(found[:len(wanted)])
        return [None if stop else next(of_bottoms) for stop in op.stop], found[len(wanted):]
    return [top.detach() for top in tops], back


def _normalised(op: Operation, norm: BatchNorm, bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """BatchNorm, Scale[, ReLU]."""
    gamma, beta = op.nodes[1].layer.params
    wanted, relu, room = (not op.stop[0], *op.nodes[1].param_need), len(op.nodes) == 3, norm.room()
    statistics = [None] * sum(op.nodes[0].param_need)        # which have no gradients
    y, gradients = normalise_little(bottoms[0], gamma, beta, *room, norm.eps, relu)
    norm.add(*room)

    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        dx, *learned = gradients(y if relu else None, dtops[0], wanted)
        return [dx], [*statistics, *(d for d, want in zip(learned, wanted[1:], strict=True) if want)]
    return y, back


def _convolved(op: Operation, layer: Convolution, bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """Convolution."""
    x, weight, need = channels_last(bottoms[0]), layer.params[0], op.nodes[0].param_need
    bias, group = layer.params[1] if len(layer.params) > 1 else None, layer.param.convolution_param.group
    geometry = layer.stride, layer.pad, layer.dilation, False, (0,) * layer.spatial, group

    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        dy, = dtops
        assert dy is not None
        dx, dweight, _ = torch.ops.aten.convolution_backward.default(dy, x, weight, None, *geometry, [not op.stop[0], need[0], False])
        found = [dweight, None if bias is None or not need[1] else column_sums(rows(dy)).to(dy.dtype)]
        return [dx], [d for d, want in zip(found, need, strict=False) if want]
    return torch.convolution(x, weight, bias, *geometry), back


def _dense(op: Operation, layer: Convolution, dense: Dense) -> Form:
    """Convolution of tiny images."""
    need, (stop,) = op.nodes[0].param_need, op.stop

    def form(bottoms: list[Tensor]) -> tuple[Tops, Back]:
        weight, *bias = layer.params
        x, matrix = dense.rows(bottoms[0]), dense.matrix(weight)

        def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
            assert dtops[0] is not None
            dy = dense.rows(dtops[0])
            found = [dense.gradient(x, dy) if need[0] else None,
                     column_sums(rows(dtops[0])).to(dy.dtype) if bias and need[1] else None]
            return [None if stop else dense.bottoms(torch.mm(dy, matrix.t()))], [d for d, want in zip(found, need, strict=False) if want]
        return dense.tops(torch.addmm(dense.bias(bias[0]), x, matrix) if bias else torch.mm(x, matrix)), back
    return form


def _forked(op: Operation, layer: Convolution, bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """operations.forked."""
    x, factor, (high, wide) = bottoms[0], layer.params[0].reshape(1, -1, 1, 1), layer.stride

    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        whole = [dy for dy in dtops[:2] if dy is not None]
        dx = whole[0] if whole else torch.zeros_like(x)
        if dtops[2] is not None:
            dx[:, :, ::high, ::wide].add_(dtops[2] * factor)
        return [dx], []
    return [x, x, taken(x, (high, wide), factor)], back


def _split(count: int) -> Form:
    """Split."""
    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        first, *others = (dy for dy in dtops if dy is not None)
        return [sum(others, first)], []
    return lambda bottoms: (bottoms * count, back)


def _padded(bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """operations.padded_sum."""
    x, y = bottoms

    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        dz, = dtops
        assert dz is not None
        return [dz, dz[:, :y.shape[1]]], []
    return add_to_channels(x.clone(), y), back


def _summed(layer: Eltwise, bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """A sum of two."""
    return layer.forward(*bottoms), lambda dtops: ([dtops[0]] * 2, [])


def _rectified(bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """ReLU."""
    y = torch.relu(bottoms[0])

    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        return [torch.ops.aten.threshold_backward.default(dtops[0], y, 0)], []
    return y, back


def _multiplied(op: Operation, layer: InnerProduct, bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """InnerProduct with a bias."""
    (weight, bias), (x,), need = layer.params, bottoms, op.nodes[0].param_need
    flat = x.reshape(x.shape[0], layer.size)

    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        dy, = dtops
        assert dy is not None
        dx = None if op.stop[0] else torch.mm(dy, weight).reshape(x.shape)
        found = [torch.mm(dy.t(), flat) if need[0] else None, dy.sum(0) if need[1] else None]
        return [dx], [d for d, want in zip(found, need, strict=True) if want]
    return torch.addmm(bias, flat, weight.t()), back


def _averaged(bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """Pooling of whole images to their means."""
    x, = bottoms

    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        dy, = dtops
        assert dy is not None
        return [(dy / (x.shape[2] * x.shape[3])).expand(x.shape)], []
    return x.mean((2, 3), keepdim=True), back


def _classified(layer: SoftmaxWithLoss, bottoms: list[Tensor]) -> tuple[Tops, Back]:
    """SoftmaxWithLoss."""
    loss, gradient = layer.with_gradient(*bottoms)

    def back(dtops: Gradients) -> tuple[Gradients, Gradients]:
        assert dtops[0] is not None
        return [gradient(dtops[0]), None], []
    return loss, back
