"""He et al.'s CIFAR ResNets, layer by layer.

Names are the usual ones of Caffe ResNets: first_conv; group{g}_block{i}_conv0, _conv1, _proj, each with _bn, _scale, _relu in place;
_sum, _relu; global_avg_pool; fc.  Weights are drawn as MSRA says.
"""
from __future__ import annotations

from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Options, Taps

FROZEN = {"lr_mult": 0, "decay_mult": 0}                     # of a parameter that neither learns nor decays


@dataclass(frozen=True)
class ResNet:
    """He et al.'s CIFAR network of depth 6n + 2: three stacks of n residual modules, with `widths` channels each."""
    depth: int
    widths: tuple[int, int, int] = (16, 32, 64)

    def __post_init__(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise UserError(f"a ResNet of depth {self.depth} does not exist; depths are 6n + 2: 8, 14, 20, 26, 32, ...")
        if len(self.widths) != 3 or min(self.widths) < 1 or sorted(self.widths) != list(self.widths):
            raise UserError(f"widths {self.widths} do not make a ResNet: give three channel counts that do not fall")

    @property
    def n(self) -> int:
        """Residual modules per stack."""
        return (self.depth - 2) // 6

    @property
    def title(self) -> str:
        """"resnet26", or "resnet26-64-128-256" where the widths are not 16, 32, 64."""
        return "-".join([f"resnet{self.depth}", *(str(w) for w in self.widths if self.widths != (16, 32, 64))])

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False, modules: int | None = None, frozen_modules: int = 0) -> Taps:
        """He et al. 2016, section 4.2: from `bottom` to class scores "fc"; as experiment.Network says, and beyond that

        modules           write only the residual modules up to this one of 3n (SL-ResNet's pretraining)
        frozen_modules    so many of them, with the first convolution, do not learn; their BatchNorm goes on following the batches
        """
        trunk = _Trunk(net, options, prefix)
        trunk.learns = frozen_modules == 0
        blob, before = bottom, self.widths[max(0, begin - 1)]
        if begin == 0:
            blob = trunk.conv("first_conv", bottom, before)
        ends, below = dict[int, str](), dict[int, str]()
        for number in range(begin * self.n + 1, (3 * self.n if modules is None else modules) + 1):
            trunk.learns = number > frozen_modules
            group, block = divmod(number - 1, self.n)
            is_end = block == self.n - 1
            width, stride = self.widths[group], 2 if group and not block else 1
            below[number], blob = trunk.module(f"group{group}_block{block}", blob, before, width, stride, apart=preacts and is_end)
            before, ends[number] = width, blob
        pooled, scores = prefix + "global_avg_pool", prefix + "fc"
        net.layer.add(name=pooled, type="Pooling", bottom=[blob], top=[pooled], pooling_param={"pool": "AVE", "global_pooling": True})
        net.layer.add(name=scores, type="InnerProduct", bottom=[pooled], top=[scores],
                      inner_product_param={"num_output": classes, "weight_filler": {"type": "msra"}})
        last = [number for number in ends if number % self.n == 0]
        return Taps(modules=tuple(ends.values()), stages=tuple(ends[number] for number in last),
                    preacts=tuple(below[number] for number in last) if preacts else (), pooled=pooled, logits=scores)


class _Trunk:
    """Writes the convolutional part of a ResNet into a net; `learns` says whether the layers written next do."""

    def __init__(self, net: caffe_pb2.NetParameter, options: Options, prefix: str):
        self.net, self.options, self.prefix, self.learns = net, options, prefix, True

    def specs(self, count: int) -> list[dict[str, int]]:
        return [] if self.learns else [FROZEN] * count

    def conv(self, name: str, bottom: str, width: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> str:
        """Convolution, BatchNorm, Scale and ReLU, the last three in place."""
        name = self.prefix + name
        self.net.layer.add(name=name, type="Convolution", bottom=[bottom], top=[name], param=self.specs(1),
                           convolution_param={"num_output": width, "kernel_size": [kernel], "stride": [stride], "pad": [kernel // 2],
                                              "bias_term": False, "weight_filler": {"type": "msra"}})
        # use_global_stats stays unset: false would move the statistics in the TEST phase too.
        self.net.layer.add(name=name + "_bn", type="BatchNorm", bottom=[name], top=[name], param=[FROZEN] * 3,
                           batch_norm_param={"moving_average_fraction": self.options.bn_fraction})
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
        name = self.prefix + name
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

    def module(self, name: str, bottom: str, before: int, width: int, stride: int, apart: bool) -> tuple[str, str]:
        """A residual module: ReLU(conv-BN-ReLU-conv-BN + shortcut); what the last ReLU is given and makes, one blob or two `apart`."""
        shortcut = self.shortcut(name, bottom, before, width, stride)
        inner = self.conv(name + "_conv0", bottom, width, stride=stride)
        outer = self.conv(name + "_conv1", inner, width, relu=False)
        total, name = self.prefix + name + "_sum", self.prefix + name
        end = name + "_out" if apart else total
        self.net.layer.add(name=total, type="Eltwise", bottom=[shortcut, outer], top=[total])
        self.net.layer.add(name=name + "_relu", type="ReLU", bottom=[total], top=[end])
        return total, end
