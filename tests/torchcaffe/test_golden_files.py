"""Nets, blobs, weights and solver states that BVLC Caffe wrote (tests/golden, families proto and solvers), read and written again.

The golden runner checks what an engine does with these files; here are the files themselves.
"""
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from torchcaffe import formats
from torchcaffe.proto import caffe_pb2, prototxt, upgrade


def cases(golden: Path, pattern: str) -> list[Path]:
    found = sorted(path.parent for path in golden.glob(pattern))
    assert found
    return found


def hdf5(path: Path) -> dict:
    """Every group and dataset of a file: shape, type and bytes."""
    found = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found[name] = (item.shape, item.dtype, item[()].tobytes()) if isinstance(item, h5py.Dataset) else None

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def test_upgrades_are_caffes(golden):
    for case in cases(golden, "proto/*/before.prototxt"):
        solver = "solver" in json.loads((case / "case.json").read_text())["tool"]
        kind, upgraded = ((caffe_pb2.SolverParameter, upgrade.upgrade_solver) if solver else (caffe_pb2.NetParameter, upgrade.upgrade_net))
        before, after = (prototxt.parse((case / f"{name}.prototxt").read_text(), kind(), str(case)) for name in ("before", "after"))
        assert upgraded(before) == after, case.name
        assert upgraded(after) == upgraded(before), case.name


def test_blobs_and_datums(golden):
    for case in cases(golden, "proto/*/message.bin"):
        name = json.loads((case / "case.json").read_text())["message"].removeprefix("caffe.")
        message = getattr(caffe_pb2, name).FromString((case / "message.bin").read_bytes())
        arrays = np.load(case / "data.npz")
        blobs = message.blobs if name == "BlobProtoVector" else [message] if name == "BlobProto" else []
        for i, blob in enumerate(blobs):
            for key in ("data", "diff"):
                wanted = f"{key}/{i}" if name == "BlobProtoVector" else key
                if wanted in arrays.files:
                    np.testing.assert_array_equal(formats.blob_to_array(blob, diff=key == "diff"), arrays[wanted], err_msg=case.name)
        if blobs and blobs[0].HasField("shape"):
            diff = formats.blob_to_array(blobs[0], diff=True) if blobs[0].diff else None
            assert formats.array_to_blob(formats.blob_to_array(blobs[0]), diff) == blobs[0]


def test_models(golden):
    for case in cases(golden, "proto/*/model.caffemodel"):
        arrays = np.load(case / "data.npz")
        for file in case.glob("*.caffemodel*"):
            weights = dict(formats.read_weights(file))
            for key in arrays.files:
                layer, index = key.removeprefix("param/").rsplit("/", 1)
                if layer in weights and int(index) < len(weights[layer]):       # others are shared, or not in the file
                    blob = weights[layer][int(index)].reshape(arrays[key].shape).astype(np.float32)
                    np.testing.assert_array_equal(blob, arrays[key], err_msg=f"{file} {key}")


@pytest.mark.parametrize("end", ["", ".h5"])
def test_snapshots_are_read(golden, end):
    for case in cases(golden, "solvers/*/snapshot_iter_5.solverstate"):
        arrays = np.load(case / "data.npz")
        state = formats.read_state(case / f"snapshot_iter_5.solverstate{end}")
        assert (state.iter, state.learned_net) == (5, f"snapshot_iter_5.caffemodel{end}")
        assert state.current_step == json.loads((case / "case.json").read_text())["current_step_at_snapshot"]
        assert len(state.history) == sum(key.startswith("history@5/") for key in arrays.files)
        for i, history in enumerate(state.history):
            np.testing.assert_array_equal(history, arrays[f"history@5/{i}"])
        for layer, blobs in formats.read_weights(case / f"snapshot_iter_5.caffemodel{end}"):
            for i, blob in enumerate(blobs):
                np.testing.assert_array_equal(blob, arrays[f"param@5/{layer}/{i}"])


def test_snapshots_are_written_as_caffe_writes_them(golden, tmp_path):
    """From what the binary files hold: the binary state field for field, both HDF5 files dataset for dataset."""
    for case in cases(golden, "solvers/*/snapshot_iter_5.solverstate"):
        state = formats.read_state(case / "snapshot_iter_5.solverstate")
        formats.write_state(tmp_path / "s", state)
        theirs = (case / "snapshot_iter_5.solverstate").read_bytes()
        assert caffe_pb2.SolverState.FromString((tmp_path / "s").read_bytes()) == caffe_pb2.SolverState.FromString(theirs), case.name
        state.learned_net += ".h5"
        formats.write_state(tmp_path / "s.h5", state)
        assert hdf5(tmp_path / "s.h5") == hdf5(case / "snapshot_iter_5.solverstate.h5"), case.name
        net = caffe_pb2.NetParameter.FromString((case / "snapshot_iter_5.caffemodel").read_bytes())
        formats.write_weights(tmp_path / "w.h5", net)
        assert hdf5(tmp_path / "w.h5") == hdf5(case / "snapshot_iter_5.caffemodel.h5"), case.name
