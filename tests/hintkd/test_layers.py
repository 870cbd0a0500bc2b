"""The loss layers: gradients against finite differences, the torch form against the numpy form, schedules and bad input."""
from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import torchcaffe


class Blob:
    """A pycaffe blob in float64."""

    def __init__(self, data: Any):
        self.data = np.array(data, float)
        self.diff = np.zeros_like(self.data)

    shape = property(lambda self: self.data.shape)
    count = property(lambda self: self.data.size)

    def reshape(self, *shape: int) -> None:
        self.data, self.diff = np.zeros(shape), np.zeros(shape)


class Blobs(list):
    def add_blob(self, *shape: int) -> None:
        self.append(Blob(np.zeros(shape)))


@pytest.fixture(scope="module")
def layers() -> SimpleNamespace:
    with mock.patch.dict(sys.modules, caffe=torchcaffe):
        modules = {name: importlib.import_module(f"hintkd.layers.{module}")
                   for name, module in {"SoftenedCrossEntropy": "softened_cross_entropy", "HintLoss": "hint_loss",
                                        "KLDivergence": "kl_divergence"}.items()}
    return SimpleNamespace(**{name: getattr(module, name) for name, module in modules.items()})


def build(cls: type, bottoms: list[Blob], phase: int = torchcaffe.TRAIN, **param: Any) -> tuple[Any, list[Blob]]:
    layer, tops = cls(None), [Blob(np.zeros(1))]
    layer.param_str, layer.phase, layer.blobs = json.dumps(param) if param else "", phase, Blobs()
    layer.setup(bottoms, tops)
    layer.reshape(bottoms, tops)
    return layer, tops


def logits(rows: int = 5, classes: int = 4) -> list[Blob]:
    draw = np.random.default_rng(3)
    return [Blob(3 * draw.standard_normal((rows, classes))), Blob(3 * draw.standard_normal((rows, classes))),
            Blob(draw.integers(0, classes, rows))]


def maps() -> list[Blob]:
    draw = np.random.default_rng(4)
    return [Blob(draw.standard_normal((3, 2, 4, 4))) for _ in range(2)]


def finite_differences(layer: Any, bottoms: list[Blob], tops: list[Blob], index: int, weight: float) -> np.ndarray:
    """Of weight * top with respect to bottom `index`."""
    gradient, flat, h = np.zeros(bottoms[index].count), bottoms[index].data.reshape(-1), 1e-5
    for i in range(flat.size):
        sides = []
        for step in (h, -2 * h):
            flat[i] += step
            layer.forward(bottoms, tops)
            sides.append(weight * tops[0].data[0])
        flat[i] += h
        gradient[i] = (sides[0] - sides[1]) / (2 * h)
    layer.forward(bottoms, tops)
    return gradient.reshape(bottoms[index].shape)


SOFTENED: list[dict[str, Any]] = [{}, {"tau": 3, "lambda": 5}, {"tau": 3, "lambda": 5, "label_tau": 3, "tau_squared": True}]
CASES = [*(("SoftenedCrossEntropy", p) for p in SOFTENED), ("HintLoss", {}), ("KLDivergence", {"tau": 3, "detached": False})]


def bottoms_of(name: str) -> list[Blob]:
    return maps() if name == "HintLoss" else logits()[:2 if name == "KLDivergence" else 3]


@pytest.mark.parametrize(("name", "param"), CASES)
@pytest.mark.parametrize("bottom", [0, 1])
def test_gradients_are_those_of_finite_differences(layers: SimpleNamespace, name: str, param: dict, bottom: int) -> None:
    bottoms = bottoms_of(name)
    layer, tops = build(getattr(layers, name), bottoms, **param)
    expected = finite_differences(layer, bottoms, tops, bottom, weight=0.7)
    tops[0].diff[...] = 0.7
    layer.backward(tops, [i == bottom for i in range(len(bottoms))], bottoms)
    np.testing.assert_allclose(bottoms[bottom].diff, expected, atol=1e-8)
    assert not bottoms[1 - bottom].diff.any()      # propagate_down was false there


@pytest.mark.parametrize(("name", "param"), CASES)
def test_torch_form_equals_numpy_form(layers: SimpleNamespace, name: str, param: dict) -> None:
    bottoms = bottoms_of(name)
    layer, tops = build(getattr(layers, name), bottoms, **param)
    layer.forward(bottoms, tops)
    tops[0].diff[...] = 0.7
    layer.backward(tops, [True, True, False], bottoms)
    tensors = [torch.tensor(b.data, requires_grad=i < 2) for i, b in enumerate(bottoms)]
    loss = layer.forward_torch(tensors, [])
    (0.7 * loss).sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), tops[0].data, rtol=1e-12)
    for tensor, blob in zip(tensors[:2], bottoms[:2], strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy(), blob.diff, atol=1e-13)


