"""Nets built for looking at: the shapes of everything and the contents of nothing, so that no net is too large.

A data layer whose data are not there gets an Input layer in its place, with tops of the shape that its settings let expect, or that the
user gives.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile, zip_longest

from torchcaffe import formats, settings
from torchcaffe.errors import CaffeError
from torchcaffe.graph import filter as graph
from torchcaffe.layers.base import LAYERS, Context, Shape
from torchcaffe.net import Net
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.streams import Streams

READERS = {"Data": "data_param", "HDF5Data": "hdf5_data_param", "ImageData": "image_data_param", "WindowData": "window_data_param"}


@dataclass
class Outline:
    """A net without contents, and the complaints of the data layers (by name) that it has Input layers for."""
    net: Net
    missing: dict[str, CaffeError]


def outline(param: caffe_pb2.NetParameter, source: str, given: Mapping[str, Shape] | None = None) -> Outline:
    """The net of a message whose state is set; `source` is its file, `given` the shapes that a user says the tops of data layers have.

    Raises CaffeError for a net that cannot be built.  None for `given` means that the user cannot be asked.
    """
    net = caffe_pb2.NetParameter()
    net.CopyFrom(graph.filter_net(param))
    context = Context(param.state.phase, Streams(0))
    missing: dict[str, CaffeError] = {}
    unused = set(given or ())
    for layer in (layer for layer in net.layer if layer.type in READERS):
        complaint, asked = _complaint(layer, context), unused.intersection(layer.top)
        if not (complaint or asked):
            continue
        shapes = _shapes(layer, param, given or {})
        if len(shapes) < len(layer.top):
            top, hint = layer.top[len(shapes)], ""
            if given is not None:
                example = f"{top}={batch_size(layer)}{',3,32,32' if top == layer.top[0] else ''}"
                hint = f"; to look at the net without it, say what shape '{top}' has, as in --shape {example}"
            raise placed(CaffeError(f"{complaint or 'its shapes are given in part'}{hint}", layer=layer.name), source)
        if complaint:
            missing[layer.name] = placed(complaint, source)
        unused -= asked
        layer.type = "Input"
        for shape in shapes:
            layer.input_param.shape.add(dim=shape)
    if unused:
        raise CaffeError(f"{source}: no data layer of phase {caffe_pb2.Phase.Name(param.state.phase)} has a top '{min(unused)}' "
                         "that could be given a shape")
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


def batch_size(layer: caffe_pb2.LayerParameter) -> int:
    """How many records a data layer reads at a time."""
    size: int = getattr(layer, READERS[layer.type]).batch_size
    return size


def _shapes(layer: caffe_pb2.LayerParameter, param: caffe_pb2.NetParameter, given: Mapping[str, Shape]) -> list[Shape]:
    """The shapes of the first tops of a data layer, as far as they are given or can be told: from its own settings, or from those of the
    net's other data layers with its first top, which as a rule make images of the same size."""
    others = [other for other in param.layer if other.type in READERS and other.top[:1] == layer.top[:1]]
    images = next(filter(None, (_image_shape(one) for one in (layer, *others))), None)
    batch = given[layer.top[0]][:1] if layer.top[0] in given else (batch_size(layer),)
    known: list[Shape | None] = [(*batch, *images) if images and all(batch) else None, batch if all(batch) else None]
    if layer.type == "HDF5Data":
        known = []
    shapes = [given.get(top, expected) for top, expected in zip_longest(layer.top, known[:len(layer.top)])]
    return list(takewhile(lambda shape: shape is not None, shapes))  # type: ignore[arg-type]


def _image_shape(layer: caffe_pb2.LayerParameter) -> Shape | None:
    """Channels, height and width of a data layer's images as far as crop, new size, mean and colour tell; None where they do not."""
    transform, images = layer.transform_param, layer.image_data_param
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
    return (channels, height, width) if height and width else None
