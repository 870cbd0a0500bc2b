"""How parameters get their first values: Caffe's fillers as numpy draws (Caffe: filler.hpp).

A filler is chosen and checked when a layer is set up and draws when the net asks, from the generator the net gives it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod, sqrt

import numpy as np

from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2

Shape = tuple[int, ...]
Fill = Callable[[np.random.Generator], np.ndarray]


def filler(param: caffe_pb2.FillerParameter, shape: Sequence[int]) -> Fill:
    """A function that draws a float32 array of `shape` as `param` says.

    A filler nobody wrote is constant 0.  Raises CaffeError for an unknown type and for a shape the type is not made for.
    """
    if param.type not in FILLERS:
        raise CaffeError(f"unknown filler type '{param.type}'; there are {', '.join(sorted(FILLERS))}")
    _require(param.sparse == -1 or param.type == "gaussian", param, shape, "is never sparse; only 'gaussian' is")
    return FILLERS[param.type](param, tuple(shape))


def _require(condition: bool, param: caffe_pb2.FillerParameter, shape: Sequence[int], message: str) -> None:
    if not condition:
        raise CaffeError(f"filler '{param.type}' for a parameter of shape {tuple(shape)}: {message}")


def _constant(param: caffe_pb2.FillerParameter, shape: Shape) -> Fill:
    return lambda draw: np.full(shape, param.value, np.float32)


def _between(low: float, high: float, shape: Shape) -> Fill:
    return lambda draw: np.asarray(low + (high - low) * draw.random(shape, np.float32), np.float32)


def _normal(mean: float, std: float, shape: Shape) -> Fill:
    return lambda draw: np.asarray(mean + std * draw.standard_normal(shape, np.float32), np.float32)


def _uniform(param: caffe_pb2.FillerParameter, shape: Shape) -> Fill:
    return _between(param.min, param.max, shape)


def _gaussian(param: caffe_pb2.FillerParameter, shape: Shape) -> Fill:
    """`sparse` n keeps each value with probability n / shape[0], so that an output has about n inputs."""
    normal = _normal(param.mean, param.std, shape)
    if param.sparse == -1:
        return normal
    _require(param.sparse >= 0 and len(shape) > 0 and param.sparse <= shape[0], param, shape,
             f"sparse {param.sparse} is not between 0 and the first axis")
    return lambda draw: normal(draw) * (draw.random(shape) < param.sparse / shape[0])


def _positive_unitball(param: caffe_pb2.FillerParameter, shape: Shape) -> Fill:
    """Positive numbers; those of one index of the first axis add up to 1."""
    _require(prod(shape) > 0 and len(shape) > 0, param, shape, "needs at least one axis and one element")

    def fill(draw: np.random.Generator) -> np.ndarray:
        rows = draw.random((shape[0], prod(shape[1:])), np.float32)
        return (rows / rows.sum(axis=1, keepdims=True)).reshape(shape)
    return fill


def _fan(param: caffe_pb2.FillerParameter, shape: Shape) -> float:
    """The n that xavier and msra divide by: count/shape[0] (FAN_IN), count/shape[1] (FAN_OUT) or their mean (AVERAGE)."""
    _require(prod(shape) > 0 and len(shape) > 0, param, shape, "needs at least one axis and one element")
    fan_in = prod(shape) // shape[0]
    fan_out = prod(shape) // shape[1] if len(shape) > 1 else prod(shape)
    return {param.FAN_IN: fan_in, param.FAN_OUT: fan_out, param.AVERAGE: (fan_in + fan_out) / 2}[param.variance_norm]


def _xavier(param: caffe_pb2.FillerParameter, shape: Shape) -> Fill:
    """Uniform with variance 1/n (Glorot and Bengio 2010, with FAN_IN instead of the mean by default)."""
    limit = sqrt(3 / _fan(param, shape))
    return _between(-limit, limit, shape)


def _msra(param: caffe_pb2.FillerParameter, shape: Shape) -> Fill:
    """Normal with variance 2/n (He et al. 2015)."""
    return _normal(0, sqrt(2 / _fan(param, shape)), shape)


def _bilinear(param: caffe_pb2.FillerParameter, shape: Shape) -> Fill:
    """Weights with which a Deconvolution of stride f, kernel 2f - f % 2 and one group per channel interpolates."""
    _require(len(shape) == 4 and shape[2] == shape[3], param, shape, "needs four axes and a square kernel")
    factor = ceil(shape[3] / 2)
    center = (shape[3] - 1) / (2 * factor)
    line = 1 - np.abs(np.arange(shape[3]) / factor - center)
    return lambda draw: np.broadcast_to(np.outer(line, line), shape).astype(np.float32)


FILLERS: dict[str, Callable[[caffe_pb2.FillerParameter, Shape], Fill]] = {
    "constant": _constant,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "positive_unitball": _positive_unitball,
    "xavier": _xavier,
    "msra": _msra,
    "bilinear": _bilinear,
}
