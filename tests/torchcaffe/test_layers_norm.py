"""Normalisation, scales and shifts."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from one_layer import draw, gradients_are_true, make, run
from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2

SHAPES = [(6, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2)]


def statistics(layer):
    return [p.detach().numpy().copy() for p in layer.params]


class TestBatchNorm:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_batch_statistics_are_added_to_the_stored_ones(self, shape):
        layer = make("BatchNorm", shape, text="batch_norm_param { moving_average_fraction: 0.75 }")
        axes, count = (0, *range(2, len(shape))), np.prod(shape) / 3
        mean, variance, factor = np.zeros(3), np.zeros(3), 0.0
        for seed in range(3):
            x = draw(*shape, seed=seed)
            y = run(layer, x)[0].detach().numpy()
            x = x.detach().numpy()
            centred = x - x.mean(axes, keepdims=True)
            assert np.allclose(y, centred / np.sqrt((centred ** 2).mean(axes, keepdims=True) + 1e-5))
            mean = 0.75 * mean + x.mean(axes)
            variance = 0.75 * variance + x.var(axes) * count / (count - 1)
            factor = 0.75 * factor + 1
        assert all(np.allclose(a, b) for a, b in zip(statistics(layer), [mean, variance, [factor]], strict=True))

    def test_stored_statistics_are_divided_by_the_factor_and_kept(self):
        layer = make("BatchNorm", (2, 2), phase=caffe_pb2.TEST)
        with torch.no_grad():
            for parameter, values in zip(layer.params, ([2.0, 4.0], [8.0, 18.0], [2.0]), strict=True):
                parameter.copy_(torch.tensor(values))
        before = statistics(layer)
        x = draw(2, 2)
        expected = (x - torch.tensor([1.0, 2.0])) / torch.sqrt(torch.tensor([4.0, 9.0], dtype=torch.float64) + 1e-5)
        assert torch.allclose(run(layer, x)[0], expected)
        assert all(np.array_equal(a, b) for a, b in zip(before, statistics(layer), strict=True))

    def test_a_factor_of_zero_counts_mean_and_variance_as_zero(self):
        layer = make("BatchNorm", (2, 2), phase=caffe_pb2.TEST)
        x = draw(2, 2)
        assert torch.allclose(run(layer, x)[0], x / np.sqrt(1e-5))

    @pytest.mark.parametrize(("phase", "written", "moves"), [
        (caffe_pb2.TRAIN, "", True), (caffe_pb2.TRAIN, "use_global_stats: true", False),
        (caffe_pb2.TEST, "", False), (caffe_pb2.TEST, "use_global_stats: false", True)])
    def test_who_updates_the_statistics(self, phase, written, moves):
        layer = make("BatchNorm", (4, 2), phase=phase, text=f"batch_norm_param {{ {written} }}")
        run(layer, draw(4, 2))
        assert bool(layer.params[2] == 1) == moves

    def test_one_value_per_channel_has_variance_zero(self):
        layer = make("BatchNorm", (1, 3))
        x = draw(1, 3)
        y = run(layer, x)[0]
        y.sum().backward()
        assert y.abs().max() < 1e-12 and x.grad.abs().max() < 1e-9
        assert np.allclose(layer.params[0].detach(), x.detach()[0]) and not layer.params[1].any()

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("phase", [caffe_pb2.TRAIN, caffe_pb2.TEST])
    def test_gradients_are_true(self, shape, phase):
        layer = make("BatchNorm", shape, phase=phase)
        run(layer, draw(*shape, seed=3))
        assert torch.autograd.gradcheck(layer.normalise, (draw(*shape), draw(3, seed=1), draw(3, seed=2)))

    @pytest.mark.parametrize("stored", ["true", "false"])
    def test_normalise_with_weight_and_bias_is_a_scale_layer_after_it(self, stored):
        text = f"batch_norm_param {{ use_global_stats: {stored} }}"
        fused, plain, scale = make("BatchNorm", (3, 4, 5, 5), text=text), make("BatchNorm", (3, 4, 5, 5), text=text), \
            make("Scale", (3, 4, 5, 5), text="scale_param { bias_term: true }")
        scale.params = [draw(4, seed=1), draw(4, seed=2)]
        x, dy = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=3)
        one, two = fused.normalise(x, *scale.params), run(scale, run(plain, x)[0])[0]
        assert torch.allclose(one, two)
        for a, b in zip(*(torch.autograd.grad(y, [x, *scale.params], dy) for y in (one, two)), strict=True):
            assert torch.allclose(a, b)

    def test_it_declares_that_no_solver_moves_its_statistics(self):
        layer = make("BatchNorm", (2, 2), text="param { lr_mult: 0 decay_mult: 0 }")
        assert [spec.lr_mult for spec in layer.param.param] == [0, 0, 0]

    def test_a_learning_rate_and_a_blob_without_channels_are_refused(self):
        with pytest.raises(CaffeError, match="lr_mult: 0"):
            make("BatchNorm", (2, 2), text="param { lr_mult: 1 }")
        with pytest.raises(CaffeError, match=r"\(3,\)"):
            make("BatchNorm", (3,))


PLACES = [((2, 3, 4, 5), "", (3,)), ((2, 3, 4, 5), "axis: 0", (2,)), ((2, 3, 4, 5), "axis: -1", (5,)), ((2, 3, 4), "num_axes: -1", (3, 4)),
          ((2, 3, 4), "axis: 0 num_axes: 2", (2, 3)), ((2, 3, 4), "num_axes: 0", ()), ((4, 3), "", (3,)), ((4,), "axis: 0", (4,))]


class TestScaleAndBias:
    @pytest.mark.parametrize(("shape", "place", "parameter"), PLACES)
    def test_scale_multiplies_along_its_axes_with_true_gradients(self, shape, place, parameter):
        layer = make("Scale", shape, text=f"scale_param {{ bias_term: true {place} filler {{ type: 'gaussian' }} }}")
        x, (gamma, beta) = draw(*shape), layer.params
        assert gamma.shape == beta.shape == parameter
        start = len(shape) - len(parameter) if "-1" in place else 0 if "axis: 0" in place or not parameter else 1
        view = (1,) * start + parameter + (1,) * (len(shape) - start - len(parameter))
        assert torch.allclose(run(layer, x)[0], x * gamma.reshape(view) + beta.reshape(view))
        assert gradients_are_true(layer, x)

    @pytest.mark.parametrize(("shape", "place", "parameter"), PLACES)
    def test_a_second_bottom_takes_the_parameter_s_place(self, shape, place, parameter):
        layer = make("Scale", shape, parameter, text=f"scale_param {{ {place} }}")
        assert layer.params == []
        assert gradients_are_true(layer, draw(*shape), draw(*parameter, seed=1))

    @pytest.mark.parametrize(("shape", "place", "parameter"), PLACES)
    def test_bias_adds_along_its_axes_with_true_gradients(self, shape, place, parameter):
        layer = make("Bias", shape, text=f"bias_param {{ {place} }}")
        assert layer.params[0].shape == parameter and not layer.params[0].any()
        assert gradients_are_true(layer, draw(*shape))
        assert gradients_are_true(make("Bias", shape, parameter, text=f"bias_param {{ {place} }}"), draw(*shape), draw(*parameter, seed=1))

    def test_scale_starts_as_the_identity(self):
        x = draw(2, 3)
        assert torch.equal(run(make("Scale", (2, 3), text="scale_param { bias_term: true }"), x)[0], x)

    def test_what_does_not_fit_names_both_shapes(self):
        with pytest.raises(CaffeError, match=r"\(4,\).*\(2, 3\)"):
            make("Scale", (2, 3), (4,))
        with pytest.raises(CaffeError, match=r"reaches beyond.*\(2, 3\)"):
            make("Bias", (2, 3), text="bias_param { num_axes: 2 }")


def test_lrn_across_channels_sums_neighbouring_channels():
    layer = make("LRN", (1, 4, 1, 1), text="lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 k: 2 }")
    x = draw(1, 4, 1, 1)
    values = x.detach().flatten().numpy()
    expected = [v * (2 + 0.5 / 3 * (values[max(i - 1, 0):i + 2] ** 2).sum()) ** -0.75 for i, v in enumerate(values)]
    assert np.allclose(run(layer, x)[0].detach().flatten(), expected)
    assert gradients_are_true(layer, x)


def test_lrn_within_a_channel_sums_neighbouring_pixels_and_ignores_k():
    layer = make("LRN", (1, 1, 3, 3), text="lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 k: 2 norm_region: WITHIN_CHANNEL }")
    x = draw(1, 1, 3, 3)
    corner = x[0, 0, :2, :2].square().sum()
    assert torch.allclose(run(layer, x)[0][0, 0, 0, 0], x[0, 0, 0, 0] * (1 + 0.5 / 9 * corner) ** -0.75)
    assert gradients_are_true(layer, x)
    with pytest.raises(CaffeError, match="local_size 4 is even"):
        make("LRN", (1, 1, 3, 3), text="lrn_param { local_size: 4 }")


def test_mvn_adds_eps_to_the_standard_deviation_and_gives_four_axes():
    layer = make("MVN", (4, 6), text="mvn_param { across_channels: true eps: 0.5 }")
    x = draw(4, 6).detach()
    y = run(layer, x)[0]
    assert y.shape == (4, 6, 1, 1)
    assert torch.allclose(y[:, :, 0, 0], (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, correction=0) + 0.5))


@pytest.mark.parametrize("text", ["normalize_variance: false", "across_channels: true", ""])
def test_mvn_has_a_true_gradient_without_eps(text):
    assert gradients_are_true(make("MVN", (2, 3, 4, 5), text=f"mvn_param {{ {text} }}"), draw(2, 3, 4, 5))
