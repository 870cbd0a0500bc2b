"""Convolution and pooling, against loops written from Caffe's definition."""
from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from one_layer import draw, gradients_are_true, make, run
from torchcaffe.errors import CaffeError
from torchcaffe.layers.vision import Pool


def correlate(x, weight, stride, pad, dilation, group):
    """Convolution of (N, C, H, W) by its definition."""
    n, c, h, w = x.shape
    out, _, kh, kw = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2))
    high = (h + 2 * pad[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    wide = (w + 2 * pad[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((n, out, high, wide))
    for o, i, j in product(range(out), range(high), range(wide)):
        first = o // (out // group) * (c // group)
        top, left = i * stride[0], j * stride[1]
        window = padded[:, first:first + c // group, top:top + dilation[0] * (kh - 1) + 1:dilation[0],
                        left:left + dilation[1] * (kw - 1) + 1:dilation[1]]
        y[:, o, i, j] = (window * weight[o]).sum((1, 2, 3))
    return y


class TestConvolution:
    @pytest.mark.parametrize(("text", "stride", "pad", "dilation", "group"), [
        ("kernel_size: 3", (1, 1), (0, 0), (1, 1), 1),
        ("kernel_size: 3 stride: 2 pad: 1 group: 2", (2, 2), (1, 1), (1, 1), 2),
        ("kernel_h: 1 kernel_w: 3 stride_h: 2 stride_w: 1 pad_h: 0 pad_w: 1", (2, 1), (0, 1), (1, 1), 1),
        ("kernel_size: 2 kernel_size: 3 stride: 1 stride: 2 pad: 1 pad: 0 dilation: 2 dilation: 1", (1, 2), (1, 0), (2, 1), 1),
    ])
    def test_it_is_the_sum_over_windows(self, text, stride, pad, dilation, group):
        layer = make("Convolution", (2, 4, 6, 7), text=f"convolution_param {{ num_output: 6 {text} weight_filler {{ type: 'gaussian' }} }}")
        x = draw(2, 4, 6, 7)
        y = run(layer, x)[0].detach().numpy()
        assert np.allclose(y, correlate(x.detach().numpy(), layer.params[0].detach().numpy(), stride, pad, dilation, group))
        assert layer.top_shapes((2, 4, 6, 7)) == [y.shape]

    @pytest.mark.parametrize(("kind", "shape", "text"), [
        ("Convolution", (2, 4, 5, 5), "pad: 1 group: 2"), ("Convolution", (2, 2, 6), ""),
        ("Convolution", (1, 2, 4, 3, 3), "bias_term: false"),
        ("Convolution", (2, 2, 2, 4, 4), "axis: 2"), ("Convolution", (2, 4, 4), "axis: 0"),
        ("Deconvolution", (2, 4, 3, 3), "stride: 2 pad: 1 group: 2"), ("Deconvolution", (2, 2, 4), "dilation: 2")])
    def test_gradients_are_true(self, kind, shape, text):
        layer = make(kind, shape, text=f"convolution_param {{ num_output: 2 kernel_size: 3 {text} weight_filler {{ type: 'xavier' }} }}")
        x = draw(*shape)
        assert run(layer, x)[0].shape == layer.top_shapes(shape)[0]
        assert gradients_are_true(layer, x)

    @pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_a_frozen_factor_per_channel_with_a_stride(self, stride, layout):
        layer = make("Convolution", (2, 3, 5, 7), text=f"""convolution_param {{ num_output: 3 group: 3 kernel_size: 1 bias_term: false
            stride: {stride[0]} stride: {stride[1]} weight_filler {{ type: 'gaussian' std: 1 }} }}""")
        layer.params = [layer.params[0].detach()]
        x = draw(2, 3, 5, 7).detach().contiguous(memory_format=layout).requires_grad_()
        y = run(layer, x)[0]
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert np.allclose(y.detach(), correlate(x.detach().numpy(), layer.params[0].numpy(), stride, (0, 0), (1, 1), 3))
        assert torch.autograd.gradcheck(layer.convolve, (x, layer.params[0], None))

    def test_deconvolution_is_the_transpose_of_convolution(self):
        geometry = "kernel_size: 3 stride: 2 pad: 1 bias_term: false weight_filler { type: 'gaussian' }"
        forth = make("Convolution", (1, 2, 7, 7), text=f"convolution_param {{ num_output: 3 {geometry} }}")
        back = make("Deconvolution", (1, 3, 4, 4), text=f"convolution_param {{ num_output: 2 {geometry} }}")
        back.params = forth.params
        x, y = draw(1, 2, 7, 7), draw(1, 3, 4, 4, seed=1)
        assert torch.allclose((run(forth, x)[0] * y).sum(), (x * run(back, y)[0]).sum())

    def test_several_bottoms_share_the_weights(self):
        layer = make("Convolution", (1, 2, 4, 4), (1, 2, 4, 4), tops=2, text="convolution_param { num_output: 3 kernel_size: 1 }")
        assert gradients_are_true(layer, draw(1, 2, 4, 4), draw(1, 2, 4, 4, seed=1))
        with pytest.raises(CaffeError, match="one shape"):
            layer.top_shapes((1, 2, 4, 4), (1, 2, 5, 5))

    @pytest.mark.parametrize(("text", "words"), [
        ("num_output: 3", "kernel_size is missing"),
        ("num_output: 3 kernel_size: 9", "does not fit"),
        ("num_output: 3 kernel_size: 3 group: 2", "group 2 does not divide"),
        ("num_output: 3 kernel_size: 3 kernel_h: 3 kernel_w: 3", "take the place of kernel_size"),
        ("num_output: 3 kernel_size: 3 kernel_size: 3 kernel_size: 3", "3 values of kernel_size for 2 spatial axes"),
        ("num_output: 3 kernel_size: 3 stride: 0", "stride .* must be positive"),
        ("kernel_size: 3", "num_output must be positive"),
        ("num_output: 3 kernel_size: 3 axis: 3", "1 to 3 axes behind the channels"),
    ])
    def test_what_does_not_fit_is_refused(self, text, words):
        with pytest.raises(CaffeError, match=words):
            make("Convolution", (1, 4, 6, 6), text=f"convolution_param {{ {text} }}")

    def test_other_channels_than_at_setup_are_refused(self):
        with pytest.raises(CaffeError, match=r"4 channels.*\(1, 5, 6, 6\)"):
            make("Convolution", (1, 4, 6, 6), text="convolution_param { num_output: 3 kernel_size: 3 }").top_shapes((1, 5, 6, 6))


@pytest.mark.parametrize("text", ["kernel_size: 3", "kernel_h: 2 kernel_w: 3 stride: 2 pad: 1", "kernel_size: 2 dilation: 2 pad: 1"])
def test_im2col_gives_the_windows_that_convolution_multiplies(text):
    columns = make("Im2col", (2, 3, 5, 6), text=f"convolution_param {{ {text} }}")
    more = "num_output: 4 bias_term: false weight_filler { type: 'xavier' }"
    layer = make("Convolution", (2, 3, 5, 6), text=f"convolution_param {{ {text} {more} }}")
    x = draw(2, 3, 5, 6)
    assert torch.allclose(torch.einsum("ok,nkhw->nohw", layer.params[0].flatten(1), run(columns, x)[0]), run(layer, x)[0])
    assert gradients_are_true(columns, x)


def pool_by_loops(x, pool, average):
    """Pooling of (H, W) by Caffe's loops; and for MAX the index of the first maximum."""
    (kh, kw), (sh, sw), (ph, pw), (h, w) = pool.kernel, pool.stride, pool.pad, x.shape
    round_up = np.ceil if pool.ceil else np.floor
    high, wide = int(round_up((h + 2 * ph - kh) / sh)) + 1, int(round_up((w + 2 * pw - kw) / sw)) + 1
    if ph or pw:
        high -= (high - 1) * sh >= h + ph
        wide -= (wide - 1) * sw >= w + pw
    y, index = np.zeros((high, wide)), -np.ones((high, wide))
    for i, j in product(range(high), range(wide)):
        top, left = i * sh - ph, j * sw - pw
        if average:
            size = (min(top + kh, h + ph) - top) * (min(left + kw, w + pw) - left)
            with np.errstate(invalid="ignore"):
                y[i, j] = np.float64(x[max(top, 0):min(top + kh, h), max(left, 0):min(left + kw, w)].sum()) / size
            continue
        y[i, j] = -np.finfo(np.float32).max
        for r, c in product(range(max(top, 0), min(top + kh, h)), range(max(left, 0), min(left + kw, w))):
            if x[r, c] > y[i, j]:
                y[i, j], index[i, j] = x[r, c], r * w + c
    return y, index


def geometries():
    for kernel, stride, pad, size, ceil in product([1, 2, 3, 4], [1, 2, 3, 5], [0, 1, 2, 3], [3, 5, 8], [True, False]):
        pool = Pool((kernel, 2), (stride, 2), (pad, pad // 2), ceil)
        if pad < kernel and pad // 2 < 2 and min(pool.sizes((size, 5))) > 0:
            yield size, pool


@pytest.mark.parametrize("average", [False, True])
def test_pooling_agrees_with_caffe_s_loops_in_every_geometry(average):
    cases = list(geometries())
    assert len(cases) > 100
    for size, pool in cases:
        x = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (1, 1, size, 5)).astype(float))      # full of ties
        y, index = pool_by_loops(x[0, 0].numpy(), pool, average)
        assert pool.sizes((size, 5)) == y.shape
        if average:
            assert np.allclose(pool.average(x)[0, 0], y, equal_nan=True), (size, pool)
        else:
            got, places = pool.maximum(x)
            assert np.array_equal(got[0, 0], y) and np.array_equal(places[0, 0], index), (size, pool)


class TestPooling:
    @pytest.mark.parametrize("text", ["pool: MAX kernel_size: 3 stride: 2", "pool: AVE kernel_size: 3 stride: 2 pad: 1",
                                      "pool: AVE kernel_size: 3 stride: 2 pad: 2", "pool: MAX kernel_size: 4 stride: 3 pad: 3",
                                      "pool: AVE global_pooling: true", "pool: AVE kernel_h: 2 kernel_w: 1 stride_h: 1 stride_w: 1"])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_gradients_are_true_in_both_layouts(self, text, layout):
        layer = make("Pooling", (2, 3, 6, 6), text=f"pooling_param {{ {text} }}")
        x = draw(2, 3, 6, 6).detach().contiguous(memory_format=layout).requires_grad_()
        assert gradients_are_true(layer, x)

    def test_of_equal_numbers_the_first_gets_the_gradient(self):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.zeros(1, 2, 2, 2).contiguous(memory_format=layout).requires_grad_()
            run(make("Pooling", (1, 2, 2, 2), text="pooling_param { kernel_size: 2 }"), x)[0].sum().backward()
            assert x.grad[0, 0].tolist() == [[1, 0], [0, 0]]

    def test_global_pooling_follows_the_bottom(self):
        layer = make("Pooling", (1, 1, 2, 2), text="pooling_param { pool: AVE global_pooling: true }")
        assert layer.top_shapes((1, 1, 4, 6)) == [(1, 1, 1, 1)]
        x = draw(1, 1, 4, 6)
        assert torch.allclose(run(layer, x)[0].squeeze(), x.mean())

    @pytest.mark.parametrize(("text", "words"), [
        ("", "kernel_size, or kernel_h and kernel_w"),
        ("pool: STOCHASTIC kernel_size: 2", "stochastic"),
        ("kernel_size: 2 pad: 2", "pad .* must be smaller"),
        ("kernel_size: 2 kernel_h: 2 kernel_w: 2", "write kernel_size, or"),
        ("kernel_h: 2", "write kernel_size, or"),
        ("global_pooling: true kernel_size: 2", "goes without kernel"),
        ("global_pooling: true stride: 2", "goes without kernel"),
        ("kernel_size: 7", "does not fit"),
        ("kernel_size: 2 stride: 0", "stride .* must be positive")])
    def test_what_does_not_fit_is_refused(self, text, words):
        with pytest.raises(CaffeError, match=words):
            make("Pooling", (1, 1, 4, 4), text=f"pooling_param {{ {text} }}")

    def test_a_blob_without_an_image_is_refused(self):
        with pytest.raises(CaffeError, match=r"four axes.*\(4, 4\)"):
            make("Pooling", (4, 4), text="pooling_param { kernel_size: 2 }")

    def test_only_max_has_a_mask(self):
        with pytest.raises(CaffeError, match="mask"):
            make("Pooling", (1, 1, 4, 4), tops=2, text="pooling_param { pool: AVE kernel_size: 2 }")


@pytest.mark.parametrize("pool", ["MAX", "AVE"])
def test_spp_puts_the_levels_after_one_another(pool):
    layer = make("SPP", (2, 3, 8, 7), text=f"spp_param {{ pyramid_height: 3 pool: {pool} }}")
    x = draw(2, 3, 8, 7)
    y = run(layer, x)[0]
    assert layer.top_shapes((2, 3, 8, 7)) == [tuple(y.shape)] == [(2, 3 * (1 + 4 + 16))]
    assert torch.allclose(y[:, :3], x.amax((2, 3)) if pool == "MAX" else x.mean((2, 3)))
    assert gradients_are_true(layer, x)
