"""pycaffe's io functions, there and back."""
from __future__ import annotations

import numpy as np
import pytest

from torchcaffe import io
from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_datum_gives_back_its_array(dtype):
    array = (np.random.default_rng(0).random((3, 4, 5)) * 255).astype(dtype)
    datum = caffe_pb2.Datum.FromString(io.array_to_datum(array, 7).SerializeToString())
    assert datum.label == 7 and bool(datum.data) == (dtype == np.uint8)
    np.testing.assert_array_equal(io.datum_to_array(datum), array)


def test_a_datum_without_label_has_none():
    assert not io.array_to_datum(np.zeros((1, 1, 1), np.uint8)).HasField("label")


def test_a_blob_gives_back_its_arrays():
    array = np.random.default_rng(0).random((2, 3)).astype(np.float32)
    blob = io.array_to_blobproto(array, diff=array + 1)
    np.testing.assert_array_equal(io.blobproto_to_array(blob), array)
    np.testing.assert_array_equal(io.blobproto_to_array(blob, return_diff=True), array + 1)


def test_legacy_dims_win():
    blob = caffe_pb2.BlobProto(data=range(6), num=1, channels=2, height=1, width=3, shape=caffe_pb2.BlobShape(dim=[6]))
    assert io.blobproto_to_array(blob).shape == (1, 2, 1, 3)


def test_shapes_that_do_not_fit():
    with pytest.raises(CaffeError, match="three axes"):
        io.array_to_datum(np.zeros((2, 2)))
    with pytest.raises(CaffeError, match="holds 3 values"):
        io.datum_to_array(caffe_pb2.Datum(channels=1, height=2, width=2, data=b"abc"))
    with pytest.raises(CaffeError, match="holds 2 values"):
        io.blobproto_to_array(caffe_pb2.BlobProto(data=[1, 2], shape=caffe_pb2.BlobShape(dim=[3])))
