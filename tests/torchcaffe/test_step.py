"""The whole-iteration step gives the numbers of the layer-by-layer run."""
import re

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import MLP, conv, feed, parameters, resnet8, write_solver, zero_padded


def train(path, iterations, fast, kind=torch.float32, classes=10):
    with caffe.number_type(kind):
        solver = caffe.get_solver(path)
    solver.fast = fast
    feed(solver.net, classes=classes)
    solver.step(iterations)
    return solver


def largest_difference(a, b):
    return max(np.abs(a[k] - b[k]).max() for k in a)


def test_twenty_iterations_of_resnet8_agree_in_float64(tmp_path):
    path = write_solver(tmp_path, resnet8(), base_lr=0.1)
    slow, fast = (parameters(train(path, 20, f, torch.float64).net) for f in (False, True))
    assert largest_difference(slow, fast) < 1e-10


def test_a_shortcut_that_pads_with_zeros_needs_neither_padding_nor_zeros(tmp_path):
    path = write_solver(tmp_path, zero_padded(), base_lr=0.1)
    slow, fast = (train(path, 5, f, torch.float64) for f in (False, True))
    assert not {"pad", "zeros"} & {name for op in fast._program(fast.net).operations for name in op.tops}
    for name in ("half", "zeros", "pad", "sum", "c"):                 # which it has all the same
        assert np.allclose(slow.net.blobs[name].data, fast.net.blobs[name].data, rtol=1e-9, atol=1e-12), name
    assert largest_difference(parameters(slow.net), parameters(fast.net)) < 1e-10


@pytest.mark.parametrize("third", [False, True])                  # whether other layers read what both read
def test_a_shortcut_s_gradient_joins_the_convolution_s(tmp_path, third):
    text = zero_padded().replace('type: "constant" value: 1', 'type: "constant" value: 0.7')
    if third:
        text += conv("side", "a", 4) + 'layer { name: "more" type: "EuclideanLoss" bottom: "a" bottom: "side" top: "more" }'
    slow, fast = (train(write_solver(tmp_path, text, base_lr=0.1), 3, f, torch.float64) for f in (False, True))
    joined = [op.tops[-1] for op in fast._program(fast.net).operations if len(op.nodes) > 1 and op.nodes[0].layer.type == "Split"]
    assert joined == ([] if third else ["half"])
    assert largest_difference(parameters(slow.net), parameters(fast.net)) < 1e-10


def test_twenty_iterations_of_resnet8_agree_in_float32(tmp_path):
    path = write_solver(tmp_path, resnet8())
    slow, fast = (parameters(train(path, 20, f).net) for f in (False, True))
    assert largest_difference(slow, fast) < 2e-4


def test_the_fast_step_with_iter_size_clipping_and_nesterov_agrees(tmp_path):
    path = write_solver(tmp_path, resnet8(), iter_size=2, clip_gradients=0.5, type="Nesterov")
    slow, fast = (parameters(train(path, 5, f, torch.float64).net) for f in (False, True))
    assert largest_difference(slow, fast) < 1e-10


def test_dropout_draws_do_not_depend_on_the_path(tmp_path):
    path = write_solver(tmp_path, MLP)
    slow, fast = (parameters(train(path, 7, f, torch.float64, classes=3).net) for f in (False, True))
    assert largest_difference(slow, fast) < 1e-12


def test_a_blob_looked_at_before_shows_the_tops_of_the_last_fast_step(tmp_path):
    path = write_solver(tmp_path, MLP)
    slow, fast = (caffe.get_solver(path) for _ in range(2))
    fast.fast = True
    arrays = []
    for solver in (slow, fast):
        feed(solver.net, classes=3)
        arrays.append(solver.net.blobs["ip2"].data)
        solver.step(3)
    assert np.allclose(*arrays, atol=1e-6) and np.abs(arrays[0]).max() > 0


def layer(name, kind, bottoms, top, rest=""):
    return f'layer {{ name: "{name}" type: "{kind}" {"".join(f"""bottom: "{b}" """ for b in bottoms)} top: "{top}" {rest} }}'


def fully_connected(name, bottom, rest=""):
    return layer(name, "InnerProduct", [bottom], name, 'inner_product_param { num_output: 4 weight_filler { type: "xavier" } }' + rest)


