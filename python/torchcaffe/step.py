"""One pass of a net as one function of tensors: what training and testing programs run.

The same layers as net.py, without blobs in between: in-place chains of BatchNorm, Scale and ReLU become one kernel, frozen ones are
folded into their convolution (folding.py), autograd goes through the whole net, nothing is kept that training does not need, and
nothing waits for the host.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe.build import Graph, Node, check_differentiable
from torchcaffe.folding import Folded, foldable, is_plain_relu, is_plain_scale
from torchcaffe.layers.arithmetic import Eltwise
from torchcaffe.layers.base import Layer
from torchcaffe.layers.norm import BatchNorm
from torchcaffe.layers.python import PythonLayer
from torchcaffe.layers.vision import Convolution
from torchcaffe.memory import keep_freed
from torchcaffe.net import Net

Tops = Tensor | Sequence[Tensor]
# Layers that may compute on bfloat16 with a precision of bf16; all others are given float32.
HALF = {"Convolution", "Deconvolution", "InnerProduct", "BatchNorm", "Scale", "Bias", "ReLU", "PReLU", "Pooling", "Eltwise", "Concat",
        "Slice", "Split", "Flatten", "Reshape", "Dropout"}
FRESH = ("Convolution", "Eltwise", "InnerProduct")      # their backward does not need their top, so ReLU may overwrite it
NEW_GRADIENT = ("Convolution", "Deconvolution", "InnerProduct", "Pooling")       # their backward makes a tensor that nothing else holds


def why_not(net: Net) -> str | None:
    """Why the net cannot run as one function, in words, or None if it can."""
    for node in net.graph.nodes:
        if isinstance(node.layer, PythonLayer) and not node.layer.has_torch_form:
            values = sum(blob.count for blob in (*node.bottoms, *node.tops))
            return (f"Python layer '{node.layer.name}' has no forward_torch, so that {4 * values / 2**20:.3g} MiB pass through numpy "
                    "on the way forward, and their gradients on the way back")
        if node.layer.varies:
            return f"layer '{node.layer.name}' reads images one by one, which may differ in size"
    consumed = {name for node in net.graph.nodes for name in node.bottom_names}
    for node in net.graph.nodes:
        for name, weight in zip(node.top_names, node.loss_weights, strict=True):
            if weight and name in consumed and node.layer.type != "Split":
                return f"the loss '{name}' is also the bottom of another layer"
            if name in net.inputs and node.layer.type != "Input":
                return f"layer '{node.layer.name}' changes the input '{name}' in place"
    return None


@dataclass(eq=False)
class Operation:
    """Some layers in a row that are computed together."""
    run: Callable[..., Tops]
    bottoms: list[str]
    stop: list[bool]                   # no gradient goes to this bottom
    tops: list[str]
    nodes: list[Node]
    learns: bool
    overwrites: str | None = None      # the bottom whose memory the top takes

    def store(self, result: Tops, tops: dict[str, Tensor]) -> None:
        """Put a result under the tops' names; what it has overwritten is gone."""
        if self.overwrites is not None:
            del tops[self.overwrites]
        tops.update(zip(self.tops, [result] if isinstance(result, Tensor) else result, strict=True))


class Pass(dict[str, Tensor]):
    """The tops of a pass by name.  One that was overwritten is computed again when somebody asks for it."""

    def __init__(self, operations: list[Operation]):
        super().__init__()
        lost = {op.overwrites for op in operations}
        self._again: dict[object, Operation] = {op.tops[0]: op for op in operations if op.tops[0] in lost and isinstance(op.run, Folded)}

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (name in self._again and all(bottom in self for bottom in self._again[name].bottoms))

    def __missing__(self, name: str) -> Tensor:
        folded = self._again[name].run
        assert isinstance(folded, Folded)
        with torch.no_grad():
            self[name] = folded(*(self[bottom] for bottom in self._again[name].bottoms))
        return self[name]


