"""Which pixel of one top lies over which of another: for crops that align feature maps.

A map is (axis, scale, shift): along the spatial axes from `axis` + 1 on, coordinate x of the top's bottom is scale * x + shift in the top;
axis None stands for layers that treat every pixel alike.  Works on the tops of net_spec.  Caffe: python/caffe/coord_map.py.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from torchcaffe.errors import CaffeAssertionError, CaffeError, CaffeKeyError, CaffeRuntimeError
from torchcaffe.net_spec import Function, Top, layers

PASS_THROUGH_LAYERS = ["AbsVal", "BatchNorm", "Bias", "BNLL", "Dropout", "Eltwise", "ELU", "Log", "LRN", "Exp", "MVN", "Power", "ReLU",
                       "PReLU", "Scale", "Sigmoid", "Split", "TanH", "Threshold"]
Map = tuple[int | None, Any, Any]
IDENTITY: Map = (None, 1, 0)


class UndefinedMapException(CaffeError):
    """A layer that does not map coordinates."""


class AxisMismatchException(CaffeError):
    """Two maps whose spatial axes begin at different places."""


def conv_params(fn: Function) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """(axis, stride, extent of the kernel, pad) of a Convolution, Deconvolution, Im2col or Pooling layer."""
    given = fn.params.get("convolution_param", fn.params.get("pooling_param", fn.params))
    legacy = sorted({f"{what}_{side}" for what in ("pad", "kernel", "stride") for side in "hw"} & set(given))
    if legacy or "kernel_size" not in given:
        kind = CaffeAssertionError if "kernel_size" in given else CaffeKeyError
        raise kind(f"layers.{fn.type_name}: the coordinates of a crop are worked out from kernel_size, stride and pad"
                   + (f", not from {', '.join(legacy)}" if legacy else ", but there is no kernel_size"))
    size, dilation = (np.array(given.get(name, 1), ndmin=1) for name in ("kernel_size", "dilation"))
    stride, pad = np.array(given.get("stride", 1), ndmin=1), np.array(given.get("pad", 0), ndmin=1)
    return given.get("axis", 1), stride, (size - 1) * dilation + 1, pad


def crop_params(fn: Function) -> tuple[int, np.ndarray]:
    """(axis, offset) of a Crop layer."""
    given = fn.params.get("crop_param", fn.params)
    return given.get("axis", 2), np.array(given.get("offset", 0), ndmin=1)


def coord_map(fn: Function) -> Map:
    """The map of a layer.  Raises UndefinedMapException for a layer that has none."""
    if fn.type_name in ("Convolution", "Pooling", "Im2col"):
        axis, stride, extent, pad = conv_params(fn)
        return axis, 1 / stride, (pad - (extent - 1) / 2) / stride
    if fn.type_name == "Deconvolution":
        axis, stride, extent, pad = conv_params(fn)
        return axis, stride, (extent - 1) / 2 - pad
    if fn.type_name == "Crop":
        axis, offset = crop_params(fn)
        return axis - 1, 1, -offset
    if fn.type_name in PASS_THROUGH_LAYERS:
        return IDENTITY
    raise UndefinedMapException(f"layers.{fn.type_name} does not map the coordinates of its bottom to those of its top")


def compose(base_map: Map, next_map: Map) -> Map:
    """The map of `next_map` followed by `base_map`."""
    (axis, scale, shift), (further, scale2, shift2) = base_map, next_map
    if None not in (axis, further) and axis != further:
        raise AxisMismatchException(f"the spatial axes begin after axis {axis} in one layer and after axis {further} in another")
    return further if axis is None else axis, scale * scale2, scale * shift2 + shift


def inverse(mapping: Map) -> Map:
    """The map from top to bottom."""
    axis, scale, shift = mapping
    return axis, 1 / scale, -shift / scale


def coord_map_from_to(top_from: Top, top_to: Top) -> Map:
    """The map from the coordinates of one top to those of another, over the nearest blob that both are computed from."""
    sources = _sources(top_from)
    for top, to_map in _sources(top_to).items():
        if top in sources:
            return compose(to_map, inverse(sources[top]))
    raise CaffeRuntimeError(f"there is no map from the top of layers.{top_from.fn.type_name} to that of layers.{top_to.fn.type_name}: "
                            "no spatial layers lead from a common blob to both")


def _sources(top: Top) -> dict[Top, Map]:
    """The map to `top` from every top that it is computed from by layers that have maps, nearest first."""
    found = {top: IDENTITY}
    for item in (waiting := [top]):
        try:
            step = compose(found[item], coord_map(item.fn))
        except UndefinedMapException:
            continue
        for bottom in item.fn.inputs[:1] if item.fn.type_name == "Crop" else item.fn.inputs:    # a Crop's second bottom lends its size only
            if bottom not in found:
                found[bottom] = step
                waiting.append(bottom)
    return found


def crop(top_from: Top, top_to: Top) -> Top:
    """A Crop layer that cuts `top_from` down to the pixels of `top_to`.

    Raises CaffeAssertionError where the two differ in scale, or lie apart by less than a pixel or the wrong way round.
    """
    axis, scale, shift = coord_map_from_to(top_from, top_to)
    offset = -np.array(shift, float, ndmin=1)
    if not np.all(np.asarray(scale) == 1) or (offset < 0).any() or (np.round(offset) != offset).any():
        raise CaffeAssertionError(f"layers.{top_from.fn.type_name} cannot be cropped to layers.{top_to.fn.type_name}: coordinates are "
                                  f"scaled by {scale} and shifted by {shift}, and a crop takes scale 1 and a shift of whole pixels, "
                                  "none above 0")
    first = 2 if axis is None else axis + 1
    cropped: Top = layers.Crop(top_from, top_to, crop_param={"axis": first, "offset": offset.astype(int).tolist()})
    return cropped
