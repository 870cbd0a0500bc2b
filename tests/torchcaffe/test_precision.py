"""Training with products of fewer bits: what stays float32, what is close, and what is refused."""
from __future__ import annotations

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import feed, parameters, resnet8, write_solver
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
