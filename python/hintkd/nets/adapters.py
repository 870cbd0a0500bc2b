"""Small learned nets of stock layers between a student's map and a teacher's: regressors, connectors, translators, paraphrasers, heads.

Weights begin as torch's defaults, which the sources rely on: uniform in +-1 / sqrt(fan in), biases too.  BatchNorm follows the batches
with a fraction of 0.9.  Shapes are (C, H, W), without the batch.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError

Net = caffe_pb2.NetParameter
Shape = tuple[int, int, int]
BN_FRACTION, SLOPE = 0.9, 0.1               # SLOPE: of factor transfer's leaky ReLUs
STATISTICS = [{"lr_mult": 0, "decay_mult": 0}] * 3


def default_filler(fan_in: int) -> dict[str, Any]:
    """torch's own first weights of convolutions and fully connected layers."""
    return {"type": "uniform", "min": -fan_in ** -0.5, "max": fan_in ** -0.5}


def pooled(net: Net, name: str, bottom: str, shape: Shape, size: int) -> str:
    """The map averaged to size x size: by a stock layer where size divides it, by a Python layer elsewhere; itself if it has that size."""
    if shape[1:] == (size, size):
        return bottom
    if shape[1] == shape[2] and shape[1] % size == 0:
        kernel = shape[1] // size
        net.layer.add(name=name, type="Pooling", bottom=[bottom], top=[name],
                      pooling_param={"pool": "AVE", "kernel_size": kernel, "stride": kernel})
    else:
        net.layer.add(name=name, type="Python", bottom=[bottom], top=[name], python_param={
            "module": "hintkd.layers.adaptive_pooling", "layer": "AdaptivePooling", "param_str": f'{{"size": {size}}}'})
    return name


def convolution(net: Net, name: str, bottom: str, channels: int, width: int, kernel: int = 1, stride: int = 1, pad: int = 0,
                bias: bool = True, transposed: bool = False, he: bool = False) -> str:
    """From `channels` to `width` channels; `he`: with He's first weights by the fan out, as the overhaul's connectors have them."""
    fan_in = (width if transposed else channels) * kernel ** 2
    filler = {"type": "msra", "variance_norm": "FAN_OUT"} if he else default_filler(fan_in)
    net.layer.add(name=name, type="Deconvolution" if transposed else "Convolution", bottom=[bottom], top=[name], convolution_param={
        "num_output": width, "kernel_size": [kernel], "stride": [stride], "pad": [pad], "bias_term": bias, "weight_filler": filler,
        **({"bias_filler": filler} if bias else {})})
    return name


def normalised(net: Net, bottom: str) -> str:
    """BatchNorm and Scale in place."""
    net.layer.add(name=bottom + "_bn", type="BatchNorm", bottom=[bottom], top=[bottom], param=STATISTICS,
                  batch_norm_param={"moving_average_fraction": BN_FRACTION})
    net.layer.add(name=bottom + "_scale", type="Scale", bottom=[bottom], top=[bottom], scale_param={"bias_term": True})
    return bottom


def rectified(net: Net, bottom: str, slope: float = 0.0) -> str:
    """ReLU in place."""
    net.layer.add(name=bottom + "_relu", type="ReLU", bottom=[bottom], top=[bottom], relu_param={"negative_slope": slope} if slope else {})
    return bottom


def fitted(net: Net, name: str, bottom: str, source: Shape, target: Shape) -> str:
    """A convolution with biases that brings a map to another's size, and BatchNorm (FitNet's regressor without its ReLU, AB's connector).

    Half the size: 3x3, stride 2; twice: transposed 4x4, stride 2; smaller otherwise: a valid one.  Raises UserError elsewhere.
    """
    here, there = source[1], target[1]
    if here == 2 * there:
        convolution(net, name, bottom, source[0], target[0], kernel=3, stride=2, pad=1)
    elif 2 * here == there:
        convolution(net, name, bottom, source[0], target[0], kernel=4, stride=2, pad=1, transposed=True)
    elif here >= there:
        convolution(net, name, bottom, source[0], target[0], kernel=1 + here - there)
    else:
        raise UserError(f"{name}: no convolution brings a map of {here} x {here} to {there} x {there}")
    return normalised(net, name)


