"""The generated nets: against He et al.'s parameter counts, against the network written in torch, and by what Caffe needs in writing."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import experiments
import torchcaffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import UserError
from hintkd.experiment import DATASETS, Experiment, Trained
from hintkd.methods.hint_2019 import Options
from hintkd.nets import stages as nets
from hintkd.nets.networks import NETWORKS
from hintkd.nets.resnet import ResNet
from hintkd.nets.stages import Pair, surgery

NARROW = (4, 8, 16)


def experiment(**changed: object) -> Experiment:
    return experiments.experiment(**{"student": ResNet(8, NARROW), "teacher": ResNet(14, NARROW), **changed})  # type: ignore[arg-type]


def built(net: caffe_pb2.NetParameter, folder: Path, image: tuple[int, ...], phase: int = torchcaffe.TRAIN,
          batch: int = 3) -> torchcaffe.Net:
    """The net with Input layers in place of its data layers."""
    fed = caffe_pb2.NetParameter(name=net.name)
    fed.layer.add(name="data", type="Input", top=["data", "label"], input_param={"shape": [{"dim": [batch, *image]}, {"dim": [batch]}]})
    fed.layer.extend(layer for layer in net.layer if layer.type != "Data")
    (folder / "net.prototxt").write_text(write_text(fed))
    result = torchcaffe.Net(str(folder / "net.prototxt"), phase)
    draw = np.random.default_rng(1)
    result.blobs["data"].data[...] = draw.standard_normal((batch, *image))
    result.blobs["label"].data[...] = draw.integers(0, 10, batch)
    return result


def learned(net: caffe_pb2.NetParameter, image: tuple[int, ...]) -> int:
    """Weights that learn, from the messages alone: convolutions, Scale and fc."""
    shapes, count = surgery.shapes(net.layer, image), 0
    for layer in net.layer:
        if any(spec.lr_mult == 0 for spec in layer.param):
            continue
        below = shapes[layer.bottom[0]] if layer.bottom else ()
        if layer.type == "Convolution":
            count += layer.convolution_param.num_output * below[0] * layer.convolution_param.kernel_size[0] ** 2
        elif layer.type == "Scale":
            count += 2 * below[0]
        elif layer.type == "InnerProduct":
            count += layer.inner_product_param.num_output * (math.prod(below) + 1)
    return count


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_counts_are_those_of_he_et_al(depth: int, millions: float) -> None:
    x = experiment(student=ResNet(depth))                                  # their table 6; option A
    assert round(learned(nets.plain_net(x), (3, 32, 32)) / 1e6, 2 if millions < 1 else 1) == millions


class Reference:
    """The network as the papers draw it, in torch, on the weights of a Caffe net."""

    def __init__(self, net: torchcaffe.Net, resnet: ResNet, shortcut: str):
        self.weights = {name: [torch.tensor(np.array(blob.data)) for blob in blobs] for name, blobs in net.params.items()}
        self.resnet, self.option = resnet, shortcut

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.weights[name][0]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        gamma, beta = self.weights[name + "_scale"]
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5)

    def shortcut(self, name: str, x: torch.Tensor, width: int, stride: int) -> torch.Tensor:
        if stride == 1 and x.shape[1] == width:
            return x
        if self.option == "B":
            return self.conv(name + "_proj", x, stride)
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, width - x.shape[1]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv("first_conv", x))
        for group, width in enumerate(self.resnet.widths):
            for block in range(self.resnet.n):
                name, stride = f"group{group}_block{block}", 2 if group and not block else 1
                inner = F.relu(self.conv(name + "_conv0", x, stride))
                x = F.relu(self.conv(name + "_conv1", inner) + self.shortcut(name, x, width, stride))
        weight, bias = self.weights["fc"]
        return F.linear(x.mean(dim=(2, 3)), weight, bias)


@pytest.mark.parametrize(("shortcut", "widths"), [("A", (4, 8, 16)), ("A", (3, 3, 9)), ("B", (4, 6, 9))])
def test_net_computes_what_the_papers_draw(tmp_path: Path, shortcut: str, widths: tuple[int, int, int]) -> None:
    x = experiment(student=ResNet(14, widths), options=Options(shortcut=shortcut))
    net = built(nets.plain_net(x), tmp_path, (3, 16, 16))
    for name, blobs in net.params.items():
        if name.endswith("_scale"):
            blobs[1].data[...] = np.random.default_rng(2).standard_normal(blobs[1].data.shape)
    net.forward()
    expected = Reference(net, x.student, shortcut)(torch.tensor(np.array(net.blobs["data"].data)))
    np.testing.assert_allclose(net.blobs["fc"].data, expected.numpy(), atol=1e-5)


def test_taps_are_what_is_compared_and_read(tmp_path: Path) -> None:
    taps = ResNet(14, NARROW).write(caffe_pb2.NetParameter(), "data", 10, Options())
    assert taps.modules == tuple(f"group{g}_block{b}_sum" for g in range(3) for b in range(2))
    assert taps.stages == taps.modules[1::2] and taps.preacts == () and (taps.pooled, taps.logits) == ("global_avg_pool", "fc")


def test_preacts_are_what_the_last_relu_of_a_stage_is_given_and_change_no_value(tmp_path: Path) -> None:
    network, scores = ResNet(14, NARROW), []
    for preacts in (False, True):
        message = caffe_pb2.NetParameter()
        taps = network.write(message, "data", 10, Options(), preacts=preacts)
        net = built(message, tmp_path, (3, 16, 16))
        for blobs in net.params.values():
            for blob in blobs:
                blob.data[...] = np.random.default_rng(blob.count).standard_normal(blob.shape) / 3
        net.forward()
        scores.append(np.array(net.blobs[taps.logits].data))
    for below, end in zip(taps.preacts, taps.stages, strict=True):
        assert net.blobs[below].data.min() < 0
        np.testing.assert_array_equal(net.blobs[end].data, net.blobs[below].data.clip(min=0))
    np.testing.assert_array_equal(*scores)


def test_a_branch_begins_at_a_tap_of_another_network_under_names_of_its_own(tmp_path: Path) -> None:
    """As a student's later stages on a teacher's first one."""
    message, teacher, student = caffe_pb2.NetParameter(name="both"), ResNet(14, NARROW), ResNet(8, NARROW)
    trunk = teacher.write(message, "data", 10, Options())
    branch = student.write(message, trunk.stages[0], 10, Options(), prefix="branch/", begin=1)
    assert branch.stages == ("branch/group1_block0_sum", "branch/group2_block0_sum") and branch.logits == "branch/fc"
    names = [layer.name for layer in message.layer if layer.name.startswith("branch/")]
    assert len(set(names)) == len(names) and not any("first_conv" in name or "group0" in name for name in names)
    net = built(message, tmp_path, (3, 16, 16))
    net.forward()
    assert net.blobs[branch.stages[0]].data.shape == net.blobs[trunk.stages[1]].data.shape
    assert net.blobs[branch.logits].data.shape == (3, 10)


def test_networks_are_known_by_name() -> None:
    assert NETWORKS["resnet"](depth=20, widths=(4, 8, 16)) == ResNet(20, NARROW)


def test_a_teacher_stands_on_its_own_statistics_or_on_those_of_each_batch() -> None:
    for statistics, stored in (("stored", True), ("batch", False)):
        x = experiment(options=Options(teacher_statistics=statistics))
        for net in (nets.kd_net(x, 100), nets.hint_net(x, [Pair("group1_block1_relu", "group1_block0_relu")])):
            norms = [layer for layer in net.layer if layer.type == "BatchNorm"]
            assert {layer.batch_norm_param.use_global_stats for layer in norms if layer.name.startswith("teacher/")} == {stored}
            assert not any(layer.batch_norm_param.HasField("use_global_stats") for layer in norms if not layer.name.startswith("teacher/"))


def test_shortcut_a_needs_multiples() -> None:
    x = experiment(student=ResNet(8, (4, 6, 9)))
    with pytest.raises(UserError, match="from 4 to 6; use shortcut B"):
        nets.plain_net(x)


def test_data_layers_augment_in_training_only() -> None:
    x = experiment()
    train, test = nets.plain_net(x).layer[:2]
    transforms = caffe_pb2.TransformationParameter
    assert train.transform_param == transforms(crop_size=32, mirror=True, mean_file="data/cifar10/train_mean.binaryproto")
    assert test.transform_param == transforms(mean_file="data/cifar10/test_mean.binaryproto")
    assert (train.data_param.batch_size, test.data_param.batch_size) == (128, 100)
    assert [layer.include[0].phase for layer in (train, test)] == [caffe_pb2.TRAIN, caffe_pb2.TEST]


@pytest.mark.parametrize(("options", "files", "values"), [
    (Options(), 2, 0), (Options(mean="values"), 0, 6), (Options(mean="none", mirror=False), 0, 0)])
def test_mean_and_mirror_are_options(options: Options, files: int, values: int) -> None:
    x = experiment(options=options)
    data = nets.plain_net(x).layer[:2]
    assert sum(layer.transform_param.HasField("mean_file") for layer in data) == files
    assert sum(len(layer.transform_param.mean_value) for layer in data) == values
    assert data[0].transform_param.mirror == options.mirror


def test_mnist_is_scaled_and_otherwise_as_it_is() -> None:
    x = experiment(dataset=DATASETS["mnist"], options=Options(mean="values", mnist_scale=0.5))
    transform = nets.plain_net(x).layer[0].transform_param
    assert transform == caffe_pb2.TransformationParameter(scale=0.5)


def test_mean_values_have_to_be_known() -> None:
    x = experiment(dataset=replace(DATASETS["cifar10"], mean_value=()), options=Options(mean="values"))
    with pytest.raises(UserError, match="needs its mean_value"):
        nets.plain_net(x)


def teacher_part(net: caffe_pb2.NetParameter) -> list[caffe_pb2.LayerParameter]:
    return [layer for layer in net.layer if layer.name.startswith("teacher/")]


STAGE_NETS = [
    nets.kd_net(experiment(), 100),
    nets.hint_net(experiment(), [Pair("group1_block1_relu", "group1_block0_relu")]),
    nets.hint_net(experiment(options=Options(shortcut="B")),
                  [Pair("group0_block1_relu", "group0_block0_relu", "1"), Pair("fc", "fc", "2")]),
]


@pytest.mark.parametrize("net", STAGE_NETS, ids=lambda net: net.name)
def test_teacher_is_frozen_in_writing_and_student_is_not(net: caffe_pb2.NetParameter) -> None:
    counts = {"Convolution": 1, "Scale": 2, "BatchNorm": 3, "InnerProduct": 2}
    for layer in net.layer:
        if layer.name.startswith("teacher/"):
            assert [(spec.lr_mult, spec.decay_mult) for spec in layer.param] == [(0, 0)] * counts.get(layer.type, 0)
            assert [rule.phase for rule in layer.include] == [caffe_pb2.TRAIN]
            assert layer.type != "BatchNorm" or layer.batch_norm_param.use_global_stats
        else:
            assert not layer.batch_norm_param.HasField("use_global_stats")
            if layer.type in ("SoftmaxWithLoss", "Python"):
                assert list(layer.propagate_down) == [True] + [False] * (len(layer.bottom) - 1)
    assert not net.force_backward


@pytest.mark.parametrize("net", STAGE_NETS, ids=lambda net: net.name)
def test_outputs_are_losses_and_nothing_gets_decay_without_a_gradient(net: caffe_pb2.NetParameter, tmp_path: Path) -> None:
    trained = built(net, tmp_path, (3, 32, 32))
    assert all(output == "label" or output.endswith("_loss") for output in trained.outputs)
    for name, blobs in trained.params.items():
        if name.startswith("teacher/"):
            for blob in blobs:
                blob.data[...] = 1 if name.endswith("_bn") else blob.data
    trained.forward()
    trained.backward()
    for layer in net.layer:
        if layer.name in trained.params and not any(spec.lr_mult == 0 for spec in layer.param):
            assert all(np.any(blob.diff) for blob in trained.params[layer.name]), layer.name


def test_kd_net_tests_the_student_alone(tmp_path: Path) -> None:
    x = experiment()
    net = built(nets.kd_net(x, 100), tmp_path, (3, 32, 32), torchcaffe.TEST)
    assert net.outputs == ["accuracy", "loss"]
    assert set(net.params) == {layer.name for layer in nets.plain_net(x).layer if surgery.parameter_count(layer)}


def test_kd_loss_says_what_is_not_default() -> None:
    def param_str(label_tau: float = 1, tau_squared: bool = False, **changed: object) -> str:
        net = nets.kd_net(experiment(**changed), 1000, label_tau, tau_squared)
        text = next(layer.python_param.param_str for layer in net.layer if layer.type == "Python")
        assert text.startswith('{"tau": 3.0, "lambda": 5.0')
        return text.removeprefix('{"tau": 3.0, "lambda": 5.0')
    assert param_str() == "}"
    assert param_str(3.0, True) == ', "label_tau": 3.0, "tau_squared": true}'
    assert param_str(lambda_schedule="linear") == ', "schedule": "linear", "end": 1.0, "iterations": 1000}'
    assert param_str(lambda_schedule="step", lambda_end=0.0) == ', "schedule": "step", "end": 0.0, "steps": [500, 750]}'


@pytest.mark.parametrize("schedule", ["linear", "step"])
def test_a_lambda_schedule_runs_in_a_net(tmp_path: Path, schedule: str) -> None:
    net = built(nets.kd_net(experiment(lambda_schedule=schedule), 4), tmp_path, (3, 32, 32))
    for _ in range(3):
        net.forward()
    assert net.params["kd_loss"][0].data[0] == 3


def test_hint_nets_stop_at_the_pair() -> None:
    net = nets.hint_net(experiment(), [Pair("group1_block1_relu", "group1_block0_relu")])
    names = [layer.name for layer in net.layer]
    assert "group1_block0_relu" in names and "teacher/group1_block1_relu" in names
    assert not any("group2" in name or "fc" in name or "pool" in name for name in names)
    assert [layer.include[0].phase for layer in net.layer if layer.type == "Data"] == [caffe_pb2.TRAIN]
    assert list(net.layer[0].top) == ["data"]
    assert list(net.layer[-1].loss_weight) == [1]


def test_concurrent_losses_share_one_weight() -> None:
    pairs = [Pair(f"group{g}_block1_relu", f"group{g}_block0_relu", str(g + 1)) for g in range(3)]
    losses = [layer for layer in nets.hint_net(experiment(), pairs).layer if layer.type == "Python"]
    assert [layer.name for layer in losses] == ["hint1_loss", "hint2_loss", "hint3_loss"]
    assert [layer.loss_weight[0] for layer in losses] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("kernel", [1, 3])
def test_regressor_matches_a_wider_teacher(tmp_path: Path, kernel: int) -> None:
    x = experiment(teacher=ResNet(14, (8, 16, 32)), regressor=True)
    net = nets.hint_net(x, [Pair("group1_block1_relu", "group1_block0_relu", "2")], kernel, std=0.5)
    regressor = next(layer for layer in net.layer if layer.name == "regressor2").convolution_param
    assert (regressor.weight_filler.type, regressor.weight_filler.std, regressor.bias_term) == ("gaussian", 0.5, False)
    assert built(net, tmp_path, (3, 32, 32)).params["regressor2"][0].data.shape == (16, 8, kernel, kernel)


@pytest.mark.parametrize(("changed", "pair", "complaint"), [
    ({"teacher": ResNet(14, (8, 16, 32))}, ("group1_block1_relu", "group1_block0_relu"),
     "is 8x16x16 and hint layer 'group1_block1_relu' is 16x16x16; use a regressor"),
    ({"regressor": True}, ("group1_block1_relu", "group0_block0_relu"), "is 4x32x32 and .* is 8x16x16; a regressor changes channels only"),
    ({}, ("group1_block9_relu", "group1_block0_relu"), "no layer or blob 'group1_block9_relu'; did you mean"),
    ({"teacher": None}, ("group1_block1_relu", "group1_block0_relu"), "needs a teacher"),
])
def test_pairs_that_do_not_fit_are_refused(changed: dict, pair: tuple[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        nets.hint_net(experiment(**changed), [Pair(*pair)])


OWN_TEACHER = """
name: "mine"
layer { name: "in" type: "Input" top: "x" top: "y" input_param { shape { dim: 1 dim: 3 dim: 32 dim: 32 } shape { dim: 1 } } }
layer { name: "conv" type: "Convolution" bottom: "x" top: "conv" convolution_param { num_output: 4 kernel_size: 5 stride: 2 pad: 2 } }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "dropped" }
layer { name: "slice" type: "Slice" bottom: "dropped" top: "half" top: "other" }
layer { name: "pool" type: "Pooling" bottom: "half" top: "pool" pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "train_only" type: "Power" bottom: "pool" top: "pool" include { phase: TRAIN } power_param { scale: 0 } }
layer { name: "scores" type: "InnerProduct" bottom: "pool" top: "scores" inner_product_param { num_output: %d } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "scores" bottom: "y" top: "loss" }
"""


def test_a_teacher_of_ones_own_is_taken_apart_alike(tmp_path: Path) -> None:
    (tmp_path / "mine.prototxt").write_text(OWN_TEACHER % 10)
    x = experiment(teacher=Trained(tmp_path / "mine.caffemodel", tmp_path / "mine.prototxt"))
    net = nets.kd_net(x, 100)
    assert [layer.name for layer in teacher_part(net)] == [f"teacher/{name}" for name in ("conv", "slice", "pool", "scores", "silence")]
    assert [len(layer.param) for layer in teacher_part(net)] == [2, 0, 0, 2, 0]
    assert list(teacher_part(net)[-1].bottom) == ["teacher/other"]
    trained = built(net, tmp_path, (3, 32, 32))
    trained.forward()
    assert trained.outputs == ["kd_loss"]


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.prototxt").write_text(OWN_TEACHER.replace('type: "Slice"', 'type: "ReLU"').replace('top: "other"', "") % 7)
    x = experiment(teacher=Trained(tmp_path / "mine.caffemodel", tmp_path / "mine.prototxt"))
    with pytest.raises(UserError, match="'mine' scores 7 classes and data set cifar10 has 10"):
        nets.kd_net(x, 100)
