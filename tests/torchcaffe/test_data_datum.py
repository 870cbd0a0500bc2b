"""Datum messages: decoding against Pillow's own pixels, and bytes that are none."""
from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from torchcaffe.data import datum
from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(file, "PNG")
    return file.getvalue()


COLOR = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
WHOLE = png(COLOR)


def decoded(data: bytes, color: bool | None = None) -> np.ndarray:
    return datum.image(caffe_pb2.Datum(data=data, encoded=True), "record 0", color)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_datum_or_an_error(data):
    try:
        image = datum.image(datum.parse(data, "record 0"), "record 0")
    except CaffeError as error:
        assert "record 0" in str(error)
    else:
        assert image.ndim == 3


@given(st.builds(caffe_pb2.Datum, channels=st.integers(-2**31, 2**31 - 1), height=st.integers(-3, 3), width=st.integers(-3, 3),
                 data=st.binary(max_size=30), float_data=st.lists(st.floats(width=32), max_size=5), encoded=st.booleans()))
def test_any_datum_is_an_image_or_an_error(message):
    try:
        image = datum.image(message, "record 0")
    except CaffeError as error:
        assert "record 0" in str(error)
    else:
        assert image.shape == (message.channels, message.height, message.width)


@given(st.integers(0, len(WHOLE)), st.binary(max_size=4))
@example(len(WHOLE) - 1, b"")
def test_damaged_images_are_an_error_or_an_image(cut, junk):
    try:
        image = decoded(WHOLE[:cut] + junk + WHOLE[cut + len(junk):])
    except CaffeError as error:
        assert "record 0" in str(error)
    else:
        assert image.shape == (3, 5, 7)


def test_colour_comes_as_blue_green_red():
    np.testing.assert_array_equal(decoded(WHOLE), COLOR[:, :, ::-1].transpose(2, 0, 1))


def test_stored_channels_are_kept_unless_forced():
    gray, alpha = png(COLOR, "L"), png(np.dstack([COLOR, COLOR[:, :, :1]]))
    assert [decoded(gray).shape[0], decoded(WHOLE).shape[0], decoded(alpha).shape[0]] == [1, 3, 4]
    assert [decoded(data, color=True).shape[0] for data in (gray, WHOLE, alpha)] == [3, 3, 3]
    assert [decoded(data, color=False).shape[0] for data in (gray, WHOLE, alpha)] == [1, 1, 1]
    np.testing.assert_array_equal(decoded(gray, color=True), np.repeat(decoded(gray), 3, axis=0))


def test_gray_is_the_weighted_sum_of_the_channels():
    want = COLOR @ np.array([0.299, 0.587, 0.114])
    assert abs(decoded(WHOLE, color=False)[0] - want).max() <= 1


def test_sixteen_bits_are_refused():
    with pytest.raises(CaffeError, match="more than 8 bits"):
        decoded(png(np.full((4, 4), 1000, np.uint16)))


def test_without_pillow_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CaffeError, match=r"-m pip install \S*([Pp]illow|hintkd\[images\])"):
        decoded(WHOLE)
