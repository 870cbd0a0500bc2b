"""extract_features, end to end: records that hold the net's blobs, and what it says about bad input."""
from __future__ import annotations

import os

import lmdb
import numpy as np
import pytest

import torchcaffe as caffe
from lmdbs import data_layer, numbered, write_images
from torchcaffe.cli import main
from torchcaffe.proto import caffe_pb2

NET = """layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 3 kernel_size: 5 weight_filler { type: "xavier" } } }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "quiet" type: "Silence" bottom: "data_label" }
"""


@pytest.fixture(autouse=True)
def net(tmp_path, monkeypatch):
    """A net on 7 images, in the current folder, with its weights."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "lmdb", numbered(7))
    (tmp_path / "net.prototxt").write_text(data_layer("lmdb", 5, "scale: 0.01") + NET)
    caffe.set_random_seed(3)
    model = caffe.Net("net.prototxt", caffe.TEST)
    model.save("weights.caffemodel")
    return model


def features(path: str) -> tuple[list[bytes], np.ndarray]:
    with lmdb.open(path, readonly=True, lock=False) as environment, environment.begin() as transaction:
        keys, values = zip(*transaction.cursor(), strict=True)
    data = [caffe_pb2.Datum.FromString(value) for value in values]
    return list(keys), np.array([np.reshape(d.float_data, (d.channels, d.height, d.width)) for d in data], np.float32)


@pytest.mark.parametrize("device", [[], ["CPU"]])
def test_features_are_the_blobs_of_each_pass_in_order(net, device):
    assert main(["extract_features", "weights.caffemodel", "net.prototxt", "conv,ip", "one,two", "2", "lmdb", *device]) == 0
    for path, name in (("one", "conv"), ("two", "ip")):
        net.layers[0].cursor = 0
        want = [net.forward(blobs=[name])[name].copy() for _ in range(2)]
        keys, found = features(path)
        assert keys == [b"%010d" % i for i in range(10)]
        np.testing.assert_array_equal(found.reshape(np.concatenate(want).shape), np.concatenate(want))
    assert found.shape == (10, 4, 1, 1)


@pytest.mark.parametrize(("changed", "words"), [
    ({1: "none"}, "none: cannot be read"), ({2: "none"}, "none: cannot be read"),
    ({3: "conv,nothing", 4: "a,b"}, "net.prototxt: no blob 'nothing'; there are data, data_label, conv, ip"),
    ({4: "a,b"}, "1 blob name(s) and 2 dataset name(s)"), ({4: "lmdb"}, "lmdb exists already"), ({5: "0"}, "num_mini_batches is 0"),
    ({5: "x"}, "num_mini_batches: invalid int value"),
    ({6: "leveldb"}, "LevelDB is not written here"), ({6: "sql"}, "invalid choice: 'sql'"),
    ({7: "CPU", 8: "x"}, "DEVICE_ID 'x' is not the number of a GPU"),
])
def test_bad_arguments(capfd, changed, words):
    arguments = {0: "extract_features", 1: "weights.caffemodel", 2: "net.prototxt", 3: "conv", 4: "out", 5: "1", 6: "lmdb"} | changed
    before = sorted(os.listdir())
    assert main(list(arguments.values())) == 2
    out, err = capfd.readouterr()
    assert words in err.splitlines()[-1] and "Traceback" not in err and not out
    assert sorted(os.listdir()) == before
