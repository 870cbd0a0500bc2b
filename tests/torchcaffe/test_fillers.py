"""Fillers: distributions, the rules of fan-in and fan-out, and what is refused."""
from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torchcaffe.errors import CaffeError
from torchcaffe.layers.fillers import filler
from torchcaffe.proto import caffe_pb2


def draw(shape, seed=0, **fields):
    return filler(caffe_pb2.FillerParameter(**fields), shape)(np.random.default_rng(seed))


@pytest.mark.parametrize("fields", [{}, {"type": "uniform"}, {"type": "gaussian"}, {"type": "gaussian", "sparse": 2}, {"type": "xavier"},
                                    {"type": "msra"}, {"type": "positive_unitball"}])
def test_every_filler_draws_float32_of_the_shape_and_the_same_from_the_same_generator(fields):
    first, second, other = (draw((4, 3, 2), seed, **fields) for seed in (5, 5, 6))
    assert first.dtype == np.float32 and first.shape == (4, 3, 2)
    assert np.array_equal(first, second)
    assert np.array_equal(first, other) == (not fields)


def test_a_filler_nobody_wrote_is_zero():
    assert not draw((3,)).any()
    assert draw((), value=0.25).shape == () and draw((), value=0.25) == 0.25


def test_uniform_spans_min_to_max():
    values = draw((100, 100), type="uniform", min=-2, max=4)
    assert -2 <= values.min() < -1.99 and 3.99 < values.max() < 4
    assert abs(values.mean() - 1) < 0.06


def test_gaussian_has_mean_and_std():
    values = draw((100, 100), type="gaussian", mean=3, std=0.5)
    assert abs(values.mean() - 3) < 0.02 and abs(values.std() - 0.5) < 0.02


def test_sparse_gaussian_keeps_about_so_many_values_per_output():
    values = draw((200, 100), type="gaussian", sparse=20)
    assert abs((values != 0).mean() - 20 / 200) < 0.01
    assert abs(values[values != 0].std() - 1) < 0.1


@pytest.mark.parametrize(("norm", "n"), [("FAN_IN", 50 * 9), ("FAN_OUT", 40 * 9), ("AVERAGE", 45 * 9)])
def test_xavier_and_msra_divide_by_the_chosen_fan(norm, n):
    shape, mode = (40, 50, 3, 3), caffe_pb2.FillerParameter.VarianceNorm.Value(norm)
    xavier, msra = draw(shape, type="xavier", variance_norm=mode), draw(shape, type="msra", variance_norm=mode)
    assert sqrt(3 / n) * 0.999 < np.abs(xavier).max() <= sqrt(3 / n)
    assert abs(msra.std() / sqrt(2 / n) - 1) < 0.02


def test_fan_out_of_a_vector_is_its_length():
    values = draw((1000,), type="msra", variance_norm=caffe_pb2.FillerParameter.FAN_OUT)
    assert abs(values.std() / sqrt(2 / 1000) - 1) < 0.1


def test_positive_unitball_rows_add_up_to_one():
    values = draw((7, 3, 5), type="positive_unitball")
    assert values.min() > 0 and np.allclose(values.reshape(7, -1).sum(1), 1, atol=1e-6)


def test_bilinear_weights_interpolate_in_a_deconvolution():
    weights = draw((1, 1, 4, 4), type="bilinear")
    assert np.allclose(weights[0, 0, 0], [0.0625, 0.1875, 0.1875, 0.0625])
    ramp = torch.arange(6.0).repeat(6, 1)[None, None]
    fine = F.conv_transpose2d(ramp, torch.from_numpy(weights), stride=2, padding=1)[0, 0]
    assert torch.allclose(fine[6, 1:-1].diff(), torch.full((9,), 0.5))


@pytest.mark.parametrize(("shape", "fields", "words"), [
    ((2,), {"type": "gausian"}, "unknown filler type 'gausian'"),
    ((2,), {"type": "uniform", "sparse": 1}, "never sparse"),
    ((2,), {"type": "gaussian", "sparse": 3}, "sparse 3"),
    ((), {"type": "xavier"}, "at least one axis"),
    ((0, 3), {"type": "msra"}, "one element"),
    ((2, 2, 3, 4), {"type": "bilinear"}, "square kernel"),
])
def test_what_does_not_fit_is_refused(shape, fields, words):
    with pytest.raises(CaffeError, match=words):
        filler(caffe_pb2.FillerParameter(**fields), shape)