def test_softened_cross_entropy_is_equation_2(layers: SimpleNamespace) -> None:
    student, teacher = Blob([[np.log(3), 0.0]]), Blob([[0.0, 2 * np.log(4)]])
    layer, tops = build(layers.SoftenedCrossEntropy, [student, teacher, Blob([0])], **{"tau": 2, "lambda": 5})
    layer.forward([student, teacher, Blob([0])], tops)
    soft = np.sqrt([3, 1]) / np.sqrt([3, 1]).sum()                    # the teacher says 1/5, 4/5
    assert tops[0].data[0] == pytest.approx(-np.log(0.75) - 5 * (0.2 * np.log(soft[0]) + 0.8 * np.log(soft[1])))


def test_a_teacher_learns_from_a_divergence_only_where_it_is_not_detached(layers: SimpleNamespace) -> None:
    for detached in (True, False):
        bottoms = logits()[:2]
        layer, tops = build(layers.KLDivergence, bottoms, tau=3, detached=detached)
        layer.forward(bottoms, tops)
        tops[0].diff[...] = 1
        layer.backward(tops, [True, True], bottoms)
        assert bottoms[1].diff.any() == (not detached)
        teacher = torch.tensor(bottoms[1].data, requires_grad=True)
        loss = layer.forward_torch([torch.tensor(bottoms[0].data, requires_grad=True), teacher], [])
        loss.backward()
        assert (teacher.grad is None) == detached


def test_hint_loss_is_half_the_squared_distance_per_item(layers: SimpleNamespace) -> None:
    bottoms = [Blob(np.zeros((2, 3, 1, 1))), Blob(np.full((2, 3, 1, 1), 2.0))]
    layer, tops = build(layers.HintLoss, bottoms)
    layer.forward(bottoms, tops)
    assert tops[0].data[0] == 6 * 4 / (2 * 2)


def test_huge_logits_do_not_overflow(layers: SimpleNamespace) -> None:
    bottoms = [Blob([[1e4, -1e4]]), Blob([[-1e4, 1e4]]), Blob([1])]
    layer, tops = build(layers.SoftenedCrossEntropy, bottoms)
    layer.forward(bottoms, tops)
    tops[0].diff[...] = 1
    layer.backward(tops, [True, True, False], bottoms)
    assert tops[0].data[0] == 4e4
    np.testing.assert_allclose(bottoms[0].diff, [[2, -2]])


