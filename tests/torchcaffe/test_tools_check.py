"""check: every obstacle is named with its place and what to do, what runs is not complained about, and nothing is changed by looking."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import torchcaffe as caffe
from lmdbs import data_layer, numbered, write, write_images
from torchcaffe import formats
from torchcaffe.cli import main

NET = """layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 3 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "data_label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "data_label" top: "accuracy" include { phase: TEST } }
"""
INPUT = 'layer { name: "data" type: "Input" top: "data" top: "data_label" input_param { shape { dim: 2 dim: 4 } shape { dim: 2 } } }\n'
SOLVER = 'net: "net.prototxt" base_lr: 0.1\nlr_policy: "fixed" snapshot_prefix: "snap" test_iter: 2 test_interval: 5 max_iter: 3 '


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an LMDB, a net on it and a solver."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "lmdb", numbered(5), [0, 1, 2, 1, 0])
    (tmp_path / "net.prototxt").write_text(data_layer("lmdb", 2) + NET)
    (tmp_path / "solver.prototxt").write_text(SOLVER)
    return tmp_path


def check(capfd: pytest.CaptureFixture[str], *files: str, status: int) -> list[str]:
    """What the command prints, line by line; nothing may be left behind."""
    before = sorted(os.listdir())
    assert main(["check", *files]) == status
    out, err = capfd.readouterr()
    assert not err and sorted(os.listdir()) == before
    return out.splitlines()


def problem(capfd: pytest.CaptureFixture[str], *files: str) -> str:
    """The one problem that is found."""
    lines = [line for line in check(capfd, *files, status=1) if line.startswith("  - ")]
    assert len(lines) == 1, lines
    return lines[0]


# -- what runs -----------------------------------------------------------------------------------------------------
def test_all_that_a_training_run_reads_and_writes_is_in_order(folder, capfd):
    solver = caffe.get_solver("solver.prototxt")
    solver.step(3)
    solver.snapshot()
    formats.write_mean("mean.binaryproto", numbered(1)[0].astype(float))
    (folder / "train.sh").write_text("#!/bin/sh\ncaffe train --solver solver.prototxt --gpu 0\n")
    with h5py.File("rows.h5", "w") as file:
        file["data"] = np.zeros((4, 3))
    capfd.readouterr()
    files = ["solver.prototxt", "net.prototxt", "lmdb", "snap_iter_3.caffemodel", "snap_iter_3.solverstate", "mean.binaryproto",
             "train.sh", "rows.h5"]
    assert check(capfd, *files, status=0) == [
        "solver.prototxt: solver: will run", "net.prototxt: net: will run",
        "lmdb: LMDB, 5 records of 2x12x12, labels 0 to 2: can be used",
        "snap_iter_3.caffemodel: caffemodel, 867 parameters in 1 layer(s): can be used",
        "snap_iter_3.solverstate: solver state, iteration 3: can be used", "mean.binaryproto: mean file, 2x12x12: can be used",
        "train.sh: script: will run", "rows.h5: HDF5 data, data 4x3: can be used"]


def test_what_a_file_is_is_told_from_its_content(folder, capfd):
    solver = caffe.get_solver("solver.prototxt")
    solver.snapshot()
    (folder / "hdf5.prototxt").write_text(SOLVER + "snapshot_format: HDF5")
    caffe.get_solver("hdf5.prototxt").snapshot()
    formats.write_mean("mean.binaryproto", numbered(1)[0].astype(float))
    os.remove("hdf5.prototxt")
    capfd.readouterr()
    names = {"snap_iter_0.caffemodel": "a", "snap_iter_0.solverstate": "b", "snap_iter_0.caffemodel.h5": "c",
             "snap_iter_0.solverstate.h5": "d", "mean.binaryproto": "e", "net.prototxt": "f"}
    for old, new in names.items():
        shutil.copy(old, new)
    kinds = [line.split(": ")[1].split(",")[0] for line in check(capfd, *names.values(), status=0)]
    assert kinds == ["caffemodel", "solver state", "caffemodel", "solver state", "mean file", "net"]


def test_nets_for_one_phase_are_not_looked_at_in_the_other(folder, capfd):
    (folder / "net.prototxt").write_text(data_layer("lmdb", 2).replace("top:", "include { phase: TEST } top:", 1) + NET)
    assert check(capfd, "net.prototxt", status=0) == ["net.prototxt: net: will run"]


def test_every_net_of_the_golden_vectors_will_run(golden, monkeypatch, capfd):
    for case in sorted((golden / "nets").iterdir()):
        monkeypatch.chdir(case)
        monkeypatch.syspath_prepend(str(case))
        assert main(["check", "net.prototxt", "init.caffemodel"]) == 0, capfd.readouterr().out


# -- what is in the way of nets ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "words"), [
    (data_layer("/home/alice/lmdb", 2) + NET, ["net.prototxt:1: layer 'data' (Data): source '/home/alice/lmdb' is an absolute path that "
                                               "does not exist here"]),
    (data_layer("gone", 2, "crop_size: 5") + NET, ["source 'gone' does not exist, seen from"]),
    (data_layer("lmdb", 2, 'mean_file: "/home/alice/m.binaryproto"') + NET, ["mean_file '/home/alice/m.binaryproto' is an absolute path"]),
    (data_layer("lmdb", 2, backend="LEVELDB") + NET, ["lmdb is an LMDB, so write `backend: LMDB`"]),
    (data_layer("lmdb", 2, "crop_size: 13") + NET, ["net.prototxt:1: layer 'data' (Data): crop_size 13 is larger than the images"]),
    (data_layer("lmdb", 2) + NET + '\nlayer { name: "r" type: "RoiPooling" bottom: "ip" top: "r" }',
     ["net.prototxt:6: layer 'r' (RoiPooling): is not a layer type of Caffe's", "as a Python layer"]),
    (data_layer("lmdb", 2) + NET + 'layer { name: "r" type: "relu" bottom: "ip" top: "r" }', ["did you mean 'ReLU'?"]),
    (data_layer("lmdb", 2) + NET + 'layer { name: "p" type: "Python" bottom: "ip" top: "p" python_param { module: "gone" layer: "L" } }',
     ["layer 'p' (Python): no module 'gone' on sys.path"]),
    (INPUT + NET + 'layer { name: "e" type: "EuclideanLoss" bottom: "ip" bottom: "data" top: "e" }', ["layer 'e'", "(2, 3)", "(2, 4)"]),
    (INPUT.replace("layer {", "layer { include { phase: TEST } exclude { phase: TEST }", 1) + NET, ["has include and exclude rules"]),
    ('name: "nothing"', ["has no layers, so it is not a net"]),
    ("layer {", ["net.prototxt:1:7: the file ends inside the block"]),
    ("a.png 1\n", ["is neither a net nor a solver; if it is a list of files, name the net that reads it"]),
])
def test_obstacles_of_a_net(folder, capfd, text, words):
    (folder / "net.prototxt").write_text(text)
    said = problem(capfd, "net.prototxt")
    assert all(word in said for word in words), said


def test_all_obstacles_are_told_at_once_and_each_once(folder, capfd):
    text = data_layer("/gone/lmdb", 2, 'crop_size: 5 mean_file: "gone.binaryproto"', backend="LEVELDB") + NET
    (folder / "net.prototxt").write_text(text + 'layer { name: "x" type: "Mine" bottom: "ip" top: "x" mine_param { a: 1 } }')
    said = check(capfd, "net.prototxt", status=1)
    assert len(said) == 6
    for words, line in zip(["unknown field 'mine_param' in LayerParameter", "mean_file 'gone.binaryproto' does not exist",
                            "source '/gone/lmdb' is an absolute path", "run `torchcaffe convert_leveldb /gone/lmdb /gone/lmdb_lmdb`",
                            "layer 'x' (Mine): is not a layer type"], said[1:], strict=True):
        assert words in line


def test_behind_missing_data_the_rest_of_the_net_is_still_looked_at(folder, capfd):
    net = NET.replace('bottom: "ip" bottom', 'bottom: "iq" bottom', 1)
    (folder / "net.prototxt").write_text(data_layer("gone", 2, "crop_size: 5") + net)
    said = check(capfd, "net.prototxt", status=1)
    assert len(said) == 3 and "source 'gone'" in said[1] and "net.prototxt:3: layer 'loss'" in said[2] and "'iq'" in said[2]


@pytest.mark.parametrize(("code", "words"), [
    ("import gone_too", "net.prototxt: layer 'p' (Python) raises ModuleNotFoundError: No module named 'gone_too' ("),
    ("import gone_too", "; install what it needs"), ("print 'hello'", "layer 'p' (Python) raises SyntaxError"),
    ("import caffe\nclass L(caffe.Layer):\n def setup(self, b, t):\n  raise ValueError('no')",
     "layer 'p' (Python) raises ValueError: no (layer_"),
    ("import sys\nsys.exit(0)", "layer 'p' (Python) ends the program with SystemExit"),
])
def test_python_layers_that_do_not_work(folder, capfd, monkeypatch, code, words):
    module = f"layer_{abs(hash(code))}"
    (folder / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (folder / "net.prototxt").write_text(
        INPUT + f'layer {{ name: "p" type: "Python" bottom: "data" top: "p" python_param {{ module: "{module}" layer: "L" }} }}')
    said = problem(capfd, "net.prototxt")
    assert words in said and f"{module}.py:" in said


def test_images_that_a_list_names_must_be_there(folder, capfd):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save("a.png")
    (folder / "list").write_text("a.png 0\nb.png 1\nc.png 2\n")
    (folder / "net.prototxt").write_text('layer { name: "data" type: "ImageData" top: "data" top: "data_label" '
                                         'image_data_param { source: "list" batch_size: 2 } }' + NET)
    assert "2 of the 3 files in list do not exist: b.png, c.png; put them there, or set root_folder" in problem(capfd, "net.prototxt")
    (folder / "list").write_text("".join(f"{i}.png 0\n" for i in range(30)))
    assert "do not exist: 0.png, 1.png, " in (said := problem(capfd, "net.prototxt")) and "19.png and 10 more; " in said


def test_hdf5_files_that_a_list_names_must_be_there(folder, capfd):
    (folder / "list").write_text("a.h5\nb.h5\n")
    (folder / "net.prototxt").write_text('layer { name: "data" type: "HDF5Data" top: "data" top: "data_label" '
                                         'hdf5_data_param { source: "list" batch_size: 2 } }' + NET)
    assert "2 of the 2 files in list do not exist: a.h5, b.h5; put them there, or start from the folder" in problem(capfd, "net.prototxt")


@pytest.mark.parametrize(("kind", "given", "words"), [
    ("Data", "input_param { shape { dim: 1 } }", "layer 'data' (Data): data_param has no source and no batch_size; write them"),
    ("Data", 'data_param { source: "lmdb" backend: LMDB }', "data_param has no batch_size; write it"),
    ("HDF5Data", "hdf5_data_param { batch_size: 2 }", "hdf5_data_param has no source; write it"),
    ("ImageData", "", "image_data_param has no source; write it"),
    ("WindowData", "transform_param { crop_size: 5 }", "window_data_param has no source and no batch_size; write them"),
])
def test_a_data_layer_without_data_is_told_what_to_write(folder, capfd, kind, given, words):
    (folder / "net.prototxt").write_text(f'layer {{ name: "data" type: "{kind}" top: "data" top: "data_label" {given} }}\n' + NET)
    assert words in problem(capfd, "net.prototxt")
    with pytest.raises(caffe.CaffeError, match=words.split(": ")[-1].split(" and ")[0].split(";")[0]):
        caffe.Net("net.prototxt", caffe.TRAIN)


# -- the state that a net is judged in --------------------------------------------------------------------------------------
STAGED = """
layer { name: "data" type: "DummyData" top: "data" include { phase: TRAIN } dummy_data_param { shape { dim: 2 dim: 3 } } }
layer { name: "data" type: "DummyData" top: "data" include { phase: TEST stage: "held-out" } dummy_data_param { shape { dim: 2 dim: 3 } } }
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" inner_product_param { num_output: 3 } }
layer { name: "loss" type: "EuclideanLoss" bottom: "fc" bottom: "data" top: "loss" }
"""


def test_a_net_is_judged_in_the_states_that_its_solver_gives_it(folder, capfd):
    (folder / "net.prototxt").write_text(STAGED)
    (folder / "solver.prototxt").write_text(SOLVER.replace("test_iter: 2", 'test_state { stage: "held-out" } test_iter: 2'))
    assert check(capfd, "net.prototxt", "solver.prototxt", status=0) == ["net.prototxt: net: will run", "solver.prototxt: solver: will run"]
    (folder / "solver.prototxt").write_text(SOLVER)                                     # which names no stage
    said = check(capfd, "./net.prototxt", "solver.prototxt", status=1)
    words = "layer 'fc' (InnerProduct): unknown bottom blob 'data': no earlier layer has such a top (in phase TEST without stages)"
    assert [words in line for line in said] == [False, True, False, True]


def test_a_net_by_itself_is_judged_in_the_states_that_its_inputs_name(folder, capfd):
    (folder / "net.prototxt").write_text(STAGED)
    assert check(capfd, "net.prototxt", status=0) == ["net.prototxt: net: will run"]
    (folder / "net.prototxt").write_text(STAGED.replace('bottom: "fc" bottom', 'bottom: "gone" bottom'))
    assert "unknown bottom blob 'gone': no earlier layer has such a top" in (said := problem(capfd, "net.prototxt")) and " (in" not in said
    (folder / "net.prototxt").write_text(STAGED + 'layer { name: "x" type: "ReLU" bottom: "gone" top: "x" include { stage: "held-out" } }')
    assert "'gone': no earlier layer has such a top (in phase TEST with stage 'held-out')" in problem(capfd, "net.prototxt")


def test_a_net_whose_layers_are_for_one_phase_is_not_judged_in_the_other(folder, capfd):
    deploy = INPUT + NET.replace("include { phase: TEST }", "").replace("inner_p", "include { phase: TEST } inner_p")
    (folder / "net.prototxt").write_text(deploy)
    assert check(capfd, "net.prototxt", status=0) == ["net.prototxt: net, in phase TEST without stages: will run"]
    (folder / "net.prototxt").write_text(deploy.replace("layer {", "layer { include { phase: TRAIN }", 1))
    assert "unknown bottom blob 'ip'" in problem(capfd, "net.prototxt")                 # its input says what it is for


def test_line_ends_mean_nothing_to_what_a_file_is(folder, capfd):
    for text in (SOLVER.replace("\n", " "), SOLVER.replace(" ", "\n"), 'net: "net.prototxt", ' + SOLVER.split('"', 2)[2]):
        (folder / "solver.prototxt").write_text(text)
        assert check(capfd, "solver.prototxt", status=0) == ["solver.prototxt: solver: will run"]
    (folder / "solver.prototxt").write_text(SOLVER.replace('net: "net.prototxt"', f"net_param {{ {INPUT} {NET} }}"))
    assert check(capfd, "solver.prototxt", status=0) == ["solver.prototxt: solver: will run"]
    (folder / "net.prototxt").write_text(" ".join((INPUT + NET).split()))
    assert check(capfd, "net.prototxt", status=0) == ["net.prototxt: net: will run"]


@pytest.mark.parametrize("devices", ["0,1", "0, 1", "[0, 1]", '"0,1"'])
def test_several_devices_in_a_solver_get_a_sentence(folder, capfd, devices):
    (folder / "solver.prototxt").write_text(f"# one line\n{SOLVER} device_id: {devices} momentum: 0.9")
    assert "device_id is the number of one GPU, not 0" in (said := problem(capfd, "solver.prototxt"))
    assert "name several for training with `torchcaffe train --gpu 0,1`" in said and "solver.prototxt:3:" in said
    with pytest.raises(caffe.CaffeError, match="device_id is the number of one GPU"):
        caffe.get_solver("solver.prototxt")


# -- solvers, weights, states ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("change", "words"), [
    (("net.prototxt", "/home/alice/net.prototxt"), "solver.prototxt: net '/home/alice/net.prototxt' is an absolute path"),
    (('"snap"', '"none/snap"'), "there is no writable folder none"), (("fixed", "sometimes"), "'sometimes'"),
    (("max_iter", 'type: "Adamm" max_iter'), "Adam"), (("max_iter", 'weights: "gone" max_iter'), "weights 'gone' does not exist"),
    (("test_interval: 5", ""), "test_interval must be above 0"), (('net: "net.prototxt"', ""), "says what to train"),
    (("max_iter", "max_itre"), "unknown field 'max_itre' in SolverParameter; did you mean 'max_iter'?"),
])
def test_obstacles_of_a_solver(folder, capfd, change, words):
    (folder / "solver.prototxt").write_text(SOLVER.replace(*change))
    said = problem(capfd, "solver.prototxt")
    assert words in said and "solver.prototxt" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_gpu_that_is_not_there(folder, capfd):
    (folder / "solver.prototxt").write_text(SOLVER + "solver_mode: GPU")
    assert "solver_mode is GPU, but torch finds no CUDA device here; write solver_mode: CPU" in problem(capfd, "solver.prototxt")


def test_a_solvers_nets_are_looked_at_in_its_states(folder, capfd):
    (folder / "net.prototxt").write_text(data_layer("lmdb", 2) + NET +
                                         'layer { name: "x" type: "Mine" bottom: "ip" top: "x" include { stage: "late" phase: TEST } }')
    assert check(capfd, "solver.prototxt", status=0)
    (folder / "solver.prototxt").write_text(SOLVER + 'test_state { stage: "late" }')
    assert "net.prototxt:5: layer 'x' (Mine)" in problem(capfd, "solver.prototxt")


def test_weights_and_states_are_held_against_the_net(folder, capfd):
    solver = caffe.get_solver("solver.prototxt")
    solver.snapshot()
    (folder / "net.prototxt").write_text(data_layer("lmdb", 2) + NET.replace("num_output: 3", "num_output: 5"))
    capfd.readouterr()
    assert "parameter 0 of layer 'ip' has shape (3, 288) there and (5, 288) in net.prototxt" in problem(
        capfd, "net.prototxt", "snap_iter_0.caffemodel")
    assert "layer 'ip'" in problem(capfd, "solver.prototxt", "snap_iter_0.solverstate")
    (folder / "net.prototxt").write_text(data_layer("lmdb", 2) + NET.replace('"ip"', '"other"'))
    assert "none of its layers has the name of one in net.prototxt" in problem(capfd, "net.prototxt", "snap_iter_0.caffemodel")
    os.remove("snap_iter_0.caffemodel")
    assert "its weights are neither at snap_iter_0.caffemodel, where they were written, nor beside it" in problem(
        capfd, "snap_iter_0.solverstate")


@pytest.mark.parametrize(("line", "cure"), [("caffe train --gpu 0,1 --solver=s", "write --processes N"),
                                            ("build/tools/caffe train -gpu=all", "write --processes N"),
                                            ("nccl = caffe.NCCL(solver, uid)", "without set_mode_gpu")])
def test_several_gpus_in_a_script(folder, capfd, monkeypatch, line, cure):
    (folder / "train.sh").write_text(f"#!/bin/sh\n\n{line}\n")
    for count, found in ((0, "none"), (1, "1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        said = problem(capfd, "train.sh")
        assert "train.sh:3: asks for several GPUs" in said and f"but torch finds {found} here" in said and cure in said
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["check", "train.sh"]) == 0
    assert "train.sh: script, trains on several GPUs: will run" in capfd.readouterr().out
    (folder / "train.sh").write_text("#!/bin/sh\ncaffe train --gpu 0,1,2\n")
    assert "but torch finds 2 here" in problem(capfd, "train.sh")


# -- data and binary files ---------------------------------------------------------------------------------------------
def test_obstacles_of_data_and_binary_files(folder, capfd):
    write(folder / "bad", {b"0": b"no datum"})
    assert "record 0 (key b'0') of bad is not a Datum message" in problem(capfd, "bad")
    write_images(folder / "mixed", [np.zeros((1, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)])
    assert "the images have 1 or 3 channels" in problem(capfd, "mixed")
    (folder / "level").mkdir()
    (folder / "level" / "CURRENT").write_text("MANIFEST-000002\n")
    assert "run `torchcaffe convert_leveldb level level_lmdb`, and write source: \"level_lmdb\"" in problem(capfd, "level")
    (folder / "empty").mkdir()
    assert "is a folder without a database" in problem(capfd, "empty")
    (folder / "half.caffemodel").write_bytes(b"\x0a\xff\xff")
    assert "half.caffemodel: is not a caffemodel, or is damaged or cut off" in problem(capfd, "half.caffemodel")
    (folder / "noise").write_bytes(b"\xff\0\xff" * 50)
    assert "noise: is none of the binary files of Caffe's" in problem(capfd, "noise")
    with h5py.File("groups.h5", "w") as file:
        file.create_group("something")
    assert "has no dataset" in problem(capfd, "groups.h5")


def test_sizes_that_differ_are_said(folder, capfd):
    write_images(folder / "uneven", [np.zeros((3, 4, 4), np.uint8), np.zeros((3, 5, 4), np.uint8)])
    assert check(capfd, "uneven", status=0) == ["uneven: LMDB, 2 records of 2 shapes (so crop_size is needed), labels 0 to 1: can be used"]


@pytest.mark.parametrize(("arguments", "words"), [(["none"], "there is no file none"), ([], "required: FILE"),
                                                    (["net.prototxt", "none", "lmdb", "too"], "there are no files none, too")])
def test_mistakes_in_flags(capfd, arguments, words):
    assert main(["check", *arguments]) == 2
    assert words in capfd.readouterr().err
