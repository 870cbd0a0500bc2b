"""He et al.'s CIFAR ResNets, layer by layer.

Names are the usual ones of Caffe ResNets: first_conv; group{g}_block{i}_conv0, _conv1, _proj, each with _bn, _scale, _relu in place;
_sum, _relu; global_avg_pool; fc.  Weights are drawn as MSRA says.
"""
from __future__ import annotations

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Options, ResNet

FROZEN = {"lr_mult": 0, "decay_mult": 0}                     # of a parameter that neither learns nor decays


class _Trunk:
    """Writes the convolutional part of a ResNet into a net; `learns` says whether the layers written next do."""

    def __init__(self, net: caffe_pb2.NetParameter, options: Options, bn_fraction: float):
        self.net, self.options, self.bn_fraction, self.learns = net, options, bn_fraction, True

    def specs(self, count: int) -> list[dict[str, int]]:
        return [] if self.learns else [FROZEN] * count

    def conv(self, name: str, bottom: str, width: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> str:
        """Convolution, BatchNorm, Scale and ReLU, the last three in place."""
        self.net.layer.add(name=name, type="Convolution", bottom=[bottom], top=[name], param=self.specs(1),
                           convolution_param={"num_output": width, "kernel_size": [kernel], "stride": [stride], "pad": [kernel // 2],
                                              "bias_term": False, "weight_filler": {"type": "msra"}})
        # use_global_stats stays unset: false would move the statistics in the TEST phase too.
        self.net.layer.add(name=name + "_bn", type="BatchNorm", bottom=[name], top=[name], param=[FROZEN] * 3,
                           batch_norm_param={"moving_average_fraction": self.bn_fraction})
        self.net.layer.add(name=name + "_scale", type="Scale", bottom=[name], top=[name], param=self.specs(2),
                           scale_param={"bias_term": True})
        if relu:
            self.net.layer.add(name=name + "_relu", type="ReLU", bottom=[name], top=[name])
        return name

    def shortcut(self, name: str, bottom: str, before: int, width: int, stride: int) -> str:
        if stride == 1 and width == before:
            return bottom
        if self.options.shortcut == "B":
            return self.conv(name + "_proj", bottom, width, kernel=1, stride=stride, relu=False)
        if width % before:
            raise UserError(f"shortcut A repeats channels with zeros and cannot go from {before} to {width}; use shortcut B or multiples")
        # Every second pixel: Pooling with kernel 1 would round up to one pixel too many, a frozen identity convolution does not.
        self.net.layer.add(name=name + "_proj", type="Convolution", bottom=[bottom], top=[name + "_proj"], param=[FROZEN],
                           convolution_param={"num_output": before, "kernel_size": [1], "stride": [stride], "group": before,
                                              "bias_term": False, "weight_filler": {"type": "constant", "value": 1}})
        if width == before:
            return name + "_proj"
        self.net.layer.add(name=name + "_zeros", type="Power", bottom=[name + "_proj"], top=[name + "_zeros"], power_param={"scale": 0})
        self.net.layer.add(name=name + "_pad", type="Concat", top=[name + "_pad"],
                           bottom=[name + "_proj", *[name + "_zeros"] * (width // before - 1)])
        return name + "_pad"

    def module(self, name: str, bottom: str, before: int, width: int, stride: int) -> str:
        """A residual module: ReLU(conv-BN-ReLU-conv-BN + shortcut)."""
        shortcut = self.shortcut(name, bottom, before, width, stride)
        inner = self.conv(name + "_conv0", bottom, width, stride=stride)
        outer = self.conv(name + "_conv1", inner, width, relu=False)
        self.net.layer.add(name=name + "_sum", type="Eltwise", bottom=[shortcut, outer], top=[name + "_sum"])
        self.net.layer.add(name=name + "_relu", type="ReLU", bottom=[name + "_sum"], top=[name + "_sum"])
        return name + "_sum"


def module_name(resnet: ResNet, number: int) -> str:
    """"group{g}_block{i}" of residual module 1 .. 3n, counted from the input."""
    return "group{}_block{}".format(*divmod(number - 1, resnet.n))


def add_resnet(net: caffe_pb2.NetParameter, resnet: ResNet, classes: int, options: Options, bn_fraction: float, modules: int | None = None,
               frozen_modules: int = 0) -> None:
    """He et al. 2016, section 4.2: from "data" to class scores "fc".

    modules           write only so many of the 3n residual modules (SL-ResNet's pretraining)
    frozen_modules    so many of them, with the first convolution, do not learn; their BatchNorm goes on following the batches
    """
    trunk, before = _Trunk(net, options, bn_fraction), resnet.widths[0]
    trunk.learns = frozen_modules == 0
    blob = trunk.conv("first_conv", "data", before)
    for number in range(1, (3 * resnet.n if modules is None else modules) + 1):
        trunk.learns = number > frozen_modules
        group, block = divmod(number - 1, resnet.n)
        width = resnet.widths[group]
        blob = trunk.module(module_name(resnet, number), blob, before, width, stride=2 if group and not block else 1)
        before = width
    net.layer.add(name="global_avg_pool", type="Pooling", bottom=[blob], top=["global_avg_pool"],
                  pooling_param={"pool": "AVE", "global_pooling": True})
    net.layer.add(name="fc", type="InnerProduct", bottom=["global_avg_pool"], top=["fc"],
                  inner_product_param={"num_output": classes, "weight_filler": {"type": "msra"}})
