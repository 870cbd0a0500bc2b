"""What is no regular file is refused in a sentence, before anything is read of it: a device has no end, and a pipe may wait for ever."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

import torchcaffe as caffe
from torchcaffe import formats, io
from torchcaffe.cli import main
from torchcaffe.data import images
from torchcaffe.data.hdf5 import RowFiles
from torchcaffe.layers.window_data import read_windows
from torchcaffe.proto import prototxt

READERS = {
    "net": prototxt.read_net, "solver": prototxt.read_solver, "weights": formats.read_weights, "state": formats.read_state,
    "mean": formats.read_mean, "list of images": images.read_list, "image": images.read_file, "image of io": io.load_image,
    "window file": lambda path: read_windows(path, 0.5, 0.5), "list of HDF5 files": lambda path: RowFiles(path, ["data"]),
    "HDF5 file": lambda path: listed(path), "infogain matrix": lambda path: infogain(path),
    "net with weights": lambda path: caffe.Net("net.prototxt", caffe.TEST, weights=path),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("net.prototxt").write_text('layer { name: "x" type: "DummyData" top: "x" dummy_data_param { shape { dim: 1 } } }')
    return tmp_path


def listed(path: str) -> RowFiles:
    Path("list").write_text(path)
    return RowFiles("list", ["data"])


def infogain(path: str) -> caffe.Net:
    Path("loss.prototxt").write_text(f'''
      layer {{ name: "x" type: "DummyData" top: "x" top: "label" dummy_data_param {{ shape {{ dim: 2 dim: 3 }} shape {{ dim: 2 }} }} }}
      layer {{ name: "l" type: "InfogainLoss" bottom: "x" bottom: "label" infogain_loss_param {{ source: "{path}" }} }}''')
    return caffe.Net("loss.prototxt", caffe.TRAIN)


@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
@pytest.mark.parametrize("reader", READERS)
def test_devices_and_pipes_are_refused(reader, path):
    with pytest.raises(caffe.CaffeError, match=f"{path}.*a device, a pipe or a socket, not a file"):
        READERS[reader](path)


@pytest.mark.parametrize("command", [["train", "--solver", "pipe"], ["check", "/dev/zero"], ["summary", "pipe"],
                                     ["test", "--model", "net.prototxt", "--weights", "/dev/zero"],
                                     ["upgrade_net_proto_text", "pipe", "new"]])
def test_commands_refuse_them_too(command, capfd):
    assert main(command) in (1, 2)
    assert "a device, a pipe or a socket, not a file" in "".join(capfd.readouterr())
