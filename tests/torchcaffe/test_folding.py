"""Frozen convolutions with folded BatchNorm and Scale give what the layers give one by one."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import torchcaffe as caffe
from nets import conv, feed, parameters, resnet8, write_solver, zero_padded
from torchcaffe.step import folding
from torchcaffe.step.folding import Folded, FoldedSum
from torchcaffe.step.program import Program

FROZEN = "param { lr_mult: 0 decay_mult: 0 }"


def randomise(net, seed=1):
    """Statistics, scales and biases as after training."""
    rng = np.random.default_rng(seed)
    for layer in net.layers:
        for i, blob in enumerate(layer.blobs):
            if layer.type in ("BatchNorm", "Scale") or i == 1:
                blob.data[...] = rng.uniform(0.5, 2, blob.shape)


def folded(program):
    return [op for op in program.operations if isinstance(op.run, Folded)]


def with_biases(text):
    return text.replace("bias_term: false", "bias_term: true")


def frozen_below(text):
    """The first convolution of the net frozen in writing, with stored statistics."""
    head, tail = text.split('layer { name: "g0_a"', 1)
    head = head.replace('convolution_param', FROZEN + " convolution_param")
    head = head.replace('type: "BatchNorm"', f'type: "BatchNorm" {FROZEN} {FROZEN} {FROZEN} batch_norm_param {{ use_global_stats: true }}')
    head = head.replace('type: "Scale"', f'type: "Scale" {FROZEN} {FROZEN}')
    return head + 'layer { name: "g0_a"' + tail


@pytest.mark.parametrize("change", [lambda t: t, with_biases])
def test_a_test_net_folds_every_convolution_and_gives_the_same_scores(tmp_path, change):
    path = tmp_path / "net.prototxt"
    path.write_text(change(resnet8()))
    with caffe.number_type(torch.float64):
        net = caffe.Net(str(path), caffe.TEST)
    randomise(net)
    feed(net)
    program = Program(net)
    assert len(folded(program)) == sum(layer.type == "Convolution" for layer in net.layers)
    with torch.no_grad():
        program.forward()
    scores = program.tops["fc"].numpy().copy()
    assert np.allclose(scores, net.forward(blobs=["fc"])["fc"], rtol=1e-10, atol=1e-10)


def train(path, fast, iterations):
    with caffe.number_type(torch.float64):
        solver = caffe.get_solver(path)
    solver.fast = fast
    randomise(solver.net)
    feed(solver.net)
    solver.step(iterations)
    return solver


def test_frozen_layers_below_a_student_fold_and_stay_as_they_are(tmp_path):
    path = write_solver(tmp_path, frozen_below(resnet8()), base_lr=0.01)
    slow, fast = train(path, False, 5), train(path, True, 5)
    assert [op.nodes[0].layer.name for op in folded(fast._programs[id(fast.net)])] == ["first"]
    a, b = parameters(slow.net), parameters(fast.net)
    assert max(np.abs(a[k] - b[k]).max() for k in a) < 1e-10


def test_weights_changed_between_two_steps_are_folded_again(tmp_path):
    path = write_solver(tmp_path, frozen_below(resnet8()), base_lr=0.01)
    ends = []
    for fast in (False, True):
        solver = train(path, fast, 2)
        solver.net.params["first"][0].data[...] *= 1.5
        solver.step(2)
        ends.append(parameters(solver.net))
    assert max(np.abs(ends[0][k] - ends[1][k]).max() for k in ends[0]) < 1e-10


def test_a_folded_convolution_s_top_takes_a_shortcut_of_fewer_channels(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(zero_padded())
    with caffe.number_type(torch.float64):
        net = caffe.Net(str(path), caffe.TEST)
    randomise(net)
    feed(net)
    expected = {name: array.copy() for name, array in net.forward(blobs=["fc", "loss"]).items()}
    program = Program(net)
    assert [op.overwrites for op in program.operations if op.overwrites] == [{"b"}]
    with torch.no_grad():
        program.forward()
    assert all(np.allclose(net.blobs[name].data, expected[name], rtol=1e-10, atol=1e-10) for name in expected)


def test_blobs_that_a_test_has_let_go_of_show_what_they_held(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(resnet8())
    with caffe.number_type(torch.float64):
        layers, net = (caffe.Net(str(path), caffe.TEST) for _ in range(2))
    randomise(layers)
    net.share_with(layers)
    for each in (layers, net):
        feed(each)
    names = ["first", "g0", "g1_b", "g1", "g2_b", "pool", "fc"]
    expected = layers.forward(blobs=names)
    held = net.blobs["g2_b"].data                                      # an array that somebody has
    program = Program(net)
    assert [op.overwrites for op in program.operations if op.overwrites] == [{"g0_b"}, {"g1_b"}, {"g2_b"}]
    with torch.no_grad():
        program.forward()
    assert all(name in program.tops for name in names) and not {"first", "g0", "g1_b", "g1", "pool"} & {*program.tops.keys()}
    net.params["g1_b"][0].data[...] = 0                                # the pass is over
    for name in names:
        assert np.allclose(net.blobs[name].data, expected[name], rtol=1e-10, atol=1e-10), name
    assert np.allclose(held, expected["g2_b"])
    with torch.no_grad():
        program.forward()
    assert {"g0", "g1"} <= {*program.tops.keys()}                      # somebody has arrays of these, too
    program.tops.clear()
    assert "g0_b" not in program.tops


def single(path):
    """A TEST net in float32, whose frozen blocks end in one kernel, after training."""
    net = caffe.Net(str(path), caffe.TEST)
    randomise(net)
    feed(net)
    return net


def sums(program):
    return [op.nodes[0].layer.name for op in program.operations if isinstance(op.run, FoldedSum)]


def test_blocks_that_end_in_one_kernel_give_the_same_bits(tmp_path, monkeypatch):
    path = tmp_path / "net.prototxt"
    path.write_text(resnet8(batch=16))
    net = single(path)
    program, tops = Program(net), []
    assert sums(program) == ["g0_b", "g1_b", "g2_b"]                    # onto the block's bottom, and twice onto the projection
    for batch in (folding.FULL_BATCH, 10**6):
        monkeypatch.setattr(folding, "FULL_BATCH", batch)
        with torch.no_grad():
            program.forward()
        tops.append([program.tops[name].numpy().copy() for name in ("g2", "fc")])
    assert all(np.array_equal(a, b) for a, b in zip(*tops, strict=True))
    assert np.allclose(net.forward(blobs=["g2"])["g2"], tops[0][0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def by_cudnn(monkeypatch):
    """by_cudnn(program, refuses) lets frozen convolutions call cuDNN's fused ones, which compute what they should, or refuse."""
    called = []

    def use(program, refuses=False):
        def fused(x, weight, other, alpha, bias, stride, padding, dilation, groups):
            called.append(x.shape)
            if refuses:
                raise RuntimeError("no engine for this\nand more")
            return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * other)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", fused)
        monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda x, weight, *rest: fused(x, weight, torch.zeros(()), 1, *rest))
        for op in program.operations:
            for run in (op.run, getattr(op.run, "folded", None)):
                if isinstance(run, Folded):
                    run.on_gpu = True
        return called
    return use


