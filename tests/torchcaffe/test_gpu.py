"""The same numbers on a GPU as on the CPU: layers, nets, solvers, replayed iterations, snapshots."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import check
import lmdbs
import torchcaffe as caffe
from nets import conv, feed, parameters, resnet8, write_solver
from one_layer import make, run
from test_golden import RUNNABLE
from test_layers_all import CASES, TOPS
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
    return solver


def difference(one, other):
    a, b = parameters(one.net), parameters(other.net)
    return max(np.abs(a[k] - b[k]).max() for k in a)


def on_cpu(*arguments, **named):
    caffe.set_mode_cpu()
    try:
        return train(*arguments, **named)
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
def test_twenty_iterations_of_resnet8_agree_with_the_cpu_in_float64(tmp_path, fast, replay):
    path = write_solver(tmp_path, resnet8())
    assert difference(on_cpu(path, fast=fast, replay=False, fed=True), train(path, fast=fast, replay=replay, fed=True)) < 1e-9


def test_random_numbers_are_those_of_the_cpu():
    assert torch.equal(Streams(3).uniform("dropout", "it", 5, (1000,), "cuda").cpu(), Streams(3).uniform("dropout", "it", 5, (1000,)))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_replayed_iterations_are_those_the_host_leads_and_those_of_the_cpu(solver_file, kind):
    bar = 1e-9 if kind == torch.float64 else 2e-4
    replayed = train(solver_file, kind=kind)
    graph = replayed._replayed(replayed.net)
    assert graph is not None and graph.graph is not None and not replayed.net.layers[0].needs_host
    assert difference(replayed, train(solver_file, replay=False, kind=kind)) < bar
    assert difference(replayed, on_cpu(solver_file, replay=False, kind=kind)) < bar


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
    assert group.shared[0] and group.replay is not None
    group.step(10)
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
