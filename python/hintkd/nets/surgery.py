"""Parts of nets: what a blob needs below it, the shapes on the way, and a trained net as a frozen teacher inside another net.

Works on LayerParameters of any net, a user's own included.  Which layers are compared with which is the business of methods/.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from math import ceil, floor

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError

Layers = Sequence[caffe_pb2.LayerParameter]
Shape = tuple[int, ...]

TEACHER = "teacher/"          # before the name of every layer and blob of a teacher inside a student's net
_SOURCES = {"Data", "DummyData", "HDF5Data", "ImageData", "Input", "MemoryData", "WindowData"}
_ELEMENTWISE = {"AbsVal", "BNLL", "BatchNorm", "Bias", "Clip", "Dropout", "ELU", "Eltwise", "Exp", "LRN", "Log", "MVN", "PReLU", "Power",
                "ReLU", "Scale", "Sigmoid", "Softmax", "Swish", "TanH", "Threshold"}
_NOT_TO_FREEZE = {"Embed", "LSTM", "Parameter", "Python", "RNN"}


def _is_source(layer: caffe_pb2.LayerParameter) -> bool:
    return layer.type in _SOURCES or (layer.type == "Python" and not layer.bottom)


def blob_of(layers: Layers, name: str) -> str:
    """The blob that the layer of this name makes (its first top), or the blob of this name.  Raises UserError if there is neither."""
    for layer in layers:
        if layer.name == name and layer.top:
            return layer.top[0]
    blobs = {top for layer in layers for top in layer.top}
    if name in blobs:
        return name
    near = get_close_matches(name, [layer.name for layer in layers] + sorted(blobs), n=1)
    raise UserError(f"the net has no layer or blob '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))


def cut(layers: Layers, blobs: Iterable[str]) -> list[caffe_pb2.LayerParameter]:
    """The layers that these blobs need, in their order; layers above are left out, for weight decay would shrink them."""
    needed, kept = set(blobs), []
    for layer in reversed(layers):
        if needed.intersection(layer.top):
            kept.append(layer)
            needed.update(layer.bottom)
    return kept[::-1]


def shapes(layers: Layers, image: Shape) -> dict[str, Shape]:
    """Shape per item of every blob made from "data" of shape `image` (channels, height, width); without blobs above unknown layer types."""
    known: dict[str, Shape] = {"data": image}
    for layer in layers:
        below = [known[b] for b in layer.bottom if b in known]
        if below and len(below) == len(layer.bottom):
            known.update(zip(layer.top, _top_shapes(layer, below), strict=False))
    return known


def _top_shapes(layer: caffe_pb2.LayerParameter, below: list[Shape]) -> list[Shape]:
    """Of all tops of a layer of known type; else none."""
    if layer.type == "Slice" and layer.slice_param.axis == 1:
        points = [0, *layer.slice_param.slice_point, below[0][0]]
        if len(points) == 2:
            points = [below[0][0] * i // len(layer.top) for i in range(len(layer.top) + 1)]
        return [(stop - start, *below[0][1:]) for start, stop in pairwise(points)]
    shape = _top_shape(layer, below)
    return [shape] if shape else []


def _top_shape(layer: caffe_pb2.LayerParameter, below: list[Shape]) -> Shape | None:
    first = below[0]
    if layer.type == "Convolution":
        c = layer.convolution_param
        kernels, pads = _both(c.kernel_size, c.kernel_h, c.kernel_w), _both(c.pad, c.pad_h, c.pad_w)
        strides, dilations = _both(c.stride, c.stride_h, c.stride_w, 1), _both(c.dilation, 0, 0, 1)
        return (c.num_output, *((size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
                                for size, kernel, pad, stride, dilation in zip(first[1:], kernels, pads, strides, dilations, strict=True)))
    if layer.type == "Deconvolution":
        c = layer.convolution_param
        kernels, pads = _both(c.kernel_size, c.kernel_h, c.kernel_w), _both(c.pad, c.pad_h, c.pad_w)
        strides, dilations = _both(c.stride, c.stride_h, c.stride_w, 1), _both(c.dilation, 0, 0, 1)
        return (c.num_output, *(stride * (size - 1) + dilation * (kernel - 1) + 1 - 2 * pad
                                for size, kernel, pad, stride, dilation in zip(first[1:], kernels, pads, strides, dilations, strict=True)))
    if layer.type == "Pooling":
        p = layer.pooling_param
        if p.global_pooling:
            return first[0], 1, 1
        kernels, pads = (p.kernel_h or p.kernel_size, p.kernel_w or p.kernel_size), (p.pad_h or p.pad, p.pad_w or p.pad)
        strides, rounded = (p.stride_h or p.stride, p.stride_w or p.stride), floor if p.round_mode == p.FLOOR else ceil
        return (first[0], *(_pooled(*sizes, rounded) for sizes in zip(first[1:], kernels, pads, strides, strict=True)))
    if layer.type == "InnerProduct":
        return (layer.inner_product_param.num_output,)
    if layer.type == "Concat" and layer.concat_param.axis > 0 and not layer.concat_param.HasField("concat_dim"):
        axis = layer.concat_param.axis - 1                   # without the batch
        return *first[:axis], sum(shape[axis] for shape in below), *first[axis + 1:]
    if layer.type == "Reshape" and layer.reshape_param.axis == 0 and layer.reshape_param.num_axes == -1:
        batch, *dims = layer.reshape_param.shape.dim or [1]
        return tuple(dims) if batch == 0 and min(dims, default=0) > 0 else None
    return first if layer.type in _ELEMENTWISE else None


def _both(values: Sequence[int], height: int, width: int, default: int = 0) -> tuple[int, int]:
    """Height and width of a setting that may be given once, twice, or by name (Caffe: base_conv_layer.cpp)."""
    if height or width:
        return height, width
    return (values[0], values[-1]) if values else (default, default)


def _pooled(size: int, kernel: int, pad: int, stride: int, rounded: Callable[[float], int]) -> int:
    """Caffe: pooling_layer.cpp."""
    out = rounded((size + 2 * pad - kernel) / stride) + 1
    return out - 1 if pad and (out - 1) * stride >= size + pad else out


def logits(net: caffe_pb2.NetParameter) -> str:
    """The blob of class scores of a net for classification: what its softmax, loss or accuracy reads."""
    for layer in net.layer:
        if layer.type in ("SoftmaxWithLoss", "Softmax", "Accuracy"):
            return layer.bottom[0]
    consumed = {b for layer in net.layer for b in layer.bottom if b not in layer.top}
    ends = [top for layer in net.layer for top in layer.top if top not in consumed and not _is_source(layer)]
    if len(set(ends)) != 1:
        raise UserError(f"the teacher's net '{net.name}' does not say which blob its class scores are: end it in one Softmax layer")
    return ends[0]


def teacher_layers(net: caffe_pb2.NetParameter, blobs: Sequence[str], statistics: str = "stored",
                   in_test: bool = False) -> list[caffe_pb2.LayerParameter]:
    """`net` as a teacher: what its blobs `blobs` need, fed by "data", every name under "teacher/", in the TRAIN phase or both.

    Nothing in it learns: each parameter has `lr_mult: 0 decay_mult: 0` in writing, since Caffe decides from the written ParamSpecs what
    needs backward; BatchNorm uses its "stored" `statistics`, or those of each "batch", which move the stored ones; Dropout is left out;
    tops that nobody reads end in Silence.
    Raises UserError where the net holds a layer that cannot be frozen like this, or needs more than its first data blob.
    """
    tested = [layer for layer in net.layer if _in_test(layer)]
    images = {layer.top[0] for layer in tested if _is_source(layer)}
    names = dict.fromkeys(images, "data")              # the teacher's blobs by their name in the student's net
    result = []
    for source in cut([layer for layer in tested if not _is_source(layer)], blobs):
        missing = [b for b in source.bottom if b not in names and b != "data"]
        if missing:
            raise UserError(f"the teacher's layer '{source.name}' needs '{missing[0]}', which no layer makes from the images")
        if source.type == "Dropout":
            names[source.top[0]] = names[source.bottom[0]]
            continue
        if source.type in _NOT_TO_FREEZE:
            raise UserError(f"the teacher's layer '{source.name}' has type {source.type}, which cannot be frozen inside a student's net")
        names.update({top: TEACHER + top for top in source.top})
        result.append(_frozen(source, names, statistics, in_test))
    consumed = {b for layer in result for b in layer.bottom} | {names[b] for b in blobs}
    unused = [top for layer in result for top in layer.top if top not in consumed]
    if unused:
        result.append(_new(name=TEACHER + "silence", type="Silence", bottom=dict.fromkeys(unused), include=train_alone(in_test)))
    return result


def _new(**fields: object) -> caffe_pb2.LayerParameter:
    return caffe_pb2.LayerParameter(**fields)  # type: ignore[arg-type]


def train_alone(in_test: bool) -> list[caffe_pb2.NetStateRule]:
    """What a layer's `include` says: the TRAIN phase, or nothing, which is both."""
    return [] if in_test else [caffe_pb2.NetStateRule(phase=caffe_pb2.TRAIN)]


