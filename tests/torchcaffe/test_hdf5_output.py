"""HDF5Output: what the file holds, once, and what the layer refuses."""
from __future__ import annotations

import h5py
import numpy as np
import pytest

from lmdbs import net
from torchcaffe.errors import CaffeError


def text(file, data: str = "dim: 3 dim: 2 dim: 4", label: str = "dim: 3") -> str:
    return (f'layer {{ name: "in" type: "Input" top: "data" top: "label" input_param {{ shape {{ {data} }} shape {{ {label} }} }} }}\n'
            f'layer {{ name: "out" type: "HDF5Output" bottom: "data" bottom: "label" hdf5_output_param {{ file_name: "{file}" }} }}\n')


def test_the_batch_is_in_the_file_with_four_axes(tmp_path):
    file = tmp_path / "out.h5"
    model = net(tmp_path, text(file))
    assert not file.exists()
    data = np.random.default_rng(0).random((3, 2, 4), np.float32)
    model.forward(data=data, label=np.arange(3, dtype=np.float32))
    with h5py.File(file) as written:
        np.testing.assert_array_equal(written["data"][()], data[..., None], strict=True)
        np.testing.assert_array_equal(written["label"][()], np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1), strict=True)
        assert set(written) == {"data", "label"}
    with pytest.raises(CaffeError, match="holds a batch already and takes no second one"):
        model.forward()


@pytest.mark.parametrize(("file", "shapes", "words"), [
    ("none/out.h5", {}, "no writable folder none"), ("", {}, "no file_name"),
    ("out.h5", {"label": "dim: 4"}, "3 rows of data and 4 labels"),
    ("out.h5", {"data": "dim: 3 dim: 1 dim: 1 dim: 1 dim: 1"}, "at most four axes"),
])
def test_what_caffe_refuses(tmp_path, monkeypatch, file, shapes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CaffeError, match=rf"layer 'out' \(HDF5Output\): .*{words}"):
        net(tmp_path, text(file, **shapes))
