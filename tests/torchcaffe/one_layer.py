"""One layer without a net, for tests of layers: built from a line of prototxt, in float64."""
from __future__ import annotations

import numpy as np
import torch
from google.protobuf import text_format
from torch import Tensor

from torchcaffe.graph.blob import Blob
from torchcaffe.layers import LAYERS
from torchcaffe.layers.base import Context, Layer
from torchcaffe.proto import caffe_pb2
from torchcaffe.streams import Streams


def make(type_name: str, *bottoms: tuple[int, ...], text: str = "", tops: int = 1, phase: int = caffe_pb2.TRAIN,
         dtype: torch.dtype = torch.float64, device: str = "cpu") -> Layer:
    """A layer that is set up for bottoms of these shapes, with drawn parameters that take gradients."""
    param = text_format.Parse(text, caffe_pb2.LayerParameter(name="it", type=type_name, top=[f"top{i}" for i in range(tops)]))
    context = Context(phase, Streams(1), torch.device(device), dtype)
    layer = LAYERS[type_name](param, context)
    layer.attach([], [Blob((), context.device, dtype) for _ in range(tops)])
    layer.setup(*bottoms)
    layer.top_shapes(*bottoms)
    for i, (shape, fill) in enumerate(layer.declared):
        values = torch.from_numpy(fill(context.streams.numpy("fill", "it", i))).to(context.device, dtype)
        layer.params.append(values.reshape(shape).requires_grad_())
    return layer


def run(layer: Layer, *bottoms: Tensor) -> list[Tensor]:
    """The tops, always as a list."""
    result = layer.forward(*bottoms)
    return [result] if isinstance(result, Tensor) else list(result)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, of a leaf that takes a gradient."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).requires_grad_()


def gradients_are_true(layer: Layer, *bottoms: Tensor) -> bool:
    """Whether autograd's gradients for bottoms and parameters are those of finite differences."""
    count = len(bottoms)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        layer.params = list(values[count:])
        return tuple(top for top in run(layer, *values[:count]) if top.requires_grad)
    return torch.autograd.gradcheck(function, (*bottoms, *layer.params))
