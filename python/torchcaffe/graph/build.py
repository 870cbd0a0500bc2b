"""A NetParameter becomes a static graph: layers with their blobs, who needs a gradient, which parameters are learned.

Follows Net::Init of Caffe's net.cpp decision for decision; net.py and step/ run what this builds.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.graph.blob import Blob, Shape
from torchcaffe.layers import LAYERS
from torchcaffe.layers.base import Context, Layer
from torchcaffe.proto import caffe_pb2
from torchcaffe.proto.prototxt import nearest

AUTOMATIC = "(automatic)"                           # Caffe's name of a loss that the file does not name; never an output


@dataclass
class Node:
    """One layer in its place: what it reads, what it makes, and where gradients go."""
    layer: Layer
    bottom_names: list[str]
    top_names: list[str]
    bottoms: list[Blob]
    tops: list[Blob]
    loss_weights: list[float]                       # one per top, 0 where the top is no loss
    bottom_need: list[bool]                         # a gradient goes to this bottom
    param_need: list[bool] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)     # of each parameter: its position among the learnable ones
    need_backward: bool = False
    seen_shapes: tuple[Shape, ...] | None = None    # the bottoms' shapes that the tops' shapes were computed from

    def reshape(self) -> None:
        """Give the tops the shapes that follow from the bottoms' present shapes."""
        shapes = tuple(b.shape for b in self.bottoms)
        if shapes == self.seen_shapes and not self.layer.reshapes_itself:
            return
        for name, blob, shape in zip(self.top_names, self.tops, self.layer.top_shapes(*shapes), strict=True):
            blob.reshape(*self.layer.possible(shape, f"top '{name}'"))
        self.seen_shapes = shapes
        self.write_loss_weights()

    @property
    def overwrites(self) -> bool:
        """Whether the layer works in place and Caffe's backward then reads what it has overwritten."""
        return hasattr(self.layer, "in_place_gradient") and self.bottoms[0] is self.tops[0]

    def forward(self, *bottoms: Tensor) -> Tensor | Sequence[Tensor]:
        """The layer's forward, with Caffe's gradient also where that is not the layer's."""
        return _Overwritten.apply(bottoms[0], self) if self.overwrites else self.layer.forward(*bottoms)

    def write_loss_weights(self) -> None:
        """Put the loss weights into the tops' diffs, where forward and backward read them (Caffe: SetLossWeights)."""
        for blob, weight in zip(self.tops, self.loss_weights, strict=False):
            if weight:
                blob.diff_slot.assign(torch.full_like(blob.diff_value(), weight))


