"""The same numbers on a GPU as on the CPU: layers, nets, solvers, replayed iterations, snapshots; and the same bytes every time.

Float32 is compared with float64 over three iterations, since what two kernels round apart grows from iteration to iteration.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import check
import lmdbs
import torchcaffe as caffe
from nets import conv, feed, parameters, resnet8, write_solver
from one_layer import make, run
from test_golden import RUNNABLE
from test_layers_all import CASES, TOPS
from torchcaffe.layers import vision
from torchcaffe.layers.layout import channels_last
from torchcaffe.step.program import Program
from torchcaffe.streams import Streams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
TEACHER = """
layer { name: "t" type: "Convolution" bottom: "data" top: "t" param { lr_mult: 0 decay_mult: 0 }
  convolution_param { num_output: 6 kernel_size: 3 bias_term: false weight_filler { type: "constant" value: 0.1 } } }
layer { name: "t_bn" type: "BatchNorm" bottom: "t" top: "t" param { lr_mult: 0 decay_mult: 0 } param { lr_mult: 0 decay_mult: 0 }
  param { lr_mult: 0 decay_mult: 0 } batch_norm_param { use_global_stats: true eps: 1 } }
layer { name: "t_scale" type: "Scale" bottom: "t" top: "t" param { lr_mult: 0 decay_mult: 0 } param { lr_mult: 0 decay_mult: 0 }
  scale_param { bias_term: true } }
layer { name: "t_pool" type: "Pooling" bottom: "t" top: "t_pool" pooling_param { pool: AVE global_pooling: true } }
"""
STUDENT = conv("s", "data", 8) + """
layer { name: "s_pool" type: "Pooling" bottom: "s" top: "s_pool" pooling_param { pool: AVE global_pooling: true } }
layer { name: "drop" type: "Dropout" bottom: "s_pool" top: "drop" dropout_param { dropout_ratio: 0.3 } }
layer { name: "hint" type: "InnerProduct" bottom: "drop" top: "hint" inner_product_param { num_output: 6 weight_filler { type: "msra" } } }
layer { name: "match" type: "EuclideanLoss" bottom: "hint" bottom: "t_pool" top: "match" loss_weight: 0.1
  propagate_down: true propagate_down: false }
