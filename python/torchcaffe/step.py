"""One pass of a net as one function of tensors: what training and testing programs run.

The same layers as net.py, without blobs in between: in-place chains of BatchNorm, Scale and ReLU become one kernel, autograd goes
through the whole net, nothing is kept that training does not need, and nothing waits for the host.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe.build import Graph, Node, check_differentiable
from torchcaffe.layers.norm import BatchNorm
from torchcaffe.layers.python import PythonLayer
from torchcaffe.net import TRAIN, Net

Tops = Tensor | Sequence[Tensor]
FRESH = ("Convolution", "Eltwise", "InnerProduct")      # their backward does not need their top, so ReLU may overwrite it


def why_not(net: Net) -> str | None:
    """Why the net cannot run as one function, in words, or None if it can."""
    for node in net.graph.nodes:
        if isinstance(node.layer, PythonLayer) and not node.layer.has_torch_form:
            return f"Python layer '{node.layer.name}' has no forward_torch"
    consumed = {name for node in net.graph.nodes for name in node.bottom_names}
    for node in net.graph.nodes:
        for name, weight in zip(node.top_names, node.loss_weights, strict=True):
            if weight and name in consumed and node.layer.type != "Split":
                return f"the loss '{name}' is also the bottom of another layer"
    return None


@dataclass
class Operation:
    """Some layers in a row that are computed together."""
    run: Callable[..., Tops]
    bottoms: list[str]
    stop: list[bool]                   # no gradient goes to this bottom
    tops: list[str]
    nodes: list[Node]
    learns: bool


class Program:
    """A net as a list of operations.

    forward() returns the loss (a scalar tensor, or None without a loss); gradients() differentiates it.  The tops of the last pass
    are kept until the next one starts, for blobs that somebody looks at.
    """

    def __init__(self, net: Net):
        self.net, self.graph = net, net.graph
        if net.phase == TRAIN:
            with net.located():
                check_differentiable(net.graph)
        self.operations = _plan(net.graph)
        self.tops: dict[str, Tensor] = {}
        self.shown = [(name, blob) for name, blob in net.blobs.items() if name not in net.inputs]
        self.learned = [(node.layer, i, self.graph.param_owner[node.layer.name, i])
                        for node in self.graph.nodes if node.need_backward
                        for i, need in enumerate(node.param_need) if need]

    def forward(self) -> Tensor | None:
        """One pass over all layers; inputs are read from the input blobs."""
        tops = self.tops
        tops.clear()
        tops.update((name, self.net.blobs[name].data_slot.value()) for name in self.net.inputs)
        loss: Tensor | None = None
        for op in self.operations:
            bottoms = [tops[b].detach() if stop else tops[b] for b, stop in zip(op.bottoms, op.stop, strict=True)]
            if op.learns:
                result = op.run(*bottoms)
            else:
                with torch.no_grad():
                    result = op.run(*bottoms)
            values = [result] if isinstance(result, Tensor) else result
            for name, value, weight in zip(op.tops, values, op.nodes[-1].loss_weights, strict=True):
                tops[name] = value
                if weight:
                    term = value.sum() if weight == 1 else value.sum() * weight
                    loss = term if loss is None else loss + term
        for name, blob in self.shown:
            blob.data_slot.defer(tops, name)
        return loss

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


def _plan(graph: Graph) -> list[Operation]:
    nodes = [n for n in graph.nodes if n.layer.type not in ("Input", "Silence")]
    operations: list[Operation] = []
    index = 0
    while index < len(nodes):
        chain = _chain(nodes, index)
        first, last = chain[0], chain[-1]
        learns = any(n.need_backward for n in chain)
        operations.append(Operation(_function(chain, operations), first.bottom_names,
                                    [not (learns and need) for need in first.bottom_need], last.top_names, chain, learns))
        index += len(chain)
    return operations


def _chain(nodes: list[Node], index: int) -> list[Node]:
    """BatchNorm, Scale and ReLU that follow each other in place, or one layer."""
    chain = [nodes[index]]
    if not isinstance(chain[0].layer, BatchNorm):
        return chain
    for following in nodes[index + 1:index + 3]:
        if following.bottom_names != chain[-1].top_names or following.top_names != following.bottom_names:
            break
        if not (_is_plain_scale(following) if len(chain) == 1 else _is_plain_relu(following)):
            break
        if following.need_backward and not following.bottom_need[0] and chain[-1].need_backward:
            break
        chain.append(following)
    return chain


def _is_plain_scale(node: Node) -> bool:
    p = node.layer.param.scale_param
    return node.layer.type == "Scale" and len(node.bottoms) == 1 and p.axis == 1 and p.num_axes == 1 and p.bias_term


def _is_plain_relu(node: Node) -> bool:
    return node.layer.type == "ReLU" and node.layer.param.relu_param.negative_slope == 0


def _function(chain: list[Node], before: list[Operation]) -> Callable[..., Tops]:
    """The function that computes a chain from its bottoms."""
    layer = chain[0].layer
    if isinstance(layer, BatchNorm) and len(chain) > 1:
        scale, relu = chain[1].layer, len(chain) == 3

        def normalise(x: Tensor) -> Tensor:
            y = layer.normalise(x, *scale.params)
            return F.relu_(y) if relu else y
        return normalise
    node = chain[0]
    if _is_plain_relu(node) and node.top_names == node.bottom_names and before \
            and before[-1].tops == node.bottom_names and before[-1].nodes[-1].layer.type in FRESH:
        return F.relu_
    return layer.forward
