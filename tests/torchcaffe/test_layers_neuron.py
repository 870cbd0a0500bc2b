"""Layers that treat every element alike."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from one_layer import draw, gradients_are_true, make, run
from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2


@pytest.mark.parametrize(("kind", "text"), [
    ("ReLU", ""), ("ReLU", "relu_param { negative_slope: 0.1 }"), ("PReLU", ""), ("PReLU", "prelu_param { channel_shared: true }"),
    ("ELU", "elu_param { alpha: 0.5 }"), ("Sigmoid", ""), ("TanH", ""), ("Power", "power_param { power: 3 scale: 2 shift: 0.5 }"),
    ("Exp", "exp_param { base: 2 scale: 0.5 shift: 1 }"), ("AbsVal", ""), ("BNLL", ""), ("Clip", "clip_param { min: -0.5 max: 0.7 }"),
    ("Swish", "swish_param { beta: 2 }"),
])
def test_gradients_are_those_of_the_function(kind, text):
    assert gradients_are_true(make(kind, (2, 3, 4), text=text), draw(2, 3, 4))


def test_log_has_a_true_gradient_where_its_argument_is_positive():
    layer = make("Log", (2, 3), text="log_param { base: 10 scale: 2 shift: 3 }")
    x = draw(2, 3).detach().abs().requires_grad_()
    assert gradients_are_true(layer, x)
    assert torch.allclose(run(layer, x)[0], torch.log10(2 * x + 3))


@pytest.mark.parametrize(("kind", "text", "slope"), [
    ("ReLU", "", 0), ("ReLU", "relu_param { negative_slope: 0.25 }", 0.25), ("PReLU", "", 0.25), ("ELU", "elu_param { alpha: 0.5 }", 0.5),
    ("AbsVal", "", 0), ("Clip", "clip_param { min: 0 max: 1 }", 1), ("Clip", "clip_param { min: -1 max: 0 }", 1)])
def test_the_gradient_at_zero_is_caffe_s(kind, text, slope):
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    run(make(kind, (1, 2), text=text), x)[0].sum().backward()
    assert x.grad.tolist() == [[slope, slope]]


def test_a_shared_slope_has_no_axes_and_gathers_all_gradients():
    layer = make("PReLU", (1, 3), text="prelu_param { channel_shared: true }")
    x = torch.tensor([[-1.0, -2.0, 5.0]], dtype=torch.float64)
    run(layer, x)[0].sum().backward()
    assert layer.params[0].shape == () and layer.params[0].grad == -3


def test_prelu_refuses_a_blob_without_channels():
    with pytest.raises(CaffeError, match=r"'it' \(PReLU\).*\(4,\)"):
        make("PReLU", (4,))


class TestPower:
    def test_power_zero_is_one_and_scale_zero_is_shift_to_the_power(self):
        x = draw(2, 2)
        assert torch.equal(run(make("Power", (2, 2), text="power_param { power: 0 }"), x)[0], torch.ones(2, 2, dtype=torch.float64))
        assert (run(make("Power", (2, 2), text="power_param { scale: 0 shift: 3 power: 2 }"), x)[0] == 9).all()

    def test_a_negative_number_to_a_fraction_is_nan_as_in_c(self):
        assert run(make("Power", (1,), text="power_param { scale: 0 shift: -1 power: 0.5 }"), draw(1))[0].isnan()

    def test_the_gradient_at_zero_is_finite(self):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        run(make("Power", (1,), text="power_param { power: 3 }"), x)[0].sum().backward()
        assert x.grad == 0


@pytest.mark.parametrize(("text", "expected"), [
    ("", lambda x: np.exp(x)), ("exp_param { base: 10 scale: 2 shift: -1 }", lambda x: 10 ** (2 * x - 1)),
    ("exp_param { base: 0.5 }", lambda x: 0.5 ** x)])
def test_exp_has_the_written_base(text, expected):
    x = draw(3, 2).detach()
    assert np.allclose(run(make("Exp", (3, 2), text=text), x)[0].numpy(), expected(x.numpy()))


@pytest.mark.parametrize(("kind", "text"), [("Exp", "exp_param { base: 0 }"), ("Log", "log_param { base: -2 }"),
                                            ("Log", "log_param { base: 1 }")])
def test_an_impossible_base_is_refused(kind, text):
    with pytest.raises(CaffeError, match="base"):
        make(kind, (1,), text=text)


def test_threshold_is_strict():
    layer = make("Threshold", (3,), text="threshold_param { threshold: 0.5 }")
    assert run(layer, torch.tensor([0.4, 0.5, 0.6]))[0].tolist() == [0, 0, 1]


class TestDropout:
    def test_test_phase_passes_the_bottom_through(self):
        x = draw(4, 5)
        assert torch.equal(run(make("Dropout", (4, 5), phase=caffe_pb2.TEST), x)[0], x)

    def test_kept_values_are_scaled_and_their_share_is_right(self):
        y = run(make("Dropout", (100, 100), text="dropout_param { dropout_ratio: 0.2 }"), torch.ones(100, 100))[0]
        assert sorted(set(y.flatten().tolist())) == [0, pytest.approx(1.25)]
        assert abs((y != 0).double().mean() - 0.8) < 0.02

    def test_gradient_and_output_have_the_same_mask(self):
        x = torch.ones(50, 50, dtype=torch.float64, requires_grad=True)
        y = run(make("Dropout", (50, 50)), x)[0]
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())

    def test_masks_follow_the_cursor(self):
        x = torch.ones(50, 50)
        layer, again = make("Dropout", (50, 50)), make("Dropout", (50, 50))
        first, second = run(layer, x)[0], run(layer, x)[0]
        assert not torch.equal(first, second) and layer.cursor == 2
        again.cursor = 1
        assert torch.equal(run(again, x)[0], second)

    def test_the_mask_does_not_depend_on_layout_or_number_type(self):
        x = torch.ones(4, 5, 6, 7)
        masks = [run(make("Dropout", (4, 5, 6, 7)), form)[0] != 0
                 for form in (x, x.contiguous(memory_format=torch.channels_last), x.double())]
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])

    def test_dropping_everything_is_refused(self):
        with pytest.raises(CaffeError, match="dropout_ratio 1"):
            make("Dropout", (1,), text="dropout_param { dropout_ratio: 1 }")
