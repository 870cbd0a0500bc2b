"""Passes from device memory alone give the numbers of passes that the host leads; on a CPU the same functions run, unrecorded."""
from __future__ import annotations

from contextlib import contextmanager, nullcontext

import h5py
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lmdbs
import torchcaffe as caffe
from nets import MLP, feed, parameters, resnet8, write_solver
from torchcaffe.layers.data import Data

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
HEAD = """
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" dropout_param { dropout_ratio: 0.4 } }
layer { name: "fc" type: "InnerProduct" bottom: "conv" top: "fc"
  inner_product_param { num_output: 12 weight_filler { type: "msra" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "data_label" top: "loss" }
"""


def train(path, replay, steps=(7,), kind=torch.float64, restore=None, fed=False):
    with caffe.number_type(kind):
        solver = caffe.get_solver(path)
    solver.fast = solver.exact = True
    solver.replay = replay
    if fed:
        feed(solver.net, classes=3)
    if restore:
        solver.restore(restore)
    for count in steps:
        solver.step(count)
    return solver


def differences(one, other):
    a, b = parameters(one.net), parameters(other.net)
    return max(np.abs(a[k] - b[k]).max() for k in a)


@pytest.fixture
def images(tmp_path):
    """A solver of a net that reads 20 images in batches of 6, cuts, mirrors and drops out; its test net reads them too."""
    records = np.random.default_rng(0).integers(0, 256, (20, 3, 12, 12), dtype=np.uint8)
    lmdbs.write_images(tmp_path / "lmdb", records, [i % 12 for i in range(20)])
    net = lmdbs.data_layer(tmp_path / "lmdb", 6, "crop_size: 9 mirror: true scale: 0.01 mean_value: 100") + HEAD
    return write_solver(tmp_path, net, test_iter=3, test_interval=4, base_lr=0.1)


@pytest.mark.parametrize("changes", [
    {"iter_size": 2, "base_lr": 0.1}, {"type": "Adam", "base_lr": 0.001}, {"clip_gradients": 0.1, "weight_decay": 0.1},
    {"type": "Nesterov", "lr_policy": "inv", "gamma": 0.1, "power": 0.7}, {"type": "AdaDelta", "momentum": 0.95, "delta": 1e-6}])
