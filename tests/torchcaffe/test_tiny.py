"""Nets so small that they run without autograd and on one thread: who is one, and that it learns what others learn."""
from __future__ import annotations

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import INPUTS, MLP, block, conv, feed, parameters, resnet8, write_solver, zero_padded
from torchcaffe.graph import work
from torchcaffe.layers.vision import Convolution
from torchcaffe.step import dense
from torchcaffe.step.dense import Dense
from torchcaffe.step.program import Program
from torchcaffe.step.tiny import Tiny, suits

TAIL = """
layer { name: "fc" type: "InnerProduct" bottom: "%s" top: "fc" inner_product_param { num_output: 10 weight_filler { type: "msra" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" loss_weight: 0.7%s }"""
OTHERS = INPUTS % {"batch": 6, "size": 8} + conv("a", "data", 4).replace("bias_term: false", "bias_term: true") + """
layer { name: "odd" type: "Convolution" bottom: "a" top: "odd"
  convolution_param { num_output: 6 kernel_h: 3 kernel_w: 2 stride: 2 pad: 1 dilation: 2 group: 2 weight_filler { type: "msra" } } }
layer { name: "log" type: "BNLL" bottom: "odd" top: "log" loss_weight: 0.01 }
layer { name: "halves" type: "Slice" bottom: "log" top: "one" top: "two" }
layer { name: "product" type: "Eltwise" bottom: "one" bottom: "two" top: "product" eltwise_param { operation: PROD } }
layer { name: "max" type: "Pooling" bottom: "product" top: "max" pooling_param { kernel_size: 2 stride: 2 } }""" + TAIL % (
    "max", " loss_param { ignore_label: 3 normalization: FULL }")
FORKED = (INPUTS % {"batch": 6, "size": 8} + conv("a", "data", 4) + conv("b", "a", 8, stride=2) + """
layer { name: "accuracy" type: "Silence" bottom: "b" }""" + conv("c", "a", 4, stride=1) + TAIL % ("c", ""))
NETS = {"resnet8": resnet8(), "zero padded": zero_padded(), "mlp": MLP, "others": OTHERS, "a branch without a loss": FORKED,
        "large images": INPUTS % {"batch": 1, "size": 50} + conv("a", "data", 2) + block("g", "a", 2, 1) + TAIL % ("g", "")}


def solver_of(path, **settings):
    solver = caffe.get_solver(str(path))
    solver.fast = True
    for name, value in settings.items():
        setattr(solver, name, value)
    feed(solver.net, classes=3)
    return solver


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_autograd_s(tmp_path, name):
    path = write_solver(tmp_path, NETS[name])
    with caffe.number_type(torch.float64):
        solver = solver_of(path)
    programs = [kind(solver.net, solver.updater.at_rest) for kind in (Program, Tiny)]
    assert suits(solver.net)
    fed, losses = programs[0].sources(), []
    for program in programs:
        for layer in solver.net.layers:
            layer.cursor = 0                                # both drop the same
        losses.append(program.forward(dict(fed)))
    mine, theirs = (program.gradients(loss) for program, loss in zip(programs[::-1], losses[::-1], strict=True))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-13)
    assert [g is None for g in mine] == [g is None for g in theirs] and any(g is not None for g in mine)
    for a, b in zip(mine, theirs, strict=True):
        if a is not None:
            np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NETS)
def test_it_learns_what_it_learns_layer_by_layer(tmp_path, name):
    path = write_solver(tmp_path, NETS[name], base_lr=0.01)
    ends = []
    for fast in (True, False):
        solver = solver_of(path, fast=fast)
        solver.step(10)
        ends.append(parameters(solver.net))
    assert max(np.abs(ends[0][key] - ends[1][key]).max() for key in ends[0]) < 2e-4


def test_a_run_that_was_cut_and_resumed_ends_with_the_same_bytes(tmp_path):
    path = write_solver(tmp_path, resnet8(batch=16), momentum=0.9, weight_decay=1e-3, iter_size=2)
    whole, parts, first = (solver_of(path, exact=True) for _ in range(3))
    whole.step(9)
    for count in (1, 5, 3):
        parts.step(count)
    first.step(4)
    state = first.snapshot()
    again = solver_of(path, exact=True)
    again.restore(state)
    again.step(5)
    assert isinstance(again._program(again.net), Tiny)
    for other in (parts, again):
        a, b = parameters(whole.net), parameters(other.net)
        assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("shape", [(8, 3, 12, 12), (5, 3, 8, 8)])
