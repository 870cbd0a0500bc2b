"""Older forms of a net or solver message, turned into the present one as BVLC Caffe does when it reads a file.

Nets have had three forms of layers: V0 (`layers { layer { type: "conv" } }`), V1 (`layers { type: CONVOLUTION }`) and today's
(`layer { type: "Convolution" }`), beside which a net's inputs and the frozen parameters of BatchNorm have changed.  Every function
changes the message it is given.  Reading files is left to prototxt.py and formats.py.  Caffe: upgrade_proto.cpp.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchcaffe.errors import CaffeError
from torchcaffe.glog import error as log_error
from torchcaffe.proto import caffe_pb2

SOURCE = "upgrade_proto.cpp:0"

# V1's type names are V2's in capitals, words joined by `_`, but for these
V1_TYPES = {"NONE": "", "ABSVAL": "AbsVal", "ARGMAX": "ArgMax", "BNLL": "BNLL", "LRN": "LRN", "MVN": "MVN", "RELU": "ReLU",
            "TANH": "TanH", "SOFTMAX_LOSS": "SoftmaxWithLoss", "HDF5_DATA": "HDF5Data", "HDF5_OUTPUT": "HDF5Output"}
_V1_NAMES = frozenset(caffe_pb2.V1LayerParameter.LayerType.keys())
# V0's type names are V1's in small letters, but for these
V0_TYPES = {"conv": "CONVOLUTION", "innerproduct": "INNER_PRODUCT", "pool": "POOLING", "images": "IMAGE_DATA"}
SOLVER_TYPES = {"SGD": "SGD", "NESTEROV": "Nesterov", "ADAGRAD": "AdaGrad", "RMSPROP": "RMSProp", "ADADELTA": "AdaDelta", "ADAM": "Adam"}

_WEIGHTS = {"conv": "convolution_param", "innerproduct": "inner_product_param"}
_WINDOWS = {"conv": "convolution_param", "pool": "pooling_param"}
_IMAGES = {"images": "image_data_param"}
_READERS = {"data": "data_param", "hdf5_data": "hdf5_data_param", "window_data": "window_data_param"} | _IMAGES
_DETECTION = {"window_data": "window_data_param"}
_TRANSFORM = {"": "transform_param"}
# V0 had one flat list of fields: which message of which layer types ("" for all; "" the layer itself) each moved to, and its name there
V0_FIELDS: dict[str, tuple[dict[str, str], str]] = {
    "num_output": (_WEIGHTS, "num_output"), "biasterm": (_WEIGHTS, "bias_term"),
    "weight_filler": (_WEIGHTS, "weight_filler"), "bias_filler": (_WEIGHTS, "bias_filler"),
    "pad": (_WINDOWS, "pad"), "kernelsize": (_WINDOWS, "kernel_size"), "stride": (_WINDOWS, "stride"),
    "group": ({"conv": "convolution_param"}, "group"), "pool": ({"pool": "pooling_param"}, "pool"),
    "dropout_ratio": ({"dropout": "dropout_param"}, "dropout_ratio"),
    **{name: ({"lrn": "lrn_param"}, name) for name in ("local_size", "alpha", "beta", "k")},
    "source": (_READERS | {"infogain_loss": "infogain_loss_param"}, "source"), "batchsize": (_READERS, "batch_size"),
    "scale": (_TRANSFORM, "scale"), "meanfile": (_TRANSFORM, "mean_file"), "cropsize": (_TRANSFORM, "crop_size"),
    "mirror": (_TRANSFORM, "mirror"), "rand_skip": ({"data": "data_param"} | _IMAGES, "rand_skip"),
    "shuffle_images": (_IMAGES, "shuffle"), "new_height": (_IMAGES, "new_height"), "new_width": (_IMAGES, "new_width"),
    "concat_dim": ({"concat": "concat_param"}, "concat_dim"),
    **{f"det_{name}": (_DETECTION, name) for name in ("fg_threshold", "bg_threshold", "fg_fraction", "context_pad", "crop_mode")},
    "hdf5_output_param": ({"hdf5_output": ""}, "hdf5_output_param"),
    "new_num": ({}, ""), "new_channels": ({}, ""),                  # no layer type ever came to use these
}


def _say(message: str) -> None:
    log_error(message, SOURCE)


def upgrade_net(net: caffe_pb2.NetParameter, complain: Callable[[str], None] = _say) -> caffe_pb2.NetParameter:
    """Bring `net` to today's form, in place, and return it; a net in today's form stays as it is.

    `complain` is told of each field that is dropped because it means nothing to its layer; by default that is a line of the log.
    Raises CaffeError where Caffe cannot go on: `layer` beside `layers`, an unknown V0 type, inputs without their shapes.
    """
    if net.layers and net.layer:
        raise CaffeError("the net has both 'layer' and 'layers' blocks; write all of them as 'layer'")
    if any(layer.HasField("layer") for layer in net.layers):
        _upgrade_v0(net, complain)
    for old in net.layers:
        _move_transformation(old)
        net.layer.append(_from_v1(old))
    net.ClearField("layers")
    if net.input:
        _upgrade_inputs(net)
    for layer in net.layer:
        if layer.type == "BatchNorm" and len(layer.param) == 3:     # once written to freeze the statistics by hand
            for spec in layer.param:
                spec.lr_mult = 0
                spec.decay_mult = 0
    return net


def upgrade_solver(solver: caffe_pb2.SolverParameter) -> caffe_pb2.SolverParameter:
    """Replace the enum `solver_type` by the string `type`, in place; both given is a CaffeError."""
    if solver.HasField("solver_type"):
        if solver.HasField("type"):
            raise CaffeError("both 'solver_type' and 'type' are given; keep 'type'")
        name = caffe_pb2.SolverParameter.SolverType.Name(solver.solver_type)
        solver.type = SOLVER_TYPES[name]
        solver.ClearField("solver_type")
    return solver


def _put(message: Any, field: str, value: Any) -> None:
    """Set a field of any kind; a repeated one grows by `value`, or by all of it when that is repeated too."""
    target = getattr(message, field)
    if hasattr(target, "extend"):
        target.extend(value if hasattr(value, "extend") else [value])
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(value)
    else:
        setattr(message, field, value)


def _upgrade_v0(net: caffe_pb2.NetParameter, complain: Callable[[str], None]) -> None:
    """V0 layers to V1; like Caffe, only name, inputs and force_backward survive beside them."""
    upgraded = [_from_v0(layer, complain) for layer in _without_padding_layers(net)]
    for field, _ in net.ListFields():
        if field.name not in ("name", "input", "input_dim", "force_backward"):
            net.ClearField(field.name)
    net.layers.extend(upgraded)


def _without_padding_layers(net: caffe_pb2.NetParameter) -> list[caffe_pb2.V1LayerParameter]:
    """V0 had padding layers: each becomes the `pad` of the convolution or pooling above it."""
    kept, makers = [], dict.fromkeys(net.input)
    for layer in net.layers:
        for i, bottom in enumerate(layer.bottom):
            if bottom not in makers:
                raise CaffeError(f"layer '{layer.layer.name}': bottom '{bottom}' is neither an input nor the top of a layer before it")
            maker = makers[bottom]
            if maker is not None and maker.layer.type == "padding":
                if layer.layer.type not in _WINDOWS or len(layer.bottom) != 1 or len(maker.bottom) != 1 or len(maker.top) != 1:
                    raise CaffeError(f"layer '{maker.layer.name}': padding must lie between one blob and one convolution or pooling")
                layer.layer.pad = maker.layer.pad
                layer.bottom[i] = maker.bottom[0]
        makers.update(dict.fromkeys(layer.top, layer))
        if layer.layer.type != "padding":
            kept.append(layer)
    return kept


def _from_v0(connection: caffe_pb2.V1LayerParameter, complain: Callable[[str], None]) -> caffe_pb2.V1LayerParameter:
    """One V0 layer, flat inside `layer { }`, as a V1 layer."""
    old = connection.layer
    new = caffe_pb2.V1LayerParameter(bottom=connection.bottom, top=connection.top)
    for field, value in old.ListFields():
        if field.name == "type":
            name = V0_TYPES.get(value, value.upper())
            if name not in _V1_NAMES:
                raise CaffeError(f"layer '{old.name}': there is no V0 layer type '{value}'")
            _put(new, "type", caffe_pb2.V1LayerParameter.LayerType.Value(name))
        elif field.name in V0_FIELDS:
            places, name = V0_FIELDS[field.name]
            place = places.get(old.type, places.get(""))
            if place is None:
                complain(f"layer '{old.name}': '{field.name}' means nothing to type '{old.type}' and is ignored")
            else:
                _put(getattr(new, place) if place else new, name, value)
        else:                                                       # name, blobs, blobs_lr, weight_decay
            _put(new, field.name, value)
    return new


def _move_transformation(layer: caffe_pb2.V1LayerParameter) -> None:
    """Data layers once had scale, mean_file, crop_size and mirror of their own; now `transform_param` has them."""
    name = {"DATA": "data_param", "IMAGE_DATA": "image_data_param", "WINDOW_DATA": "window_data_param"}.get(
        caffe_pb2.V1LayerParameter.LayerType.Name(layer.type))
    if name is None or not layer.HasField(name):
        return
    reader = getattr(layer, name)
    for field in ("scale", "mean_file", "crop_size", "mirror"):
        if reader.HasField(field):
            setattr(layer.transform_param, field, getattr(reader, field))
            reader.ClearField(field)


def _from_v1(old: caffe_pb2.V1LayerParameter) -> caffe_pb2.LayerParameter:
    """One V1 layer as a layer of today."""
    new = caffe_pb2.LayerParameter()
    specs = {"param": "name", "blob_share_mode": "share_mode", "blobs_lr": "lr_mult", "weight_decay": "decay_mult"}
    for field, value in old.ListFields():
        if field.name == "type":
            name = caffe_pb2.V1LayerParameter.LayerType.Name(value)
            new.type = V1_TYPES.get(name, "".join(word.capitalize() for word in name.split("_")))
        elif field.name in specs:                                   # parallel lists became one list of ParamSpec
            for i, item in enumerate(value):
                spec = new.param[i] if i < len(new.param) else new.param.add()
                setattr(spec, specs[field.name], item)
        else:
            _put(new, field.name, value)
    return new


def _upgrade_inputs(net: caffe_pb2.NetParameter) -> None:
    """`input` with `input_shape` or `input_dim` becomes an Input layer named "input" in front; without shapes it is dropped."""
    shapes = [list(shape.dim) for shape in net.input_shape] or [list(net.input_dim[i:i + 4]) for i in range(0, len(net.input_dim), 4)]
    if shapes:
        if len(shapes) != len(net.input) or (net.input_dim and not net.input_shape and len(net.input_dim) % 4):
            raise CaffeError(f"the net has {len(net.input)} 'input' but shapes for {len(shapes)}; "
                             "give one input_shape or four input_dim for each")
        layers = [caffe_pb2.LayerParameter(name="input", type="Input", top=net.input), *net.layer]
        for shape in shapes:
            layers[0].input_param.shape.add(dim=shape)
        net.ClearField("layer")
        net.layer.extend(layers)
    for field in ("input", "input_shape", "input_dim"):
        net.ClearField(field)
