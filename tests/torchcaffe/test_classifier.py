"""Classifier and Detector: what reaches the net, and what comes back, on a net that returns channel means."""
import numpy as np
import pytest

import torchcaffe as caffe
from torchcaffe import io

NET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 6 dim: 6 } } }
layer { name: "mean" type: "Pooling" bottom: "data" top: "mean" pooling_param { pool: AVE global_pooling: true } }
layer { name: "out" type: "Flatten" bottom: "mean" top: "out" }
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "net.prototxt").write_text(NET)
    caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST).save(tmp_path / "net.caffemodel")
    return str(tmp_path / "net.prototxt"), str(tmp_path / "net.caffemodel")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def test_a_classifier_averages_ten_crops(files):
    images = [draw(12, 10, 3), draw(8, 8, 3, seed=1)]
    classifier = caffe.Classifier(*files, image_dims=(8, 8), mean=np.array([1.0, 2.0, 3.0]), raw_scale=255, channel_swap=(2, 1, 0),
                                  input_scale=0.5)
    found = classifier.predict(images)
    for row, image in zip(found, images, strict=True):
        crops = io.oversample([io.resize_image(image, (8, 8))], (6, 6))
        expected = ((crops[..., ::-1] * 255 - [1, 2, 3]) * 0.5).mean((0, 1, 2))
        np.testing.assert_allclose(row, expected, rtol=1e-4)


def test_a_classifier_can_take_the_centre_only(files):
    image = draw(8, 9, 3)
    found = caffe.Classifier(*files, image_dims=(8, 9)).predict([image], oversample=False)
    np.testing.assert_allclose(found, [image[1:7, 1:7].mean((0, 1))], rtol=1e-4)
    whole = caffe.Classifier(*files).predict([image] * 5, oversample=False)
    np.testing.assert_allclose(whole, [io.resize_image(image, (6, 6)).mean((0, 1))] * 5, rtol=1e-4)


@pytest.fixture
def photo(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = (draw(20, 30, 3) * 255).astype(np.uint8)
    image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png"), pixels / 255


def test_a_detector_classifies_windows(files, photo):
    path, image = photo
    windows = [(2, 3, 14, 9), (0, 0, 20, 30)]
    found = caffe.Detector(*files).detect_windows([(path, windows)])
    assert [(d["filename"], d["window"]) for d in found] == [(path, w) for w in windows]
    for detection, (top, left, bottom, right) in zip(found, windows, strict=True):
        np.testing.assert_allclose(detection["prediction"], io.resize_image(image[top:bottom, left:right], (6, 6)).mean((0, 1)), rtol=1e-4)
    assert caffe.Detector(*files).detect_windows([(path, [])]) == []


def test_context_inside_the_image_is_its_pixels(files):
    image = draw(30, 30, 3)
    crop = caffe.Detector(*files, context_pad=1).crop(image, (10, 10, 14, 14))
    # 4 of 6 pixels are the window's, so 5 pixels about 12.5 become 7.5: 8.75 to 16.25, rounded
    np.testing.assert_allclose(crop, io.resize_image(image[9:16, 9:16], (6, 6)), atol=1e-6)


def test_context_beyond_the_image_is_the_mean(files):
    mean = np.array([51.0, 102.0, 153.0])
    detector = caffe.Detector(*files, mean=mean, raw_scale=255, channel_swap=(2, 1, 0), context_pad=1)
    crop = detector.crop(draw(30, 30, 3), (0, 0, 12, 12))
    np.testing.assert_allclose(crop[0], np.tile(mean[::-1] / 255, (6, 1)), rtol=1e-6)
    np.testing.assert_allclose(crop[:, 0], np.tile(mean[::-1] / 255, (6, 1)), rtol=1e-6)
    np.testing.assert_allclose(detector.transformer.preprocess("data", crop)[:, 0], 0, atol=1e-4)


def test_what_a_detector_cannot_do_is_said(files):
    with pytest.raises(caffe.CaffeError, match="Selective Search is MATLAB code"):
        caffe.Detector(*files).detect_selective_search(["a.png"])
    with pytest.raises(caffe.CaffeError, match="context_pad 3 takes a square input of more than 6 pixels, not 6x6"):
        caffe.Detector(*files, context_pad=3)
    with pytest.raises(caffe.CaffeError, match="lies outside of its image of 30x30 pixels"):
        caffe.Detector(*files, context_pad=1).crop(draw(30, 30, 3), (40, 40, 50, 50))
