"""Nets built for looking at: the shapes of everything and the contents of nothing, so that no net is too large.

A data layer whose data are not there gets an Input layer in its place, with tops of the shape that its settings let expect.
"""
from __future__ import annotations

from dataclasses import dataclass

from torchcaffe import formats, settings
from torchcaffe.errors import CaffeError
from torchcaffe.graph import filter as graph
from torchcaffe.layers.base import LAYERS, Context, Shape
from torchcaffe.net import Net
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.streams import Streams

READERS = ("Data", "HDF5Data", "ImageData", "WindowData")


@dataclass
class Outline:
    """A net without contents, and the complaints of the data layers (by name) that it has Input layers for."""
    net: Net
    missing: dict[str, CaffeError]


def outline(param: caffe_pb2.NetParameter, source: str) -> Outline:
    """The net of a message whose state is set; `source` is its file.  Raises CaffeError for a net that cannot be built."""
    net = caffe_pb2.NetParameter()
    net.CopyFrom(graph.filter_net(param))
    context = Context(param.state.phase, Streams(0))
    missing: dict[str, CaffeError] = {}
    for layer in net.layer:
        if layer.type not in READERS:
            continue
        complaint = _complaint(layer, context)
        if complaint:
            shapes = expected_shapes(layer)
            if not shapes:
                raise placed(complaint, source)
            missing[layer.name] = placed(complaint, source)
            layer.type = "Input"
            for shape in shapes[:len(layer.top)]:
                layer.input_param.shape.add(dim=shape)
    with settings.shapes_only():
        return Outline(Net.from_message(net, Streams(0), source), missing)


def placed(error: CaffeError, source: str) -> CaffeError:
    """The same complaint, with the file and the line of the layer it is about."""
    line = prototxt.layer_line(source, error.layer) if error.layer else None
    return CaffeError(f"{source}:{line}: {error}" if line else f"{source}: {error}")


def _complaint(layer: caffe_pb2.LayerParameter, context: Context) -> CaffeError | None:
    """What a data layer says when it opens what it is to read."""
    own = caffe_pb2.LayerParameter()
    own.CopyFrom(layer)
    try:
        reader = LAYERS[layer.type](own, context)
        reader.setup()
        reader.top_shapes()
    except CaffeError as error:
        return error
    return None


def expected_shapes(layer: caffe_pb2.LayerParameter) -> list[Shape]:
    """The shapes of data and labels as far as crop, new size, mean and colour tell; none where they do not."""
    transform, images = layer.transform_param, layer.image_data_param
    batch = {"Data": layer.data_param.batch_size, "ImageData": images.batch_size, "WindowData": layer.window_data_param.batch_size}.get(
        layer.type, 0)
    mean: Shape = ()
    if transform.HasField("mean_file"):
        try:
            mean = formats.read_mean(transform.mean_file).shape
        except CaffeError:
            mean = ()
    channels = (mean or (len(transform.mean_value) if len(transform.mean_value) > 1 else 3,))[0]
    if layer.type == "ImageData" and not images.is_color:
        channels = 1
    height, width = (transform.crop_size,) * 2 if transform.crop_size else (images.new_height, images.new_width)
    if not height and mean:
        height, width = mean[1:]
    if not batch or not height or not width:
        return []
    return [(batch, channels, height, width), (batch,)]