def _frozen(source: caffe_pb2.LayerParameter, names: dict[str, str], statistics: str, in_test: bool) -> caffe_pb2.LayerParameter:
    layer = _new()
    layer.CopyFrom(source)
    shared = [spec.name for spec in source.param]
    for name in ("bottom", "top", "param", "blobs", "include", "exclude", "propagate_down", "loss_weight"):
        layer.ClearField(name)
    layer.name = TEACHER + source.name
    layer.bottom.extend(names.get(b, b) for b in source.bottom)
    layer.top.extend(names[t] for t in source.top)
    for i in range(parameter_count(source)):
        spec = layer.param.add(lr_mult=0, decay_mult=0)
        if i < len(shared) and shared[i]:
            spec.name = TEACHER + shared[i]
    if source.type == "BatchNorm":
        layer.batch_norm_param.use_global_stats = statistics == "stored"
    layer.include.extend(train_alone(in_test))
    return layer


def freeze(layers: Layers) -> None:
    """Layers with no parameters in writing yet do not learn, and their parameters do not decay."""
    for layer in layers:
        for _ in range(parameter_count(layer)):
            layer.param.add(lr_mult=0, decay_mult=0)


def parameter_count(layer: caffe_pb2.LayerParameter) -> int:
    """How many parameters a layer has, from its message alone."""
    if layer.type in ("Convolution", "Deconvolution"):
        return 1 + layer.convolution_param.bias_term
    if layer.type == "InnerProduct":
        return 1 + layer.inner_product_param.bias_term
    if layer.type == "Scale":
        return (len(layer.bottom) == 1) + layer.scale_param.bias_term
    return {"BatchNorm": 3, "Bias": int(len(layer.bottom) == 1), "PReLU": 1}.get(layer.type, 0)


def _in_test(layer: caffe_pb2.LayerParameter) -> bool:
    """Whether the layer is in a net of the TEST phase at level 0 without stages (Caffe: Net::FilterNet)."""
    def meets(rule: caffe_pb2.NetStateRule) -> bool:
        return ((not rule.HasField("phase") or rule.phase == caffe_pb2.TEST) and rule.min_level <= 0
                and (not rule.HasField("max_level") or rule.max_level >= 0) and not rule.stage)
    return any(map(meets, layer.include)) if layer.include else not any(map(meets, layer.exclude))
