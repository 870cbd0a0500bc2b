"""Statistics that batch normalisations add up at the end of a pass are those that they add up one by one."""
from __future__ import annotations

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import INPUTS, feed, parameters, resnet8, write_solver
from torchcaffe.errors import CaffeError
from torchcaffe.step import statistics
from torchcaffe.step.program import Program

SHARED = 'param { lr_mult: 0 name: "%s0" } param { lr_mult: 0 name: "%s1" } param { lr_mult: 0 name: "%s2" }'
FULLY = INPUTS % {"batch": 4, "size": 1} + """
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "msra" } } }
layer { name: "bn" type: "BatchNorm" bottom: "ip" top: "bn" batch_norm_param { moving_average_fraction: 0.9 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "bn" bottom: "label" top: "loss" }"""


def train(path, iterations, classes=10):
    with caffe.number_type(torch.float64):
        solver = caffe.get_solver(path)
    solver.fast = True
    feed(solver.net, classes=classes)
    solver.step(iterations)
    return solver


@pytest.fixture
def together(monkeypatch):
    """Call it, and layers leave their statistics to the pass, as on a GPU."""
    return lambda: monkeypatch.setattr(statistics, "collects", lambda node: True)


def is_equal(one, other):
    a, b = parameters(one.net), parameters(other.net)
    return all(np.allclose(a[k], b[k], rtol=1e-12, atol=1e-14) for k in a)


@pytest.mark.parametrize(("text", "changes"), [
    (resnet8(), {}), (resnet8().replace('type: "BatchNorm"', 'type: "BatchNorm" batch_norm_param { moving_average_fraction: 0.9 }', 3),
                      {"iter_size": 2}), (FULLY, {}), (FULLY.replace("dim: 4", "dim: 1"), {})])
def test_they_are_the_same_numbers(tmp_path, together, text, changes):
    path = write_solver(tmp_path, text, **changes)
    plain = train(path, 4, classes=5)
    together()
    other = train(path, 4, classes=5)
    assert is_equal(plain, other) and other._program(other.net).statistics.layers
    for solver in (plain, other):                           # layer by layer nothing is left to a pass
        solver.net.forward()
    assert is_equal(plain, other) and all(layer.batch is None for layer in other._program(other.net).statistics.layers)


def test_layers_that_share_theirs_add_them_one_after_the_other(tmp_path, together):
    text = resnet8()
    for name in ("g0_a_bn", "g0_b_bn"):
        text = text.replace(f'name: "{name}" type: "BatchNorm"', f'name: "{name}" type: "BatchNorm" ' + SHARED % (("s",) * 3))
    path = write_solver(tmp_path, text)
    plain = train(path, 3)
    together()
    other = train(path, 3)
    names = {layer.name for layer in other._program(other.net).statistics.layers}
    assert is_equal(plain, other) and "first_bn" in names and not names & {"g0_a_bn", "g0_b_bn"}


def test_a_pass_that_fails_adds_nothing(tmp_path, together):
    together()
    solver = train(write_solver(tmp_path, resnet8()), 2)
    before = parameters(solver.net)
    solver.net.blobs["label"].data[...] = 99
    with pytest.raises(CaffeError, match="label 99"):
        solver.step(1)
    assert all(np.array_equal(before[k], array) for k, array in parameters(solver.net).items())


def test_a_test_net_that_uses_batch_statistics_adds_them_up_too(tmp_path, together):
    text = resnet8().replace('type: "BatchNorm"', 'type: "BatchNorm" batch_norm_param { use_global_stats: false }')
    (tmp_path / "net.prototxt").write_text(text)
    found = []
    for change in (lambda: None, together):
        change()
        caffe.set_random_seed(1)
        net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
        feed(net)
        with torch.no_grad():
            Program(net).forward()
        found.append(parameters(net))
    assert all(np.array_equal(found[0][k], found[1][k]) for k in found[0]) and found[0]["first_bn", 2] == 1
