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
from torchcaffe.graph.blob import Slot
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


@contextmanager
def recorded(graph, pool):
    yield


@contextmanager
def refused(graph, pool):
    yield
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


class Graph:
    """Stands for a recording of a Replay: computes again and writes where the recorded pass wrote, which nobody on the host notices."""

    def __init__(self, of):
        self.of, self.tops = of, None

    @torch.no_grad()
    def replay(self):
        tops = self.of.programs[0].tops
        before, self.tops = dict(tops), self.tops or dict(tops)
        with torch.enable_grad():
            result = self.of._run()
        self.of.result.copy_(result)
        for name, tensor in self.tops.items():
            tensor.copy_(tops[name])
        tops.clear()
        tops.update(before)


class Stream:
    device_index = 0

    def wait_stream(self, other):
        pass


@pytest.fixture
def record(monkeypatch):
    """record(solver, context) lets a solver record its iterations on a CPU, inside the context."""
    def use(solver, context=recorded):
        replay = solver._replayed(solver.net)
        replay.can_record = True
        stubs = {"CUDAGraph": lambda: Graph(replay), "Stream": Stream, "current_stream": Stream, "stream": nullcontext, "graph": context,
                 "device": nullcontext, "graph_pool_handle": lambda: (0, 1), "set_stream": lambda stream: None}
        for name, stub in stubs.items():
            monkeypatch.setattr(torch.cuda, name, stub)
        return solver
    return use


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


class Kept(caffe.Layer):
    """Says that it reads 20 records, 6 at a time, and of each epoch the last 2."""

    def setup(self, bottom, top):
        pass

    def records(self):
        return {"source": self.param_str, "batch": 6, "shuffle": True, "last": "kept", "border": 0, "pad": 0, "padding": "zeros", "crop": 9,
                "mirror": True, "mean": [], "std": [100.0], "views": 1}


@pytest.mark.parametrize("iter_size", [1, 2])
def test_whole_batches_and_short_ones_have_a_recording_each(tmp_path, images, record, iter_size):
    net = f"""layer {{ name: "data" type: "Python" top: "data" top: "data_label"
        python_param {{ module: "test_capture" layer: "Kept" param_str: "{tmp_path}/lmdb" }} }}"""
    path = write_solver(tmp_path, net + HEAD, base_lr=0.1, iter_size=iter_size)
    led, recording = train(path, False, (9,)), record(train(path, True, (0,)))
    recording.step(9)                                       # of epochs of 6, 6, 6 and 2 images
    assert differences(led, recording) < 1e-12
    replay = recording._replayed(recording.net)
    assert len(replay.recordings) == 2 and all(each.graph for each in replay.recordings.values())
    assert [layer.cursor for layer in recording.net.layers] == [layer.cursor for layer in led.net.layers]


def test_a_blob_looked_at_shows_the_last_replay(images):
    solver = train(images, True, (2,))
    array = solver.net.blobs["fc"].data
    before = array.copy()
    solver.step(1)
    assert np.abs(array - before).max() > 1e-6 and solver.net.blobs["loss"].data.item() > 0


def test_arrays_that_somebody_has_are_brought_up_to_date_once_a_step(images, monkeypatch):
    solver, copies = train(images, True, (2,)), []
    array, tested = (net.blobs["fc"].data for net in (solver.net, solver.test_nets[0]))
    before, seen = array.copy(), tested.copy()
    flush = Slot.flush
    monkeypatch.setattr(Slot, "flush", lambda slot: (copies.append(slot.stale or slot._deferred is not None), flush(slot))
                        if slot is solver.net.blobs["fc"].data_slot else flush(slot))
    solver.step(3)                                              # with a test, at iteration 4
    assert sum(copies) <= 2 and np.abs(array - before).max() > 1e-6 and np.abs(tested - seen).max() > 1e-6
    fresh = train(images, False, (5,))
    assert np.allclose(array, fresh.net.blobs["fc"].data, rtol=1e-10, atol=1e-12)


def test_a_recorded_iteration_finds_its_rates_where_they_were(images):
    solver = train(images, True, (1,))
    rates = [group.rate for group in solver.updater.groups]
    solver.apply_update()
    solver.step(1)
    solver.replay = False
    solver.step(1)
    solver.replay = True
    solver.step(1)
    assert rates and all(isinstance(rate, torch.Tensor) for rate in rates)
    assert all(group.rate is rate for group, rate in zip(solver.updater.groups, rates, strict=True))


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


@pytest.mark.parametrize("context", [recorded, refused])
def test_recording_leaves_no_trace(tmp_path, images, record, context, capfd):
    """Warming up and recording change nothing, and every replay is one iteration."""
    path = write_solver(tmp_path, (tmp_path / "net.prototxt").read_text(), iter_size=2, base_lr=0.1)
    plain, other = train(path, True, (0,)), record(train(path, True, (0,)), context)
    for solver in (plain, other):
        solver.step(4)
    assert other.is_recorded == (context is recorded) and differences(plain, other) == 0
    assert ("is not replayed: operation not permitted when stream is capturing\n" in capfd.readouterr().err) == (context is refused)
    assert [layer.cursor for layer in plain.net.layers] == [layer.cursor for layer in other.net.layers]


def test_displays_show_what_a_recording_writes_also_after_the_end_of_a_run(tmp_path, images, record, capfd):
    path = write_solver(tmp_path, (tmp_path / "net.prototxt").read_text(), test_iter=3, test_interval=2, display=1, max_iter=2,
                        snapshot_after_train=False)
    shown = []
    for solver in (train(path, True, (0,)), record(train(path, True, (0,)))):
        solver.solve()
        solver.step(3)
        shown.append([line.split("] ", 1)[1] for line in capfd.readouterr().err.splitlines() if "Train net output" in line])
    assert len(set(shown[0])) > 4 and shown[0] == shown[1]


def test_blobs_computed_again_for_somebody_who_looks_are_those_of_the_last_replay(tmp_path, record):
    path = write_solver(tmp_path, resnet8())
    plain, other = train(path, True, (1,), fed=True), train(path, True, (0,), fed=True)
    record(other).step(1)
    assert "g0" not in [*other._program(other.net).tops]        # let go of
    for _ in range(3):
        assert np.array_equal(plain.net.blobs["g0"].data, other.net.blobs["g0"].data)
        for solver in (plain, other):
            solver.step(1)


def test_what_layers_kept_for_backward_is_forgotten_before_iterations_are_recorded(images, record):
    """A recording would meet autograd's nodes of the parameters, which belong to another stream."""
    plain, other = train(images, True, (0,)), record(train(images, True, (0,)))
    for solver in (plain, other):
        solver.net.forward()
        solver.net.backward()
        solver.step(1)
    assert other.is_recorded and not other.net._tapes and plain.net._tapes and differences(plain, other) == 0
    other.net.backward()                                        # from what the blobs hold
    assert np.abs(other.net.params["fc"][0].diff).max() > 0
