"""Solvers that train together: what each reads and draws, what all of them end with, and what they say when they cannot."""
from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from lmdbs import batches, data_layer, net, numbered, write_images
from nets import write_solver
from torchcaffe.train import parallel

LAYERS = """
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 4 kernel_size: 3
  weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "data_label" top: "loss" }
"""
WAYS = {"fast": (True, False), "at once": (False, False), "layer by layer": (False, True)}     # (solver.fast, after_backward)


@pytest.fixture(autouse=True)
def alone():
    yield
    caffe.set_solver_rank(0)
    caffe.set_solver_count(1)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """23 images of 3 classes, a number that no batch divides."""
    rng = np.random.default_rng(3)
    return write_images(tmp_path_factory.mktemp("records") / "lmdb", rng.integers(0, 255, (23, 2, 6, 6)).astype(np.uint8),
                        rng.integers(0, 3, 23).tolist())


def member(rank: int, count: int) -> None:
    caffe.set_solver_count(count)
    caffe.set_solver_rank(rank)
    caffe.set_multiprocess(True)


def in_processes(count: int, work, *arguments) -> list:
    """What work(rank, count, uid, *arguments) returns in each of `count` processes; of one that raises CaffeError, its sentence."""
    fork, uid = multiprocessing.get_context("fork"), caffe.NCCL.new_uid()
    pipes = [fork.Pipe(duplex=False) for _ in range(count)]

    def run(rank: int) -> None:
        try:
            member(rank, count)
            pipes[rank][1].send(work(rank, count, uid, *arguments))
        except caffe.CaffeError as error:
            pipes[rank][1].send(str(error))

    processes = [fork.Process(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    for _, end in pipes:
        end.close()
    results = []
    for rank, (end, _) in enumerate(pipes):
        try:
            assert end.poll(60), f"process {rank} says nothing"
            results.append(end.recv())
        except EOFError:
            results.append(None)
    for process in processes:
        process.join(10)
        assert process.exitcode is not None
    return results


# -- what each reads and draws -------------------------------------------------------------------------------------------
def test_records_are_dealt_out_in_turn(tmp_path):
    text = data_layer(write_images(tmp_path / "lmdb", numbered(7, 2, 2)), 2)
    member(1, 3)
    images = batches(net(tmp_path, text), 4)[:, :, 1, 0, 0]
    np.testing.assert_array_equal(images.ravel(), np.arange(1, 24, 3) % 7)


def test_a_test_net_reads_all_records(tmp_path):
    text = data_layer(write_images(tmp_path / "lmdb", numbered(7, 2, 2)), 2)
    member(0, 3)
    np.testing.assert_array_equal(batches(net(tmp_path, text, caffe.TEST), 4)[:, :, 1, 0, 0].ravel(), np.arange(8) % 7)


@pytest.mark.parametrize("shuffle", ["", "shuffle: true"])
def test_rows_of_hdf5_files_are_dealt_out_of_one_order(tmp_path, shuffle):
    h5py = pytest.importorskip("h5py")
    for i, length in enumerate((3, 1, 4)):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            file["row"] = np.arange(length) + 10 * i
    (tmp_path / "files").write_text("\n".join(str(tmp_path / f"{i}.h5") for i in range(3)))

    def rows(batch: int, passes: int) -> np.ndarray:
        param = f'source: "{tmp_path}/files" batch_size: {batch} {shuffle}'
        model = net(tmp_path, f'layer {{ name: "in" type: "HDF5Data" top: "row" hdf5_data_param {{ {param} }} }}')
        return batches(model, passes, "row").ravel()

    whole = rows(8, 3)
    parts = np.empty(24)
    for rank in range(2):
        member(rank, 2)
        parts[rank::2] = rows(3, 4)
    np.testing.assert_array_equal(parts, whole)


def test_solvers_start_with_the_same_weights_and_draw_different_windows(tmp_path):
    text = data_layer(write_images(tmp_path / "lmdb", [np.arange(200, dtype=np.uint8).reshape(2, 10, 10)]), 16, "crop_size: 3") + LAYERS
    nets = []
    for rank in range(2):
        member(rank, 2)
        nets.append(net(tmp_path, text))
        nets[-1].forward()
    np.testing.assert_array_equal(nets[0].params["conv"][0].data, nets[1].params["conv"][0].data)
    assert (nets[0].blobs["data"].data != nets[1].blobs["data"].data).any()


# -- what all of them end with -----------------------------------------------------------------------------------------
def trained(rank, count, uid, path, way, kind, callback=None):
    fast, layer_wise = WAYS[way]
    with caffe.number_type(kind):
        solver = caffe.get_solver(path)
    solver.fast = fast
    nccl = caffe.NCCL(solver, uid)
    nccl.bcast()
    solver.add_callback(nccl)
    if callback is not None:
        solver.add_callback(lambda: None, lambda: callback(solver, rank))
    if layer_wise:
        solver.net.after_backward(nccl)
    solver.step(12)
    return [blob.data_slot.value().numpy() for blobs in solver.net.params.values() for blob in blobs]


def files(folder, records, batch, extra="", layers=LAYERS, **solver):
    return write_solver(folder, data_layer(records, batch, f"scale: 0.01 {extra}") + layers, **{"base_lr": 0.05, **solver})


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_end_with_the_weights_of_one_with_twice_the_batch(tmp_path, records, way, kind, tolerance):
    alone = trained(0, 1, "", files(tmp_path, records, 10, clip_gradients=1.0), way, kind)
    together = in_processes(2, trained, files(tmp_path, records, 5, clip_gradients=1.0), way, kind)
    for one, two, whole in zip(*together, alone, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, whole, rtol=0, atol=tolerance)
    first = trained(0, 1, "", files(tmp_path, records, 5, clip_gradients=1.0), way, kind)
    assert max(np.abs(a - b).max() for a, b in zip(first, alone, strict=True)) > 1e-4


SHARED = """
layer { name: "flip" type: "Power" bottom: "data" top: "flip" power_param { scale: -0.5 } }
layer { name: "one" type: "InnerProduct" bottom: "data" top: "one" param { name: "w" }
  inner_product_param { num_output: 3 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "other" type: "InnerProduct" bottom: "flip" top: "other" param { name: "w" }
  inner_product_param { num_output: 3 bias_term: false } }
layer { name: "relu" type: "ReLU" bottom: "other" top: "other" }
layer { name: "sum" type: "Eltwise" bottom: "one" bottom: "other" top: "sum" }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "sum" bottom: "data_label" top: "loss" }
"""


@pytest.mark.parametrize("way", WAYS)
def test_shared_parameters_and_iter_size_are_combined_once(tmp_path, records, way):
    alone = trained(0, 1, "", files(tmp_path, records, 6, layers=SHARED, iter_size=2), way, torch.float64)
    together = in_processes(2, trained, files(tmp_path, records, 3, layers=SHARED, iter_size=2), way, torch.float64)
    for one, whole in zip(together[0], alone, strict=True):
        np.testing.assert_allclose(one, whole, rtol=0, atol=1e-13)


def test_without_a_seed_the_root_s_weights_and_order_hold_for_all(tmp_path, records):
    one, two = in_processes(2, trained, files(tmp_path, records, 5, random_seed=-1), "fast", torch.float32)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_callback_sees_the_mean_in_the_diffs(tmp_path, records):
    path = files(tmp_path, records, 5)

    def seen(rank, count, uid):
        diffs = []
        trained(rank, count, uid, path, "at once", torch.float32, lambda solver, _: diffs.append(solver.net.params["ip"][1].diff.copy()))
        return diffs

    one, two = in_processes(2, seen)
    np.testing.assert_array_equal(one, two)
    assert len(one) == 12 and np.abs(one).max() > 0


def test_a_request_to_one_stops_all_after_the_same_iteration(tmp_path, records):
    path = files(tmp_path, records, 5)

    def stopped(rank, count, uid):
        solver = caffe.get_solver(path)
        nccl = caffe.NCCL(solver, uid)
        solver.add_callback(nccl)
        if rank == 1:
            solver.add_callback(lambda: None, lambda: nccl.request("stop") if solver.iter == 3 else None)
        solver.step(50)
        return solver.iter

    assert in_processes(2, stopped) == [5, 5]


DROPOUT = LAYERS.replace('{ name: "relu" type: "ReLU" ', '{ name: "drop" type: "Dropout" ')


def test_a_run_continued_from_the_root_s_snapshot_ends_with_the_same_bytes(tmp_path, records):
    path = files(tmp_path, records, 5, "crop_size: 5 mirror: true", DROPOUT, snapshot=8)

    def run(rank, count, uid, restore, iterations):
        solver = caffe.get_solver(path)
        solver.fast, solver.exact = True, True
        if restore:
            solver.restore(restore)
        nccl = caffe.NCCL(solver, uid)
        nccl.bcast()
        solver.add_callback(nccl)
        solver.step(iterations)
        return [blob.data for blobs in solver.net.params.values() for blob in blobs]

    state = str(tmp_path / "snap_iter_8.solverstate")
    whole, rest = in_processes(2, run, None, 12), in_processes(2, run, state, 4)
    for a, b in zip(whole[0] + whole[1], rest[0] + rest[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert "was made with solvers 2, now it is 1" in in_processes(1, run, state, 4)[0]


def test_what_recurrent_layers_carry_on_is_not_continued_exactly_by_several(tmp_path):
    text = """
    layer { name: "x" type: "DummyData" top: "x" top: "c" dummy_data_param { shape { dim: 2 dim: 3 dim: 4 } shape { dim: 2 dim: 3 } } }
    layer { name: "lstm" type: "LSTM" bottom: "x" bottom: "c" top: "y" recurrent_param { num_output: 2 } }
    layer { name: "loss" type: "EuclideanLoss" bottom: "y" bottom: "y" top: "loss" }"""
    member(0, 2)
    solver = caffe.get_solver(write_solver(tmp_path, text))
    solver.exact = True
    state = solver.snapshot()
    with pytest.raises(caffe.SidecarError, match="of the root only"):
        solver.restore(state)


# -- what they say when they cannot --------------------------------------------------------------------------------------
def test_solvers_with_different_nets_are_told_so(tmp_path, records):
    paths = []
    for outputs in (4, 6):
        (tmp_path / str(outputs)).mkdir()
        paths.append(files(tmp_path / str(outputs), records, 5, layers=LAYERS.replace("num_output: 4", f"num_output: {outputs}")))

    def join(rank, count, uid):
        caffe.NCCL(caffe.get_solver(paths[rank]), uid)

    said = in_processes(2, join)
    assert said[0] == said[1] and "solvers 0 and 1 differ in parameters" in said[0]


def test_when_one_dies_the_other_says_so_in_one_sentence(tmp_path, records):
    path = files(tmp_path, records, 5)

    def die(solver, rank):
        if rank == 1 and solver.iter == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    said, nothing = in_processes(2, trained, path, "fast", torch.float32, die)
    assert nothing is None and said.startswith("solver 0 of 2 lost another one (") and "\n" not in said


def test_who_leaves_the_group_has_no_thread_in_it_any_more(tmp_path, records):
    path = files(tmp_path, records, 5)

    def threads() -> list[str]:
        names = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
        return [name for name in names if "gloo" in name]

    def left(rank, count, uid):
        solver = caffe.get_solver(path)
        solver.add_callback(caffe.NCCL(solver, uid))
        solver.step(2)
        before = threads()
        parallel.leave()
        return bool(before), threads()

    assert in_processes(2, left) == [(True, [])] * 2


def test_a_group_that_does_not_come_together_is_named(tmp_path, records, monkeypatch):
    solver = caffe.get_solver(files(tmp_path, records, 5))
    caffe.set_solver_count(2)
    monkeypatch.setattr(parallel, "MEETING", parallel.timedelta(seconds=1))
    for uid, message in [(caffe.NCCL.new_uid(), "start one process for each rank from 0 to 1"), ("nonsense", "is not a uid")]:
        with pytest.raises(caffe.CaffeError, match=message):
            caffe.NCCL(solver, uid)


def test_ranks_and_counts_that_cannot_be(tmp_path):
    for call, message in [(lambda: caffe.set_solver_count(0), "at least 1"), (lambda: caffe.set_solver_rank(-1), "at least 0")]:
        with pytest.raises(caffe.CaffeError, match=message):
            call()
    caffe.set_solver_rank(2)
    with pytest.raises(caffe.CaffeError, match="there is no solver 2 among 1"):
        net(tmp_path, 'layer { name: "in" type: "DummyData" top: "x" dummy_data_param { shape { dim: 1 } } }')
