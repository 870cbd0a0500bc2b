"""Layers without bottoms that read no data source: Input, DummyData, Parameter."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from torchcaffe.graph.blob import Blob
from torchcaffe.layers.base import Layer, Shape, layer
from torchcaffe.proto import caffe_pb2

T = TypeVar("T")


@layer("Input")
class Input(Layer):
    """Blobs whose contents the user sets: one shape for all tops, one for each, or none (the user reshapes the blobs).

    The net reads the blobs themselves and never runs this layer.  Caffe: input_layer.cpp.
    """

    bottoms, tops = 0, (1, None)

    def top_shapes(self) -> list[Shape]:
        shapes, count = [tuple(s.dim) for s in self.param.input_param.shape], len(self.param.top)
        self.require(len(shapes) in (0, 1, count), f"{len(shapes)} shapes for {count} tops; write none, one or one for each")
        return shapes if len(shapes) == count else (shapes or [()]) * count


@layer("DummyData")
class DummyData(Layer):
    """Blobs that fillers fill: constant ones when the net is built, so that a user may change them; the others in every forward pass.

    Shapes and fillers: one for all tops or one for each; a filler nobody wrote is constant 0.  Caffe: dummy_data_layer.cpp.
    """

    bottoms, tops, needs_host = 0, (1, None), True

    def attach(self, bottoms: list[Blob], tops: list[Blob]) -> None:
        self.filled = tops

    def setup(self) -> None:
        p = self.param.dummy_data_param
        old = (p.num, p.channels, p.height, p.width)
        self.require(not (p.shape and any(old)), "write shape, or num, channels, height and width; not both")
        if any(old):
            self.shapes: list[Shape] = list(zip(*(self._for_each_top(sizes, "sizes") for sizes in old), strict=True))
        else:
            self.shapes = self._for_each_top([tuple(shape.dim) for shape in p.shape], "shapes")
        self.shapes = [self.possible(shape, f"top '{name}'") for name, shape in zip(self.param.top, self.shapes, strict=True)]
        messages = self._for_each_top(p.data_filler or [caffe_pb2.FillerParameter()], "data_fillers")
        self.constant = [message.type == "constant" for message in messages]
        self.fills = [self.filler(message, shape) for message, shape in zip(messages, self.shapes, strict=True)]
        for i, (blob, constant) in enumerate(zip(self.filled, self.constant, strict=True)):
            if constant:
                blob.reshape(*self.shapes[i])
                blob.data_slot.assign(self._draw(i))

    def _for_each_top(self, values: Sequence[T], what: str) -> list[T]:
        count = len(self.param.top)
        self.require(len(values) in (1, count), f"{len(values)} {what} for {count} tops; write one or one for each")
        return list(values) * (count if len(values) == 1 else 1)

    def _draw(self, index: int) -> Tensor:
        if self.context.device.type == "meta":
            return torch.empty(self.shapes[index], device="meta", dtype=self.context.dtype)
        draw = self.context.streams.numpy(f"data{index}", self.name, self.cursor)
        return torch.from_numpy(self.fills[index](draw)).to(self.context.device, self.context.dtype)

    def top_shapes(self) -> list[Shape]:
        return self.shapes

    def forward(self) -> list[Tensor]:
        tops = [blob.data_slot.value() if constant else self._draw(i)
                for i, (blob, constant) in enumerate(zip(self.filled, self.constant, strict=True))]
        self.cursor += 1
        return tops


@layer("Parameter")
class Parameter(Layer):
    """A parameter as a blob, zero at first.  Its gradient is not added up over iter_size but overwritten.  Caffe: parameter_layer.hpp."""

    bottoms, tops = 0, 1

    def setup(self) -> None:
        self.declare(self.param.parameter_param.shape.dim, caffe_pb2.FillerParameter())

    def top_shapes(self) -> list[Shape]:
        return [self.declared[0][0]]

    def forward(self) -> Tensor:
        return self.params[0]
