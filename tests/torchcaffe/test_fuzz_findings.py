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


def solver(folder: Path, settings: str, rule: str = "SGD") -> caffe.Solver:
    """A solver of an inner product, whose rate is base_lr 1 times what `settings` make of it."""
    (folder / "net.prototxt").write_text(X + """
        layer { name: "ip" type: "InnerProduct" bottom: "x" top: "ip" inner_product_param { num_output: 1 } }
        layer { name: "loss" type: "Reduction" bottom: "ip" top: "loss" loss_weight: 1 }""")
    (folder / "solver.prototxt").write_text(
        f'net: "{folder}/net.prototxt" type: "{rule}" base_lr: 1 snapshot_prefix: "{folder}/s" {settings}')
    return caffe.get_solver(str(folder / "solver.prototxt"))


@pytest.mark.parametrize(("settings", "steps", "rate"), [
    ('lr_policy: "sigmoid" gamma: 3e38 stepsize: 8', 1, 0),
    ('lr_policy: "inv" gamma: 3e38 power: -9', 1, np.inf),
    ('lr_policy: "poly" power: 0.5', 1, np.inf),                        # (1 - 1 / 0) ^ 0.5, as max_iter is missing
    ('lr_policy: "poly" max_iter: 2 power: 0.5', 3, np.nan),            # once a complex number
    ('lr_policy: "exp" gamma: 1e38', 9, np.inf),
])
def test_rates_are_those_of_c_where_python_s_floats_raise(tmp_path, settings, steps, rate):
    made = solver(tmp_path, settings)
    made.step(steps)
    np.testing.assert_allclose(made.lr, rate, atol=1e-300)
    made.step(1)


@pytest.mark.parametrize("settings", ["momentum: 1", "momentum: 1e38", "momentum: 0.9 momentum2: 2"])
def test_adam_with_momenta_that_make_no_sense(tmp_path, settings):
    made = solver(tmp_path, f'lr_policy: "fixed" {settings}', "Adam")
    made.step(12)
    assert made.iter == 12


def test_tests_of_no_batch(tmp_path):
    solver(tmp_path, 'lr_policy: "fixed" test_iter: 0 test_interval: 1 test_compute_loss: true').step(2)


def test_paths_with_a_zero(tmp_path):
    with pytest.raises(CaffeError, match=r"solver.prototxt: a string holds the character .0"):
        solver(tmp_path, r'lr_policy: "fixed" test_net: "a\000b" test_iter: 1 test_interval: 1')
    made = solver(tmp_path, 'lr_policy: "fixed"')
    with pytest.raises(CaffeError, match="cannot be read"):
        made.net.copy_from("a\0b")


def test_states_with_impossible_paths_or_vast_and_empty_blobs(tmp_path):
    made, path = solver(tmp_path, 'lr_policy: "fixed"'), tmp_path / "s.solverstate"
    shapes = {b"\x3a\x04\x0a\x02\x01\x30": 48, b"\x3a\x02\x08\x01": 1}          # (1, 48) and (1), and how many zeros
    blobs = [shape + b"\x2a" + varint(4 * count) + bytes(4 * count) for shape, count in shapes.items()]
    history = b"".join(b"\x1a" + varint(len(blob)) + blob for blob in blobs)
    for name, words in ((b"a\nb\0", r"is damaged: it names 'a\\nb\\x00' as the file of its weights"), (b"\xc4.caffemodel", "No such file"),
                        (b"a" * 5000, "File name too long")):
        path.write_bytes(b"\x08\x01\x12" + varint(len(name)) + name + history)
        with pytest.raises(CaffeError, match=words):
            made.restore(path)
    dims = b"".join(b"\x08" + varint(size) for size in (2**24, 2**30, 2**30, 0))
    path.write_bytes(b"\x08\x01\x12\x00\x1a" + varint(len(dims) + 2) + b"\x3a" + varint(len(dims)) + dims)
    with pytest.raises(CaffeError, match="has shape .* but 0 elements"):
        made.restore(path)


def test_names_with_line_ends_and_escapes_are_told_in_one_line(tmp_path):
    (tmp_path / "a.caffemodel").write_bytes(b"\x12\x08\x0a\x06\x12\x04a\n\x1bb")                 # a V0 layer of type a, line end, escape, b
    with pytest.raises(CaffeError, match=r"there is no V0 layer type 'a\\n\\x1bb'$"):
        solver(tmp_path, 'lr_policy: "fixed"').net.copy_from(str(tmp_path / "a.caffemodel"))


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


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


def test_argmax_of_a_single_axis(tmp_path):
    assert (passes(tmp_path, over_x("ArgMax", "").replace("dim: 2 dim: 3 dim: 4 dim: 4", "dim: 2")) == np.zeros((2, 1, 1))).all()


EMPTY = [(4,), (0,), (2, 0), (0, 3), (2, 0, 4, 4), (0, 3, 4, 4), (2, 3, 0, 4)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize(("kind", "setting"), [
    ("ArgMax", ""), ("Scale", "scale_param { bias_term: true }"), ("MVN", ""), ("MVN", "mvn_param { across_channels: true }"),
    ("Convolution", "convolution_param { num_output: 2 kernel_size: 3 }"),
    ("Deconvolution", "convolution_param { num_output: 2 kernel_size: 3 }"),
    ("Pooling", "pooling_param { kernel_size: 2 }"), ("Pooling", "pooling_param { global_pooling: true }"),
    ("SPP", "spp_param { pyramid_height: 2 }"),
])
def test_blobs_without_elements_or_without_axes(tmp_path, shape, kind, setting):
    """They pass, or a layer refuses them: torch's errors are not for users."""
    dims = " ".join(f"dim: {size}" for size in shape)
    try:
        passes(tmp_path, over_x(kind, setting).replace("dim: 2 dim: 3 dim: 4 dim: 4", dims))
    except CaffeError as error:
        assert f"layer 'it' ({kind})" in str(error)
