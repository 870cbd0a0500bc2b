"""The lines of `debug_info: true`: the mean absolute value of every blob, gradient and update, as each is computed.

A net that runs layer by layer calls these; whether it does is its `debug_info`, which a solver sets for the iterations it displays.
Caffe: net.cpp (ForwardDebugInfo, BackwardDebugInfo, Backward, UpdateDebugInfo; 1.0 no longer calls the last).
"""
from __future__ import annotations

import torch
from torch import Tensor

from torchcaffe import glog
from torchcaffe.graph.build import Graph
from torchcaffe.layers.base import Layer

FORWARD, BACKWARD, NORMS, UPDATE = "net.cpp:598", "net.cpp:622", "net.cpp:660", "net.cpp:640"


def forward(graph: Graph, index: int) -> None:
    """After a layer's forward: its tops and its parameters."""
    node = graph.nodes[index]
    for name, blob in zip(node.top_names, node.tops, strict=True):
        _say("Forward", f"Layer {node.layer.name}, top blob {name} data: {_mean(blob.data_slot.value())}", FORWARD)
    for i, blob in enumerate(node.layer.blobs):
        _say("Forward", f"Layer {node.layer.name}, param blob {_shown(node.layer, i)} data: {_mean(blob.data_slot.value())}", FORWARD)


def backward(graph: Graph, index: int) -> None:
    """After a layer's backward: the gradients it made."""
    node = graph.nodes[index]
    for name, blob, need in zip(node.bottom_names, node.bottoms, node.bottom_need, strict=True):
        if need:
            _say("Backward", f"Layer {node.layer.name}, bottom blob {name} diff: {_mean(blob.diff_value())}", BACKWARD)
    for i, need in enumerate(node.param_need):
        if need:
            _say("Backward", f"Layer {node.layer.name}, param blob {i} diff: {_mean(node.layer.blobs[i].diff_slot.value())}", BACKWARD)


def all_parameters(graph: Graph) -> None:
    """After a whole backward pass: norms over all learnable parameters, as an error line, as Caffe has it."""
    data = [item.blob.data_slot.value().detach().double() for item in graph.learnable]
    diff = [item.blob.diff_slot.value().double() for item in graph.learnable]
    l1, l2 = ([sum(float(torch.linalg.vector_norm(t, order)) ** order for t in tensors) ** (1 / order) for tensors in (data, diff)]
              for order in (1, 2))
    glog.error(f"    [Backward] All net params (data, diff): L1 norm = ({l1[0]:g}, {l1[1]:g}); L2 norm = ({l2[0]:g}, {l2[1]:g})", NORMS)


def update(graph: Graph) -> None:
    """After an update: every parameter as it was before, and what was subtracted from it."""
    layers = {node.layer.name: node.layer for node in graph.nodes}
    for node in graph.nodes:
        layer = node.layer
        for i, (blob, position) in enumerate(zip(layer.blobs, node.owners, strict=False)):
            owner = graph.learnable[position]
            change = blob.diff_slot.value()
            if (owner.layer, owner.index) == (layer.name, i):
                text = f"Layer {layer.name}, param {_shown(layer, i)} data: {_mean(blob.data_slot.value() + change)}; diff: {_mean(change)}"
            else:
                first = _shown(layers[owner.layer], owner.index)
                text = (f"Layer {layer.name}, param blob {_shown(layer, i)} (owned by layer {owner.layer}, param {first}) "
                        f"diff: {_mean(change)}")
            _say("Update", text, UPDATE)


def _say(what: str, text: str, source: str) -> None:
    glog.info(f"    [{what}] {text}", source)


def _mean(tensor: Tensor) -> str:
    """The mean absolute value; nan of nothing, as in Caffe."""
    return f"{float(tensor.detach().abs().double().mean()):g}"


def _shown(layer: Layer, index: int) -> str:
    """A parameter's own name, or its number."""
    return (layer.param.param[index].name if index < len(layer.param.param) else "") or str(index)