def connector(net: Net, name: str, bottom: str, source: Shape, target: Shape) -> str:
    """AB's: nothing where the shapes agree already."""
    return bottom if source == target else fitted(net, name, bottom, source, target)


def variational_regressor(net: Net, name: str, bottom: str, channels: int, width: int) -> str:
    """VID's: three 1x1 convolutions without biases, ReLU between them."""
    for i in range(3):
        bottom = convolution(net, f"{name}{i}", bottom, channels if i == 0 else width, width, bias=False)
        if i < 2:
            rectified(net, bottom)
    return bottom


def three_convolutions(net: Net, name: str, bottom: str, widths: Sequence[int], batch_norm: bool = False, transposed: bool = False) -> str:
    """widths[0] to widths[3] channels, 3x3, with biases and leaky ReLUs (factor transfer)."""
    for i, (before, width) in enumerate(pairwise(widths)):
        bottom = convolution(net, f"{name}{i}", bottom, before, width, kernel=3, pad=1, transposed=transposed)
        if batch_norm:
            normalised(net, bottom)
        rectified(net, bottom, SLOPE)
    return bottom


def paraphraser(net: Net, bottom: str, channels: int, ratio: float = 0.5) -> tuple[str, str]:
    """FT's of the teacher: (the factor, the reconstruction)."""
    width = int(channels * ratio)
    factor = paraphraser_encoder(net, bottom, channels, ratio)
    return factor, three_convolutions(net, "paraphraser_decoder", factor, (width, width, channels, channels), transposed=True)


def paraphraser_encoder(net: Net, bottom: str, channels: int, ratio: float = 0.5) -> str:
    """FT's of the teacher, its first half."""
    width = int(channels * ratio)
    return three_convolutions(net, "paraphraser_encoder", bottom, (channels, channels, width, width))


def translator(net: Net, bottom: str, channels: int, teacher_channels: int, ratio: float = 0.5) -> str:
    """FT's of the student, to as many channels as the teacher's factor has."""
    width = int(teacher_channels * ratio)
    return three_convolutions(net, "translator", bottom, (channels, channels, width, width), batch_norm=True)


def linear(net: Net, name: str, bottom: str, channels: int, width: int) -> str:
    """Fully connected, with biases."""
    filler = default_filler(channels)
    net.layer.add(name=name, type="InnerProduct", bottom=[bottom], top=[name],
                  inner_product_param={"num_output": width, "weight_filler": filler, "bias_filler": filler})
    return name


def projection_head(net: Net, name: str, bottom: str, channels: int) -> str:
    """SSKD's: two fully connected layers of as many units as the feature has, ReLU between them."""
    return linear(net, name + "1", rectified(net, linear(net, name + "0", bottom, channels, channels)), channels, channels)


def python_loss(net: Net, name: str, module: str, layer: str, bottoms: Sequence[str], weight: float = 1.0, param_str: str = "",
                blobs: int = 0, learns: bool = False, towards: int = 1, shared: Sequence[str] = ()) -> None:
    """A loss of hintkd.layers with gradients into its first `towards` bottoms, and with `blobs` of its own, which learn or do not.

    shared    the names of parameters elsewhere that are its blobs, too, which it leaves as they are
    """
    specs = [{"name": each, "lr_mult": 0, "decay_mult": 0} for each in shared] or ([] if learns else STATISTICS[:1] * blobs)
    net.layer.add(name=name, type="Python", bottom=bottoms, top=[name], loss_weight=[weight], param=specs,
                  propagate_down=[True] * towards + [False] * (len(bottoms) - towards),
                  python_param={"module": f"hintkd.layers.{module}", "layer": layer, **({"param_str": param_str} if param_str else {})})