class _Overwritten(torch.autograd.Function):
    """A layer in place whose gradient Caffe computes from what its blob holds when backward comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, node: Node) -> Any:
        ctx.node = node
        return node.layer.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        node: Node = ctx.node
        y = node.tops[0].data_slot.value().detach()
        return node.layer.in_place_gradient(y, *grads), None  # type: ignore[attr-defined]


@dataclass
class Learnable:
    """A parameter that a solver updates: owned by one layer, possibly used by others."""
    blob: Blob
    layer: str
    index: int
    type: str                                       # of the layer
    lr_mult: float = 1.0
    decay_mult: float = 1.0
    wrote_lr: bool = False
    wrote_decay: bool = False


@dataclass
class Graph:
    name: str
    param: caffe_pb2.NetParameter                   # filtered, with splits
    nodes: list[Node]
    blobs: dict[str, Blob]                          # in order
    inputs: list[str]
    outputs: list[str]
    learnable: list[Learnable]


def build(param: caffe_pb2.NetParameter, context: Context) -> Graph:
    """Build all layers of a filtered and split `param`.  Raises CaffeError naming the layer that does not fit."""
    return _Builder(param, context).run()


class _Builder:
    def __init__(self, param: caffe_pb2.NetParameter, context: Context):
        self.param, self.context = param, context
        self.graph = Graph(param.name, param, [], {}, [], [], [])
        self.available: set[str] = set()
        self.blob_need: dict[int, bool] = {}            # id(blob) -> some layer below it learns
        self.names: dict[str, int] = {}                 # ParamSpec.name -> position in learnable
        self.viewed = {spec.name for message in param.layer for spec in message.param if spec.share_mode == spec.PERMISSIVE}

    def run(self) -> Graph:
        for message in self.param.layer:
            node = self._node(message)
            self.graph.nodes.append(node)
            self._parameters(node, message)
            if node.need_backward:
                for blob in node.tops:
                    self.blob_need[id(blob)] = True
        self._prune()
        if self.param.force_backward:
            self._force_backward()
        self.graph.outputs = sorted(self.available)
        return self.graph

    # -- one layer -------------------------------------------------------------------------------------------------
    def _node(self, message: caffe_pb2.LayerParameter) -> Node:
        if message.type not in LAYERS:
            raise CaffeError(f"layer '{message.name}': layer type '{message.type}' is not registered{nearest(message.type, LAYERS)}",
                             layer=message.name)
        own = caffe_pb2.LayerParameter()
        own.CopyFrom(message)
        if not own.HasField("phase"):
            own.MergeFrom(caffe_pb2.LayerParameter(phase=caffe_pb2.Phase.Name(self.context.phase)))
        layer = LAYERS[message.type].made(own, self.context)
        layer.require(not message.propagate_down or len(message.propagate_down) == len(message.bottom),
                      f"{len(message.propagate_down)} propagate_down for {len(message.bottom)} bottoms; write one for each or none")
        bottoms, bottom_need = [], []
        for i, name in enumerate(message.bottom):
            layer.require(name in self.available, f"unknown bottom blob '{name}': no earlier layer has such a top, or one uses it up")
            self.available.discard(name)
            blob = self.graph.blobs[name]
            bottoms.append(blob)
            bottom_need.append(bool(message.propagate_down[i]) if message.propagate_down else self.blob_need[id(blob)])
        need_backward = any(self.blob_need[id(b)] for b in bottoms)
        tops, top_names = self._tops(layer, message, bottoms)
        self._check_counts(layer, len(bottoms), len(tops))
        node = Node(layer, list(message.bottom), top_names, bottoms, tops, [], bottom_need, need_backward=need_backward)
        layer.attach(bottoms, tops)
        layer.setup(*(b.shape for b in bottoms))
        node.reshape()
        node.loss_weights = self._loss_weights(layer, len(tops))
        node.write_loss_weights()
        return node

    def _tops(self, layer: Layer, message: caffe_pb2.LayerParameter, bottoms: list[Blob]) -> tuple[list[Blob], list[str]]:
        tops, names = [], list(message.top)
        for j, name in enumerate(names):
            if j < len(bottoms) and name == message.bottom[j]:
                layer.require(layer.in_place, f"cannot work in place; give top '{name}' a name of its own")
                tops.append(bottoms[j])
            else:
                layer.require(name not in self.graph.blobs, f"top '{name}' is already made by another layer, "
                              "or an in-place layer comes after another layer has read it")
                tops.append(self._blob())
                self.graph.blobs[name] = tops[-1]
                if layer.type == "Input":
                    self.graph.inputs.append(name)
            self.available.add(name)
        if layer.auto_tops:
            while len(tops) < _least(layer.tops):
                tops.append(self._blob())
                names.append(AUTOMATIC)
                self.graph.blobs[AUTOMATIC] = tops[-1]
        return tops, names

    def _blob(self) -> Blob:
        blob = Blob((), self.context.device, self.context.dtype)
        self.blob_need[id(blob)] = False
        return blob

    def _check_counts(self, layer: Layer, bottoms: int, tops: int) -> None:
        for what, count, limits in (("bottom", bottoms, layer.bottoms), ("top", tops, layer.tops)):
            least, most = limits if isinstance(limits, tuple) else (limits, limits)
            allowed = f"exactly {least}" if least == most else f"at least {least}" + ("" if most is None else f" and at most {most}")
            layer.require(count >= least and (most is None or count <= most), f"takes {allowed} {what} blob(s), not {count}")
        layer.require(not layer.same_count or bottoms == tops, f"has {bottoms} bottoms and {tops} tops; it makes one top per bottom")

    @staticmethod
    def _loss_weights(layer: Layer, tops: int) -> list[float]:
        written = list(layer.param.loss_weight) or ([1.0] if layer.is_loss else [0.0] * tops)
        layer.require(len(written) == tops, f"{len(written)} loss_weight(s) for {tops} top(s); write one for each top or none")
        return written

    # -- parameters ------------------------------------------------------------------------------------------------
    def _parameters(self, node: Node, message: caffe_pb2.LayerParameter) -> None:
        layer = node.layer
        if not layer.blobs:
            for i, (shape, _) in enumerate(layer.declared):
                layer.blobs.append(Blob(shape, self.context.device, self.context.dtype, True, self._layout(message, i, shape)))
        count = len(layer.blobs)
        layer.require(len(message.param) <= count, f"{len(message.param)} param blocks for {count} parameter(s)")
        # whether a layer needs backward is read from what is written in the net, not from what the layer adds (BatchNorm)
        node.param_need = [message.param[i].lr_mult != 0 if i < len(message.param) else True for i in range(count)]
        node.need_backward |= any(node.param_need)
        default = caffe_pb2.ParamSpec()
        for i in range(count):
            spec = layer.param.param[i] if i < len(layer.param.param) else default
            node.owners.append(self._parameter(layer, i, spec))
        layer.blobs.changed = False
        layer.bind(node.param_need)

    def _layout(self, message: caffe_pb2.LayerParameter, index: int, shape: Shape) -> torch.memory_format:
        """On a GPU weights of convolutions lie as cuDNN takes them, or it would copy them for every convolution, unless they are viewed.

        Their gradients and histories are laid out alike, which is what lets torch update all parameters in one kernel.
        """
        viewed = index < len(message.param) and message.param[index].name in self.viewed       # by others, in another shape
        last = self.context.device.type == "cuda" and len(shape) == 4 and not viewed
        return torch.channels_last if last else torch.contiguous_format

    def _parameter(self, layer: Layer, index: int, spec: caffe_pb2.ParamSpec) -> int:
        """Draw a parameter, or share it; the position of the one that learns."""
        blob, learnable = layer.blobs[index], self.graph.learnable
        owner = self.names.get(spec.name) if spec.name else None
        if owner is None:
            if spec.name:
                self.names[spec.name] = len(learnable)
            learnable.append(Learnable(blob, layer.name, index, layer.type, spec.lr_mult, spec.decay_mult,
                                       spec.HasField("lr_mult"), spec.HasField("decay_mult")))
            if layer.declared and self.context.device.type != "meta":
                initial = layer.declared[index][1](self.context.streams.common.numpy("fill", layer.name, index))
                blob.data_slot.assign(torch.from_numpy(initial).to(self.context.dtype).reshape(blob.shape))
            return len(learnable) - 1
        first = learnable[owner]
        permissive = spec.share_mode == caffe_pb2.ParamSpec.PERMISSIVE
        same = blob.count == first.blob.count if permissive else blob.shape == first.blob.shape
        layer.require(same, f"shares parameter '{spec.name}' of layer '{first.layer}' with shape {blob.shape}, there {first.blob.shape}"
                      + ("" if permissive else "; equal shapes are needed unless share_mode is PERMISSIVE"))
        for attr, wrote in (("lr_mult", "wrote_lr"), ("decay_mult", "wrote_decay")):
            if spec.HasField(attr):
                value = getattr(spec, attr)
                layer.require(not getattr(first, wrote) or getattr(first, attr) == value,
                              f"shared parameter '{spec.name}' has {attr} {value} here and {getattr(first, attr)} in layer '{first.layer}'")
                setattr(first, attr, value)
                setattr(first, wrote, True)
        blob.share_data(first.blob)
        blob.share_diff(first.blob)
        return owner

    # -- who needs backward ------------------------------------------------------------------------------------------
    def _prune(self) -> None:
        """No backward where no loss is reached, or where nothing above asks for a gradient."""
        under_loss: set[str] = set()
        skipped: set[str] = set()
        for node in reversed(self.graph.nodes):
            names = node.top_names
            contributes = any(w != 0 or n in under_loss for w, n in zip(node.loss_weights, names, strict=True))
            if node.need_backward and all(n in skipped for n in names):
                node.need_backward = False
                node.bottom_need = [False] * len(node.bottoms)
            if not contributes:
                node.need_backward = False
                node.bottom_need = [False] * len(node.bottoms)
            else:
                under_loss.update(node.bottom_names)
            skipped.update(n for n, need in zip(node.bottom_names, node.bottom_need, strict=True) if not need)

    def _force_backward(self) -> None:
        for node in self.graph.nodes:
            node.need_backward = True
            node.bottom_need = [need or i not in node.layer.no_force for i, need in enumerate(node.bottom_need)]
            node.param_need = [True] * len(node.param_need)
            node.layer.bind(node.param_need)


def check_differentiable(graph: Graph) -> None:
    """Raise CaffeError where backward would ask a layer for a gradient it does not have (Caffe aborts in Backward)."""
    for node in graph.nodes:
        layer, refused = node.layer, node.layer.not_differentiable
        for i, need in enumerate(node.bottom_need):
            layer.require(not (node.need_backward and need and (refused == "all" or i in refused)),
                          f"cannot propagate a gradient to bottom '{node.bottom_names[i]}' (number {i}); freeze what is below it, "
                          "or write propagate_down: false for it")


def _least(limits: int | tuple[int, int | None]) -> int:
    return limits[0] if isinstance(limits, tuple) else limits
