"""Transformations against loops that follow Caffe's data_transformer.cpp pixel by pixel, and the statistics of its draws."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcaffe.data.transformer import Transformer
from torchcaffe.errors import CaffeError
from torchcaffe.formats import write_mean
from torchcaffe.proto import caffe_pb2
from torchcaffe.streams import Streams


def transformer(text: str, training: bool = True) -> Transformer:
    return Transformer(text_format.Parse(text, caffe_pb2.TransformationParameter()), training)


def transformed(t: Transformer, images: np.ndarray | list[np.ndarray], seed: int = 0) -> np.ndarray:
    """`images` transformed with the draws of a seed."""
    given = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else [torch.from_numpy(i) for i in images]
    return t(given, drawn(len(images), seed)).numpy()


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return Streams(seed).uniform("transform", "data", 0, (3, count))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numbered(count: int, size: int) -> np.ndarray:
    """`count` equal images whose pixels are numbered."""
    return np.broadcast_to(np.arange(size * size, dtype=np.uint8).reshape(1, 1, size, size), (count, 1, size, size))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(4, 9), width=st.integers(4, 9), crop=st.integers(0, 4), mirror=st.booleans(), training=st.booleans(),
       mean=st.sampled_from(["none", "value", "values", "file"]), scale=st.sampled_from([1.0, 0.5, 1 / 255]))
def test_every_pixel_is_caffes(tmp_path_factory, height, width, crop, mirror, training, mean, scale):
    images = generator(1).integers(0, 256, (6, 3, height, width), dtype=np.uint8)
    mean_image = np.zeros((3, height, width), np.float32)
    text = f"crop_size: {crop} scale: {scale} mirror: {str(mirror).lower()} "
    if mean == "file":
        mean_image = generator(2).random((3, height, width), np.float32) * 255
        path = tmp_path_factory.mktemp("mean") / "mean.binaryproto"
        write_mean(path, mean_image)
        text += f'mean_file: "{path}"'
    elif mean != "none":
        values = [104.0] if mean == "value" else [104.0, 117.5, 123.0]
        mean_image += np.array(values, np.float32)[:, None, None]
        text += " ".join(f"mean_value: {v}" for v in values)
    got = transformed(transformer(text, training), images, 3)

    draws, size = drawn(6, 3).numpy(), (crop or height, crop or width)
    assert got.dtype == np.float32 and got.shape == (6, 3, *size)
    for i, image in enumerate(images):
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        if crop and training:
            top, left = int(draws[1, i] * (height - crop + 1)), int(draws[2, i] * (width - crop + 1))
        for c, h, w in np.ndindex(3, *size):
            x = size[1] - 1 - w if mirror and draws[0, i] < 0.5 else w
            want = (np.float32(image[c, top + h, left + w]) - mean_image[c, top + h, left + w]) * np.float32(scale)
            assert got[i, c, h, x] == want


def test_training_windows_are_uniform_and_independent():
    count, size, crop = 20_000, 8, 5
    got = transformed(transformer(f"crop_size: {crop} mirror: true"), numbered(count, size))
    mirrored = got[:, 0, 0, 0] > got[:, 0, 0, 1]
    corner = got[:, 0, 0].min(axis=1).astype(int)
    rooms = (size - crop + 1) ** 2
    cells = np.bincount((corner // size) * 4 + corner % size, minlength=rooms)
    assert cells.size == rooms
    deviation = np.sqrt(count * (1 / rooms) * (1 - 1 / rooms))
    assert abs(cells - count / rooms).max() < 5 * deviation
    assert abs(mirrored.sum() - count / 2) < 5 * np.sqrt(count) / 2
    assert abs(np.corrcoef(mirrored, corner)[0, 1]) < 5 / np.sqrt(count)


def test_testing_draws_no_window_but_mirrors():
    got = transformed(transformer("crop_size: 5 mirror: true", training=False), numbered(400, 8))
    assert set(got[:, 0, 0].min(axis=1)) == {9}                  # row 1, column 1: (8 - 5) / 2, rounded down
    assert 150 < (got[:, 0, 0, 0] > got[:, 0, 0, 1]).sum() < 250


def test_a_list_of_images_is_transformed_as_an_array_is():
    images = generator(1).integers(0, 256, (9, 3, 10, 10), dtype=np.uint8)
    t = transformer("crop_size: 6 mirror: true mean_value: 3")
    np.testing.assert_array_equal(transformed(t, list(images)), transformed(t, images))


def test_records_are_never_changed():
    images = generator(1).random((4, 1, 6, 6), np.float32)
    before = images.copy()
    for mirror in ("true", "false"):
        transformed(transformer(f"mirror: {mirror} mean_value: 1 scale: 2", training=False), images)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(("text", "shape", "reason"), [
    ('mean_file: "m" mean_value: 1', (1, 4, 4), "both mean_file and mean_value"),
    ("force_color: true force_gray: true", (1, 4, 4), "both force_color and force_gray"),
    ("crop_size: 5", (1, 4, 9), "crop_size 5 is larger than the images of 4x9"),
    ("mean_value: 1 mean_value: 2", (3, 4, 4), "2 mean_values for images of 3 channels"),
    ('mean_file: "/nowhere/mean"', (3, 4, 4), "/nowhere/mean"),
])
def test_settings_that_do_not_fit(text, shape, reason):
    with pytest.raises(CaffeError, match=reason):
        transformer(text).output_shape(shape)


def test_a_mean_of_another_size_is_refused(tmp_path):
    write_mean(tmp_path / "mean", np.zeros((3, 32, 32), np.float32))
    with pytest.raises(CaffeError, match=r"is for images of shape \(3, 32, 32\), but the records have \(3, 40, 40\)"):
        transformer(f'mean_file: "{tmp_path / "mean"}" crop_size: 32').output_shape((3, 40, 40))


@pytest.mark.parametrize("text", ["", "crop_size: 4", "mirror: true", "crop_size: 4 mirror: true"])
@pytest.mark.parametrize("training", [False, True])
def test_windows_and_mirrors_have_numbers(text, training):
    t, shape = transformer(text, training), (3, 6, 7)
    count = t.variants(shape)
    assert count == (3 * 4 if "crop" in text and training else 1) * (2 if "mirror" in text else 1)
    numbers = torch.arange(count)
    assert torch.equal(t.variant(t.draws(numbers, shape), shape), numbers)
    images = generator().integers(0, 256, (1, *shape), dtype=np.uint8)
    shown = t(torch.from_numpy(images).expand(count, -1, -1, -1), t.draws(numbers, shape))
    assert len({each.numpy().tobytes() for each in shown}) == count
    draws = drawn(200)
    theirs = t(torch.from_numpy(images).expand(200, -1, -1, -1), draws)
    assert torch.equal(theirs, shown[t.variant(draws, shape)])
