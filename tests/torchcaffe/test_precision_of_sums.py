"""Sums over a batch are those of float64, in both ways to run: statistics, tops, and the gradients of parameters and bottoms.

An error counts relative to the largest number of a result; where a sum's terms cancel, relative to the sum of their magnitudes.
Inputs are what adding up in float32 makes worst: half of them equal (after ReLU), or far from 0 beside how much they vary; gradients from
above are positive, so that nothing is hidden by errors that cancel.  Weights that are multiplied as matrices are summed by oneDNN and
MKL; they are held to the limit for gradients of both signs, as nets have them.
"""
from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

import torchcaffe as caffe
from one_layer import make, run
from torchcaffe.layers.layout import channels_last
from torchcaffe.step.compiled import Compiled
from torchcaffe.step.program import Program
from torchcaffe.train.updates import clip

LIMIT = 2e-6
INPUTS = {"relu": lambda x: np.maximum(x, 0), "mean 3": lambda x: x + 3, "mean 100": lambda x: x + 100}
LAYOUTS = {"channels last": channels_last, "row by row": lambda x: x}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])]


def numbers(kind: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(INPUTS[kind](np.random.default_rng(seed).standard_normal(shape)).astype(np.float32))


def gradient(*shape: int, seed: int = 9) -> Tensor:
    return numbers("relu", *shape, seed=seed) + 0.1


def error(found: Tensor, true: Tensor, scale: Tensor | None = None) -> float:
    scale = true if scale is None else scale
    return float((found.detach().double().cpu() - true.detach()).abs().max() / scale.detach().abs().max())


@pytest.mark.parametrize("shape", [(64, 16, 28, 28), (128, 16, 32, 32), (128, 64, 8, 8)])
def test_batch_normalisation_is_right_in_a_net(shape, tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(f"""force_backward: true
        layer {{ name: "x" type: "Input" top: "x" input_param {{ shape {{ {" ".join(f"dim: {d}" for d in shape)} }} }} }}
        layer {{ name: "bn" type: "BatchNorm" bottom: "x" top: "y" }}""")
    net = caffe.Net(path, caffe.TRAIN)
    x = numbers("relu", *shape)
    net.blobs["x"].data[...] = x.numpy()
    net.forward()
    x = x.double().numpy()
    mean, variance, count = x.mean((0, 2, 3)), x.var((0, 2, 3)), x.size // shape[1]
    y = (x - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
    assert np.abs(net.params["bn"][0].data / mean - 1).max() < LIMIT
    assert np.abs(net.params["bn"][1].data.astype(float) * (count - 1) / count / variance - 1).max() < LIMIT
    assert np.abs(net.blobs["y"].data - y).max() < LIMIT


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shape", [(128, 16, 32, 32), (96, 7, 9, 5), (4096, 10), (100, 3, 1111), (1, 2, 300, 301), (20, 5, 6, 7, 8),
                                   (32, 4, 8, 8), (60, 1, 32, 32), (32, 16, 2, 2), (4, 3, 2, 1)])
def test_batch_normalisation_and_scale(shape, kind, layout, device):
    layer = make("BatchNorm", shape, dtype=torch.float32, device=device)
    x, dy = (LAYOUTS[layout](t).to(device).requires_grad_() for t in (numbers(kind, *shape), gradient(*shape)))
    weight, bias = (numbers("relu", shape[1], seed=s).to(device).add_(0.5).requires_grad_() for s in (1, 2))
    y = layer.normalise(x, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], dy)
    assert layer.params[2] == 1
    wide, d, w, b = (t.detach().cpu().double() for t in (x, dy, weight, bias))
    axes, view, count = (0, *range(2, len(shape))), (-1, *[1] * (len(shape) - 2)), x.numel() // shape[1]
    mean, variance = wide.mean(axes), wide.var(axes, correction=0)
    deviation = (variance + 1e-5).sqrt()
    standard = (wide - mean.view(view)) / deviation.view(view)
    assert error(layer.params[0], mean) < LIMIT
    assert error(layer.params[1], variance * count / (count - 1)) < LIMIT
    assert error(y, standard * w.view(view) + b.view(view)) < LIMIT
    assert error(dbias, d.sum(axes)) < LIMIT
    assert error(dweight, (d * standard).sum(axes), (d * standard).abs().sum(axes)) < LIMIT
    centred = d - d.mean(axes).view(view) - standard * (d * standard).mean(axes).view(view)
    assert error(dx, centred * (w / deviation).view(view)) < LIMIT


