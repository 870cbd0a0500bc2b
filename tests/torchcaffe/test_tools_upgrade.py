"""The upgrade tools, end to end: files that Caffe's own tools wrote from the same input, and what is said about others."""
from __future__ import annotations

import json
import os

import numpy as np
import pytest

from test_golden import CASES
from torchcaffe import formats
from torchcaffe.cli import main
from torchcaffe.proto import caffe_pb2, prototxt

OLD = [case for case in CASES if case.startswith(("proto/v", "proto/input", "proto/current", "proto/batch_norm", "proto/solver"))]


@pytest.mark.parametrize("case", OLD)
def test_text_files_become_what_caffe_makes_of_them(case, golden, tmp_path):
    told = json.loads((golden / case / "case.json").read_text())
    out = tmp_path / "out.prototxt"
    assert main([told["tool"], str(golden / case / "before.prototxt"), str(out)]) == told["exit_status"]
    kind = caffe_pb2.SolverParameter if "solver" in told["tool"] else caffe_pb2.NetParameter
    assert prototxt.read(out, kind()) == prototxt.read(golden / case / "after.prototxt", kind())


def test_binary_nets_become_what_caffe_makes_of_them(golden, tmp_path):
    folder, out = golden / "proto/model_v1", tmp_path / "out.caffemodel"
    assert main(["upgrade_net_proto_binary", str(folder / "model.caffemodel"), str(out)]) == 0
    ours, theirs = (formats.read_message(path, caffe_pb2.NetParameter(), "") for path in (out, folder / "upgraded.caffemodel"))
    assert ours == theirs and not ours.layers


def test_a_file_may_be_upgraded_in_its_place(golden, tmp_path, capfd):
    file = tmp_path / "net.prototxt"
    file.write_bytes((golden / "proto/v1_net/before.prototxt").read_bytes())
    assert main(["upgrade_net_proto_text", str(file), str(file)]) == 0
    assert "already in latest" not in capfd.readouterr().err
    text = file.read_text()
    assert "layers" not in text and main(["upgrade_net_proto_text", str(file), str(file)]) == 0
    assert file.read_text() == text and "already in latest proto format" in capfd.readouterr().err


def test_a_field_that_means_nothing_is_named(golden, tmp_path, capfd):
    main(["upgrade_net_proto_text", str(golden / "proto/v0_unknown/before.prototxt"), str(tmp_path / "out")])
    assert "means nothing to type" in capfd.readouterr().err


@pytest.mark.parametrize(("arguments", "words"), [
    (["upgrade_net_proto_text", "none", "out"], "none: cannot be read"),
    (["upgrade_net_proto_text", "solver", "out"], "solver:1:1: 'base_lr' belongs in a SolverParameter"),
    (["upgrade_net_proto_text", "mixed", "out"], "mixed: the net has both 'layer' and 'layers' blocks"),
    (["upgrade_net_proto_binary", "solver", "out"], "solver: is not a net in binary form"),
    (["upgrade_solver_proto_text", "twice", "out"], "twice: both 'solver_type' and 'type' are given"),
    (["upgrade_net_proto_text", "net", "none/out"], "none/out: cannot be written (No such file or directory)"),
    (["upgrade_net_proto_text", "net", os.devnull], f"{os.devnull}: is not a file; write to another name"),
    (["upgrade_net_proto_text", "net"], "the following arguments are required: OUT; see torchcaffe upgrade_net_proto_text --help"),
])
def test_mistakes_are_one_sentence_and_change_nothing(tmp_path, monkeypatch, capfd, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name, text in (("solver", "base_lr: 1"), ("mixed", 'layer { } layers { }'), ("twice", 'solver_type: ADAM type: "Adam"'),
                       ("net", 'name: "x"')):
        (tmp_path / name).write_text(text)
    before = sorted(os.listdir())
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert words in err.splitlines()[-1] and "Traceback" not in err and not out
    assert sorted(os.listdir()) == before


def test_weights_survive_the_upgrade(golden, tmp_path):
    source, out = golden / "proto/model_v1/model.caffemodel", tmp_path / "out.caffemodel"
    main(["upgrade_net_proto_binary", str(source), str(out)])
    for (name, blobs), (other, again) in zip(formats.read_weights(source), formats.read_weights(out), strict=True):
        assert name == other
        for a, b in zip(blobs, again, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
