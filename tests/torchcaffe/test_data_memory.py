"""MemoryData: arrays from a script."""
from __future__ import annotations

import numpy as np
import pytest

from lmdbs import batches, net
from torchcaffe.errors import CaffeError

LAYER = """layer { name: "in" type: "MemoryData" top: "data" top: "label"
                   memory_data_param { batch_size: 2 channels: 1 height: 2 width: 3 } }"""


def arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).random((count, 1, 2, 3), np.float32), np.arange(count, dtype=np.float32)


def test_batches_follow_each_other_and_wrap(tmp_path):
    model, (data, labels) = net(tmp_path, LAYER), arrays(6)
    model.set_input_arrays(data, labels)
    assert model.blobs["label"].shape == (2,)
    np.testing.assert_array_equal(batches(model, 4).reshape(8, 1, 2, 3), data[[0, 1, 2, 3, 4, 5, 0, 1]])
    assert model.blobs["label"].shape == (2, 1, 1, 1)


def test_new_arrays_start_at_their_first_record(tmp_path):
    model, (data, labels) = net(tmp_path, LAYER), arrays(6)
    model.set_input_arrays(data, labels)
    batches(model, 1)
    model.set_input_arrays(data[:4].copy(), 10 + labels[:4].reshape(-1, 1, 1, 1))
    assert batches(model, 1, "label").ravel().tolist() == [10, 11]


def test_a_batch_does_not_change_with_the_array(tmp_path):
    model, (data, labels) = net(tmp_path, LAYER), arrays(2)
    model.set_input_arrays(data, labels)
    model.forward()
    data[...] = -1
    assert model.blobs["data"].data.min() >= 0


@pytest.mark.parametrize(("change", "reason"), [
    (lambda d, n: (d.astype(float), n), "data array must be float32"),
    (lambda d, n: (d, n.astype(int)), "labels array must be float32"),
    (lambda d, n: (d[:, :, ::-1], n), "C-contiguous"),
    (lambda d, n: (d.reshape(6, 6), n), r"shape \(6, 6\); it must be \(n, 1, 2, 3\)"),
    (lambda d, n: (d, n.reshape(2, 3)), r"labels array has shape \(2, 3\)"),
    (lambda d, n: (d, n[:4]), "6 records and 4 labels"),
    (lambda d, n: (d[:5], n[:5]), "multiple of batch_size 2"),
    (lambda d, n: (d[:0], n[:0]), "multiple of batch_size 2"),
])
def test_arrays_that_do_not_fit(tmp_path, change, reason):
    with pytest.raises(CaffeError, match=reason):
        net(tmp_path, LAYER).set_input_arrays(*change(*arrays(6)))


def test_forward_before_there_are_arrays(tmp_path):
    with pytest.raises(CaffeError, match="call set_input_arrays"):
        net(tmp_path, LAYER).forward()