@pytest.mark.parametrize("readers", [
    layer("e", "Eltwise", ["y", "b"], "e"),                                                        # one gradient for two ReLUs
    layer("e", "Eltwise", ["y", "y"], "e"),
    fully_connected("c", "y") + layer("e", "Eltwise", ["y", "c"], "e"),
    layer("d", "Dropout", ["y"], "y") + fully_connected("c", "y") + layer("e", "Eltwise", ["b", "c"], "e"),
    layer("t", "TanH", ["y"], "y") + layer("e", "Eltwise", ["b", "y"], "e"),
    fully_connected("c", "y", "propagate_down: false") + layer("e", "Eltwise", ["y", "b"], "e"),
])
def test_a_relu_that_overwrites_its_gradient_leaves_those_of_others_alone(tmp_path, readers):
    net = (MLP.split('layer { name: "ip1"')[0] + fully_connected("y", "data") + layer("y_relu", "ReLU", ["y"], "y")
           + fully_connected("b", "data") + layer("b_relu", "ReLU", ["b"], "b") + readers
           + layer("loss", "SoftmaxWithLoss", ["e", "label"], "loss") + 'layer { name: "sink" type: "Silence" bottom: "b" }')
    path = write_solver(tmp_path, net, base_lr=0.1)
    slow, fast = (parameters(train(path, 7, f, torch.float64, classes=4).net) for f in (False, True))
    assert largest_difference(slow, fast) < 1e-12


class Doubler(caffe.Layer):
    """A Python layer without a torch form."""

    def setup(self, bottom, top):
        pass

    def reshape(self, bottom, top):
        top[0].reshape(*bottom[0].shape)

    def forward(self, bottom, top):
        top[0].data[...] = 2 * bottom[0].data

    def backward(self, top, propagate_down, bottom):
        bottom[0].diff[...] = 2 * top[0].diff


class TorchDoubler(Doubler):
    """The same with a torch form, and a blob that counts passes."""

    def setup(self, bottom, top):
        self.blobs.add_blob(1)

    def forward(self, bottom, top):
        super().forward(bottom, top)
        self.blobs[0].data[...] += 1

    def forward_torch(self, bottoms, blobs):
        with torch.no_grad():
            blobs[0].add_(1)
        return bottoms[0] * 2


def with_python_layer(name):
    extra = f"""layer {{ name: "double" type: "Python" bottom: "ip2" top: "d" param {{ lr_mult: 0 decay_mult: 0 }}
                python_param {{ module: "test_step" layer: "{name}" }} }}"""
    if name == "Doubler":
        extra = extra.replace("param { lr_mult: 0 decay_mult: 0 }", "")
    text = MLP.replace('layer { name: "loss"', extra + 'layer { name: "loss"')
    return text.replace('bottom: "ip2" bottom: "label"', 'bottom: "d" bottom: "label"')


def test_a_python_layer_without_a_torch_form_sends_the_net_layer_by_layer(tmp_path, capsys):
    path = write_solver(tmp_path, with_python_layer("Doubler"))
    slow, fast = (parameters(train(path, 3, f, classes=3).net) for f in (False, True))
    assert largest_difference(slow, fast) == 0
    assert re.search(r"Python layer 'double' has no forward_torch, so that [\d.e-]+ MiB pass through numpy", capsys.readouterr().err)


def test_a_torch_form_keeps_the_fast_step_and_its_state(tmp_path, capsys):
    path = write_solver(tmp_path, with_python_layer("TorchDoubler"))
    slow, fast = (parameters(train(path, 3, f, torch.float64, classes=3).net) for f in (False, True))
    assert "has no forward_torch" not in capsys.readouterr().err
    assert fast["double", 0] == 3 == slow["double", 0] and largest_difference(slow, fast) < 1e-12


@pytest.mark.parametrize("fast", [False, True])
def test_how_step_is_cut_up_does_not_change_a_byte(tmp_path, fast):
    path = write_solver(tmp_path, MLP, display=5)
    whole = train(path, 100, fast, classes=3)
    parts = train(path, 37, fast, classes=3)
    parts.step(63)
    a, b = parameters(whole.net), parameters(parts.net)
    assert all(np.array_equal(a[k], b[k]) for k in a)