def test_replayed_iterations_are_those_the_host_leads(tmp_path, images, changes, capfd):
    path = write_solver(tmp_path, (tmp_path / "net.prototxt").read_text(), test_iter=3, test_interval=4, display=3, **changes)
    solvers = [train(path, replay) for replay in (False, True)]
    assert differences(*solvers) < 1e-12
    assert [layer.cursor for layer in solvers[0].net.layers] == [layer.cursor for layer in solvers[1].net.layers]
    assert isinstance(solvers[1].net.layers[0], Data) and not solvers[1].net.layers[0].needs_host
    lines = [line.split("] ", 1)[1] for line in capfd.readouterr().err.splitlines() if "net output" in line or ", lr =" in line]
    assert len(lines) > 3 and lines[:len(lines) // 2] == lines[len(lines) // 2:]


def test_float32_batches_from_the_device_are_those_from_the_host(images):
    solvers = [train(images, replay, (1,), torch.float32) for replay in (False, True)]
    for _ in range(5):
        a, b = (solver.net.blobs["data"].data.copy() for solver in solvers)
        assert np.array_equal(a, b) and a.std() > 0.1
        for solver in solvers:
            solver.step(1)


def test_how_steps_are_cut_up_and_resuming_make_no_difference(images):
    whole = train(images, True, (11,), torch.float32)
    parts = train(images, True, (3, 4), torch.float32)
    resumed = train(images, True, (4,), torch.float32, restore=parts.snapshot())
    assert differences(whole, resumed) == 0


def test_input_blobs_that_are_written_between_steps_reach_the_device(tmp_path):
    path = write_solver(tmp_path, MLP)
    solvers = [train(path, replay, (2,), fed=True) for replay in (False, True)]
    for solver in solvers:
        feed(solver.net, seed=5, classes=3)
        solver.step(2)
    assert differences(*solvers) < 1e-12


def test_records_that_the_host_reads_are_fed(tmp_path):
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["data"] = np.random.default_rng(0).normal(size=(10, 2, 5, 5))
        file["data_label"] = np.arange(10) % 12
    (tmp_path / "list").write_text(f"{tmp_path}/rows.h5")
    net = f"""layer {{ name: "data" type: "HDF5Data" top: "data" top: "data_label"
        hdf5_data_param {{ batch_size: 4 shuffle: true source: "{tmp_path}/list" }} }}"""
    path = write_solver(tmp_path, net + HEAD, iter_size=2)
    assert differences(*(train(path, replay) for replay in (False, True))) < 1e-12


def test_a_blob_looked_at_shows_the_last_replay(images):
    solver = train(images, True, (2,))
    array = solver.net.blobs["fc"].data
    before = array.copy()
    solver.step(1)
    assert np.abs(array - before).max() > 1e-6 and solver.net.blobs["loss"].data.item() > 0


def test_callbacks_are_called_between_gradients_and_update(images):
    solver, calls = train(images, True, (2,)), []
    solver.add_callback(lambda: calls.append("start"), lambda: calls.append("gradients"))
    solver.step(2)
    assert calls == ["start", "gradients"] * 2


def test_a_layer_that_needs_the_host_is_named(tmp_path, capfd):
    net = lmdbs.data_layer(lmdbs.write_images(tmp_path / "lmdb", lmdbs.numbered(5)), 3, name="data") + """
        layer { name: "ip" type: "InnerProduct" bottom: "data" top: "scores" inner_product_param { num_output: 1 } }
        layer { name: "some" type: "Filter" bottom: "scores" bottom: "data_label" top: "ip" }
        layer { name: "loss" type: "Reduction" bottom: "ip" top: "loss" loss_weight: 1 }"""
    train(write_solver(tmp_path, net), True, (2,))
    assert "is not replayed: layer 'some' (Filter) needs the host in every pass" in capfd.readouterr().err


class Watch(TorchDispatchMode):
    """Notes operations that would let the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        boolean = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or boolean:
            self.waited.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", ["images", "resnet8"])
def test_nothing_in_a_recorded_pass_waits_for_the_device(tmp_path, images, which, monkeypatch):
    path = images if which == "images" else write_solver(tmp_path, resnet8(), iter_size=2, clip_gradients=1)
    solver = train(path, True, (1,), fed=which == "resnet8")
    replay = solver._replayed(solver.net)
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda labels: (0, 0))      # labels are looked at on CPUs only
    with Watch() as watch:
        replay._run()
    assert watch.waited == []


@contextmanager
def refused(graph):
    yield
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize("record", [nullcontext, refused])
def test_recording_leaves_no_trace(tmp_path, images, monkeypatch, record, capfd):
    """With a graph that runs its passes again: warming up and recording change nothing, and every replay is one iteration."""
    class Graph:
        def replay(self):
            replay._run()

    class Stream:
        def wait_stream(self, other):
            pass

    stubs = {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "stream": nullcontext, "graph": record,
             "device": nullcontext}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    path = write_solver(tmp_path, (tmp_path / "net.prototxt").read_text(), iter_size=2, base_lr=0.1)
    plain, recorded = train(path, True, (0,)), train(path, True, (0,))
    replay = recorded._replayed(recorded.net)
    replay.can_record = True
    for solver in (plain, recorded):
        solver.step(4)
    assert (replay.graph is not None) == (record is nullcontext) and differences(plain, recorded) == 0
    assert ("is not replayed: operation not permitted when stream is capturing\n" in capfd.readouterr().err) == (record is refused)
    assert [layer.cursor for layer in plain.net.layers] == [layer.cursor for layer in recorded.net.layers]
