"""Caffe's layer types, one module per family; importing this fills LAYERS.

It is also pycaffe's `layers`, as in `from caffe import layers as L`: any other name makes a layer of that type for a NetSpec.
"""
from typing import Any

from torchcaffe.layers import (
    arithmetic,
    data,
    hdf5_output,
    image_data,
    input,
    loss,
    neuron,
    norm,
    python,
    recurrent,
    shape,
    vision,
    window_data,
)
from torchcaffe.layers.base import LAYERS, Context, Layer, layer

__all__ = ["LAYERS", "Context", "Layer", "arithmetic", "data", "hdf5_output", "image_data", "input", "layer", "loss", "neuron", "norm",
           "python", "recurrent", "shape", "vision", "window_data"]


def __getattr__(name: str) -> Any:
    from torchcaffe.net_spec import layers

    return getattr(layers, name)
