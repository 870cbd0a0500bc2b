"""Sizes that nobody has memory for are refused with one sentence, before anything of that size is made.

Everything is tried in one process that may take 1 GiB beyond what it has after its imports.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest

import torchcaffe
from torchcaffe import formats
from torchcaffe.proto import caffe_pb2

X = 'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 dim: 3 dim: 4 dim: 4 } } } '


def over_x(kind: str, settings: str) -> str:
    return X + f'layer {{ name: "it" type: "{kind}" bottom: "x" top: "y" {settings} }}'


def alone(kind: str, settings: str) -> str:
    return f'layer {{ name: "it" type: "{kind}" top: "y" {settings} }}'


NETS = {
    "a blob of 2^40": alone("Input", "input_param { shape { dim: 1099511627776 } }"),
    "a product of 2^64": alone("Input", "input_param { shape { dim: 65536 dim: 65536 dim: 65536 dim: 65536 } }"),
    "a sequence of 2^40": 'input: "x" input_shape { dim: 1048576 dim: 1048576 }',
    "old input_dim": 'input: "x" input_dim: 65536 input_dim: 65536 input_dim: 256 input_dim: 1',
    "dummy": alone("DummyData", "dummy_data_param { shape { dim: 1048576 dim: 1048576 } }"),
    "drawn dummy": alone("DummyData", 'dummy_data_param { shape { dim: 1099511627776 } data_filler { type: "gaussian" } }'),
    "old dummy": alone("DummyData", "dummy_data_param { num: 4294967295 channels: 4294967295 height: 1 width: 1 }"),
    "parameter": alone("Parameter", "parameter_param { shape { dim: 1099511627776 } }"),
    "memory data": alone("MemoryData", "memory_data_param { batch_size: 4294967295 channels: 4294967295 height: 65536 width: 65536 }")
    .replace('top: "y"', 'top: "y" top: "z"'),
    "inner product": over_x("InnerProduct", 'inner_product_param { num_output: 4294967295 weight_filler { type: "xavier" } }'),
    "channels": over_x("Convolution", 'convolution_param { num_output: 4294967295 kernel_size: 3 weight_filler { type: "gaussian" } }'),
    "kernel": over_x("Convolution", "convolution_param { num_output: 1 kernel_size: 4294967295 pad: 4294967295 }"),
    "pad": over_x("Convolution", "convolution_param { num_output: 1 kernel_size: 1 pad: 1048576 }"),
    "bilinear": over_x("Deconvolution", 'convolution_param { num_output: 3 kernel_size: 2147483648 weight_filler { type: "bilinear" } }'),
    "stride": over_x("Deconvolution", "convolution_param { num_output: 1 kernel_size: 1 stride: 1048576 }"),
    "im2col": over_x("Im2col", "convolution_param { kernel_size: 1 pad: 1048576 }"),
    "pool": over_x("Pooling", "pooling_param { kernel_size: 4294967295 pad: 4294967294 }"),
    "pyramid": over_x("SPP", "spp_param { pyramid_height: 4294967295 }"),
    "tiles": over_x("Tile", "tile_param { tiles: 2147483647 }"),
    "reshape": over_x("Reshape", "reshape_param { shape { dim: 1099511627776 } }"),
    "reshape to a rest": over_x("Reshape", "reshape_param { shape { dim: 1099511627776 dim: -1 } }"),
    "embed": over_x("Embed", "embed_param { input_dim: 4294967295 num_output: 4294967295 }"),
    "crop": alone("Data", 'transform_param { crop_size: 4294967295 } data_param { source: "good" batch_size: 1 backend: LMDB }'),
    "batch": alone("Data", 'data_param { source: "good" batch_size: 4294967295 backend: LMDB }'),
    "record": alone("Data", 'data_param { source: "bad" batch_size: 1 backend: LMDB }'),
    "mean": alone("Data", 'transform_param { mean_file: "mean.binaryproto" } data_param { source: "good" batch_size: 1 backend: LMDB }'),
    "rows": 'layer { name: "it" type: "HDF5Data" top: "data" hdf5_data_param { source: "rows.txt" batch_size: 1 } }',
    "many rows": 'layer { name: "it" type: "HDF5Data" top: "small" hdf5_data_param { source: "rows.txt" batch_size: 4294967295 } }',
    "image": alone("ImageData", 'image_data_param { source: "list.txt" batch_size: 1 new_height: 1048576 new_width: 1048576 }'),
}
FILES = ["shape.caffemodel", "legacy.caffemodel", "empty.caffemodel", "huge.caffemodel.h5", "shape.solverstate", "huge.solverstate.h5",
         "mean.binaryproto"]
PROGRAM = """
import json, resource, sys
import torchcaffe as caffe
from torchcaffe import cli, formats
from torchcaffe.errors import CaffeError