CASES = [
    ("Scale", (64, 16, 32, 32), "scale_param { bias_term: true }"), ("Scale", (5000, 7), "scale_param { bias_term: true }"),
    ("Scale", (64, 16, 32, 32), "scale_param { axis: 0 }"), ("Scale", (64, 16, 32, 32), "scale_param { num_axes: 0 }"),
    ("Scale", (64, 16, 32, 32), "scale_param { axis: 2 bias_term: true }"),
    ("Bias", (64, 16, 32, 32), ""), ("Bias", (64, 16, 32, 32), "bias_param { axis: -1 }"), ("PReLU", (64, 16, 32, 32), ""),
    ("Convolution", (128, 4, 32, 32), "convolution_param { num_output: 8 kernel_size: 3 pad: 1 }"),
    ("Convolution", (100, 4, 32, 32), "convolution_param { num_output: 8 kernel_size: 3 stride: 2 group: 2 }"),
    ("Convolution", (16, 4, 64, 64), "convolution_param { num_output: 8 kernel_size: 1 }"),
    ("Convolution", (40, 2, 2000), "convolution_param { num_output: 4 kernel_size: 3 }"),
    ("Convolution", (40, 2, 10, 12, 14), "convolution_param { num_output: 4 kernel_size: 3 }"),
    ("Deconvolution", (128, 4, 16, 16), "convolution_param { num_output: 8 kernel_size: 4 stride: 2 pad: 1 }"),
    ("InnerProduct", (2000, 50), "inner_product_param { num_output: 20 }"),
    ("InnerProduct", (128, 50, 7), "inner_product_param { num_output: 20 axis: 2 }"),
    ("EuclideanLoss", (64, 16, 32, 32), ""), ("Reduction", (64, 16, 32, 32), ""),
    ("Reduction", (64, 16, 32, 32), "reduction_param { operation: SUMSQ }"),
    ("Reduction", (128, 32, 32), "reduction_param { axis: 1 operation: MEAN }"),
    ("SigmoidCrossEntropyLoss", (64, 16, 32, 32), ""), ("MVN", (64, 4, 64, 64), ""),
    ("Pooling", (16, 8, 64, 64), "pooling_param { pool: AVE global_pooling: true }"),
]
MATRICES = ("Convolution", "Deconvolution", "InnerProduct")
WITH_ANOTHER = ("EuclideanLoss", "SigmoidCrossEntropyLoss")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["relu", "mean 100"])
@pytest.mark.parametrize(("name", "shape", "text"), CASES)
def test_other_layers(name, shape, text, kind, layout, device):
    """Tops, and the gradients of parameters."""
    caffe.set_precision("fp32")                                     # a GPU's convolutions too
    shapes = [shape] * (2 if name in WITH_ANOTHER else 1)
    layer, wide = (make(name, *shapes, text=text, dtype=d, device=where) for d, where in ((torch.float32, device), (torch.float64, "cpu")))
    bottoms = [numbers(kind, *shape), *(numbers("relu", *shape, seed=1) for _ in shapes[1:])]
    if name == "PReLU":
        bottoms = [-bottoms[0]]                                     # a slope's gradient has a term for what is negative
    layer.params = [numbers("relu", max(p.numel(), 1), seed=3).reshape(p.shape).add_(0.1).to(device).requires_grad_() for p in wide.params]
    wide.params = [p.detach().cpu().double().requires_grad_() for p in layer.params]
    top, = run(layer, *(LAYOUTS[layout](x).to(device).requires_grad_() for x in bottoms))
    true, = run(wide, *(x.double().requires_grad_() for x in bottoms))
    scale = bottoms[0].double() if name == "MVN" else None          # which takes a mean in float32 from numbers of float32
    assert error(top, true, scale) < LIMIT
    for i, (mine, exact) in enumerate(zip(layer.params, wide.params, strict=True)):
        is_matrix = name in MATRICES and i == 0
        dy = numbers("mean 3", *true.shape, seed=9) - 3 if is_matrix else gradient(*true.shape)
        found, = torch.autograd.grad(top, mine, LAYOUTS[layout](dy).to(device), retain_graph=True)
        wanted, magnitudes = (torch.autograd.grad(true, exact, d.double(), retain_graph=True)[0] for d in (dy, dy.abs()))
        assert error(found, wanted, magnitudes) < LIMIT


