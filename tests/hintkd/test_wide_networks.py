"""The networks of self distillation: ResNeXt, PyramidNet and wide ResNets of four stacks, against the same written by hand in float64."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import torchcaffe as caffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import UserError
from hintkd.experiment import Options, Taps
from hintkd.nets.titles import network
from torchcaffe.settings import number_type, shapes_only


def written(title: str, preacts: bool = False, begin: int = 0, shape: tuple[int, ...] = (2, 3, 16, 16)) -> tuple[Any, Taps]:
    net = caffe_pb2.NetParameter(name=title)
    net.layer.add(name="data", type="Input", top=["data"], input_param={"shape": [{"dim": shape}]})
    return net, network(title).write(net, "data", 10, replace(Options(), bn_fraction=0.9), begin=begin, preacts=preacts)


def built(tmp_path: Path, param: Any, dtype: torch.dtype = torch.float64) -> Any:
    path = tmp_path / "net.prototxt"
    path.write_text(write_text(param))
    caffe.set_random_seed(1)
    with number_type(dtype):
        return caffe.Net(str(path), caffe.TRAIN)


class ByHand:
    """Layers by their names, with the parameters of a net."""

    def __init__(self, net: Any):
        self.net = net

    def blobs(self, name: str) -> list[torch.Tensor]:
        return [torch.from_numpy(np.array(blob.data)) for blob in self.net.params[name]]

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        (weight,) = self.blobs(name)
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, *self.blobs(name + "_scale"), training=True)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.mean((2, 3)), *self.blobs("fc"))

    def resnext(self, x: torch.Tensor, n: int, cardinality: int) -> torch.Tensor:
        x = F.relu(self.norm("conv1", self.conv("conv1", x)))
        for group in range(3):
            for block in range(n):
                name, stride = f"layer{group + 1}_{block}", 2 if group and not block else 1
                y = F.relu(self.norm(f"{name}_conv1", self.conv(f"{name}_conv1", x)))
                y = F.relu(self.norm(f"{name}_conv2", self.conv(f"{name}_conv2", y, stride, cardinality)))
                y = self.norm(f"{name}_conv3", self.conv(f"{name}_conv3", y))
                x = F.relu(y + (x if block else self.norm(f"{name}_proj", self.conv(f"{name}_proj", x, stride))))
        return self.scores(x)

    def pyramidnet(self, x: torch.Tensor, n: int) -> torch.Tensor:
        x = self.norm("conv1", self.conv("conv1", x))
        for index in range(3 * n):
            name, stride = f"layer{index // n + 1}_{index % n}", 2 if index >= n and index % n == 0 else 1
            y = self.conv(f"{name}_conv1", self.norm(f"{name}_bn1", x))
            y = self.conv(f"{name}_conv2", F.relu(self.norm(f"{name}_conv1", y)), stride)
            y = self.norm(f"{name}_conv3", self.conv(f"{name}_conv3", F.relu(self.norm(f"{name}_conv2", y))))
            straight = F.avg_pool2d(x, 2) if stride == 2 else x
            x = y + F.pad(straight, (0, 0, 0, 0, 0, y.shape[1] - straight.shape[1]))
        return self.scores(F.relu(self.norm("bn_final", x)))


@pytest.mark.parametrize("title", ["resnext11_2x4d", "pyramidnet20_10"])
def test_a_network_computes_what_the_same_by_hand_does(title: str, tmp_path: Path) -> None:
    param, taps = written(title)
    net = built(tmp_path, param)
    images = np.random.default_rng(1).standard_normal((2, 3, 16, 16))
    net.blobs["data"].data[...] = images
    net.forward()
    with torch.no_grad():
        own, x = ByHand(net), torch.from_numpy(images)
        expected = own.resnext(x, 1, 2) if title.startswith("resnext") else own.pyramidnet(x, 2)
    assert np.array(net.blobs[taps.logits].data) == pytest.approx(expected.numpy(), rel=1e-9, abs=1e-9)


def test_channels_that_are_new_in_a_pyramid_stay_zero_and_send_nothing_back(tmp_path: Path) -> None:
    param, taps = written("pyramidnet20_10")
    param.layer.add(name="sum", type="Reduction", bottom=[taps.logits], top=["sum"], loss_weight=[1])
    net = built(tmp_path, param)
    net.blobs["data"].data[...] = np.random.default_rng(1).standard_normal((2, 3, 16, 16))
    net.forward()
    net.backward()
    assert not np.any(net.blobs["layer1_0_wide_zeros"].data) and not np.any(net.params["layer1_0_wide_zeros"][0].diff)
    assert np.any(net.params["layer1_0_conv1"][0].diff) and np.any(net.params["conv1"][0].diff)


@pytest.mark.parametrize(("title", "shapes"), [
    ("resnext29_8x64d", [(256, 32, 32), (512, 16, 16), (1024, 8, 8)]),
    ("wrn_20_8_4", [(128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4)]),
    ("wrn_44_8_4", [(128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4)]),
    ("wrn_28_12_4", [(192, 32, 32), (384, 16, 16), (768, 8, 8), (1536, 4, 4)]),
    ("pyramidnet101_240", [(384, 32, 32), (704, 16, 16), (1024, 8, 8)])])
def test_the_ends_of_stages(title: str, shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    param, taps = written(title, shape=(2, 3, 32, 32))
    with shapes_only():
        net = built(tmp_path, param, torch.float32)
    assert [tuple(net.blobs[stage].shape)[1:] for stage in taps.stages] == shapes
    assert taps.stages[-1] == taps.modules[-1]


def test_a_wide_network_of_four_stacks_has_the_parameters_of_its_formula(tmp_path: Path) -> None:
    """Convolutions of 3x3 and 1x1 without biases, two numbers for each normalised channel, the scores' layer."""
    depth, k, n = 20, 8, 2
    count, before = 27 * 16, 16
    for stack in range(4):
        width = 16 * k * 2 ** stack
        for block in range(n):
            count += 9 * before * width + 9 * width * width + (before * width if block == 0 else 0) + 2 * before + 2 * width
            before = width
    count += 2 * before + 10 * before + 10
    param, _ = written(f"wrn_{depth}_{k}_4", shape=(2, 3, 32, 32))
    with shapes_only():
        net = built(tmp_path, param, torch.float32)
    assert sum(blob.count for name, blobs in net.params.items() for blob in blobs if not name.endswith("_bn")) == count == 44_529_114


@pytest.mark.parametrize("title", ["resnext11_2x4d", "pyramidnet20_10", "wrn_12_1_4"])
def test_a_part_goes_on_where_the_one_below_ends(title: str, tmp_path: Path) -> None:
    param, whole = written(title)
    size, channels = 16, {"resnext11_2x4d": 256, "pyramidnet20_10": 4 * 19, "wrn_12_1_4": 16}[title]
    part, taps = written(title, begin=1, shape=(2, channels, size, size))
    names = {layer.name for layer in part.layer}
    above = {layer.name for layer in param.layer if layer.name not in names}
    assert taps.stages == whole.stages[1:] and not any(name.startswith(("layer2", "layer3", "block2", "block3")) for name in above)
    built(tmp_path, part)


@pytest.mark.parametrize(("title", "said"), [
    ("resnext30_8x64d", "9n \\+ 2"), ("pyramidnet100_240", "9n \\+ 2"), ("wrn_22_8_4", "8n \\+ 4: 12, 20")])
def test_depths_that_do_not_exist_are_told(title: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        network(title)
