"""Inputs that fuzzing found and that ended in something else than an answer or a CaffeError: each now has one or the other."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import torchcaffe as caffe
from torchcaffe.errors import CaffeError

X = 'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 dim: 3 dim: 4 dim: 4 } } }\n'


def over_x(kind: str, settings: str) -> str:
    return X + f'layer {{ name: "it" type: "{kind}" bottom: "x" top: "y" {settings} }}'


def passes(folder: Path, text: str | bytes, value: float = 1) -> np.ndarray:
    """The output y of a net over x, after a pass forth and back."""
    path = folder / "net.prototxt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    net = caffe.Net(str(path), caffe.TRAIN)
    net.blobs["x"].data[...] = value
    net.forward()
    net.backward()
    return net.blobs["y"].data


def test_enum_values_that_are_no_utf8(tmp_path):
    with pytest.raises(CaffeError, match="net.prototxt:1:1: holds a value that is not UTF-8"):
        passes(tmp_path, b'layer { name: "x" type: "Input" top: "x" phase: \xbb }')


@pytest.mark.parametrize("region", ["ACROSS_CHANNELS", "WITHIN_CHANNEL"])
def test_lrn_of_nothing_and_over_everything(tmp_path, region):
    setting = f"lrn_param {{ local_size: %d norm_region: {region} alpha: 0.5 }}"
    assert passes(tmp_path, over_x("LRN", setting % 3).replace("dim: 4 dim: 4", "dim: 4 dim: 0")).shape == (2, 3, 4, 0)
    vast = passes(tmp_path, over_x("LRN", setting % (2**30 + 1)))
    np.testing.assert_allclose(vast, np.ones((2, 3, 4, 4)), rtol=1e-6)               # alpha / n of anything is nothing
    wide, further = (passes(tmp_path, over_x("LRN", setting % size)) for size in (7, 9))
    assert 0.5 < wide.min() < further.min() < 1                                     # beyond the edges there are zeros; n counts them


def test_exp_of_a_shift_beyond_the_numbers(tmp_path):
    assert np.isinf(passes(tmp_path, over_x("Exp", "exp_param { shift: 1e38 }"))).all()


@pytest.mark.parametrize(("kind", "setting"), [
    ("Convolution", "convolution_param { num_output: 1 kernel_size: 1 pad: 1048576 stride: 1048576 }"),
    ("Deconvolution", "convolution_param { num_output: 1 kernel_size: 3 pad: 1048500 stride: 699000 }"),
    ("Im2col", "convolution_param { kernel_size: 1 pad: 1048576 stride: 1048576 }"),
    ("Pooling", "pooling_param { kernel_size: 1048576 pad: 1048575 stride: 1048576 }"),
])
def test_padding_beyond_all_measure(tmp_path, kind, setting):
    """In a process of its own: the first two ended it with SIGSEGV."""
    (tmp_path / "net.prototxt").write_text(over_x(kind, setting))
    path = str(Path(caffe.__file__).parents[1])
    done = subprocess.run([sys.executable, "-m", "torchcaffe", "time", "--model", "net.prototxt"], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONPATH": path}, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"torchcaffe: net.prototxt:2: layer 'it' ({kind}), the ") and "is not possible" in last
