"""`torchcaffe train` with several processes, and a script that starts its own: one log, one snapshot, one end for all of them."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import torchcaffe
from lmdbs import data_layer, write_images
from nets import write_solver
from torchcaffe import formats
from torchcaffe.cli import main

LAYERS = """
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "data_label" top: "loss" }
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(torchcaffe.__file__).parents[1])}
FOREVER = 100_000_000
SCRIPT = '''
import sys
from multiprocessing import Process

import caffe


def train(solver, count):
    uid = caffe.NCCL.new_uid()
    caffe.init_log()
    caffe.log(f"Using {count} processes")
    members = [Process(target=solve, args=(solver, uid, count, rank)) for rank in range(count)]
    for member in members:
        member.daemon = True
        member.start()
    for member in members:
        member.join()


def solve(proto, uid, count, rank):
    caffe.set_solver_count(count)
    caffe.set_solver_rank(rank)
    caffe.set_multiprocess(True)
    solver = caffe.SGDSolver(proto)
    nccl = caffe.NCCL(solver, uid)
    nccl.bcast()
    spent = caffe.Timer()
    solver.add_callback(lambda: "", lambda: spent.start())
    solver.add_callback(nccl)
    solver.add_callback(lambda: "", lambda: (spent.stop(), caffe.log(f"allreduce: {spent.ms:.2f}")) if rank == 0 else None)
    if solver.param.layer_wise_reduce:
        solver.net.after_backward(nccl)
    solver.step(solver.param.max_iter)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    write_images(tmp_path / "lmdb", rng.integers(0, 255, (23, 2, 6, 6)).astype(np.uint8), rng.integers(0, 3, 23).tolist())
    return tmp_path


def files(folder: Path, batch: int, **fields) -> str:
    return write_solver(folder, data_layer(folder / "lmdb", batch, "scale: 0.01") + LAYERS,
                        **{"test_iter": 3, "test_interval": 5, "display": 5, "max_iter": 10, **fields})


def weights(path: str) -> list[np.ndarray]:
    return [blob for _, blobs in formats.read_weights(path) for blob in blobs]


def start(solver: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "torchcaffe", "train", "--solver", solver, "--processes", "2"], text=True,
                            stderr=subprocess.PIPE, env=ENVIRONMENT)


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def solvers(process: subprocess.Popen) -> list[int]:
    """The processes with a solver, the root first."""
    return sorted(pid for pid in children(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


def all_gone(pids: list[int]) -> bool:
    for _ in range(12_000):                                                 # ten minutes: the machine may be busy
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_two_processes_write_what_one_with_twice_the_batch_writes_and_once(folder, capfd):
    assert main(["train", "--solver", files(folder, 10, snapshot=5)]) == 0
    alone = {file.name: weights(str(file)) for file in folder.glob("*.caffemodel")}
    first = re.findall(r"Test net output #0: loss = (\S+)", capfd.readouterr().err)
    for file in folder.glob("snap*"):
        file.unlink()
    assert main(["train", "--solver", files(folder, 5, snapshot=5), "--processes", "2"]) == 0
    said = capfd.readouterr().err
    assert sorted(alone) == sorted(file.name for file in folder.glob("*.caffemodel")) and len(alone) == 2
    for name, arrays in alone.items():
        for ours, theirs in zip(weights(name), arrays, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
    assert said.count("Snapshotting solver state") == 2 and len(re.findall(r"Iteration \d+, Testing net", said)) == 3
    assert len(first) == len(re.findall(r"Test net output #0: loss = ", said)) == 3
    assert said.count("Iteration 5 (") == said.count("Iteration 5, lr") == 1


def test_a_mistake_that_all_processes_make_is_told_once(folder, capfd):
    solver = files(folder, 5)
    (folder / "net.prototxt").write_text((folder / "net.prototxt").read_text().replace("SoftmaxWithLoss", "SoftmaxWithLos"))
    assert main(["train", "--solver", solver, "--processes", "2"]) == 2
    said = capfd.readouterr().err
    assert said.count("did you mean 'SoftmaxWithLoss'?") == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("torchcaffe: ")


@pytest.mark.slow
def test_an_interrupt_stops_all_after_one_snapshot(folder):
    process = start(files(folder, 5, max_iter=FOREVER, test_iter=[], test_interval=[]))
    wait_for(process, "Iteration 5 (")
    pids = children(process)
    process.send_signal(signal.SIGHUP)
    wait_for(process, "Snapshotting solver state")
    for pid in solvers(process):                                            # as a terminal does, to the whole foreground
        os.kill(pid, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert "Optimization stopped early." in process.communicate()[1]
    assert process.returncode == 0 and all_gone(pids)
    assert len(list(folder.glob("*.solverstate"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_solver_that_dies_ends_all_with_one_sentence(folder, rank):
    process = start(files(folder, 5, max_iter=FOREVER))
    wait_for(process, "Iteration 5 (")
    pids = children(process)
    os.kill(solvers(process)[rank], signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == 2 and all_gone(pids) and "Traceback" not in said
    assert re.fullmatch(rf"torchcaffe: solver {rank} of 2 \(process \d+\) was ended by SIGKILL, so the others were ended, too; resume all "
                        r"from the last snapshot with --snapshot", said.splitlines()[-1])


@pytest.mark.slow
def test_solvers_end_with_the_process_that_started_them(folder):
    process = start(files(folder, 5, max_iter=FOREVER))
    wait_for(process, "Iteration 5 (")
    pids = children(process)
    process.kill()
    assert all_gone(pids)
    process.communicate()


@pytest.mark.slow
def test_a_script_that_starts_a_process_for_each_solver(folder):
    main(["train", "--solver", files(folder, 10)])
    (folder / "train.py").write_text(SCRIPT)
    whole = weights("snap_iter_10.caffemodel")
    done = subprocess.run([sys.executable, "-m", "torchcaffe.run", "train.py", files(folder, 5, snapshot=10), "2"], env=ENVIRONMENT,
                          capture_output=True, text=True, check=True)
    assert done.stderr.count("Snapshotting solver state") == 1 and done.stderr.count("allreduce: ") == 10
    for ours, theirs in zip(weights("snap_iter_10.caffemodel"), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
