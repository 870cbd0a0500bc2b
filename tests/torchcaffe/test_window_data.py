"""WindowData: which windows a batch holds, where their pixels go, against values worked out by hand, and what it refuses."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmdbs import batches, net
from torchcaffe.errors import CaffeError
from torchcaffe.formats import write_mean

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
BLOB = PIXELS[:, :, ::-1].transpose(2, 0, 1).astype(float)
# label, overlap, x1, y1, x2, y2; all of 8 x 8 pixels
WINDOWS = "3 0.9 2 3 9 10\n5 0.5 10 8 17 15\n4 0.3 4 12 11 19\n7 0.1 16 0 23 7\n"


def write(folder: Path, windows: str = WINDOWS, image: np.ndarray = PIXELS, head: str = "# 0\na picture.png\n3\n20\n24\n") -> None:
    Image.fromarray(image).save(folder / "a picture.png")
    (folder / "windows.txt").write_text(f"{head}{windows.count(chr(10))}\n{windows}")


def window_layer(folder: Path, more: str = "", transform: str = "", crop: int = 8) -> str:
    return (f'layer {{ name: "data" type: "WindowData" top: "data" top: "label" transform_param {{ crop_size: {crop} {transform} }} '
            f'window_data_param {{ source: "{folder}/windows.txt" root_folder: "{folder}/" batch_size: 8 {more} }} }}\n')


def test_background_comes_first_then_the_asked_fraction_of_objects(tmp_path):
    write(tmp_path)
    model = net(tmp_path, window_layer(tmp_path, "bg_threshold: 0.4 fg_fraction: 0.4"))
    drawn = {"background": set(), "objects": set()}
    for data in batches(model, 20):
        labels = model.blobs["label"].data
        assert labels.shape == (8,)
        for i, crop in enumerate(data):
            place = [(y, x) for x, y in [(2, 3), (10, 8), (4, 12), (16, 0)] if np.array_equal(crop, BLOB[:, y:y + 8, x:x + 8])]
            drawn["background" if i < 5 else "objects"].update(place)
    assert labels[:5].tolist() == [0] * 5 and set(labels[5:]) <= {3, 5}
    assert drawn == {"background": {(12, 4), (0, 16)}, "objects": {(3, 2), (8, 10)}}


def test_draws_are_a_function_of_the_pass(tmp_path):
    write(tmp_path)
    text = window_layer(tmp_path, transform="mirror: true")
    whole = batches(net(tmp_path, text), 5)
    resumed = net(tmp_path, text)
    resumed.layers[0].cursor = 3
    np.testing.assert_array_equal(batches(resumed, 2), whole[3:])


def test_half_of_the_crops_are_mirrored(tmp_path):
    write(tmp_path, "1 1 2 3 9 10\n")
    crops = batches(net(tmp_path, window_layer(tmp_path, "fg_fraction: 1", "mirror: true")), 25).reshape(200, 3, 8, 8)
    plain = BLOB[:, 3:11, 2:10]
    mirrored = [np.array_equal(crop, plain[:, :, ::-1]) for crop in crops]
    assert all(turned or np.array_equal(crop, plain) for turned, crop in zip(mirrored, crops, strict=True))
    assert 65 < sum(mirrored) < 135


def test_the_centre_of_the_mean_is_subtracted_and_windows_own_scale_applied(tmp_path):
    write(tmp_path, "1 1 2 3 9 10\n")
    mean = np.random.default_rng(1).random((3, 12, 12)).astype(np.float32)
    write_mean(tmp_path / "mean.binaryproto", mean)
    text = window_layer(tmp_path, "fg_fraction: 1 scale: 0.5", f'scale: 7 mean_file: "{tmp_path}/mean.binaryproto"')
    np.testing.assert_allclose(batches(net(tmp_path, text), 1)[0][0], (BLOB[:, 3:11, 2:10] - mean[:, 2:10, 2:10]) / 2, rtol=1e-5)
    text = window_layer(tmp_path, "fg_fraction: 1", "mean_value: 1 mean_value: 2 mean_value: 4")
    np.testing.assert_array_equal(batches(net(tmp_path, text), 1)[0][0], BLOB[:, 3:11, 2:10] - np.array([1, 2, 4])[:, None, None])


@pytest.mark.parametrize(("window", "filled"), [
    # crop 12, context 2: an 8 x 8 window grows by 12/8 to 13 x 13 (Caffe's rounding), which is warped by 12/13
    ("6 6 13 13", np.s_[:, :, :]),
    ("0 0 7 7", np.s_[:, 2:, 2:]),                  # 2 pixels outside: round(2 * 12/13) = 2 stay empty, the other 11 become 10
    ("16 12 23 19", np.s_[:, :9, :9]),              # 3 outside (rows 10..22 of 20, columns 14..26 of 24): 10 pixels become 9
])
def test_context_outside_of_the_image_stays_zero(tmp_path, window, filled):
    write(tmp_path, f"1 1 {window}\n", np.full((20, 24, 3), 50, np.uint8))
    crop = batches(net(tmp_path, window_layer(tmp_path, "fg_fraction: 1 context_pad: 2", "mean_value: 10", 12)), 1)[0][0]
    want = np.zeros((3, 12, 12))
    want[filled] = 40
    np.testing.assert_array_equal(crop, want)


def test_padding_is_mirrored_too(tmp_path):
    write(tmp_path, "1 1 0 6 7 13\n", np.full((20, 24, 3), 50, np.uint8))
    crops = batches(net(tmp_path, window_layer(tmp_path, "fg_fraction: 1 context_pad: 2", "mirror: true", 12)), 4).reshape(32, 3, 12, 12)
    empty = {tuple(np.flatnonzero((crop == 0).all(axis=(0, 1)))) for crop in crops}
    assert empty == {(0, 1), (10, 11)}


def test_square_windows_take_their_longer_side(tmp_path):
    striped = np.repeat((np.arange(20) * 10).astype(np.uint8)[:, None, None], 24, 1).repeat(3, 2)
    write(tmp_path, "1 1 4 8 11 11\n", striped)             # 8 wide, 4 high: becomes rows 6 to 14
    crop = batches(net(tmp_path, window_layer(tmp_path, 'fg_fraction: 1 crop_mode: "square"', crop=9)), 1)[0][0]
    np.testing.assert_array_equal(crop[0, :, 0], np.arange(6, 15) * 10)


@pytest.mark.parametrize(("windows", "head", "words"), [
    ("0 0.9 0 0 7 7\n", None, "label 0; labels of objects begin at 1"),
    ("1 0.9 0 0 7\n", None, "image 1 is not written as"),
    ("1 0.9 0 0 7 7\n", "# 4\na picture.png\n3\n20\n24\n", "image 0 is not written as `# 0`"),
    ("1 0.9 0 0 7 7\n", "# 0\na picture.png\n1\n20\n24\n", "image 0 is not written as"),
    ("1 0.1 0 0 7 7\n", None, "2 windows of each batch are objects, but .*windows.txt has none"),
    ("1 0.9 0 0 7 7\n", None, "6 windows of each batch are background, but .*windows.txt has none"),
])
def test_window_files_that_do_not_serve(tmp_path, windows, head, words):
    write(tmp_path, windows, **({} if head is None else {"head": head}))
    with pytest.raises(CaffeError, match=rf"layer 'data' \(WindowData\): .*{words}"):
        net(tmp_path, window_layer(tmp_path))


def test_windows_beyond_their_image_and_images_that_are_missing(tmp_path):
    write(tmp_path, "1 1 20 3 27 10\n")
    with pytest.raises(CaffeError, match=r"window \[20, 3, 27, 10\] in .*a picture.png, which has only 24 x 20 pixels"):
        net(tmp_path, window_layer(tmp_path, "fg_fraction: 1")).forward()
    (tmp_path / "a picture.png").unlink()
    with pytest.raises(CaffeError, match="cannot read the image .*a picture.png"):
        net(tmp_path, window_layer(tmp_path, "fg_fraction: 1")).forward()


@pytest.mark.parametrize(("more", "transform", "crop", "words"), [
    ("", "", 0, "no crop_size"), ("context_pad: 4", "", 8, "leaves nothing of crop_size 8"), ("fg_fraction: 2", "", 8, "between 0 and 1"),
    ("", "mean_value: 1 mean_value: 2", 8, "2 mean_values"), ("", 'mean_value: 1 mean_file: "x"', 8, "not both"),
])
def test_settings_that_caffe_refuses(tmp_path, more, transform, crop, words):
    write(tmp_path)
    with pytest.raises(CaffeError, match=words):
        net(tmp_path, window_layer(tmp_path, more, transform, crop))
