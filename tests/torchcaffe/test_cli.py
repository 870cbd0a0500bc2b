"""The command line tool, end to end on tiny nets: what it does, what it prints, and one sentence for every mistake."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import torchcaffe
from torchcaffe import formats
from torchcaffe.cli import main
from torchcaffe.proto import caffe_pb2

NET = """
name: "tiny"
layer { name: "data" type: "DummyData" top: "data" top: "label"
  dummy_data_param { shape { dim: 8 dim: 4 } shape { dim: 8 } data_filler { type: "gaussian" } data_filler { value: 1 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "power" type: "Power" bottom: "label" top: "two" power_param { scale: 2 } include { stage: "more" } }
layer { name: "high" type: "Power" bottom: "label" top: "three" power_param { scale: 3 } include { min_level: 1 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" loss_weight: 0.5 }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
"""
SOLVER = 'net: "net.prototxt" base_lr: 0.1 lr_policy: "fixed" random_seed: 1 snapshot_prefix: "snap" display: 5 max_iter: '

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(torchcaffe.__file__).parents[1])}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "solver.prototxt").write_text(SOLVER + "10 test_iter: 2 test_interval: 5")
    return tmp_path


def messages(text: str) -> list[str]:
    """Log lines without glog's prefix."""
    lines = text.splitlines()
    assert all(re.match(r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ \w+\.\w+:\d+\] ", line) for line in lines)
    return [line.split("] ", 1)[1] for line in lines]


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "torchcaffe", *arguments], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


# -- train ---------------------------------------------------------------------------------------------------------
def test_train_writes_weights_and_state_and_caffes_log(capfd):
    assert main(["train", "--solver=solver.prototxt"]) == 0
    said = messages(capfd.readouterr().err)
    assert formats.read_state("snap_iter_10.solverstate").iter == 10
    assert dict(formats.read_weights("snap_iter_10.caffemodel"))["ip"][0].shape == (3, 4)
    for pattern in ("Use CPU.", "Starting Optimization", r"Iteration 5 \(.*\), loss = .*", "Iteration 5, lr = 0.1",
                    "Iteration 10, Testing net .*", r"    Test net output #0: accuracy = .*",
                    r"    Train net output #0: loss = .* \(\* 0.5 = .* loss\)", "Optimization Done."):
        assert any(re.fullmatch(pattern, line) for line in said), pattern


def test_train_goes_on_from_a_snapshot(folder):
    (folder / "net.prototxt").write_text(NET.replace('type: "gaussian"', "value: 0.5"))
    assert main(["train", "-solver", "solver.prototxt"]) == 0
    whole = formats.read_weights("snap_iter_10.caffemodel")
    (folder / "half.prototxt").write_text((folder / "solver.prototxt").read_text() + " snapshot: 4")
    os.remove("snap_iter_10.caffemodel")
    assert main(["train", "--solver", "half.prototxt"]) == 0
    os.remove("snap_iter_10.caffemodel")
    assert main(["train", "--solver", "solver.prototxt", "--snapshot", "snap_iter_4.solverstate"]) == 0
    resumed = formats.read_weights("snap_iter_10.caffemodel")
    for ours, theirs in zip(dict(resumed)["ip"], dict(whole)["ip"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_train_starts_from_several_weights(folder):
    (folder / "solver.prototxt").write_text(SOLVER + "0 weights: 'none'")
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    for name, value in (("a", weights * 0), ("b", weights)):
        net = caffe_pb2.NetParameter()
        net.layer.add(name="ip").blobs.extend([formats.array_to_blob(value), formats.array_to_blob(weights[:, 0])])
        formats.write_weights(name, net)
    assert main(["train", "--solver", "solver.prototxt", "--weights", "a,b"]) == 0
    np.testing.assert_array_equal(dict(formats.read_weights("snap_iter_0.caffemodel"))["ip"][0], weights)


def test_level_and_stage_of_the_train_net():
    assert main(["train", "--solver", "solver.prototxt", "--level", "1", "--stage", "more,other"]) == 0
    assert {"power", "high"} <= {name for name, _ in formats.read_weights("snap_iter_10.caffemodel")}


@pytest.mark.slow
def test_interrupt_takes_a_snapshot_and_stops(folder):
    (folder / "solver.prototxt").write_text(SOLVER + "100000000")
    process = start("train", "--solver", "solver.prototxt")
    wait_for(process, "Iteration 5 ")
    process.send_signal(signal.SIGINT)
    assert "Optimization stopped early." in process.communicate()[1]
    assert process.returncode == 0
    (state,) = folder.glob("*.solverstate")
    assert formats.read_state(state).iter > 5


@pytest.mark.slow
def test_hangup_takes_one_snapshot_and_goes_on(folder):
    (folder / "solver.prototxt").write_text(SOLVER + "100000000")
    process = start("train", "--solver", "solver.prototxt", "--sigint_effect", "none")
    wait_for(process, "Iteration 5 ")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    wait_for(process, "Snapshotting solver state")
    wait_for(process, "Iteration ")
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(folder.glob("*.solverstate"))) == 1


# -- test and time -------------------------------------------------------------------------------------------------
def test_test_prints_batches_and_means(capfd):
    main(["train", "--solver", "solver.prototxt"])
    capfd.readouterr()
    assert main(["test", "--model", "net.prototxt", "--weights", "snap_iter_10.caffemodel", "--iterations", "3"]) == 0
    said = messages(capfd.readouterr().err)
    values = {name: [float(line.split(" = ")[1]) for line in said if re.fullmatch(rf"Batch \d, {name} = \S+", line)]
              for name in ("loss", "accuracy")}
    assert [len(v) for v in values.values()] == [3, 3]
    mean = {name: float(next(re.match(rf"{name} = (\S+)", line)[1] for line in said if line.startswith(f"{name} = "))) for name in values}
    assert mean == pytest.approx({name: np.mean(v) for name, v in values.items()}, rel=1e-4)
    assert any(line.startswith("loss = ") and " (* 0.5 = " in line for line in said)
    total = float(next(line for line in said if line.startswith("Loss: "))[6:])
    assert total == pytest.approx(0.5 * mean["loss"], rel=1e-4)


def test_test_honours_stage_and_level(capfd):
    main(["train", "--solver", "solver.prototxt"])
    capfd.readouterr()
    main(["test", "--model", "net.prototxt", "--weights", "snap_iter_10.caffemodel", "--iterations=1", "--stage=more", "--level=1"])
    said = messages(capfd.readouterr().err)
    assert said.count("two = 2") == said.count("three = 3") == 8


def test_time_reports_every_layer(capfd):
    assert main(["time", "--model", "net.prototxt", "--iterations", "2", "--phase", "TRAIN"]) == 0
    said = messages(capfd.readouterr().err)
    for layer in ("data", "ip", "loss"):
        for way in ("forward", "backward"):
            assert sum(bool(re.fullmatch(rf" *{layer}\t{way}: \S+ ms\.", line)) for line in said) == 1
    assert not any(re.match(" *accuracy\t", line) for line in said)
    assert sum(line.startswith("Iteration: ") for line in said) == 2
    assert any(line.startswith("Average Forward-Backward: ") for line in said)


def test_module_and_version():
    found = subprocess.run([sys.executable, "-m", "torchcaffe", "--version"], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert found.stdout.startswith("torchcaffe ") and found.returncode == 0


# -- mistakes ------------------------------------------------------------------------------------------------------
def complaint(capfd, *arguments: str) -> str:
    """What a command that must fail with 2 says at the end."""
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in err and not out
    return err.splitlines()[-1]


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "COMMAND; see torchcaffe --help"),
    (["trian"], "invalid choice: 'trian'"),
    (["train"], "required: --solver; see torchcaffe train --help"),
    (["train", "--solver", "solver.prototxt", "--wieghts", "x"], "unrecognized arguments: --wieghts"),
    (["train", "--solver", "none"], "none: cannot be read (No such file"),
    (["train", "--solver", "net.prototxt"], "net.prototxt:2:1: 'name' belongs in a NetParameter"),
    (["train", "--solver", "solver.prototxt", "--weights", "a", "--snapshot", "b"], "exclude each other"),
    (["train", "--solver", "solver.prototxt", "--snapshot", "none"], "none: cannot be read"),
    (["train", "--solver", "solver.prototxt", "--gpu", "0;1"], "--gpu: '0;1' is not the number of a GPU, several"),
    (["train", "--solver", "solver.prototxt", "--gpu", "1,0,1"], "--gpu: '1,0,1' names a GPU twice"),
    (["train", "--solver", "solver.prototxt", "--precision", "tf32"], "precision tf32 is a GPU's; use fp32 on a CPU"),
    (["train", "--solver", "solver.prototxt", "--gpu", "0", "--processes", "2"], "--gpu and --processes exclude each other"),
    (["test", "--model", "net.prototxt", "--weights", "none"], "none: cannot be read"),
    (["test", "--model", "net.prototxt", "--weights", "net.prototxt"], "net.prototxt: is not a caffemodel"),
    (["time", "--model", "net.prototxt", "--iterations", "0"], "--iterations: '0' is not a whole number above 0"),
])
def test_mistakes_in_flags_and_files(capfd, arguments, words):
    assert words in complaint(capfd, *arguments)


def test_a_snapshot_prefix_without_its_folder_is_refused_before_training(capfd, folder):
    (folder / "solver.prototxt").write_text(SOLVER.replace('"snap"', '"none/snap"') + "10")
    said = complaint(capfd, "train", "--solver", "solver.prototxt")
    assert "solver.prototxt: snapshot_prefix 'none/snap': there is no writable folder none" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_no_gpu_here(capfd, folder):
    assert "no GPU" in complaint(capfd, "time", "--model", "net.prototxt", "--gpu", "0")
    (folder / "solver.prototxt").write_text(SOLVER + "1 solver_mode: GPU")
    assert "solver.prototxt: solver_mode is GPU, but" in complaint(capfd, "train", "--solver", "solver.prototxt")


@pytest.mark.parametrize(("text", "line", "words"), [
    ('layer {\n name: "r"\n type: "Relu" bottom: "ip" top: "r" }', 2, ["layer 'r'", "'Relu'", "did you mean 'ReLU'?"]),
    ('layer { name: "r" type: "ReLU" bottom: "ipp" top: "r" }', 2, ["layer 'r'", "bottom blob 'ipp'", "did you mean 'ip'?"]),
    ('\nlayer { name: "s" type: "Eltwise" bottom: "ip" bottom: "data" top: "s" }', 3, ["layer 's'", "(8, 3)", "(8, 4)"]),
    ('layer { name: "c" type: "Convolution" bottom: "data" top: "c" convolution_param { num_output: 2 kernel_size: 3 } }', 2,
     ["layer 'c'"]),
])
def test_mistakes_in_nets_name_the_line(capfd, folder, text, line, words):
    net = NET.strip() + "\n" + text
    (folder / "net.prototxt").write_text(net)
    place = f"net.prototxt:{NET.strip().count(chr(10)) + line}: "
    for command in (["time", "--model", "net.prototxt"], ["train", "--solver", "solver.prototxt"]):
        said = complaint(capfd, *command)
        assert said.startswith(f"torchcaffe: {place}")
        assert all(word in said for word in words), said


def test_weights_of_another_shape_are_refused(capfd, folder):
    main(["train", "--solver", "solver.prototxt"])
    (folder / "net.prototxt").write_text(NET.replace("num_output: 3", "num_output: 5"))
    said = complaint(capfd, "test", "--model", "net.prototxt", "--weights", "snap_iter_10.caffemodel")
    assert all(word in said for word in ("snap_iter_10.caffemodel", "layer 'ip'", "(3, 4)", "(5, 4)"))
