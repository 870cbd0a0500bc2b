"""pycaffe's io functions: messages there and back, and images against scikit-image's and scipy's numbers."""
from __future__ import annotations

import sys

import numpy as np
import pytest

from torchcaffe import io
from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2


def draw(*shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


# -- messages ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_datum_gives_back_its_array(dtype):
    array = (draw(3, 4, 5) * 255).astype(dtype)
    datum = caffe_pb2.Datum.FromString(io.array_to_datum(array, 7).SerializeToString())
    assert datum.label == 7 and bool(datum.data) == (dtype == np.uint8)
    np.testing.assert_array_equal(io.datum_to_array(datum), array)


def test_a_datum_without_label_has_none():
    assert not io.array_to_datum(np.zeros((1, 1, 1), np.uint8)).HasField("label")


def test_a_blob_gives_back_its_arrays():
    array = draw(2, 3)
    blob = io.array_to_blobproto(array, diff=array + 1)
    np.testing.assert_array_equal(io.blobproto_to_array(blob), array)
    np.testing.assert_array_equal(io.blobproto_to_array(blob, return_diff=True), array + 1)


def test_legacy_dims_win():
    blob = caffe_pb2.BlobProto(data=range(6), num=1, channels=2, height=1, width=3, shape=caffe_pb2.BlobShape(dim=[6]))
    assert io.blobproto_to_array(blob).shape == (1, 2, 1, 3)


def test_a_list_of_arrays_survives_its_serialized_vector():
    arrays = [draw(2, 3), draw(4), draw(1, 2, 1, 2)]
    found = io.blobprotovector_str_to_arraylist(io.arraylist_to_blobprotovector_str(arrays))
    assert len(found) == 3
    for a, b in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CaffeError, match="not a serialized BlobProtoVector"):
        io.blobprotovector_str_to_arraylist(b"\xff\xff")


def test_shapes_that_do_not_fit():
    with pytest.raises(CaffeError, match="three axes"):
        io.array_to_datum(np.zeros((2, 2)))
    with pytest.raises(CaffeError, match="holds 3 values"):
        io.datum_to_array(caffe_pb2.Datum(channels=1, height=2, width=2, data=b"abc"))
    with pytest.raises(CaffeError, match="holds 2 values"):
        io.blobproto_to_array(caffe_pb2.BlobProto(data=[1, 2], shape=caffe_pb2.BlobShape(dim=[3])))


# -- the Transformer -----------------------------------------------------------------------------------------------
@pytest.fixture
def transformer():
    found = io.Transformer({"data": (10, 3, 4, 5)})
    found.set_transpose("data", (2, 0, 1))
    return found


def test_an_image_is_made_ready_step_by_step(transformer):
    image, mean = draw(4, 5, 3), np.array([10.0, 20.0, 30.0])
    transformer.set_channel_swap("data", (2, 1, 0))
    transformer.set_raw_scale("data", 255)
    transformer.set_mean("data", mean)
    transformer.set_input_scale("data", 0.5)
    given = image.copy()
    found = transformer.preprocess("data", image)
    expected = (image.transpose(2, 0, 1)[::-1] * 255 - mean[:, None, None]) * 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(image, given)
    np.testing.assert_allclose(transformer.deprocess("data", found), image, atol=1e-5)


def test_any_order_of_channels_and_axes_is_undone():
    transformer = io.Transformer({"data": (1, 4, 5, 6)})
    transformer.set_transpose("data", (2, 0, 1))
    transformer.set_channel_swap("data", (1, 2, 3, 0))
    blob = draw(4, 5, 6)
    image = transformer.deprocess("data", blob)
    np.testing.assert_array_equal(image[:, :, 1], blob[0])
    np.testing.assert_array_equal(transformer.preprocess("data", image), blob)


def test_an_image_of_another_size_is_resized_first(transformer):
    image = draw(9, 7, 3)
    np.testing.assert_array_equal(transformer.preprocess("data", image), io.resize_image(image, (4, 5)).transpose(2, 0, 1))


def test_means_are_numbers_per_channel_or_images(transformer):
    zero = np.zeros((4, 5, 3), np.float32)
    for mean, expected in ((np.arange(3.0), np.arange(3.0)[:, None, None] + np.zeros((3, 4, 5))),
                           (draw(3, 4, 5), draw(3, 4, 5)),
                           (draw(3, 8, 8), io.resize_image(draw(3, 8, 8).transpose(1, 2, 0), (4, 5)).transpose(2, 0, 1))):
        transformer.set_mean("data", mean)
        np.testing.assert_allclose(transformer.preprocess("data", zero), -expected, rtol=1e-6)


