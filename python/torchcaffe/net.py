"""pycaffe's Net: runs a graph layer by layer, keeping every blob's data and diff.

This is the form users look into: start and end, hooks, live arrays, propagate_down, in-place names and splits behave as in Caffe.
Each layer is differentiated on its own with autograd, so a diff that a user writes between two layers counts.  Training
programs use step/ instead, which runs a whole iteration as one function of the same layers.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcaffe import formats, glog, settings
from torchcaffe.batches import Batches
from torchcaffe.errors import CaffeError, CaffeKeyError, CaffeRuntimeError, CaffeTypeError, CaffeValueError
from torchcaffe.graph import debug, work
from torchcaffe.graph import filter as graph
from torchcaffe.graph.blob import Blob
from torchcaffe.graph.build import Graph, Node, build, check_differentiable
from torchcaffe.graph.vectors import BlobVec, DtypeVec, LayerVec, StringVec, Vector
from torchcaffe.layers.base import Context, Layer
from torchcaffe.layers.python import PythonLayer
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.streams import Streams

TRAIN, TEST = caffe_pb2.TRAIN, caffe_pb2.TEST
Hook = Callable[[int], Any]


class Net(Batches):
    """A net of a prototxt in one phase.

    Net(network_file, phase, level=0, stages=None, weights=None), or the older Net(network_file, weights, phase).
    blobs, params: dicts of Blob and of lists of Blob, in the order of the file.  layers, layer_dict: the layers; of a Python layer,
    the user's object.  Raises CaffeError with file and line.
    """

    def __init__(self, network_file: str | Path, *positional: Any, phase: int | None = None, level: int = 0,
                 stages: Sequence[str] | None = None, weights: str | Path | None = None):
        older = bool(positional) and isinstance(positional[0], (str, Path))
        names = ("weights", "phase") if older else ("phase", "level", "stages", "weights")
        if len(positional) > len(names):
            raise CaffeTypeError(f"{network_file}: Net takes {', '.join(('network_file', *names))}, not {len(positional) + 1} arguments")
        given = {"phase": phase, "level": level, "stages": stages, "weights": weights} | dict(zip(names, positional, strict=False))
        if given["phase"] not in (TRAIN, TEST):
            raise CaffeTypeError(f"{network_file}: phase {given['phase']!r} is not caffe.TRAIN or caffe.TEST")
        param = graph.set_state(prototxt.read_net(network_file), given["phase"], given["level"], list(given["stages"] or []))
        self._build(param, Streams(settings.next_net_seed(), settings.solver_rank()), str(network_file))
        if given["weights"] is not None:
            self.copy_from(given["weights"])

    @classmethod
    def from_message(cls, param: caffe_pb2.NetParameter, streams: Streams, source: str) -> Net:
        """A net from a message whose state is set; `source` names it in errors (its file, or the solver's)."""
        net = cls.__new__(cls)
        net._build(param, streams, source)
        return net

    def _build(self, param: caffe_pb2.NetParameter, streams: Streams, source: str) -> None:
        self.source, self.phase = source, param.state.phase
        self.context = Context(param.state.phase, streams, settings.device(), settings.dtype(),
                               settings.precision(), settings.share())
        with self.located():
            self.graph: Graph = build(graph.insert_splits(graph.filter_net(param)), self.context)
        self.name = self.graph.name
        self.blobs: OrderedDict[str, Blob] = OrderedDict(self.graph.blobs)
        self._layer_names = StringVec(node.layer.name for node in self.graph.nodes)
        self.layers = LayerVec(n.layer.user if isinstance(n.layer, PythonLayer) else n.layer for n in self.graph.nodes)
        self.layer_dict = OrderedDict(zip(self._layer_names, self.layers, strict=True))
        self.params: OrderedDict[str, BlobVec] = OrderedDict((name, la.blobs) for name, la in self.layer_dict.items() if la.blobs)
        self.inputs, self.outputs = list(self.graph.inputs), list(self.graph.outputs)
        self.bottom_names = OrderedDict((n.layer.name, list(n.bottom_names)) for n in self.graph.nodes)
        self.top_names = OrderedDict((n.layer.name, list(n.top_names)) for n in self.graph.nodes)
        self._blob_names = StringVec(self.blobs)
        self._tapes: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._hooks: dict[str, list[Hook]] = {"before_forward": [], "after_forward": [], "before_backward": [], "after_backward": []}
        self._differentiable = False
        self.debug_info: bool = param.debug_info            # print what graph/debug.py says about every layer
        odd = [f"'{n.layer.name}' ({n.layer.type})" for n in self.graph.nodes if n.overwrites and n.need_backward and n.bottom_need[0]]
        if odd:
            glog.warning(f"{source}: {', '.join(odd)} in place: the gradient is Caffe's, which is computed from the overwritten blob "
                         "and is not the true one; give the top a name of its own for that", "net.cpp:0")

    @contextmanager
    def located(self) -> Iterator[None]:
        """Add file and line to what a layer complains about."""
        try:
            yield
        except CaffeError as error:
            if error.layer is None:
                raise
            line = prototxt.layer_line(self.source, error.layer)
            raise type(error)(f"{self.source}:{line}: {error}" if line else f"{self.source}: {error}") from None

    # -- looking at it ---------------------------------------------------------------------------------------------
    @property
    def blob_loss_weights(self) -> OrderedDict[str, float]:
        """The loss weight of every blob, 0 for most."""
        weights = OrderedDict((name, 0.0) for name in self.blobs)
        for node in self.graph.nodes:
            weights.update((n, w) for n, w in zip(node.top_names, node.loss_weights, strict=True) if n in weights)
        return weights

    @property
    def _blob_loss_weights(self) -> DtypeVec:
        return DtypeVec(self.blob_loss_weights.values())

    def before_forward(self, hook: Hook) -> None:
        """Call hook(layer index) before each layer's forward."""
        self._hooks["before_forward"].append(hook)

    def after_forward(self, hook: Hook) -> None:
        """Call hook(layer index) after each layer's forward."""
        self._hooks["after_forward"].append(hook)

    def before_backward(self, hook: Hook) -> None:
        """Call hook(layer index) before each layer's backward."""
        self._hooks["before_backward"].append(hook)

    def after_backward(self, hook: Hook) -> None:
        """Call hook(layer index) after each layer's backward."""
        self._hooks["after_backward"].append(hook)

    def forget(self) -> None:
        """Let go of what forward passes keep for backward, which then computes from what the blobs hold."""
        self._tapes.clear()

    # -- forward ---------------------------------------------------------------------------------------------------
    def _forward(self, start: int, end: int) -> float:
        """Run layers start..end (indices, both included) and return their loss: the sum of tops times their diffs' loss weights."""
        loss = 0.0
        with work.on_its_threads(self.graph):
            for index in range(start, end + 1):
                self._call("before_forward", index)
                loss += self._forward_layer(index)
                if self.debug_info:
                    debug.forward(self.graph, index)
                self._call("after_forward", index)
        self.flush()
        return loss

    def flush(self) -> None:
        """Before a user can look: bring all arrays that somebody holds up to date."""
        for node in self.graph.nodes:
            for blob in node.tops:
                blob.data_slot.flush()
                blob.diff_slot.flush()

    def _forward_layer(self, index: int) -> float:
        node = self.graph.nodes[index]
        layer = node.layer
        self._tapes.pop(index, None)
        if layer.blobs.changed:
            with self.located():
                layer.rebind()
        for blob in layer.blobs:
            blob.data_slot.value()
        if isinstance(layer, PythonLayer):
            node.reshape()
            for blob in node.bottoms:
                blob.data_slot.flush()
            layer.forward_numpy()
        elif layer.type != "Input":
            for blob, top in zip(node.tops, self._compute(index), strict=True):
                blob.data_slot.assign(top.detach())
            for blob in layer.blobs:
                blob.data_slot.publish()
        loss = 0.0
        for blob, weight in zip(node.tops, node.loss_weights, strict=True):
            if weight:
                # the weight lies in the diff, where a later layer's backward may have written another number, as in Caffe
                loss += float(torch.sum(blob.data_slot.value() * blob.diff_value()))
        return loss

    def _compute(self, index: int) -> list[Tensor]:
        """The tops of a layer from what its bottoms hold now; what backward needs is kept."""
        node = self.graph.nodes[index]
        inputs = [blob.data_slot.value() for blob in node.bottoms]
        node.reshape()
        with torch.set_grad_enabled(node.need_backward):
            inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, node.bottom_need, strict=True)]
            result = node.forward(*inputs)
        tops = [result] if isinstance(result, Tensor) else list(result)
        if node.need_backward:
            self._tapes[index] = (inputs, tops)
        return tops

    def forward(self, blobs: Sequence[str] | None = None, start: str | None = None, end: str | None = None,
                **kwargs: np.ndarray) -> dict[str, np.ndarray]:
        """Run forward from layer `start` to layer `end`, with input blobs set from kwargs; {output or asked blob: live array}."""
        first = self._layer_index(start) if start is not None else 0
        last = self._layer_index(end) if end is not None else len(self.layers) - 1
        outputs = set(self.outputs if end is None else self.top_names[end]) | set(blobs or [])
        if kwargs:
            if set(kwargs) != set(self.inputs):
                raise CaffeError(f"input blob arguments {sorted(kwargs)} do not match the net's inputs {sorted(self.inputs)}")
            for name, value in kwargs.items():
                if value.shape[:1] != self.blobs[name].shape[:1]:
                    raise CaffeError(f"input '{name}' has shape {value.shape}, the blob {self.blobs[name].shape}; reshape it first")
                self.blobs[name].data[...] = value
        self._forward(first, last)
        return {name: self.blobs[name].data for name in self._known(outputs)}

    # -- backward --------------------------------------------------------------------------------------------------
    def _backward(self, start: int, end: int) -> None:
        """Run backward from layer index start down to end.  Blob diffs are overwritten, parameter diffs added to."""
        if not self._differentiable:
            with self.located():
                check_differentiable(self.graph)
            self._differentiable = True
        with work.on_its_threads(self.graph):
            for index in range(start, end - 1, -1):
                self._call("before_backward", index)
                if self.graph.nodes[index].need_backward:
                    self._backward_layer(index)
                    if self.debug_info:
                        debug.backward(self.graph, index)
                self._call("after_backward", index)
        if self.debug_info and (start, end) == (len(self.layers) - 1, 0):
            debug.all_parameters(self.graph)
        self.flush()

    def _backward_layer(self, index: int) -> None:
        node = self.graph.nodes[index]
        layer = node.layer
        if isinstance(layer, PythonLayer):
            for blob in (*node.bottoms, *node.tops):
                blob.data_slot.flush()
                blob.diff_slot.flush()
            layer.backward_numpy(node.bottom_need)
            return
        if layer.type == "Input":
            return
        if index not in self._tapes:                        # no forward pass came before: the blobs were filled by hand
            self._compute(index)
        inputs, tops = self._tapes[index]
        wanted = [i for i, need in enumerate(node.bottom_need) if need]
        learned = [i for i, need in enumerate(node.param_need) if need]
        targets = [inputs[i] for i in wanted] + [layer.params[i] for i in learned]
        pairs = [(t, b.diff_value().reshape(t.shape)) for t, b in zip(tops, node.tops, strict=True) if t.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(targets)
        if targets and pairs:
            grads = torch.autograd.grad([t for t, _ in pairs], targets, [d for _, d in pairs], retain_graph=True, allow_unused=True)
        for i, grad in zip(wanted, grads, strict=False):
            blob = node.bottoms[i]
            blob.diff_slot.assign(torch.zeros_like(inputs[i]) if grad is None else grad)
        for i, grad in zip(learned, grads[len(wanted):], strict=True):
            if grad is not None:
                self._add_param_diff(layer, i, grad)

    @staticmethod
    def _add_param_diff(layer: Layer, index: int, grad: Tensor) -> None:
        slot = layer.blobs[index].diff_slot
        total = slot.value()
        # a Parameter layer's blob is its top, whose diff the layers above overwrite (parameter_layer.hpp)
        slot.assign(grad if layer.type == "Parameter" else total.add_(grad.reshape(total.shape)))

    def backward(self, diffs: Sequence[str] | None = None, start: str | None = None, end: str | None = None,
                 **kwargs: np.ndarray) -> dict[str, np.ndarray]:
        """Run backward from layer `start` down to layer `end`, with top diffs set from kwargs; {input or asked blob: live diff}."""
        first = self._layer_index(start) if start is not None else len(self.layers) - 1
        last = self._layer_index(end) if end is not None else 0
        results = set(self.inputs if end is None else self.bottom_names[end]) | set(diffs or [])
        if kwargs:
            wanted = self.outputs if start is None else self.top_names[start]
            if set(kwargs) not in (set(wanted), set(self.outputs)):
                raise CaffeError(f"top diff arguments {sorted(kwargs)} do not match the tops {sorted(wanted)}")
            for name, value in kwargs.items():
                if value.shape[:1] != self.blobs[name].shape[:1]:
                    raise CaffeError(f"diff of '{name}' has shape {value.shape}, the blob {self.blobs[name].shape}")
                self.blobs[name].diff[...] = value
        self._backward(first, last)
        return {name: self.blobs[name].diff for name in self._known(results)}

    def clear_param_diffs(self) -> None:
        """Zero the diffs of all parameters."""
        for item in self.graph.learnable:
            slot = item.blob.diff_slot
            slot.assign(torch.zeros_like(slot.value()))

    # -- shapes and inputs -------------------------------------------------------------------------------------------
    def reshape(self) -> None:
        """Pass the shapes of the input blobs through all layers, after inputs were reshaped."""
        with self.located():
            for node in self.graph.nodes:
                if node.layer.type != "Input":
                    node.reshape()

    def set_input_arrays(self, data: np.ndarray, labels: np.ndarray) -> None:
        """Give the MemoryData layer, which must be the first layer, its records (float32, 4-D) and labels."""
        layer = self.graph.nodes[0].layer
        if layer.type != "MemoryData":
            raise CaffeRuntimeError(f"set_input_arrays needs a MemoryData layer as the first layer, not {layer.type} '{layer.name}'")
        layer.set_arrays(data, labels)  # type: ignore[attr-defined]

    # -- weights ---------------------------------------------------------------------------------------------------
    def copy_from(self, path: str | Path) -> None:
        """Load parameters by layer name from a .caffemodel or .h5 file; layers the net does not have are ignored.

        Raises CaffeError for another number of blobs or another shape, before anything is changed.  A parameter that another layer
        owns may be missing, as in HDF5 files.  Of layers of one name the first is filled, by each of that name in turn, and from HDF5
        files the last (Caffe: Net::CopyTrainedLayersFrom, Net::CopyTrainedLayersFromHDF5).
        """
        pairs: list[tuple[Blob, np.ndarray]] = []
        nodes = {node.layer.name: node for node in self.graph.nodes[::1 if formats.is_hdf5(path) else -1]}
        for name, arrays in formats.read_weights(path):
            if name not in nodes:
                continue
            blobs = nodes[name].layer.blobs
            known = list(arrays) + [None] * (len(blobs) - len(arrays))
            if len(known) > len(blobs) or any(a is None and self._owns(nodes[name], i) for i, a in enumerate(known)):
                raise CaffeError(f"{path}: layer '{name}' has {len(arrays)} blobs there and {len(blobs)} in {self.source}")
            for i, (blob, array) in enumerate(zip(blobs, known, strict=True)):
                if array is None:
                    continue
                if array.shape != blob.shape and not _legacy_equal(array.shape, blob.shape):
                    raise CaffeError(f"{path}: parameter {i} of layer '{name}' has shape {array.shape} there and {blob.shape} in "
                                     f"{self.source}; rename the layer to train it anew")
                pairs.append((blob, array.reshape(blob.shape)))
        for blob, array in pairs:
            blob.data_slot.assign(torch.from_numpy(array.copy()))

    def _owns(self, node: Node, index: int) -> bool:
        """Whether a layer's parameter is its own, and not another layer's that it uses."""
        return index >= len(node.owners) or self.graph.learnable[node.owners[index]].blob is node.layer.blobs[index]

    load_hdf5 = copy_from

    def to_message(self, diffs: bool = False) -> caffe_pb2.NetParameter:
        """The net with its splits and parameters, as Caffe's Net::ToProto writes it."""
        message = caffe_pb2.NetParameter(name=self.name)
        for layer in (node.layer for node in self.graph.nodes):
            entry = message.layer.add()
            entry.CopyFrom(layer.param)
            del entry.blobs[:]
            for blob in layer.blobs:
                diff = blob.diff_slot.value().detach().cpu().numpy() if diffs else None
                entry.blobs.add().CopyFrom(formats.array_to_blob(blob.data_slot.value().detach().cpu().numpy(), diff))
        return message

    def save(self, path: str | Path, diffs: bool = False) -> None:
        """Write a .caffemodel, atomically; HDF5 if the name ends in .h5."""
        formats.write_weights(path, self.to_message(diffs))

    def save_hdf5(self, path: str | Path, diffs: bool = False) -> None:
        """Write the parameters as HDF5 under any name, atomically."""
        formats.write_weights_hdf5(path, self.to_message(diffs))

    def share_with(self, other: Net) -> None:
        """Use the other net's parameters for the first layer of the same name (data only, as Caffe's ShareTrainedLayersWith)."""
        layers = {node.layer.name: node.layer for node in reversed(self.graph.nodes)}
        for theirs in (node.layer for node in other.graph.nodes if node.layer.name in layers):
            layer = layers[theirs.name]
            layer.require(len(theirs.blobs) == len(layer.blobs),
                          f"has {len(layer.blobs)} parameter(s) here and {len(theirs.blobs)} in the net it shares with")
            for blob, source in zip(layer.blobs, theirs.blobs, strict=True):
                layer.require(blob.shape == source.shape,
                              f"has a parameter of shape {blob.shape} here and {source.shape} in the net it shares with")
                blob.share_data(source)
        for node in self.graph.nodes:
            node.layer.rebind()

    # -- helpers ---------------------------------------------------------------------------------------------------
    def _call(self, when: str, index: int) -> None:
        if self._hooks[when]:
            self.flush()
        for hook in self._hooks[when]:
            hook(index)

    def _layer_index(self, name: str) -> int:
        if name not in self.layer_dict:
            raise CaffeValueError(f"{self.source}: no layer '{name}'")
        return self._layer_names.index(name)

    def _known(self, names: set[str]) -> list[str]:
        for name in names:
            if name not in self.blobs:
                raise CaffeKeyError(f"{self.source}: no blob '{name}'")
        return [name for name in self.blobs if name in names]


class NetVec(Vector[Net]):
    """The test nets of a solver."""
    holds = Net


def _legacy_equal(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Old files keep four axes; they fit a blob whose shape is the same without leading ones."""
    return len(wanted) <= 4 and len(stored) == 4 and (1,) * (4 - len(wanted)) + wanted == stored
