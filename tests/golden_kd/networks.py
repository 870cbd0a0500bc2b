"""Network cases: weights by rule, one pass in each phase with and without preacts, and what the taps hold then."""
from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import torchcaffe as caffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import UserError
from hintkd.experiment import Options, Taps
from hintkd.nets.titles import network
from torchcaffe.settings import number_type

Arrays = dict[str, np.ndarray]


def knows(title: str) -> bool:
    try:
        return bool(network(title))
    except UserError:
        return False


def weights_by_rule(tensors: list[list[Any]], seed: int, gain: float) -> list[np.ndarray]:
    """The tensors of a module, drawn one by one."""
    drawn = []
    for k, (name, shape, *_) in enumerate(tensors):
        r = np.random.default_rng(seed + k)
        kind = name.rsplit(".", 1)[-1]
        if kind == "num_batches_tracked":
            value: Any = np.zeros(shape)
        elif len(shape) >= 2:
            value = r.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))
        elif kind == "running_var":
            value = 0.5 + r.random(shape)
        elif kind == "weight":
            value = 1 + 0.1 * r.standard_normal(shape)
        else:
            value = 0.1 * r.standard_normal(shape)
        drawn.append(np.asarray(value, np.float32))
    return drawn


class Place(NamedTuple):
    """Where a tensor of a torch module is in a net: a blob of a layer, or a BatchNorm's statistic, which Caffe has multiplied."""
    layer: str
    index: int
    is_statistic: bool = False

    def blob(self, net: Any) -> Any:
        return net.params[self.layer][self.index]

    def set(self, net: Any, value: np.ndarray) -> None:
        self.blob(net).data[...] = 10 * value if self.is_statistic else value
        if self.is_statistic:
            net.params[self.layer][2].data[...] = 10

    def get(self, net: Any) -> np.ndarray:
        factor = float(net.params[self.layer][2].data[0]) if self.is_statistic else 1
        return np.array(self.blob(net).data, np.float64) / factor


def norm_places(blob: str) -> list[Place]:
    """Of a BatchNorm and Scale in place: weight, bias, running mean and variance, in torch's order."""
    return [Place(blob + "_scale", 0), Place(blob + "_scale", 1), Place(blob + "_bn", 0, True), Place(blob + "_bn", 1, True)]


def places(net: Any) -> list[Place]:
    """Of a torch module's tensors, in their order, but num_batches_tracked."""
    found: list[Place] = []
    seen: set[int] = set()
    for node in net.graph.nodes:
        name, layer = node.layer.name, node.layer
        if name not in net.params or name.endswith("_scale") or (all(p.lr_mult == 0 for p in layer.param.param) and layer.param.param \
                and layer.type == "Convolution"):
            continue                                         # a Scale comes with its BatchNorm; frozen convolutions are poolings
        if node.owners[0] in seen:
            continue                                         # a second user of a BatchNorm's parameters
        seen.add(node.owners[0])
        if layer.type == "BatchNorm":
            found += norm_places(name.removesuffix("_bn"))
        else:
            found += [Place(name, index) for index in range(len(net.params[name]))]
    return found


def tracked(tensors: list[list[Any]]) -> list[list[Any]]:
    """The tensors that a net here has, too."""
    return [tensor for tensor in tensors if not tensor[0].endswith("num_batches_tracked")]


class Built:
    """A network in a net of its own."""

    def __init__(self, title: str, classes: int, images: np.ndarray, phase: int, preacts: bool, dtype: torch.dtype):
        param = caffe_pb2.NetParameter(name=title)
        param.layer.add(name="data", type="Input", top=["data"], input_param={"shape": [{"dim": images.shape}]})
        self.taps: Taps = network(title).write(param, "data", classes, replace(Options(), bn_fraction=0.9), preacts=preacts)
        for blob in {*self.taps.preacts} - {b for layer in param.layer for b in layer.bottom}:
            param.layer.add(name=f"silence_{blob}", type="Silence", bottom=[blob])
        param.layer.add(name="sum", type="Reduction", bottom=[self.taps.logits], top=["sum"], loss_weight=[1])
        with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file, number_type(dtype):
            file.write(write_text(param))
            file.flush()
            self.net = caffe.Net(file.name, phase)
        self.net.blobs["data"].data[...] = images

    def set(self, tensors: list[list[Any]], values: list[np.ndarray]) -> None:
        """Give it a module's tensors.  Raises ValueError where one does not fit."""
        self.places = places(self.net)
        known = [(name, shape, value) for (name, shape, _), value in zip(tensors, values, strict=True)
                 if not name.endswith("num_batches_tracked")]
        if len(self.places) != len(known):
            raise ValueError(f"{len(self.places)} tensors, expected {len(known)}")
        for place, (name, shape, value) in zip(self.places, known, strict=True):
            if tuple(place.blob(self.net).data.shape) != tuple(shape):
                raise ValueError(f"{name}: shape {tuple(place.blob(self.net).data.shape)}, expected {tuple(shape)}")
            place.set(self.net, value)

    def features(self, preacts: bool) -> list[np.ndarray]:
        t = self.taps
        names = [t.stem, *(t.preacts if preacts else t.stages), t.pooled]
        return [np.array(self.net.blobs[name].data, np.float64) for name in names]

    def statistics(self, tensors: list[list[Any]]) -> Arrays:
        """The running statistics by their names."""
        return {name: place.get(self.net) for place, (name, _, _) in zip(self.places, tracked(tensors), strict=True) if place.is_statistic}


def results(case: dict[str, Any], images: np.ndarray, dtype: torch.dtype) -> Arrays:
    """What the project computes for a case, under the case's keys."""
    tensors, classes = case["tensors"], case["num_classes"]
    values = weights_by_rule(tensors, case["seed"], case["gain"])
    found: Arrays = {}
    for mode, phase in (("eval", caffe.TEST), ("train", caffe.TRAIN)):
        for preacts in (False, True):
            built = Built(case["net"], classes, images, phase, preacts, dtype)
            built.set(tensors, values)
            built.net.forward()
            where = f"{mode}/preact" if preacts else mode
            for i, feature in enumerate(built.features(preacts)):
                flat = feature.reshape(-1)
                found[f"{where}/feat{i}/stats"] = np.array([flat.mean(), flat.std(), *flat[:16]])
                axes = tuple(a for a in range(feature.ndim) if a != 1)
                found[f"{where}/feat{i}/channel_mean"] = feature.mean(axes)
            for name, value in built.statistics(tensors).items() if mode == "train" else ():
                found[f"{where}/after/{name}"] = value
                found[f"{where}/after/{name}#"] = np.array([value.mean(), value.std(), *value[:16]])
            if not preacts:
                found[f"{mode}/logits"] = np.array(built.net.blobs[built.taps.logits].data, np.float64)
                found[f"{mode}/grad_norm"] = gradient_norms(built, tensors)
    return found


def gradient_norms(built: Built, tensors: list[list[Any]]) -> np.ndarray:
    """Of the sum of all class scores, for each parameter."""
    net = built.net
    for blobs in net.params.values():
        for blob in blobs:
            blob.diff[...] = 0
    net.backward()
    return np.array([np.linalg.norm(np.array(place.blob(net).diff, np.float64))
                     for place, (_, _, kind) in zip(built.places, tracked(tensors), strict=True) if kind == "parameter"])
