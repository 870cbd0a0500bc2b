"""Caffe's layer types, one module per family; importing this fills LAYERS."""
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