@pytest.mark.parametrize("refuses", [False, True])
def test_cudnn_s_fused_convolutions_are_given_what_they_take_and_may_refuse(tmp_path, by_cudnn, refuses, capfd):
    path = tmp_path / "net.prototxt"
    path.write_text(resnet8(batch=4, size=32))              # no images so small that cuDNN is not asked
    net = single(path)
    expected = {name: array.copy() for name, array in net.forward(blobs=["g0", "g1", "g2", "fc"]).items()}
    program = Program(net)
    called = by_cudnn(program, refuses)
    for _ in range(2):
        with torch.no_grad():
            program.forward()
    assert all(np.allclose(net.blobs[name].data, expected[name], rtol=1e-4, atol=1e-4) for name in expected)
    assert len(called) == (7 if refuses else 14)                        # first, three times a and b; a second time unless it was in vain
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == (7 if refuses else 0) and all(line.endswith("without what follows it: no engine for this") for line in lines)


def test_blobs_inside_such_blocks_show_what_they_held(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(resnet8(batch=16))
    net = single(path)
    names = ["first", "g0_a", "g0_b", "g0", "g1_p", "g1_b", "g1", "g2_b", "g2"]
    expected = net.forward(blobs=names)
    expected = {name: expected[name].copy() for name in names}
    looked = caffe.Net(str(path), caffe.TEST)
    looked.share_with(net)
    feed(looked)
    held = looked.blobs["first"].data                                   # an array that somebody has
    program = Program(looked)
    for _ in range(2):
        with torch.no_grad():
            program.forward()
        assert np.allclose(held, expected["first"], rtol=1e-4, atol=1e-4)
    for name in [*names, *reversed(names)]:
        assert np.allclose(looked.blobs[name].data, expected[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize(("more", "kept"), [
    ('layer { name: "tap" type: "Reduction" bottom: "first" top: "tap" }', ["g1_b", "g2_b"]),                # read by somebody else
    (conv("side", "g0_a", 4), ["g1_b", "g2_b"]),                                                              # a branch inside the block
    ('layer { name: "out" type: "Split" bottom: "first" top: "out" }', ["g1_b", "g2_b"]),                    # an output of the net
    ('layer { name: "again" type: "Softmax" bottom: "g1_p" top: "again" }', ["g0_b", "g2_b"])])
def test_a_shortcut_that_others_read_is_not_overwritten(tmp_path, more, kept):
    path = tmp_path / "net.prototxt"
    path.write_text(resnet8(batch=16) + more)
    assert sums(Program(single(path))) == kept