layer { name: "fc" type: "InnerProduct" bottom: "drop" top: "fc" inner_product_param { num_output: 10 weight_filler { type: "msra" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "data_label" top: "loss" }
"""


@pytest.fixture(autouse=True)
def on_gpu():
    caffe.set_mode_gpu()
    yield
    caffe.set_precision("fp32")
    caffe.set_mode_cpu()


class ChannelsLast(torch.autograd.Function):
    """A convolution whose top and gradients are channels-last, as cuDNN's are in float32; those in float64 are row by row."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, pad, dilation, group):
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, pad, dilation, group
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return channels_last(F.conv2d(x, weight, bias, *ctx.geometry))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        stride, pad, dilation, group = ctx.geometry
        found = torch.ops.aten.convolution_backward(dy, x, weight, ctx.bias_sizes, stride, pad, dilation, False, (0, 0), group,
                                                    ctx.needs_input_grad[:3])
        return (*(grad if grad is None else channels_last(grad) for grad in found), None, None, None, None)


@pytest.fixture(params=["float64's own layout", "channels-last"])
def layout(request, monkeypatch):
    """In float64, too, the kernels that training in float32 uses."""
    if request.param == "channels-last":
        monkeypatch.setitem(vision.CONVOLVE, 2, ChannelsLast.apply)


@pytest.fixture
def solver_file(tmp_path):
    """A student under a frozen teacher, on records that are cut and mirrored, with tests and displays."""
    records = np.random.default_rng(0).integers(0, 256, (50, 3, 12, 12), dtype=np.uint8)
    lmdbs.write_images(tmp_path / "lmdb", records, [i % 10 for i in range(50)])
    data = lmdbs.data_layer(tmp_path / "lmdb", 16, "crop_size: 10 mirror: true scale: 0.01")
    return write_solver(tmp_path, data + TEACHER + STUDENT, test_iter=3, test_interval=5, display=3)


def train(path, iterations=20, replay=True, kind=torch.float64, fast=True, fed=False):
    with caffe.number_type(kind):
        solver = caffe.get_solver(path)
    solver.fast, solver.exact, solver.replay = fast, True, replay
    if fed:
        feed(solver.net)
    solver.step(iterations)
    assert solver.is_recorded == (fast and replay)
    return solver


def difference(one, other):
    a, b = parameters(one.net), parameters(other.net)
    return max(np.abs(a[k] - b[k]).max() for k in a)


def relative(one, other):
    """The largest difference, for each parameter as a part of its largest number."""
    a, b = parameters(one.net), parameters(other.net)
    return max(np.abs(a[k] - b[k]).max() / np.abs(b[k]).max() for k in a if b[k].any())


def on_cpu(*arguments, **named):
    caffe.set_mode_cpu()
    try:
        return train(*arguments, replay=False, **named)
    finally:
        caffe.set_mode_gpu()


@pytest.mark.parametrize("kind", sorted(CASES))
def test_every_layer_computes_what_it_computes_on_the_cpu(kind):
    shapes, text = CASES[kind]
    rng, results = np.random.default_rng(0), []
    values = [rng.uniform(0.1, 0.9, shape) if i == 0 else np.floor(rng.uniform(0, 2, shape)) for i, shape in enumerate(shapes)]
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("cuda", torch.float32)):
        layer = make(kind, *shapes, text=text, tops=TOPS.get(kind, 1), device=device, dtype=dtype)
        bottoms = [torch.tensor(v, dtype=dtype, device=device, requires_grad=i == 0) for i, v in enumerate(values)]
        tops = run(layer, *bottoms)
        roots = [top for top in tops if top.requires_grad]
        leaves = [t for t in [*bottoms, *layer.params] if t.requires_grad]
        grads = torch.autograd.grad(roots, leaves, [torch.ones_like(r) for r in roots], allow_unused=True) if roots else []
        results.append([t.detach().cpu().double() for t in [*tops, *grads] if t is not None])
    for want, double, single in zip(*results, strict=True):
        torch.testing.assert_close(double, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(single, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", RUNNABLE)
def test_golden_vectors_agree_within_1e_4(case, golden, monkeypatch):
    monkeypatch.setattr(check, "caffe", caffe)
    monkeypatch.setattr(check, "least_tolerance", 1e-4)
    assert check.run_case(golden / case, case.split("/")[0]) in ("ok", "skipped")


@pytest.mark.parametrize(("fast", "replay"), [(False, False), (True, False), (True, True)])
def test_twenty_iterations_of_resnet8_agree_with_the_cpu_in_float64(tmp_path, layout, fast, replay):
    path = write_solver(tmp_path, resnet8())
    assert difference(on_cpu(path, fast=fast, fed=True), train(path, fast=fast, replay=replay, fed=True)) < 1e-9


def test_random_numbers_are_those_of_the_cpu():
    assert torch.equal(Streams(3).uniform("dropout", "it", 5, (1000,), "cuda").cpu(), Streams(3).uniform("dropout", "it", 5, (1000,)))


def test_replayed_iterations_are_those_the_host_leads_and_those_of_the_cpu(solver_file, layout):
    replayed = train(solver_file)
    assert not replayed.net.layers[0].needs_host
    assert difference(replayed, train(solver_file, replay=False)) < 1e-9
    assert difference(replayed, on_cpu(solver_file)) < 1e-9


@pytest.mark.parametrize("net", ["resnet8", "under a teacher"])
def test_three_iterations_in_float32_are_those_of_the_cpu_in_float64(tmp_path, solver_file, net):
    path = write_solver(tmp_path, resnet8(batch=16)) if net == "resnet8" else solver_file
    wanted = on_cpu(path, 3, fed=net == "resnet8")
    for fast, replay in ((False, False), (True, False), (True, True)):
        assert relative(train(path, 3, fast=fast, replay=replay, kind=torch.float32, fed=net == "resnet8"), wanted) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_same_bytes_every_time_and_whoever_leads(tmp_path, precision):
    caffe.set_precision(precision)
    path = write_solver(tmp_path, resnet8(batch=64, size=32, width=16), base_lr=0.1)
    first, again, led = (train(path, replay=replay, kind=torch.float32, fed=True) for replay in (True, True, False))
    assert difference(first, again) == 0
    assert difference(first, led) == 0


@pytest.mark.parametrize("half", [False, True])
def test_batch_normalisation_by_cudnn_gives_the_same_bytes_every_time(half):
    """Forward and backward, channels-last, in the sizes of a ResNet for CIFAR; cuDNN promises it of its convolutions alone."""
    torch.manual_seed(0)
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        x, dy = (channels_last(torch.randn(128, channels, size, size, device="cuda")) for _ in range(2))
        if half:
            x, dy = x.bfloat16(), dy.bfloat16()
        weight, bias = torch.randn(2, channels, device="cuda")
        results = []
        for _ in range(10):
            leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
            moments = torch.zeros(2, channels, device="cuda")
            y = torch.batch_norm(*leaves, *moments, True, 1.0, 1e-5, True)
            results.append([y.detach(), moments, *torch.autograd.grad(y, leaves, dy)])
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_frozen_convolutions_fused_by_cudnn_give_what_the_layers_give_and_the_same_bytes(tmp_path, capfd):
    (tmp_path / "net.prototxt").write_text(resnet8(batch=32, size=32, width=16))
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    draw = np.random.default_rng(0)
    for layer in net.layers:
        for blob in layer.blobs if layer.type in ("BatchNorm", "Scale") else []:
            blob.data[...] = draw.uniform(0.5, 2, blob.shape)
    feed(net)
    wanted = {name: array.copy() for name, array in net.forward(blobs=["first", "g0", "g1", "g2", "fc"]).items()}
    program, found = Program(net), []
    for _ in range(3):
        with torch.no_grad():
            program.forward()
        found.append({name: net.blobs[name].data.copy() for name in wanted})
    for name, array in wanted.items():
        np.testing.assert_allclose(found[0][name], array, rtol=1e-3, atol=1e-3 * np.abs(array).max())
        assert all(np.array_equal(found[0][name], other[name]) for other in found[1:])
    assert "is computed without what follows it" not in capfd.readouterr().err


def test_a_resumed_run_ends_with_the_same_bytes(solver_file):
    whole = train(solver_file, 11, kind=torch.float32)
    state = train(solver_file, 4, kind=torch.float32).snapshot()
    resumed = caffe.get_solver(solver_file)
    resumed.fast = resumed.exact = True
    resumed.restore(state)
    resumed.step(3)
    assert all(np.isfinite(blob.data).all() for blobs in resumed.net.params.values() for blob in blobs)     # looking changes nothing
    resumed.step(4)
    assert difference(whole, resumed) == 0


def test_what_is_written_to_a_parameter_s_array_reaches_a_recorded_pass(solver_file):
    solver = train(solver_file, 2, kind=torch.float32)
    weights = solver.net.params["fc"][0].data
    weights[...] = 0
    solver.step(1)
    assert 0 < np.abs(weights).max() < 0.1


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_same_bytes_with_a_memory_and_without(solver_file, tmp_path, replay, kind):
    ends = []
    for folder in (None, tmp_path / "memory", tmp_path / "memory"):
        with caffe.number_type(kind):
            solver = caffe.get_solver(solver_file)
        solver.fast, solver.replay, solver.remember = True, replay, folder
        solver.step(8)
        solver.step(4)
        ends.append(parameters(solver.net))
    for other in ends[1:]:
        assert all(ends[0][name].tobytes() == other[name].tobytes() for name in other)


def test_solvers_together_end_as_alone(solver_file, tmp_path):
    def make_one(seed):
        folder = tmp_path / f"{seed}"
        folder.mkdir(exist_ok=True)
        net = (Path(solver_file).parent / "net.prototxt").read_text()
        with caffe.number_type(torch.float64):
            solver = caffe.get_solver(write_solver(folder, net, random_seed=seed, test_iter=2, test_interval=4))
        solver.fast = True
        return solver
    alone, together = ([make_one(seed) for seed in (1, 2, 3)] for _ in range(2))
    group = caffe.Together(together)
    assert group.shared[0]
    group.step(10)
    assert group.replay is not None and group.replay.graph is not None
    for one, other in zip(alone, together, strict=True):
        one.step(10)
        assert difference(one, other) < 1e-9


@pytest.mark.parametrize(("precision", "bar"), [("tf32", 0.05), ("bf16", 0.2)])
def test_fewer_bits_stay_close(solver_file, precision, bar):
    full = train(solver_file, 5, kind=torch.float32)
    caffe.set_precision(precision)
    few = train(solver_file, 5, kind=torch.float32)
    a, b = parameters(full.net), parameters(few.net)
    assert 0 < max(np.abs(a[k] - b[k]).max() / (1 + np.abs(a[k]).max()) for k in a) < bar


def test_what_is_written_to_a_parameter_s_array_reaches_the_gpu(tmp_path):
    (tmp_path / "net.prototxt").write_text(resnet8())
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    weights = net.params["fc"][0].data
    weights[...] = 0
    net.params["fc"][1].data[...] = 7
    assert np.allclose(net.forward(blobs=["fc"])["fc"], 7) and net.params["fc"][0].data is weights
