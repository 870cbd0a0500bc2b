"""Coordinate maps against places worked out by hand, and crops against what the layers do to a marked pixel."""
# ruff: noqa: C408    dict(dim=[1]) is how such nets are written
import numpy as np
import pytest

import torchcaffe as caffe
from torchcaffe import layers as L
from torchcaffe.coord_map import (
    AxisMismatchException,
    UndefinedMapException,
    compose,
    coord_map,
    coord_map_from_to,
    crop,
    inverse,
)


def numbers(mapping):
    axis, scale, shift = mapping
    return axis, float(np.ravel(scale)[0]), float(np.ravel(shift)[0])


DATA = L.Input(shape=dict(dim=[2, 3, 100, 100]))


@pytest.mark.parametrize(("top", "expected"), [
    (L.Convolution(DATA, kernel_size=5), (1, 1, -2)),
    (L.Convolution(DATA, kernel_size=5, pad=10), (1, 1, 8)),
    (L.Convolution(DATA, kernel_size=3, stride=2), (1, 0.5, -0.5)),
    (L.Convolution(DATA, kernel_size=3, dilation=4, pad=4), (1, 1, 0)),
    (L.Convolution(DATA, convolution_param=dict(kernel_size=[7, 7], axis=1)), (1, 1, -3)),
    (L.Pooling(DATA, kernel_size=4, stride=4), (1, 0.25, -0.375)),
    (L.Deconvolution(DATA, convolution_param=dict(kernel_size=4, stride=2)), (1, 2, 1.5)),
    (L.Crop(DATA, DATA, crop_param=dict(offset=[3, 3])), (1, 1, -3)),
    (L.ReLU(DATA), (None, 1, 0)),
])
def test_the_map_of_one_layer(top, expected):
    assert numbers(coord_map(top.fn)) == expected


def test_maps_are_composed_and_inverted():
    first, then = (1, 0.5, -1.0), (1, 3.0, 2.0)
    assert compose(first, then) == (1, 1.5, 0.0)
    assert compose(first, inverse(first)) == (1, 1, 0)
    assert compose((None, 1, 0), then) == then == compose(then, (None, 1, 0))
    with pytest.raises(AxisMismatchException):
        compose((1, 1, 0), (2, 1, 0))


def upscored():
    """As in a fully convolutional net: padding, pooling, and a score brought back to the image's size."""
    n = caffe.NetSpec()
    n.data = L.Input(shape=dict(dim=[1, 1, 24, 24]))
    n.conv = L.Convolution(n.data, kernel_size=3, pad=10, num_output=1)
    n.pool = L.Pooling(L.ReLU(n.conv), kernel_size=2, stride=2)
    n.score = L.Convolution(n.pool, kernel_size=1, num_output=1)
    n.up = L.Deconvolution(n.score, convolution_param=dict(kernel_size=2, stride=2, num_output=1))
    return n


def test_a_crop_brings_pixels_back_over_those_they_come_from(tmp_path):
    n = upscored()
    n.crop = crop(n.up, n.data)
    assert n.crop.fn.params == {"crop_param": {"axis": 2, "offset": [9]}}
    (tmp_path / "net.prototxt").write_text(str(n.to_proto()))
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    for layer, kernel in (("conv", [[0, 0, 0], [0, 1, 0], [0, 0, 0]]), ("score", [[1]]), ("up", [[1, 1], [1, 1]])):
        net.params[layer][0].data[...] = kernel
    image = np.zeros((1, 1, 24, 24), np.float32)
    image[0, 0, 11, 7] = 1
    found = net.forward(data=image)["crop"]
    assert found.shape == image.shape
    assert found[0, 0, 11, 7] == 1 and found.sum() == 4


def test_maps_meet_at_the_nearest_common_blob():
    n = upscored()
    axis, scale, shift = numbers(coord_map_from_to(n.up, n.data))
    assert (axis, scale, shift) == (1, 1, -9)
    assert numbers(coord_map_from_to(n.score, n.pool)) == (1, 1, 0)
    assert numbers(coord_map_from_to(n.pool, n.score)) == (1, 1, 0)


def test_a_crop_to_where_no_window_is_needed_cuts_nothing():
    assert crop(L.ReLU(DATA), DATA).fn.params == {"crop_param": {"axis": 2, "offset": [0]}}


@pytest.mark.parametrize(("top", "message"), [
    (L.Convolution(DATA, kernel_size=3, stride=2), "coordinates are scaled by"),        # half the size
    (L.Convolution(DATA, kernel_size=4, pad=6), "shifted by .*4.5"),                    # between two pixels
    (L.Convolution(DATA, kernel_size=3), "none above 0"),                               # smaller than what it is cropped to
])
def test_what_cannot_be_cropped_is_refused(top, message):
    with pytest.raises(caffe.CaffeError, match=message):
        crop(top, DATA)


def test_layers_without_a_map_end_the_search():
    with pytest.raises(UndefinedMapException, match=r"layers.InnerProduct does not map"):
        coord_map(L.InnerProduct(DATA, num_output=3).fn)
    with pytest.raises(caffe.CaffeError, match="no spatial layers lead from a common blob"):
        coord_map_from_to(L.InnerProduct(DATA, num_output=3), DATA)
    with pytest.raises(caffe.CaffeError, match="not from kernel_h, kernel_w"):
        coord_map(L.Convolution(DATA, kernel_h=3, kernel_w=3).fn)