class Program:
    """A net as a list of operations.

    forward() returns the loss (a scalar tensor, or None without a loss); gradients() differentiates it.  The tops of the last pass
    are kept until the next one starts, for blobs that somebody looks at.
    """

    def __init__(self, net: Net, at_rest: Set[int] | None = None):
        """`at_rest`: the learnable parameters (positions in graph.learnable) that no update changes while the program runs.

        None makes a program without gradients, for tests.
        """
        keep_freed()
        self.net, self.graph, self.at_rest = net, net.graph, at_rest
        if at_rest is not None:
            with net.located():
                check_differentiable(net.graph)
        self.operations = _plan(net.graph, at_rest)
        self.tops = Pass(self.operations)
        self.shown = [(name, blob) for name, blob in net.blobs.items() if name not in net.inputs]
        self.learned = [(node.layer, i, self.graph.param_owner[node.layer.name, i])
                        for node in self.graph.nodes if node.need_backward
                        for i, need in enumerate(node.param_need) if need]

    def refresh(self) -> None:
        """Read the parameters at rest again: somebody may have changed them between two runs."""
        for op in self.operations:
            if isinstance(op.run, Folded):
                op.run.refresh()

    def sources(self, which: Callable[[Layer], bool] = lambda layer: True) -> dict[str, Tensor]:
        """What a pass starts from: the input blobs, and the next tops of those layers without bottoms that are wanted."""
        tops = {name: self.net.blobs[name].data_slot.value() for name in self.net.inputs}
        for op in self.operations:
            if not op.bottoms and op.nodes[0].layer.type != "Parameter" and which(op.nodes[0].layer):
                op.store(op.run(), tops)
        return tops

    def forward(self, fed: Mapping[str, Tensor] | None = None, done: Collection[Operation] = ()) -> Tensor | None:
        """One pass over all layers.

        `fed` has the input blobs, whatever tops of layers without bottoms are known already, and the tops of the operations `done`.
        Without it, inputs are read from the input blobs, and the blobs show() the pass.
        """
        tops = self.tops
        tops.clear()
        tops.update(fed if fed is not None else ((name, self.net.blobs[name].data_slot.value()) for name in self.net.inputs))
        loss: Tensor | None = None
        for op in self.operations:
            if op in done or (not op.bottoms and all(name in tops for name in op.tops)):
                continue
            bottoms = [tops[b].detach() if stop else tops[b] for b, stop in zip(op.bottoms, op.stop, strict=True)]
            with nullcontext() if op.learns else torch.no_grad():
                op.store(self._run(op, bottoms), tops)
            for name, weight in zip(op.tops, op.nodes[-1].loss_weights, strict=True):
                if weight:
                    term = tops[name].sum() if weight == 1 else tops[name].sum() * weight
                    loss = term if loss is None else loss + term
        if fed is None:
            self.show()
        return loss

    def _run(self, op: Operation, bottoms: list[Tensor]) -> Tops:
        """The tops of an operation in the net's precision."""
        if self.net.context.precision != "bf16":
            return op.run(*bottoms)
        half = all(node.layer.type in HALF for node in op.nodes)
        with torch.autocast(self.net.context.device.type, torch.bfloat16, enabled=half):
            return op.run(*bottoms) if half else op.run(*(x.float() if x.dtype == torch.bfloat16 else x for x in bottoms))

    def show(self) -> None:
        """Let the blobs have the last pass, when somebody looks; arrays that somebody has are brought up to date."""
        for name, blob in self.shown:
            blob.data_slot.defer(self.tops, name)

    def gradients(self, loss: Tensor | None) -> list[Tensor | None]:
        """The gradient of `loss` for every learnable parameter, None where there is none."""
        result: list[Tensor | None] = [None] * len(self.graph.learnable)
        if loss is None or not loss.requires_grad:
            return result
        grads = torch.autograd.grad(loss, [layer.params[i] for layer, i, _ in self.learned], allow_unused=True)
        for grad, (_, _, owner) in zip(grads, self.learned, strict=True):
            if grad is None:
                continue
            known, grad = result[owner], grad.reshape(self.graph.learnable[owner].blob.shape)
            result[owner] = grad if known is None else known + grad
        return result


