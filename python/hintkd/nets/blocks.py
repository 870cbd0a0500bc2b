"""What the networks for CIFAR-100 are written with: convolutions, BatchNorm, shuffles and poolings of layers that every Caffe has.

Layers are written in the order in which the sources' modules hold their parameters.  Channel shuffle is Reshape, Slice, Reshape, Concat,
Reshape: no layer of its own, and no arithmetic.  torch rounds a pooled size down where Caffe rounds up: an average over windows that do
not fit is a depthwise convolution with frozen equal weights, which counts the padding as torch does.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

from hintkd.backend import caffe_pb2

FROZEN = {"lr_mult": 0, "decay_mult": 0}
HE: dict[str, Any] = {"type": "msra", "variance_norm": "FAN_OUT"}     # of convolutions: N(0, sqrt(2 / (k k out)))


def uniform(fan_in: int) -> dict[str, Any]:
    """torch's default first weights and biases: uniform in +-1 / sqrt(fan_in)."""
    return {"type": "uniform", "min": -fan_in ** -0.5, "max": fan_in ** -0.5}


def gaussian(std: float) -> dict[str, Any]:
    return {"type": "gaussian", "std": std}


class Blocks:
    """Writes blocks into a net; every method returns the blob it makes.

    prefix          of all names
    fraction        BatchNorm's moving_average_fraction
    torch_weights   convolutions begin as torch's default has it, instead of He's
    """

    def __init__(self, net: caffe_pb2.NetParameter, prefix: str, fraction: float, torch_weights: bool = False):
        self.net, self.prefix, self.fraction, self.torch_weights = net, prefix, fraction, torch_weights

    def layer(self, name: str, kind: str, bottoms: Sequence[str], top: str | None = None, **more: Any) -> str:
        """A layer with one top, called as the layer if no other name is given."""
        name = self.prefix + name
        self.net.layer.add(name=name, type=kind, bottom=bottoms, top=[top or name], **more)
        return top or name

    def conv(self, name: str, bottom: str, before: int, width: int, kernel: int = 3, stride: int = 1, group: int = 1,
             bias: bool = False, pad: int | None = None) -> str:
        """From `before` to `width` channels, as large as the bottom at stride 1 and without a `pad` of its own."""
        filler = uniform(before // group * kernel ** 2) if self.torch_weights else HE
        return self.layer(name, "Convolution", [bottom], convolution_param={
            "num_output": width, "kernel_size": [kernel], "stride": [stride], "pad": [kernel // 2 if pad is None else pad],
            "group": group, "bias_term": bias, "weight_filler": filler})

    def norm(self, blob: str, name: str | None = None, bottom: str | None = None, shared: bool = False) -> str:
        """BatchNorm and Scale, in place, or from `bottom` to `blob`.

        name      of the parameters, where a second pair of layers shares them: statistics then move at each of the two, as where torch
                  calls one module twice
        """
        params = [dict(FROZEN, name=f"{self.prefix}{name}_{i}") for i in range(3)] if name else [FROZEN] * 3
        self.net.layer.add(name=blob + "_bn", type="BatchNorm", bottom=[bottom or blob], top=[blob], param=params,
                           batch_norm_param={"moving_average_fraction": self.fraction})
        self.net.layer.add(name=blob + "_scale", type="Scale", bottom=[blob], top=[blob], scale_param={"bias_term": True},
                           param=[{"name": f"{self.prefix}{name}_{i}"} for i in (3, 4)] if name else [])
        return blob

    def relu(self, blob: str, apart: bool = False) -> str:
        """ReLU in place, or into a blob of its own where the bottom is tapped."""
        top = blob + "_out" if apart else blob
        self.net.layer.add(name=blob + "_relu", type="ReLU", bottom=[blob], top=[top])
        return top

    def conv_norm(self, name: str, bottom: str, before: int, width: int, kernel: int = 3, stride: int = 1, group: int = 1,
                  bias: bool = False, relu: bool = True, pad: int | None = None) -> str:
        """Convolution, BatchNorm and, if said so, ReLU."""
        blob = self.norm(self.conv(name, bottom, before, width, kernel, stride, group, bias, pad))
        return self.relu(blob) if relu else blob

    def add(self, name: str, a: str, b: str) -> str:
        return self.layer(name, "Eltwise", [a, b])

    def concat(self, name: str, bottoms: Sequence[str], axis: int = 1) -> str:
        return self.layer(name, "Concat", bottoms, concat_param={"axis": axis})

    def split(self, name: str, bottom: str, channels: int) -> tuple[str, str]:
        """The first half of the channels and the second."""
        name = self.prefix + name
        self.net.layer.add(name=name, type="Slice", bottom=[bottom], top=[name + "_left", name + "_right"],
                           slice_param={"axis": 1, "slice_point": [channels // 2]})
        return name + "_left", name + "_right"

    def shuffle(self, name: str, bottom: str, channels: int, groups: int, size: int) -> str:
        """Channel i of group g becomes channel i * groups + g, for maps of size x size."""
        each = channels // groups

        def reshaped(what: str, blob: str, *dims: int) -> str:
            return self.layer(f"{name}_{what}", "Reshape", [blob], reshape_param={"shape": {"dim": [0, *dims]}})
        rows = self.prefix + name + "_groups"
        self.net.layer.add(name=rows, type="Slice", bottom=[reshaped("rows", bottom, groups, each, size * size)],
                           top=[f"{rows}{g}" for g in range(groups)], slice_param={"axis": 1})
        columns = [reshaped(f"column{g}", f"{rows}{g}", each, 1, size * size) for g in range(groups)]
        return reshaped("shuffled", self.concat(f"{name}_columns", columns, axis=2), channels, size, size)

    def max_pool(self, name: str, bottom: str) -> str:
        """2 x 2, for even sizes."""
        return self.layer(name, "Pooling", [bottom], pooling_param={"pool": "MAX", "kernel_size": 2, "stride": 2})

    def average_2x2(self, name: str, bottom: str) -> str:
        """2 x 2, for even sizes."""
        return self.layer(name, "Pooling", [bottom], pooling_param={"pool": "AVE", "kernel_size": 2, "stride": 2})

    def widened(self, name: str, bottom: str, before: int, width: int) -> str:
        """With channels of zeros above those that are there: a frozen convolution of weights 0, which sends nothing back, makes them."""
        more = width - before
        zeros = self.layer(name + "_zeros", "Convolution", [bottom], param=[FROZEN], propagate_down=[False], convolution_param={
            "num_output": more, "kernel_size": [1], "group": gcd(before, more), "bias_term": False, "weight_filler": {"type": "constant"}})
        return self.concat(name, [bottom, zeros])

    def average_3x3(self, name: str, bottom: str, channels: int) -> str:
        """The mean of 3 x 3 pixels at stride 2, zeros around the map counted."""
        return self.layer(name, "Convolution", [bottom], param=[FROZEN], convolution_param={
            "num_output": channels, "kernel_size": [3], "stride": [2], "pad": [1], "group": channels, "bias_term": False,
            "weight_filler": {"type": "constant", "value": 1 / 9}})

    def scores(self, bottom: str, width: int, classes: int, std: float | None = None, bias: bool = True) -> tuple[str, str]:
        """Global average and a fully connected layer: (features, class scores).

        std     Gaussian first weights and biases of 0, instead of torch's default; `bias` False: torch's weights, biases of 0
        """
        pooled = self.layer("global_avg_pool", "Pooling", [bottom], pooling_param={"pool": "AVE", "global_pooling": True})
        filler = uniform(width) if std is None else gaussian(std)
        return pooled, self.layer("fc", "InnerProduct", [pooled], inner_product_param={
            "num_output": classes, "weight_filler": filler, **({"bias_filler": filler} if bias and std is None else {})})
