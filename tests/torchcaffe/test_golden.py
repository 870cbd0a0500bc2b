"""The engine against BVLC Caffe 1.0: every golden vector, as tests/golden/README.md describes them."""
from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import check
import torchcaffe
from torchcaffe import formats
from torchcaffe.data import datum
from torchcaffe.proto import caffe_pb2, prototxt, upgrade


def _cases() -> list[str]:
    """Names of all cases, from the archives' tables of contents."""
    names = []
    for path in sorted(check.HERE.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            names += [str(Path(name).parent) for name in archive.getnames() if name.endswith("/case.json")]
    return names


CASES = _cases()
FIRST = (check.HERE / "first.txt").read_text().split()
RUNNABLE = [case for case in CASES if not case.startswith("proto/") or case.startswith("proto/model_")]
OLD_NETS = [case for case in CASES if case.startswith(("proto/v", "proto/input", "proto/current", "proto/batch_norm"))]


@pytest.fixture(autouse=True)
def module_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "caffe", torchcaffe)


def test_all_vectors_are_here():
    assert len(CASES) == 536 and len(FIRST) == 381
    assert set(FIRST) <= set(RUNNABLE)


@pytest.mark.parametrize("case", RUNNABLE)
def test_agrees_with_caffe(case, golden):
    result = check.run_case(golden / case, case.split("/")[0])
    if case not in FIRST and check.outcome(result) == "unregistered":
        pytest.skip(result)
    assert result == "ok"


def test_a_wrong_number_is_noticed(golden, tmp_path):
    """The runner itself: one value off, and the case differs."""
    source = golden / "layers/ReLU/default"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    arrays = dict(np.load(tmp_path / "data.npz"))
    arrays["out/y"].flat[-1] += 0.01
    np.savez(tmp_path / "data.npz", **arrays)
    assert check.run_case(tmp_path, "layers").startswith("out/y: 1 of ")


# -- the proto family: messages and older forms of files -------------------------------------------------------------------
@pytest.mark.parametrize("case", OLD_NETS)
def test_old_nets_are_upgraded_as_caffe_does(case, golden):
    before = prototxt.parse((golden / case / "before.prototxt").read_text(), caffe_pb2.NetParameter())
    after = prototxt.parse((golden / case / "after.prototxt").read_text(), caffe_pb2.NetParameter())
    assert upgrade.upgrade_net(before) == after


@pytest.mark.parametrize("case", ["proto/solver_enum", "proto/solver_string"])
def test_old_solvers_are_upgraded_as_caffe_does(case, golden):
    before = prototxt.parse((golden / case / "before.prototxt").read_text(), caffe_pb2.SolverParameter())
    after = prototxt.parse((golden / case / "after.prototxt").read_text(), caffe_pb2.SolverParameter())
    assert upgrade.upgrade_solver(before) == after


@pytest.mark.parametrize("case", ["proto/blob_legacy", "proto/blob_no_axes", "proto/blob_shape"])
def test_blobs_hold_what_caffe_wrote(case, golden):
    blob = caffe_pb2.BlobProto.FromString((golden / case / "message.bin").read_bytes())
    expected = np.load(golden / case / "data.npz")
    np.testing.assert_array_equal(formats.blob_to_array(blob), expected["data"], strict=True)
    if "diff" in expected:
        np.testing.assert_array_equal(formats.blob_to_array(blob, diff=True), expected["diff"], strict=True)


def test_vectors_of_blobs_hold_what_caffe_wrote(golden):
    vector = caffe_pb2.BlobProtoVector.FromString((golden / "proto/blob_vector/message.bin").read_bytes())
    expected = np.load(golden / "proto/blob_vector/data.npz")
    assert len(vector.blobs) == len(expected.files)
    for i, blob in enumerate(vector.blobs):
        np.testing.assert_array_equal(formats.blob_to_array(blob), expected[f"data/{i}"], strict=True)


@pytest.mark.parametrize("case", ["proto/datum_bytes", "proto/datum_floats", "proto/datum_unlabelled"])
def test_records_hold_what_caffe_wrote(case, golden):
    record = datum.parse((golden / case / "message.bin").read_bytes(), case)
    expected = np.load(golden / case / "data.npz")
    np.testing.assert_array_equal(datum.image(record, case), expected["data"], strict=True)
    assert record.HasField("label") == ("label" in expected) and record.label == expected.get("label", 0)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("proto/model_")])
def test_weight_files_hold_the_layers_caffe_wrote(case, golden):
    folder = golden / case
    wanted = [(layer["name"], len(layer["blob_shapes"])) for layer in json.loads((folder / "case.json").read_text())["layers"]]
    found = formats.read_weights(folder / "model.caffemodel")
    assert [(name, len(blobs)) for name, blobs in found] == wanted
    if (folder / "upgraded.caffemodel").exists():
        for (name, blobs), (other, again) in zip(found, formats.read_weights(folder / "upgraded.caffemodel"), strict=True):
            assert name == other
            for a, b in zip(blobs, again, strict=True):
                np.testing.assert_array_equal(a, b, strict=True)
