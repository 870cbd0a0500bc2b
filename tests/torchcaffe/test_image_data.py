"""ImageData: lists, orders, sizes, and what it says about files that do not serve (the golden vectors hold its numbers against Caffe's)."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import torchcaffe as caffe
from lmdbs import batches, net
from torchcaffe.data import images
from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2

TEST = caffe_pb2.TEST


def pixels(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(folder: Path, count: int, size: tuple[int, int] = (6, 5)) -> list[np.ndarray]:
    """`count` images, a list of them with labels 10, 11, ..., and their pixels as blobs hold them."""
    (folder / "images").mkdir()
    found = [pixels(*size, seed) for seed in range(count)]
    for i, image in enumerate(found):
        Image.fromarray(image).save(folder / "images" / f"number {i}.png")
    (folder / "list.txt").write_text("".join(f"number {i}.png {10 + i}\n" for i in range(count)))
    return [image[:, :, ::-1].transpose(2, 0, 1) for image in found]


def image_layer(folder: Path, batch: int, more: str = "", transform: str = "") -> str:
    return (f'layer {{ name: "data" type: "ImageData" top: "data" top: "label" transform_param {{ {transform} }} image_data_param {{ '
            f'source: "{folder}/list.txt" root_folder: "{folder}/images/" batch_size: {batch} {more} }} }}\n')


def test_batches_wrap_in_the_middle(tmp_path):
    found = write(tmp_path, 5)
    model = net(tmp_path, image_layer(tmp_path, 3), TEST)
    assert [model.blobs[name].shape for name in ("data", "label")] == [(3, 3, 6, 5), (3,)]
    np.testing.assert_array_equal(batches(model, 4).reshape(12, 3, 6, 5), [found[i % 5] for i in range(12)])
    np.testing.assert_array_equal(model.blobs["label"].data, [14, 10, 11])


def test_shuffled_passes_hold_every_image_once_each_in_an_order_of_its_own(tmp_path):
    write(tmp_path, 20)
    labels = batches(net(tmp_path, image_layer(tmp_path, 8, "shuffle: true"), TEST), 5, "label").reshape(2, 20)
    assert [sorted(epoch) for epoch in labels.tolist()] == [list(range(10, 30))] * 2
    assert (labels[0] != labels[1]).any() and (labels[0] != np.arange(10, 30)).any()


def test_the_cursor_is_the_whole_state(tmp_path):
    write(tmp_path, 7)
    text = image_layer(tmp_path, 4, "shuffle: true", "crop_size: 3 mirror: true")
    whole = batches(net(tmp_path, text), 6)
    resumed = net(tmp_path, text)
    resumed.layers[0].cursor = 3
    np.testing.assert_array_equal(batches(resumed, 3), whole[3:])


def test_rand_skip_passes_over_some_images_once(tmp_path):
    write(tmp_path, 6)
    starts = {batches(net(tmp_path, image_layer(tmp_path, 1, "rand_skip: 4"), TEST, seed), 7, "label")[6].item() for seed in range(30)}
    assert starts == {10, 11, 12, 13}
    with pytest.raises(CaffeError, match="rand_skip 1000 may pass over all 6 images"):
        net(tmp_path, image_layer(tmp_path, 1, "rand_skip: 1000"))


def test_images_of_many_sizes_come_one_by_one(tmp_path):
    (tmp_path / "images").mkdir()
    sizes = [(6, 5), (4, 9), (7, 7)]
    for i, size in enumerate(sizes):
        Image.fromarray(pixels(*size, i)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "list.txt").write_text("0.png 0\n1.png 1\n2.png 2\n")
    pool = 'layer { name: "pool" type: "Pooling" bottom: "data" top: "pool" pooling_param { kernel_size: 2 stride: 2 } }'
    model = net(tmp_path, image_layer(tmp_path, 1) + pool, TEST)
    for height, width in sizes:
        model.forward()
        assert model.blobs["data"].data.shape == (1, 3, height, width)
        assert model.blobs["pool"].data.shape == (1, 3, -(-height // 2), -(-width // 2))
    many = net(tmp_path, image_layer(tmp_path, 3), TEST)
    with pytest.raises(CaffeError, match="differ in shape; set crop_size"):
        many.forward()
    assert batches(net(tmp_path, image_layer(tmp_path, 3, transform="crop_size: 4"), TEST), 1).shape == (1, 3, 3, 4, 4)
    assert batches(net(tmp_path, image_layer(tmp_path, 3, "new_height: 2 new_width: 8"), TEST), 1).shape == (1, 3, 3, 2, 8)


def test_resizing_weighs_the_four_nearest_pixels():
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 7), dtype=np.uint8)
    ours = images.resize(image, 9, 4)
    for y in range(9):
        for x in range(4):
            v, u = np.clip((y + 0.5) * 5 / 9 - 0.5, 0, 4), np.clip((x + 0.5) * 7 / 4 - 0.5, 0, 6)
            v0, u0 = min(int(v), 3), min(int(u), 5)
            part = image[:, v0:v0 + 2, u0:u0 + 2].astype(float)
            want = np.einsum("cij,i,j->c", part, [1 - v + v0, v - v0], [1 - u + u0, u - u0])
            assert abs(ours[:, y, x] - want).max() < 1
    np.testing.assert_array_equal(images.resize(image, 5, 7), image)


@pytest.mark.parametrize(("lines", "words"), [
    ("a.png 1\nb.png\n", "list.txt:2: a line of a list of images is"), ("a.png x\n", "list.txt:1: "), (" 3\n", "list.txt:1: "),
    ("\n", "lists no images"), ("none.png 1\n", "cannot read the image .*none.png \\(No such file"),
    ("list.txt 1\n", "list.txt is encoded, but not as an image"),
])
def test_what_is_wrong_with_a_list_is_said(tmp_path, lines, words):
    write(tmp_path, 1)
    for folder in (tmp_path, tmp_path / "images"):
        (folder / "list.txt").write_text(lines)
    with pytest.raises(CaffeError, match=rf"net.prototxt:1: layer 'data' \(ImageData\): .*{words}"):
        net(tmp_path, image_layer(tmp_path, 1))


@pytest.mark.parametrize(("more", "words"), [("new_height: 3", "go together"), ("is_color: false batch_size: 0", "no batch_size")])
def test_settings_that_caffe_refuses(tmp_path, more, words):
    write(tmp_path, 1)
    with pytest.raises(CaffeError, match=words):
        net(tmp_path, image_layer(tmp_path, 1, more).replace("batch_size: 1", "", more.count("batch_size")))


def test_training_on_images_of_many_sizes_runs_layer_by_layer_whatever_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(6, 5), (4, 9), (7, 7)]):
        Image.fromarray(pixels(*size, i)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "list.txt").write_text("0.png 0\n1.png 1\n2.png 2\n")
    (tmp_path / "net.prototxt").write_text(image_layer(tmp_path, 1) + """
      layer { name: "pool" type: "Pooling" bottom: "data" top: "pool" pooling_param { global_pooling: true pool: AVE } }
      layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip" inner_product_param { num_output: 3 } }
      layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }""")
    (tmp_path / "solver.prototxt").write_text('net: "net.prototxt" base_lr: 1e-4 lr_policy: "fixed"')
    solver = caffe.get_solver("solver.prototxt")
    solver.fast = True
    for i in range(4):
        solver.step(1)
        mean = pixels(*[(6, 5), (4, 9), (7, 7)][i % 3], i % 3)[:, :, ::-1].mean(axis=(0, 1))
        np.testing.assert_allclose(solver.net.blobs["pool"].data.ravel(), mean, rtol=1e-5)