class _Relu(torch.autograd.Function):
    """ReLU over its bottom, and its gradient, laid out as the top is, over the top's, where that belongs to nothing else (`own`).

    For 8 MiB on one core 0.2 ms backward in place of 0.8: nothing is allocated, and the gradient is still in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: bool) -> Any:
        y = F.relu_(x)
        ctx.own = own
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, = ctx.saved_tensors
        dx = dy if ctx.own and dy.stride() == y.stride() else torch.empty_like(y)
        return torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dx), None


def _relu_(x: Tensor, own: bool) -> Tensor:
    y: Tensor = _Relu.apply(x, own)
    return y


def _plan(graph: Graph, at_rest: Set[int] | None) -> list[Operation]:
    nodes = [n for n in graph.nodes if n.layer.type not in ("Input", "Silence")]
    operations: list[Operation] = []
    index = 0
    while index < len(nodes):
        chain = _chain(graph, nodes, index, at_rest)
        first, last = chain[0], chain[-1]
        learns = at_rest is not None and any(n.need_backward for n in chain)
        relu = partial(_relu_, own=_owns_gradient(last, nodes[index + len(chain):])) if learns else F.relu_
        operations.append(Operation(_function(chain, operations, relu), first.bottom_names,
                                    [not (learns and need) for need in first.bottom_need], last.top_names, chain, learns))
        index += len(chain)
    for op in operations:
        _add_in_place(op, operations)
    return operations


def _add_in_place(op: Operation, operations: list[Operation]) -> None:
    """Let a sum that nothing is learned from take the memory of a folded convolution's top that nothing else reads."""
    layer = op.nodes[0].layer
    if op.learns or not isinstance(layer, Eltwise) or not layer.is_plain_sum or len(op.bottoms) != 2:
        return
    for mine, other in (op.bottoms, op.bottoms[::-1]):
        makers = [before for before in operations if mine in before.tops]
        readers = sum(before.bottoms.count(mine) for before in operations)
        if len(makers) == readers == 1 and isinstance(makers[0].run, Folded):
            op.bottoms, op.overwrites, op.run = [mine, other], mine, Tensor.add_
            return


def _owns_gradient(node: Node, later: list[Node]) -> bool:
    """Whether the gradient of the node's only top is a tensor that nothing but the node sees.

    That is so if a layer reads the top whose backward makes a new tensor: what others add to it makes no old one of it.
    """
    tops = set(node.top_names)
    for other in later if not any(node.loss_weights) else []:
        read = [need for name, need in zip(other.bottom_names, other.bottom_need, strict=True) if name in tops]
        if any(read) and other.need_backward and other.layer.type in NEW_GRADIENT:
            return True
        tops -= set(other.top_names)                     # written over from here on
        if read and other.layer.type == "Split":
            tops |= set(other.top_names)
    return False


def _chain(graph: Graph, nodes: list[Node], index: int, at_rest: Set[int] | None) -> list[Node]:
    """The layers from `index` on that are computed together: what folds or fuses, or one layer."""
    run = _in_place_run(nodes, index)
    for length in (4, 3):
        if len(run) >= length and foldable(run[:length]) and all(rests(graph, node, at_rest) for node in run[:length]):
            return run[:length]
    if isinstance(run[0].layer, BatchNorm) and len(run) > 1 and is_plain_scale(run[1]):
        return run[:3] if len(run) > 2 and is_plain_relu(run[2]) else run[:2]
    return run[:1]


def _in_place_run(nodes: list[Node], index: int) -> list[Node]:
    """A layer and up to three that follow it in place on its top, with gradients passing all of them alike."""
    run = [nodes[index]]
    for node in nodes[index + 1:index + 4]:
        before = run[-1]
        stops = before.need_backward and not (node.need_backward and node.bottom_need[0])
        if node.bottom_names != before.top_names or node.top_names != node.bottom_names or stops:
            break
        run.append(node)
    return run


def rests(graph: Graph, node: Node, at_rest: Set[int] | None) -> bool:
    """Whether neither backward nor an update concerns the layer."""
    return at_rest is None or (not node.need_backward
                               and all(graph.param_owner[node.layer.name, i] in at_rest for i in range(len(node.layer.blobs))))


def _function(chain: list[Node], before: list[Operation], relu_: Callable[[Tensor], Tensor]) -> Callable[..., Tops]:
    """The function that computes a chain from its bottoms, with `relu_` for a ReLU that overwrites."""
    if len(chain) > 1 and isinstance(chain[0].layer, Convolution):
        return Folded(chain)
    layer = chain[0].layer
    if len(chain) > 1:
        assert isinstance(layer, BatchNorm)
        norm, scale, relu = layer, chain[1].layer, len(chain) == 3

        def normalise(x: Tensor) -> Tensor:
            y = norm.normalise(x, *scale.params)
            return relu_(y) if relu else y
        return normalise
    node = chain[0]
    if is_plain_relu(node) and node.top_names == node.bottom_names and before \
            and before[-1].tops == node.bottom_names and before[-1].nodes[-1].layer.type in FRESH:
        return relu_
    return node.forward
