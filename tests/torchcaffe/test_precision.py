"""Training with products of fewer bits: what stays float32, what is close, and what is refused."""
from __future__ import annotations

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import INPUTS, feed, parameters, resnet8, write_solver
from torchcaffe.errors import CaffeError, SidecarError


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    caffe.set_precision("fp32")


def train(path, precision, iterations=10):
    caffe.set_precision(precision)
    solver = caffe.get_solver(path)
    solver.fast = solver.exact = True
    feed(solver.net)
    solver.step(iterations)
    return solver


def test_bf16_trains_close_to_fp32_with_float32_parameters(tmp_path):
    path = write_solver(tmp_path, resnet8())
    full, half = train(path, "fp32"), train(path, "bf16")
    a, b = parameters(full.net), parameters(half.net)
    change = max(np.abs(a[k] - b[k]).max() / (1 + np.abs(a[k]).max()) for k in a)
    assert 1e-6 < change < 0.05 and all(array.dtype == np.float32 for array in b.values())
    assert abs(full.net.blobs["loss"].data - half.net.blobs["loss"].data) < 0.05
    tops = half._program(half.net).tops
    assert tops["loss"].dtype == torch.float32 and tops["fc"].dtype == torch.bfloat16
    assert half.net.blobs["fc"].data.dtype == np.float32
    assert all(h.dtype == torch.float32 for h in half.histories[0])


def test_a_frozen_top_that_was_let_go_of_is_seen_in_bf16_and_shared_in_it(tmp_path):
    """A teacher's tops are released and computed again for whoever looks; and computed once for several students."""
    caffe.set_precision("bf16")
    net = INPUTS % {"batch": 4, "size": 8} + frozen("t1", "data") + frozen("t2", "t1") + student("t2")
    solvers = []
    for seed in (1, 1):
        folder = tmp_path / f"{len(solvers)}"
        folder.mkdir()
        solver = caffe.get_solver(write_solver(folder, net, random_seed=seed))
        solver.fast = True
        feed(solver.net)
        solvers.append(solver)
    alone, other = solvers
    alone.step(2)
    assert "t1" not in dict.keys(alone._program(alone.net).tops)
    looked = alone.net.blobs["t1"].data
    assert looked.dtype == np.float32 and np.isfinite(looked).all() and np.abs(looked).max() > 0
    group = caffe.Together([other])
    group.step(2)
    assert group.shared[0] and group.programs[0].tops["t2"].dtype == torch.bfloat16
    a, b = parameters(alone.net), parameters(other.net)
    assert all(np.array_equal(a[k], b[k]) for k in a)


def frozen(name, bottom):
    """Convolution, BatchNorm, Scale and ReLU that nothing changes."""
    fixed = "param { lr_mult: 0 decay_mult: 0 } "
    return f"""
    layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" {fixed}
      convolution_param {{ num_output: 4 kernel_size: 3 pad: 1 bias_term: false weight_filler {{ type: "msra" }} }} }}
    layer {{ name: "{name}_bn" type: "BatchNorm" bottom: "{name}" top: "{name}" {fixed * 3}
      batch_norm_param {{ use_global_stats: true eps: 1 }} }}
    layer {{ name: "{name}_scale" type: "Scale" bottom: "{name}" top: "{name}" {fixed * 2} scale_param {{ bias_term: true }} }}
    layer {{ name: "{name}_relu" type: "ReLU" bottom: "{name}" top: "{name}" }}"""


def student(bottom):
    return f"""
    layer {{ name: "fc" type: "InnerProduct" bottom: "{bottom}" top: "fc"
      inner_product_param {{ num_output: 10 weight_filler {{ type: "msra" }} }} }}
    layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }}"""


def test_a_run_is_not_continued_exactly_in_another_precision(tmp_path):
    path = write_solver(tmp_path, resnet8())
    state = train(path, "bf16", 2).snapshot()
    caffe.set_precision("fp32")
    solver = caffe.get_solver(path)
    solver.fast = solver.exact = True
    with pytest.raises(SidecarError, match="made with precision bf16, now it is fp32"):
        solver.restore(state)


def test_precisions_that_are_refused(tmp_path):
    with pytest.raises(CaffeError, match="precision 'fp8' is none of fp32, tf32, bf16"):
        caffe.set_precision("fp8")
    caffe.set_precision("tf32")
    with pytest.raises(CaffeError, match="precision tf32 is a GPU's"):
        caffe.get_solver(write_solver(tmp_path, resnet8()))
