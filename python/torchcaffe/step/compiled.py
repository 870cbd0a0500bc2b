"""Passes compiled by torch.compile: a program's forward pass and its gradients, traced once as one graph of tensor operations.

A Caffe net is a static graph, so one pass on real tensors shows all there is to compile: the layers' own code is not translated.  What a
pass computes is program.py's Program; the solver's update is not part of it.  Nothing else depends on this module.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.net import Net
from torchcaffe.step.operations import Operation
from torchcaffe.step.program import Pass, Program

Results = tuple[Tensor, ...]


def check_compiler() -> None:
    """Raise CaffeError where torch.compile finds no C++ compiler."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise CaffeError(f"compiling needs a C++ compiler, and there is no program {name}; install one, name one in the variable CXX, "
                         "or leave --compile away")


def why_not(net: Net) -> str | None:
    """Why the net's passes cannot be compiled, in words, or None if they can."""
    if not any(any(node.loss_weights) for node in net.graph.nodes):
        return "it has no loss"
    for layer in (node.layer for node in net.graph.nodes if node.bottoms):
        if layer.ticks or layer.needs_host:
            return f"layer '{layer.name}' ({layer.type}) {'draws numbers' if layer.ticks else 'needs the host'} in every pass"
    return None


class Shown(Pass):
    """What is left of a compiled pass for whoever looks: inputs, and outputs of the net."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Tensor:
        raise CaffeError(f"compiled iterations keep inputs and outputs of the net, not blob '{name}'; train without compiling to see it")


class Compiled(Program):
    """A program whose passes with gradients are compiled, for each shape of what they start from; passes without run as they are."""

    def __init__(self, net: Net, at_rest: Set[int]):
        check_compiler()
        super().__init__(net, at_rest)
        self._left = Shown([], self.compute)
        self._functions: dict[tuple[Any, ...], Callable[..., Results]] = {}
        self._results: Results | None = None                # loss, gradients and outputs of the last pass, if it was compiled
        self._present: list[int] = []                       # the positions in graph.learnable that have a gradient

    def forward(self, fed: Mapping[str, Tensor] | None = None, done: Collection[Operation] = ()) -> Tensor | None:
        """As Program.forward; the loss needs no gradient, which gradients() knows already."""
        self._results = None
        if done or not torch.is_grad_enabled():
            return super().forward(fed, done)
        tops = dict(fed) if fed is not None else {name: self.net.blobs[name].data_slot.value() for name in self.net.inputs}
        for op in self.operations:
            if not op.bottoms and op.nodes[0].layer.type != "Parameter" and not tops.keys() >= set(op.tops):
                op.store(op.run(), tops)
        key = tuple((name, x.shape, x.stride()) for name, x in tops.items())
        if key not in self._functions:
            self._functions[key] = self._trace(tops)
        try:
            with torch.no_grad():
                self._results = self._functions[key](*tops.values())
        except RuntimeError:
            super().forward(tops)                           # where the layer itself says what is wrong, such as with a label
            raise
        self.last = self._left
        self._left.clear()
        self._left.update(tops)
        self._left.update(zip(self.net.outputs, self._results[1 + len(self._present):], strict=True))
        if fed is None:
            self.show()
        return self._results[0]

    def gradients(self, loss: Tensor | None) -> list[Tensor | None]:
        """As Program.gradients, of the loss of the last pass."""
        if self._results is None:
            return super().gradients(loss)
        result: list[Tensor | None] = [None] * len(self.graph.learnable)
        for position, gradient in zip(self._present, self._results[1:], strict=False):
            result[position] = gradient
        return result

    def _trace(self, tops: dict[str, Tensor]) -> Callable[..., Results]:
        """A pass on tensors like these, compiled.  It leaves no trace in parameters and states."""
        from torch.fx.experimental.proxy_tensor import make_fx  # takes a second, which others need not wait for

        def whole(*values: Tensor) -> Results:
            loss = Program.forward(self, dict(zip(tops, values, strict=True)))
            gradients = Program.gradients(self, loss)
            self._present = [i for i, gradient in enumerate(gradients) if gradient is not None]
            assert loss is not None
            return (loss.detach(), *(g for g in gradients if g is not None), *(self.tops[name].detach() for name in self.net.outputs))
        changed = [item.blob.data_slot.value() for item in self.graph.learnable]
        changed += [tensor for node in self.graph.nodes for tensor in node.layer.state]
        before, context = [tensor.clone() for tensor in changed], self.net.context
        context.traced = True
        try:
            graph = make_fx(whole)(*tops.values())
        finally:
            context.traced = False
            self.tops.clear()
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        compiled: Callable[..., Results] = torch.compile(graph, dynamic=False)
        return compiled