@pytest.mark.parametrize(("call", "message"), [
    (lambda t: t.preprocess("image", draw(4, 5, 3)), "'image' is not an input of this Transformer; it has data"),
    (lambda t: t.set_transpose("data", (1, 0)), "has 3 axes, not 2"),
    (lambda t: t.set_channel_swap("data", (1, 0)), "has 3 channels, not 2"),
    (lambda t: t.set_mean("data", np.zeros(4)), "has 3 channels, the mean 4"),
    (lambda t: t.set_mean("data", np.zeros((1, 3, 4, 5))), "not an array of shape"),
])
def test_settings_that_do_not_fit_the_input_are_refused(transformer, call, message):
    with pytest.raises(CaffeError, match=message):
        call(transformer)


# -- images --------------------------------------------------------------------------------------------------------
RAMP = np.arange(12.0).reshape(3, 4, 1) ** 1.5
SCIKIT_IMAGE = {                                        # resize(..., order=1, mode="constant", anti_aliasing=False), as pycaffe calls it
    (2, 3): [[2.25751, 4.67032, 8.07191], [19.64965, 25.2182, 31.2254]],
    (4, 5): [[0.0, 0.6125, 1.67494, 3.0964, 4.09197], [4.5, 6.6539, 8.80448, 11.22949, 12.17135],
             [12.13675, 16.02448, 19.07842, 22.30776, 22.73062], [17.81909, 22.4772, 25.64746, 28.9457, 28.73026]],
}


@pytest.mark.parametrize("size", SCIKIT_IMAGE)
def test_resized_images_have_scikit_image_s_numbers(size):
    found = io.resize_image(RAMP, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, :, 0], SCIKIT_IMAGE[size], atol=1e-5)
    np.testing.assert_allclose(io.resize_image(np.repeat(RAMP, 3, 2), size)[:, :, 2], SCIKIT_IMAGE[size], atol=1e-5)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("size", [(2, 3), (5, 9), (1, 1)])
def test_images_of_other_numbers_of_channels_have_scipy_s_numbers(size, order):
    ndimage = pytest.importorskip("scipy.ndimage")
    image = draw(4, 6, 2)
    expected = ndimage.zoom(image, (size[0] / 4, size[1] / 6, 1), order=order)
    np.testing.assert_allclose(io.resize_image(image, size, order), expected, atol=1e-6)


def test_constant_images_stay_so_and_the_nearest_pixel_is_a_copy():
    np.testing.assert_array_equal(io.resize_image(np.full((2, 2, 3), 7.0), (5, 3)), np.full((5, 3, 3), 7, np.float32))
    np.testing.assert_array_equal(io.resize_image(RAMP, (6, 8), 0), RAMP.repeat(2, 0).repeat(2, 1).astype(np.float32))
    with pytest.raises(CaffeError, match="interp_order 0 or 1, not shape .* and 3"):
        io.resize_image(RAMP, (6, 8), 3)


BYTES = (np.arange(12).reshape(3, 4) * 20 + 20).astype(np.uint8)
RESIZED = [[0.07843, 0.11667, 0.17157, 0.22647, 0.24706], [0.24706, 0.32941, 0.39216, 0.4549, 0.45882],       # to 4x5, by scikit-image
           [0.45882, 0.56471, 0.62745, 0.6902, 0.67059], [0.55588, 0.66569, 0.72059, 0.77549, 0.74118]]


@pytest.mark.parametrize("channels", [(), (1,), (2,), (3,)])
def test_resize_is_what_pycaffe_s_io_has_of_scikit_image(channels):
    image = np.broadcast_to(BYTES.reshape(3, 4, *[1] * len(channels)), (3, 4, *channels))
    for shape in ((4, 5), (4, 5, *channels)):
        found = io.resize(image, shape)
        assert found.shape == (4, 5, *channels) and found.dtype == np.float64
        np.testing.assert_allclose(found.reshape(4, 5, -1)[:, :, -1], RESIZED, atol=1e-5)
    np.testing.assert_allclose(io.resize(image, (4, 5), preserve_range=True).reshape(4, 5, -1)[:, :, 0], 255 * np.array(RESIZED), atol=3e-3)
    np.testing.assert_array_equal(io.resize(image, (6, 8), order=0, preserve_range=True), image.repeat(2, 0).repeat(2, 1))


def test_what_resize_makes_lies_between_the_image_s_values_unless_it_lies_beyond_the_image():
    np.testing.assert_allclose(io.resize(np.full((2, 2), 0.5), (4, 4)), 0.5)
    np.testing.assert_allclose(io.resize(np.full((2, 2), 0.5), (4, 4), clip=False)[0], [0.28125, 0.375, 0.375, 0.28125])
    np.testing.assert_allclose(io.resize(np.full((2, 2), 0.5), (4, 4), cval=0.5, clip=False), 0.5)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.uint8, np.int16])
