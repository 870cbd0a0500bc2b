"""The same numbers on a GPU as on the CPU."""
import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import feed, parameters, resnet8, write_solver

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.fixture
def on_gpu():
    caffe.set_mode_gpu()
    yield
    caffe.set_mode_cpu()


def train(path, fast, kind=torch.float64, iterations=20):
    with caffe.number_type(kind):
        solver = caffe.get_solver(path)
    solver.fast = fast
    feed(solver.net)
    solver.step(iterations)
    return solver


@pytest.mark.parametrize("fast", [False, True])
def test_twenty_iterations_of_resnet8_agree_with_the_cpu_in_float64(tmp_path, fast):
    path = write_solver(tmp_path, resnet8())
    here = parameters(train(path, fast).net)
    caffe.set_mode_gpu()
    try:
        there = parameters(train(path, fast).net)
    finally:
        caffe.set_mode_cpu()
    assert max(np.abs(here[k] - there[k]).max() for k in here) < 1e-9


def test_what_is_written_to_a_parameter_s_array_reaches_the_gpu(tmp_path, on_gpu):
    net = caffe.Net(write_net(tmp_path), caffe.TEST)
    weights = net.params["fc"][0].data
    weights[...] = 0
    net.params["fc"][1].data[...] = 7
    assert np.allclose(net.forward(blobs=["fc"])["fc"], 7) and net.params["fc"][0].data is weights


def test_a_snapshot_made_on_the_gpu_continues_with_the_same_bytes(tmp_path, on_gpu):
    path = write_solver(tmp_path, resnet8())
    whole = train(path, True, torch.float32, 6)
    first = caffe.get_solver(path)
    first.fast = first.exact = True
    feed(first.net)
    first.step(3)
    second = caffe.get_solver(path)
    second.fast = second.exact = True
    feed(second.net)
    second.restore(first.snapshot())
    second.step(3)
    a, b = parameters(whole.net), parameters(second.net)
    assert max(np.abs(a[k] - b[k]).max() for k in a) < 1e-5


def write_net(folder):
    path = folder / "net.prototxt"
    path.write_text(resnet8())
    return str(path)