def test_inputs_of_another_shape_are_computed_as_they_are(tmp_path, shape):
    path, ends = write_solver(tmp_path, resnet8(), base_lr=0.01), []
    for fast in (True, False):
        solver = solver_of(path, fast=fast)
        solver.step(1)
        solver.net.blobs["data"].reshape(*shape)
        solver.net.blobs["label"].reshape(shape[0])
        solver.net.reshape()
        feed(solver.net, classes=3)
        solver.step(3)
        ends.append(parameters(solver.net))
    assert max(np.abs(ends[0][key] - ends[1][key]).max() for key in ends[0]) < 2e-4


# -- threads ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "is_one"), [
    (resnet8(batch=32), True), (resnet8(batch=256), True), (resnet8(batch=257), False), (resnet8(batch=32, size=32), False), (MLP, True),
    (MLP.replace("num_output: 4", "num_output: 10000").replace("num_output: 3", "num_output: 200"), False)])
def test_shapes_alone_say_whether_a_net_is_tiny(tmp_path, text, is_one):
    path = tmp_path / "net.prototxt"
    path.write_text(text)
    assert work.is_tiny(caffe.Net(path, caffe.TRAIN).graph) == is_one


@pytest.mark.parametrize("fast", [False, True])
def test_a_tiny_net_has_one_thread_and_the_same_bytes_for_any_number(tmp_path, monkeypatch, fast):
    path, used, ends = write_solver(tmp_path, resnet8(batch=32)), set(), []
    forward = Convolution.forward if not fast else Dense.matrix
    owner, name = (Convolution, "forward") if not fast else (Dense, "matrix")
    monkeypatch.setattr(owner, name, lambda *args: (used.add(torch.get_num_threads()), forward(*args))[1])
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            caffe.set_threads(count)
            solver = solver_of(path, fast=fast, exact=True)
            solver.step(3)
            assert torch.get_num_threads() == count
            ends.append(parameters(solver.net))
            state = solver.snapshot()
        caffe.set_threads(1)
        solver.restore(state)                                # what two threads were given for one has computed
    finally:
        caffe.set_threads(before)
    assert used == {1} and all(np.array_equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_others_have_all_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "NUMBERS", 0)
    path, used = write_solver(tmp_path, resnet8()), set()
    solver = solver_of(path)
    update = solver.updater.apply
    monkeypatch.setattr(solver.updater, "apply", lambda gradients: (used.add(torch.get_num_threads()), update(gradients))[1])
    before = torch.get_num_threads()
    try:
        caffe.set_threads(2)
        solver.step(1)
    finally:
        caffe.set_threads(before)
    assert used == {2} and not isinstance(solver._program(solver.net), Tiny)


# -- convolutions as products ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("param", ["kernel_size: 3 pad: 1", "kernel_size: 3 pad: 1 stride: 2", "kernel_size: 1 stride: 2",
                                   "kernel_size: 3 dilation: 2",
                                   "kernel_h: 2 kernel_w: 3 pad_h: 2 pad_w: 1 stride_h: 1 stride_w: 2 group: 2", "kernel_size: 5"])
def test_a_product_with_every_weight_in_its_places_is_the_convolution(tmp_path, param):
    path = tmp_path / "net.prototxt"
    path.write_text(f"""force_backward: true
        layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ dim: 3 dim: 4 dim: 5 dim: 6 }} }} }}
        layer {{ name: "c" type: "Convolution" bottom: "data" top: "c"
          convolution_param {{ num_output: 6 {param} weight_filler {{ type: "msra" }} }} }}""")
    with caffe.number_type(torch.float64):
        net = caffe.Net(path, caffe.TRAIN)
    node, = (node for node in net.graph.nodes if node.layer.type == "Convolution")
    product, (weight, bias) = Dense(node), node.layer.params
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(node.bottoms[0].shape, generator=generator, dtype=torch.float64).requires_grad_()
    y = node.layer.convolve(x, weight, bias)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    rows, matrix = product.rows(x.detach()), product.matrix(weight.detach())
    torch.testing.assert_close(product.tops(torch.addmm(product.bias(bias.detach()), rows, matrix)), y.detach())
    torch.testing.assert_close(product.gradient(rows, product.rows(dy)), dweight)
    torch.testing.assert_close(product.bottoms(product.rows(dy) @ matrix.t()), dx)


def test_large_nets_are_computed_as_ever(tmp_path):
    """The nets of CIFAR-10 and MNIST have no layer that one of the small ways takes."""
    for size, batch in ((32, 128), (28, 64)):
        path = write_solver(tmp_path, resnet8(batch=batch, size=size, width=16))
        net = caffe.get_solver(str(path)).net
        norms = [node for node in net.graph.nodes if node.layer.type == "BatchNorm"]
        assert norms and not any(node.layer.is_little(node.bottoms[0].shape) for node in norms)
        assert not any(dense.is_dense(node) for node in net.graph.nodes) and not suits(net)