@pytest.mark.parametrize("order", [0, 1])
def test_zoom_is_what_pycaffe_s_io_has_of_scipy(order, kind):
    ndimage = pytest.importorskip("scipy.ndimage")
    array = (100 * draw(5, 6, 2)).astype(kind)
    for factors in ((2, 1.5, 1), (0.4, 1, 1)):
        expected = ndimage.zoom(array, factors, order=order)
        found = io.zoom(array, factors, order=order)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-4 if array.dtype.kind == "f" else 0)
    np.testing.assert_allclose(io.zoom(array[:, :, 0], 2, order=order), ndimage.zoom(array[:, :, 0], 2, order=order), atol=1e-4)


@pytest.mark.parametrize("call", [
    lambda: io.resize(BYTES, (4, 5), order=3), lambda: io.resize(BYTES, (4, 5), mode="reflect"), lambda: io.resize(BYTES, (4, 5, 3)),
    lambda: io.resize(BYTES[0], (4,)), lambda: io.zoom(BYTES, 2), lambda: io.zoom(np.zeros((2, 2, 2)), 2, order=1),
])
def test_what_neither_does_is_refused(call):
    with pytest.raises(ValueError, match="changes the first two axes"):
        call()


def test_skimage_is_there_as_recipes_use_it(tmp_path):
    pytest.importorskip("PIL.Image").fromarray(BYTES).save(tmp_path / "a.png")
    pixels = io.skimage.io.imread(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels, BYTES)
    np.testing.assert_allclose(io.skimage.img_as_float(pixels), BYTES / 255)
    assert io.skimage.img_as_float(np.zeros((2, 2), np.uint8)).dtype == np.float64
    np.testing.assert_array_equal(io.skimage.img_as_float(np.array([True, False])), [1, 0])
    np.testing.assert_array_equal(io.skimage.img_as_float(np.array([0.5, -2])), [0.5, -2])
    assert io.skimage.transform.resize(pixels, (2, 2)).shape == (2, 2)


def test_ten_crops_are_corners_centre_and_mirrors():
    images = [draw(5, 6, 3), draw(5, 6, 3, seed=1)]
    found = io.oversample(images, (2, 4))
    assert found.shape == (20, 2, 4, 3) and found.dtype == np.float32
    for i, image in enumerate(images):
        corners = [image[:2, :4], image[:2, 2:], image[3:, :4], image[3:, 2:], image[1:3, 1:5]]
        np.testing.assert_array_equal(found[10 * i:10 * i + 5], corners)
        np.testing.assert_array_equal(found[10 * i + 5:10 * i + 10], np.array(corners)[:, :, ::-1])
    with pytest.raises(CaffeError, match="crops of 6x4 need images of one size, at least as large"):
        io.oversample(images, (6, 4))


@pytest.fixture
def image_file(tmp_path):
    image = pytest.importorskip("PIL.Image")

    def save(pixels, mode=None):
        picture = image.fromarray(pixels)
        path = tmp_path / "image.png"
        (picture.convert(mode) if mode else picture).save(path)
        return path
    return save


def test_image_files_are_read_as_numbers_from_0_to_1(image_file):
    pixels = (draw(4, 5, 3) * 255).astype(np.uint8)
    color = pixels.astype(np.float32) / 255
    gray = (0.2125 * color[:, :, 0] + 0.7154 * color[:, :, 1] + 0.0721 * color[:, :, 2])[:, :, None]
    for mode in (None, "RGBA"):
        np.testing.assert_allclose(io.load_image(image_file(pixels, mode)), color, atol=1e-7)
        np.testing.assert_allclose(io.load_image(image_file(pixels, mode), color=False), gray, atol=1e-6)
    assert io.load_image(image_file(pixels)).dtype == np.float32


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint8, 255), (np.uint16, 65535)])
def test_gray_files_have_one_channel_or_three_alike(image_file, dtype, largest):
    path = image_file((draw(4, 5) * largest).astype(dtype))
    expected = (draw(4, 5) * largest).astype(dtype)[:, :, None] / largest
    np.testing.assert_allclose(io.load_image(path, color=False), expected, atol=1e-6)
    np.testing.assert_allclose(io.load_image(str(path)), expected.repeat(3, 2), atol=1e-6)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(CaffeError, match=f"{name}: cannot be read as an image"):
            io.load_image(tmp_path / name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CaffeError, match="takes Pillow: .+ -m pip install "):
        io.load_image("image.png")