names = json.load(open("names.json"))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30,) * 2)
found = {}
def refused(name, action):
    try:
        action()
        found[name] = "accepted"
    except CaffeError as error:
        found[name] = str(error)
    except BaseException as error:
        found[name] = f"{type(error).__name__}\\n{error}"
for name in names["nets"]:
    refused(name, lambda: caffe.Net(name + ".prototxt", caffe.TEST).forward())
for name in names["files"]:
    read = formats.read_state if "solverstate" in name else formats.read_mean if "mean" in name else formats.read_weights
    refused(name, lambda: read(name))
print(json.dumps(found), flush=True)
sys.exit(cli.main(["time", "--model", "possible.prototxt"]))
"""


def write_files(folder: Path) -> None:
    """What the nets read and FILES."""
    vast = caffe_pb2.BlobProto(shape=caffe_pb2.BlobShape(dim=[2**20, 2**20]), data=[1, 2])
    old = caffe_pb2.BlobProto(num=65536, channels=65536, height=256, width=1, data=[1])
    empty = caffe_pb2.BlobProto(shape=caffe_pb2.BlobShape(dim=[0, 2**62, 2**62]))
    for name, blob in (("shape", vast), ("legacy", old), ("empty", empty)):
        net = caffe_pb2.NetParameter()
        net.layer.add(name="ip").blobs.append(blob)
        formats.write_message(folder / f"{name}.caffemodel", net)
    formats.write_message(folder / "shape.solverstate", caffe_pb2.SolverState(iter=1, learned_net="", history=[vast]))
    formats.write_message(folder / "mean.binaryproto", old)
    for name, dataset in (("huge.caffemodel.h5", "data/ip/0"), ("huge.solverstate.h5", "history/0"), ("rows.h5", "data")):
        with h5py.File(folder / name, "w") as file:
            file.create_dataset(dataset, (2**20, 2**20), np.float32, chunks=(64, 64))     # none of its chunks is written
            file["iter"], file["current_step"], file["learned_net"] = [np.int32(1)], [np.int32(0)], b""
            file["small"] = np.zeros((2, 3), np.float32)
    (folder / "rows.txt").write_text("rows.h5\n")
    image = caffe_pb2.Datum(channels=1, height=2, width=2, data=bytes(4))
    absurd = caffe_pb2.Datum(channels=2**31 - 1, height=2**31 - 1, width=2**31 - 1, data=bytes(4))
    for name, record in (("good", image), ("bad", absurd)):
        with lmdb.open(str(folder / name), map_size=2**20, lock=False) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"0", record.SerializeToString())
    from PIL import Image
    Image.new("RGB", (2, 2)).save(folder / "image.png")
    (folder / "list.txt").write_text("image.png 0\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path):
    write_files(tmp_path)
    for name, text in NETS.items():
        (tmp_path / f"{name}.prototxt").write_text(text)
    (tmp_path / "possible.prototxt").write_text(alone("DummyData", "dummy_data_param { shape { dim: 2147483647 } }"))      # 8 GiB
    (tmp_path / "names.json").write_text(json.dumps({"nets": list(NETS), "files": FILES}))
    environment = os.environ | {"PYTHONPATH": str(Path(torchcaffe.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    wrong = {name: sentence for name, sentence in found.items() if "\n" in sentence or sentence == "accepted"}
    assert not wrong
    unnamed = {name: found[name] for name in NETS if f"{name}.prototxt" not in found[name]}
    assert not unnamed
    assert all(found[name].startswith(f"{name}: ") for name in FILES)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("torchcaffe: the memory is full; ")