SCHEDULES = [
    ({"schedule": "linear", "end": 1, "iterations": 4}, [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1]),
    ({"schedule": "step", "end": 0, "steps": [2, 3]}, [5, 5, 5, 5, 2.5, 2.5, 0, 0, 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES)
def test_lambda_follows_training_iterations_in_both_forms(layers: SimpleNamespace, schedule: dict, expected: list[float]) -> None:
    bottoms = logits()
    tensors, counter = [torch.tensor(b.data) for b in bottoms], torch.zeros(1)
    layer, tops = build(layers.SoftenedCrossEntropy, bottoms, **{"tau": 3, "lambda": 5, "iter_size": 2, **schedule})
    fixed, fixed_tops = build(layers.SoftenedCrossEntropy, bottoms, **{"tau": 3, "lambda": 0})
    fixed.forward(bottoms, fixed_tops)
    label_term = fixed_tops[0].data[0]
    fixed.p["lambda"] = 1
    fixed.forward(bottoms, fixed_tops)
    kd_term = fixed_tops[0].data[0] - label_term
    for passes, value in enumerate(expected):
        layer.forward(bottoms, tops)
        assert tops[0].data[0] == pytest.approx(label_term + value * kd_term)
        assert layer.forward_torch(tensors, [counter]).item() == pytest.approx(label_term + value * kd_term, rel=1e-6)
        assert layer.blobs[0].data[0] == counter.item() == passes + 1


def test_testing_neither_counts_nor_keeps_an_array_of_its_own(layers: SimpleNamespace) -> None:
    bottoms = logits()
    layer, tops = build(layers.SoftenedCrossEntropy, bottoms, phase=torchcaffe.TEST,
                        **{"lambda": 5, "schedule": "linear", "end": 1, "iterations": 4})
    layer.blobs[0] = Blob([2.0])                       # a test net shares the training net's blob, given after setup
    layer.forward(bottoms, tops)
    assert layer.blobs[0].data[0] == 2 and layer.lambda_now == 3


def test_fixed_lambda_needs_no_blob(layers: SimpleNamespace) -> None:
    assert build(layers.SoftenedCrossEntropy, logits())[0].blobs == []


@pytest.mark.parametrize(("param", "complaint"), [
    ({"temperature": 3}, "unknown entry 'temperature'"),
    ({"tau": "3"}, "'tau' cannot be"),
    ({"tau": True}, "'tau' cannot be true"),
    ({"tau_squared": 1}, "'tau_squared' cannot be 1"),
    ({"tau": 0}, "above 0"),
    ({"schedule": "cosine"}, "fixed, linear or step"),
    ({"schedule": "linear"}, "needs iterations"),
    ({"steps": [3]}, "neither goes with another"),
])
def test_bad_param_str_is_refused(layers: SimpleNamespace, param: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build(layers.SoftenedCrossEntropy, logits(), **param)


def test_shapes_and_labels_that_do_not_fit_are_refused(layers: SimpleNamespace) -> None:
    student, teacher, label = logits()
    with pytest.raises(ValueError, match=r"\(5, 4\) and the teacher's \(5, 3\)"):
        build(layers.SoftenedCrossEntropy, [student, Blob(np.zeros((5, 3))), label])
    with pytest.raises(ValueError, match="one for each of the 5 rows"):
        build(layers.SoftenedCrossEntropy, [student, teacher, Blob(np.zeros(4))])
    with pytest.raises(ValueError, match=r"\(3, 2, 4, 4\) and the hint layer \(3, 4, 4, 4\)"):
        build(layers.HintLoss, [maps()[0], Blob(np.zeros((3, 4, 4, 4)))])
    layer, tops = build(layers.SoftenedCrossEntropy, [student, teacher, label])
    with pytest.raises(ValueError, match="do not fit 4 classes"):
        layer.forward([student, teacher, Blob([0, 1, 2, 3, 4])], tops)


INPUTS = """
force_backward: true
layer { name: "student" type: "Input" top: "student" input_param { shape { dim: 5 dim: 4 } } }
layer { name: "teacher" type: "Input" top: "teacher" input_param { shape { dim: 5 dim: 4 } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 5 } } }
"""
ONE_LAYER = """
layer { name: "loss" type: "Python" bottom: "student" bottom: "teacher" bottom: "label" top: "loss" loss_weight: 0.7
  propagate_down: true propagate_down: true propagate_down: false
  python_param { module: "hintkd.layers.softened_cross_entropy" layer: "SoftenedCrossEntropy"
    param_str: '{"tau": 3, "lambda": 5, "tau_squared": true}' } }
"""
BUILT_IN = """
layer { name: "hard" type: "SoftmaxWithLoss" bottom: "student" bottom: "label" top: "hard" loss_weight: 0.7
  propagate_down: true propagate_down: false }
layer { name: "t" type: "Power" bottom: "teacher" top: "t" power_param { scale: 0.333333333 } }
layer { name: "t_soft" type: "Softmax" bottom: "t" top: "t_soft" }
layer { name: "s" type: "Power" bottom: "student" top: "s" power_param { scale: 0.333333333 } }
layer { name: "s_soft" type: "Softmax" bottom: "s" top: "s_soft" }
layer { name: "s_log" type: "Log" bottom: "s_soft" top: "s_log" }
layer { name: "product" type: "Eltwise" bottom: "t_soft" bottom: "s_log" top: "product" eltwise_param { operation: PROD } }
layer { name: "soft" type: "Reduction" bottom: "product" top: "soft" loss_weight: 0.7 reduction_param { coeff: -9 } }   # -5 * 3^2 / 5 rows
"""


def test_in_a_net_it_equals_the_same_loss_of_builtin_layers(tmp_path: Path) -> None:
    results = []
    for text in (ONE_LAYER, BUILT_IN):
        (tmp_path / "net.prototxt").write_text(INPUTS + text)
        net = torchcaffe.Net(str(tmp_path / "net.prototxt"), torchcaffe.TRAIN)
        for name, blob in zip(("student", "teacher", "label"), logits(), strict=True):
            net.blobs[name].data[...] = blob.data
        net.forward()
        net.backward()
        loss = sum(net.blob_loss_weights[top] * float(net.blobs[top].data.sum()) for top in net.outputs)
        results.append((loss, net.blobs["student"].diff.copy(), net.blobs["teacher"].diff.copy()))
    for ours, builtin in zip(*results, strict=True):
        np.testing.assert_allclose(ours, builtin, rtol=1e-5, atol=1e-6)
