"""The zoo's networks: how many parameters they have, how they begin, and that each runs as a whole iteration does."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Options
from hintkd.nets.titles import network
from hintkd.study.table import load_table
from test_golden_kd import check, root  # noqa: F401  (root is a fixture)

COUNTS = {                                  # of 100 classes, as the sources print them
    "resnet8": 83_892, "resnet14": 181_108, "resnet20": 278_324, "resnet32": 472_756, "resnet44": 667_188, "resnet56": 861_620,
    "resnet110": 1_736_564, "resnet8x4": 1_233_540, "resnet32x4": 7_433_860, "wrn_16_1": 180_916, "wrn_16_2": 703_284,
    "wrn_40_1": 569_780, "wrn_40_2": 2_255_156, "vgg8": 3_965_028, "vgg11": 9_277_284, "vgg13": 9_462_180, "vgg16": 14_774_436,
    "vgg19": 20_086_692, "MobileNetV2": 812_836, "ShuffleV1": 949_258, "ShuffleV2": 1_355_528, "ResNet50": 23_705_252,
    "ResNet18": 11_220_132, "ResNet34": 21_328_292, "ResNet101": 42_697_380, "ResNet152": 58_341_028, "ResNet18-8": 182_252,
    "resnext29_8x64d": 34_518_948, "wrn_28_10": 36_536_884, "pyramidnet200_240": 26_844_952}


def written(title: str) -> caffe_pb2.NetParameter:
    net = caffe_pb2.NetParameter(name=title)
    net.layer.add(name="data", type="Input", top=["data"], input_param={"shape": [{"dim": [2, 3, 32, 32]}]})
    network(title).write(net, "data", 100, Options())
    return net


@pytest.mark.parametrize("title", COUNTS)
def test_a_network_has_as_many_parameters_as_its_source(title: str, tmp_path: Path) -> None:
    path = tmp_path / "net.prototxt"
    path.write_text(str(written(title)))
    from torchcaffe.settings import shapes_only
    with shapes_only():
        net = caffe.Net(str(path), caffe.TRAIN)
    layers = {node.layer.name: node.layer for node in net.graph.nodes}
    count = sum(blob.count for name, blobs in net.params.items() for blob in blobs
                if not (layers[name].param.param and all(p.lr_mult == 0 for p in layers[name].param.param)))
    assert count == COUNTS[title]


@pytest.mark.parametrize("title", ["resnet8x4", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_first_weights_are_spread_as_the_authors(title: str, root: Path) -> None:  # noqa: F811
    """Means and standard deviations within what so many draws can differ by, the largest not beyond what the distribution has."""
    case = json.loads((root / f"nets/{title}/case.json").read_text())
    networks = sys.modules["networks"]
    built = networks.Built(title, case["num_classes"], np.zeros((1, 3, 32, 32), np.float32), caffe.TRAIN, False, torch.float32)
    for place, (name, _, kind) in zip(networks.places(built.net), networks.tracked(case["tensors"]), strict=True):
        if kind != "parameter":
            continue
        mean, std, most = case["init_mean_std_absmax"][name]
        values = np.array(place.blob(built.net).data, np.float64)
        noise = 5 * max(std, 1e-6) / np.sqrt(values.size)
        assert values.mean() == pytest.approx(mean, abs=noise * 1.5), name
        assert values.std() == pytest.approx(std, abs=noise), name
        assert np.abs(values).max() <= 1.6 * most + 1e-6, name


def test_an_unknown_title_is_told() -> None:
    with pytest.raises(UserError, match="there is no network 'resnext'"):
        network("resnext")
    with pytest.raises(UserError, match="depths are 6n \\+ 4"):
        network("wrn_17_2")


def test_a_table_can_name_any_of_them(tmp_path: Path) -> None:
    path = tmp_path / "zoo.yaml"
    path.write_text("title: zoo\nsource: a test\ndataset: cifar100\nteacher: {net: wrn, depth: 40, wide: 2}\n"
                    "student: {net: shufflenet-v1}\nrows:\n  - {method: kd}\n")
    kd = next(x for x in load_table(path).experiments() if x.name == "kd")
    (stage,) = kd.method(kd)
    assert {"fc", "teacher/fc", "teacher/block3_5_sum", "layer3_3_sum"} <= {layer.name for layer in stage.net.layer}