def test_a_table_s_row_that_is_read_very_often():
    layer = make("Embed", (100_000,), text="embed_param { num_output: 3 input_dim: 2 }", dtype=torch.float32)
    index = torch.zeros(100_000)
    found = torch.autograd.grad(run(layer, index)[0], layer.params, torch.full((100_000, 3), 0.1))
    true = torch.full((100_000, 3), 0.1).double().sum(0)
    assert all(error(*pair) < LIMIT for pair in zip(found, (torch.stack([true, 0 * true]), true), strict=True))


def test_stored_statistics_with_a_scale_that_learns():
    shape = (128, 16, 32, 32)
    layer = make("BatchNorm", shape, text="batch_norm_param { use_global_stats: true }", dtype=torch.float32)
    x, dy = (channels_last(t) for t in (numbers("mean 100", *shape), gradient(*shape)))
    with torch.no_grad():
        for parameter, value in zip(layer.params, (100.1, 2.0, 1.0), strict=True):
            parameter.fill_(value)
    weight, bias = (numbers("relu", 16, seed=s).add_(0.5).requires_grad_() for s in (1, 2))
    y = layer.normalise(x, weight, bias)
    dweight, dbias = torch.autograd.grad(y, [weight, bias], dy)
    standard = (x.double() - layer.params[0].double().view(-1, 1, 1)) / np.sqrt(2 + 1e-5)
    assert error(y, standard * weight.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)) < LIMIT
    assert error(dweight, (dy.double() * standard).sum((0, 2, 3)), (dy.double() * standard).abs().sum((0, 2, 3))) < LIMIT
    assert error(dbias, dy.double().sum((0, 2, 3))) < LIMIT


def test_the_norm_that_gradients_are_clipped_to():
    many = torch.full((1_000_000,), 0.1)
    assert error(clip([many], 1.0)[0], torch.full((1_000_000,), 1e-3, dtype=torch.float64)) < LIMIT


NET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 128 dim: 4 dim: 32 dim: 32 } } }
layer { name: "target" type: "Input" top: "target" input_param { shape { dim: 128 dim: 8 dim: 32 dim: 32 } } }
layer { name: "same" type: "Convolution" bottom: "data" top: "same" param { lr_mult: 0 }
  convolution_param { num_output: 4 kernel_size: 1 group: 4 bias_term: false weight_filler { type: "constant" value: 1 } } }
layer { name: "bn" type: "BatchNorm" bottom: "same" top: "same" }
layer { name: "scale" type: "Scale" bottom: "same" top: "same" scale_param { bias_term: true bias_filler { value: 0.3 } } }
layer { name: "relu" type: "ReLU" bottom: "same" top: "same" }
layer { name: "conv" type: "Convolution" bottom: "same" top: "conv"
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 weight_filler { type: "uniform" min: 0.1 max: 0.5 } bias_filler { value: 1 } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "conv" bottom: "target" top: "loss" }
"""
COMPILED = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")]
WAYS = ["layer by layer", "step", pytest.param("compiled", marks=COMPILED)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", INPUTS)
def test_a_net_gives_float64_s_gradients_whichever_way_it_runs(kind, way, tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(NET)
    caffe.set_random_seed(1)
    net = caffe.Net(path, caffe.TRAIN)
    with caffe.number_type(torch.float64):
        wide = caffe.Net(path, caffe.TRAIN)
    for name, blobs in net.params.items():
        for mine, theirs in zip(blobs, wide.params[name], strict=True):
            theirs.data[...] = mine.data
    for one in (net, wide):
        one.blobs["data"].data[...] = numbers(kind, 128, 4, 32, 32).numpy()
    wide.forward()
    wide.backward()
    true = {name: [torch.from_numpy(blob.diff.astype(float)) for blob in blobs] for name, blobs in wide.params.items()}
    if way == "layer by layer":
        net.forward()
        net.backward()
        found = {name: [torch.from_numpy(blob.diff) for blob in blobs] for name, blobs in net.params.items()}
    else:
        at_rest = {i for i, item in enumerate(net.graph.learnable) if item.layer == "same"}
        program = (Compiled if way == "compiled" else Program)(net, at_rest)
        gradients = program.gradients(program.forward())
        found = {name: [None] * len(blobs) for name, blobs in net.params.items()}
        for item, value in zip(net.graph.learnable, gradients, strict=True):
            found[item.layer][item.index] = value
    learned = [("scale", 0), ("scale", 1), ("conv", 1)]
    worst = {(name, i): error(found[name][i], true[name][i]) for name, i in learned}
    assert max(worst.values()) < LIMIT, worst
    for i in range(2):
        assert error(torch.from_numpy(net.params["bn"][i].data), torch.from_numpy(wide.params["bn"][i].data.astype(float))) < LIMIT
