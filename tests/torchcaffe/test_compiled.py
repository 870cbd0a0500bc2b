"""Compiled iterations are those of the same net uncompiled, but for rounding."""
import shutil

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import MLP, feed, parameters, resnet8, write_solver
from torchcaffe import cli
from torchcaffe.errors import CaffeError
from torchcaffe.step.compiled import Compiled

DUMMY = """
layer { name: "data" type: "DummyData" top: "data" top: "target" dummy_data_param { shape { dim: 4 dim: 3 } shape { dim: 4 dim: 2 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "ip" bottom: "target" top: "loss" }
"""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def train(path, compiled, iterations, classes=10):
    with caffe.number_type(torch.float64):
        solver = caffe.get_solver(path)
    solver.fast, solver.compile = True, compiled
    feed(solver.net, classes=classes)
    solver.step(iterations)
    return solver


@needs_compiler
@pytest.mark.slow
def test_iterations_with_several_passes_end_with_the_same_parameters(tmp_path):
    path = write_solver(tmp_path, resnet8(), iter_size=2, base_lr=0.1)
    plain, compiled = (train(path, c, 5) for c in (False, True))
    assert isinstance(compiled._program(compiled.net), Compiled)
    a, b = parameters(plain.net), parameters(compiled.net)
    assert max(np.abs(a[k] - b[k]).max() for k in a) < 1e-10
    assert np.allclose(plain.net.blobs["loss"].data, compiled.net.blobs["loss"].data, rtol=1e-10)
    with pytest.raises(CaffeError, match="not blob 'g1'; train without compiling"):
        _ = compiled.net.blobs["g1"].data
    assert float(compiled._forward(compiled.net)) == pytest.approx(float(plain._forward(plain.net)), rel=1e-10)          # without gradients
    assert np.allclose(plain.net.blobs["g1"].data, compiled.net.blobs["g1"].data)
    compiled.net.blobs["label"].data[0] = 10
    with pytest.raises(CaffeError, match="label 10 is not one of the classes"):
        compiled.step(1)


def test_a_net_that_draws_is_not_compiled_and_a_line_says_so(tmp_path, capsys):
    train(write_solver(tmp_path, MLP), True, 1, classes=3)
    assert "is not compiled: layer 'drop' (Dropout) draws numbers in every pass" in capsys.readouterr().err


def test_without_a_compiler_the_command_says_what_to_do_and_ends_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    path = write_solver(tmp_path, DUMMY, snapshot_prefix=str(tmp_path / "s"), max_iter=1)
    assert cli.main(["train", "--solver", str(path), "--compile"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("torchcaffe: compiling needs a C++ compiler, and there is no program no-such-compiler; install one")
