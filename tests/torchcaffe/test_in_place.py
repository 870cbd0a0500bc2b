"""In place, Clip, Power, Log and BNLL have Caffe's gradient, worked out here by hand from its source, on both ways of running a net."""
import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import parameters, write_solver

INPUTS = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 } } }
layer { name: "wanted" type: "Input" top: "wanted" input_param { shape { dim: 4 dim: 5 } } }
"""
PRODUCT = """
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "uniform" } } }
"""
LOSS = 'layer { name: "loss" type: "EuclideanLoss" bottom: "ip" bottom: "wanted" top: "loss" }'


def in_place(kind, text=""):
    return f'layer {{ name: "{kind}" type: "{kind}" bottom: "ip" top: "ip" {text} }}'


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def feed(net):
    net.blobs["data"].data[...] = np.random.default_rng(0).uniform(0.5, 1.5, (4, 3))


CASES = {                                               # the layers, and the gradient for ip's output, of the blob y and its diff
    "clip": (in_place("Clip", "clip_param { min: 0.8 max: 1.2 }"), lambda y, dy: dy),
    "bnll": (in_place("BNLL"), lambda y, dy: dy * sigmoid(y)),
    "log": (in_place("Log", "log_param { base: 2 scale: 3 shift: 4 }"), lambda y, dy: (3 / np.log(2) / (3 * y + 4)) ** 2),
    "linear": (in_place("Power", "power_param { scale: 3 }"), lambda y, dy: np.full_like(y, 9)),
    "square": (in_place("Power", "power_param { power: 2 scale: 0.5 shift: 1 }"), lambda y, dy: (0.5 * y + 1) ** 2),
    "cube": (in_place("Power", "power_param { power: 3 scale: 2 shift: 1 }"), lambda y, dy: (6 * y / (2 * y + 1)) ** 2),
    "constant": (in_place("Power", "power_param { power: 0 }"), lambda y, dy: np.zeros_like(y)),
    "what a later layer leaves in the blob": (in_place("BNLL") + in_place("Power", "power_param { scale: 2 }"),
                                              lambda y, dy: 4 * sigmoid(y)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_computed_from_the_overwritten_blob(case, tmp_path):
    layers, gradient = CASES[case]
    (tmp_path / "net.prototxt").write_text(INPUTS + PRODUCT + layers + LOSS)
    with caffe.number_type(torch.float64):
        net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TRAIN)
    feed(net)
    net.forward()
    y = net.blobs["ip"].data.copy()
    net.backward()
    expected = gradient(y, y / 4)                       # the loss's gradient: (y - 0) / 4
    np.testing.assert_allclose(net.blobs["ip"].diff, expected, rtol=1e-12)
    np.testing.assert_allclose(net.params["ip"][0].diff, expected.T @ net.blobs["data"].data, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_whole_iteration_step_agrees(case, tmp_path):
    path = write_solver(tmp_path, INPUTS + PRODUCT + CASES[case][0] + LOSS, base_lr=0.001)
    ends = []
    for fast in (False, True):
        with caffe.number_type(torch.float64):
            solver = caffe.get_solver(path)
        solver.fast = fast
        feed(solver.net)
        solver.step(3)
        ends.append(parameters(solver.net))
    for key, value in ends[0].items():
        np.testing.assert_allclose(ends[1][key], value, rtol=1e-12)


def test_a_net_whose_input_is_changed_in_place_runs_layer_by_layer(tmp_path, capsys):
    change = 'layer { name: "double" type: "Power" bottom: "data" top: "data" power_param { scale: 2 } }'
    solver = caffe.get_solver(write_solver(tmp_path, INPUTS + change + PRODUCT + LOSS, base_lr=0))
    solver.fast = True
    feed(solver.net)
    before = solver.net.blobs["data"].data.copy()
    solver.step(2)
    assert "layer 'double' changes the input 'data' in place" in capsys.readouterr().err
    np.testing.assert_allclose(solver.net.blobs["data"].data, 4 * before)


def test_the_log_says_so_once_and_only_where_a_gradient_passes(tmp_path, capsys):
    path = tmp_path / "net.prototxt"
    path.write_text(INPUTS + PRODUCT + in_place("BNLL") + in_place("Clip") + LOSS)
    caffe.Net(str(path), caffe.TRAIN)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("W") and "'BNLL' (BNLL), 'Clip' (Clip) in place" in lines[0]
    path.write_text(INPUTS + PRODUCT.replace('top: "ip"', 'top: "ip" param { lr_mult: 0 } param { lr_mult: 0 }') + in_place("BNLL") + LOSS)
    caffe.Net(str(path), caffe.TRAIN)
    assert capsys.readouterr().err == ""
