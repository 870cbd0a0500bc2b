"""The Data layer: order, cursor, sharing, and what it says about databases that do not serve."""
from __future__ import annotations

import gc
import io
import weakref

import numpy as np
import pytest
from PIL import Image

from lmdbs import batches, data_layer, net, numbered, write, write_images
from torchcaffe.data import images as data_images
from torchcaffe.data import lmdb_reader
from torchcaffe.errors import CaffeError
from torchcaffe.io import array_to_datum
from torchcaffe.proto import caffe_pb2

TEST = caffe_pb2.TEST
RANDOM = "crop_size: 8 mirror: true"


def test_batches_wrap_in_the_middle(tmp_path):
    database = write_images(tmp_path / "lmdb", numbered(7))
    labels = batches(net(tmp_path, data_layer(database, 3), TEST), 6, "data_label")
    np.testing.assert_array_equal(labels.ravel(), np.arange(18) % 7)


def test_a_batch_may_be_larger_than_the_set(tmp_path):
    database = write_images(tmp_path / "lmdb", numbered(3))
    labels = batches(net(tmp_path, data_layer(database, 8), TEST), 2, "data_label")
    np.testing.assert_array_equal(labels.ravel(), np.arange(16) % 3)


def test_records_come_in_the_byte_order_of_their_keys(tmp_path):
    image = numbered(1)[0]
    database = write(tmp_path / "lmdb", {b"%d" % i: array_to_datum(image, i).SerializeToString() for i in range(12)})
    labels = batches(net(tmp_path, data_layer(database, 12), TEST), 1, "data_label")
    assert labels[0].astype(int).tolist() == sorted(range(12), key=str)


def test_the_cursor_is_the_whole_state(tmp_path):
    database = write_images(tmp_path / "lmdb", numbered(10))
    whole = batches(net(tmp_path, data_layer(database, 4, RANDOM)), 9)
    resumed = net(tmp_path, data_layer(database, 4, RANDOM))
    resumed.layers[0].cursor = 5
    np.testing.assert_array_equal(batches(resumed, 4), whole[5:])
    assert resumed.layers[0].cursor == 9


def test_draws_depend_on_seed_layer_and_pass(tmp_path):
    database = write_images(tmp_path / "lmdb", numbered(4))
    first, again, other = (net(tmp_path, data_layer(database, 4, RANDOM) + data_layer(database, 4, RANDOM, "second"), seed=seed)
                           for seed in (1, 1, 2))
    for model in (first, again, other):
        model.forward()
    before = first.blobs["data"].data.copy()
    np.testing.assert_array_equal(before, again.blobs["data"].data)
    assert (before != other.blobs["data"].data).any()
    assert (before != first.blobs["second"].data).any()
    first.forward()
    assert (before != first.blobs["data"].data).any()


def test_a_set_too_large_to_keep_gives_the_same_batches(tmp_path, monkeypatch):
    database = write_images(tmp_path / "lmdb", numbered(10))
    kept = batches(net(tmp_path, data_layer(database, 4, RANDOM)), 6)
    monkeypatch.setattr(data_images, "KEEP_BYTES", 10)
    streamed = net(tmp_path, data_layer(database, 4, RANDOM))
    np.testing.assert_array_equal(batches(streamed, 6), kept)
    assert streamed.layers[0].images._kept is None


def test_images_of_unequal_size_are_cropped_to_one(tmp_path):
    sizes = [(12, 12), (12, 12), (9, 16), (20, 8)]
    images = [numbered(1, *size)[0] for size in sizes]
    database = write_images(tmp_path / "lmdb", images)
    data = batches(net(tmp_path, data_layer(database, 4, "crop_size: 8"), TEST), 2)
    for image, (height, width), got in zip(images, sizes, data[1], strict=True):
        top, left = (height - 8) // 2, (width - 8) // 2
        np.testing.assert_array_equal(got, image[:, top:top + 8, left:left + 8])


def test_images_of_unequal_size_need_a_crop(tmp_path):
    database = write_images(tmp_path / "lmdb", [numbered(1)[0], numbered(1, 9, 9)[0]])
    with pytest.raises(CaffeError, match=r"layer 'data' \(Data\).*differ in shape; set crop_size"):
        net(tmp_path, data_layer(database, 2), TEST).forward()


def test_encoded_and_raw_records_may_be_mixed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    bgr = pixels[:, :, ::-1].transpose(2, 0, 1)
    database = write(tmp_path / "lmdb", {b"0": caffe_pb2.Datum(encoded=True, data=file.getvalue(), label=4).SerializeToString(),
                                         b"1": array_to_datum(bgr, 5).SerializeToString()})
    data = batches(net(tmp_path, data_layer(database, 2), TEST), 1)[0]
    np.testing.assert_array_equal(data, [bgr, bgr])


def test_float_records_are_not_rounded(tmp_path):
    image = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    database = write_images(tmp_path / "lmdb", [image, 2 * image])
    np.testing.assert_array_equal(batches(net(tmp_path, data_layer(database, 2), TEST), 1)[0], [image, 2 * image])


def test_one_handle_serves_all_layers_and_is_closed_after_them(tmp_path):
    database = write_images(tmp_path / "lmdb", numbered(4))
    models = [net(tmp_path, data_layer(database, 2), phase) for phase in (caffe_pb2.TRAIN, TEST)]
    handle = weakref.ref(lmdb_reader.open_database(database))
    for model in models:
        model.forward()
    model = models.pop()
    gc.collect()
    assert handle() is lmdb_reader.open_database(database)
    del model, models
    gc.collect()
    assert handle() is None


def test_a_database_written_anew_is_read_anew(tmp_path):
    database = write_images(tmp_path / "lmdb", numbered(4), [1, 1, 1, 1])
    old = net(tmp_path, data_layer(database, 2), TEST)
    database.rename(tmp_path / "old")
    write_images(tmp_path / "lmdb", numbered(4), [2, 2, 2, 2])
    new = net(tmp_path, data_layer(database, 2), TEST)
    assert batches(old, 1, "data_label").max() == 1
    assert batches(new, 1, "data_label").min() == 2


def test_databases_that_do_not_serve_are_named(tmp_path):
    write(tmp_path / "empty", {})
    truncated = write_images(tmp_path / "truncated", numbered(50))
    with open(truncated / "data.mdb", "r+b") as file:
        file.truncate(20_000)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"junk" * 5000)
    text = write(tmp_path / "text", {b"0": b"\xff\xff\xff no Datum"})
    for name, reason in (("missing", "there is no LMDB"), ("empty", "holds no records"), ("truncated", "only half there"),
                         ("junk", "does not begin as an LMDB"), (text.name, r"record 0 \(key b'0'\).*not a Datum")):
        with pytest.raises(CaffeError, match=rf"layer 'data' \(Data\).*{reason}") as caught:
            net(tmp_path, data_layer(tmp_path / name, 2), TEST)
        assert name in str(caught.value)


def test_a_record_damaged_further_on_is_named(tmp_path):
    image = numbered(1)[0]
    short = array_to_datum(image, 1)
    short.data = short.data[:-1]
    database = write(tmp_path / "lmdb", {b"0": array_to_datum(image, 0).SerializeToString(), b"1": short.SerializeToString()})
    with pytest.raises(CaffeError, match=r"record 1 \(key b'1'\) of .*lmdb holds 287 values for 2 channels of 12x12"):
        net(tmp_path, data_layer(database, 2), TEST).forward()


def test_leveldb_is_refused_with_what_to_do(tmp_path):
    database = write_images(tmp_path / "lmdb", numbered(2))
    with pytest.raises(CaffeError, match="is an LMDB, so write `backend: LMDB`"):
        net(tmp_path, data_layer(database, 2).replace("backend: LMDB", ""))
    with pytest.raises(CaffeError, match="run `torchcaffe convert_leveldb .* .*_lmdb`"):
        net(tmp_path, data_layer(tmp_path / "leveldb", 2, backend="LEVELDB"))


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("transform", ["", "crop_size: 9 mirror: true scale: 0.01 mean_value: 100"])
def test_inputs_have_numbers(tmp_path, transform, resident):
    write_images(tmp_path / "lmdb", numbered(7))
    made = net(tmp_path, data_layer(tmp_path / "lmdb", 3, transform))
    layer = made.layers[0]
    tops = batches(made, 6)
    if resident:
        layer.reside(2**20)
    for pass_, top in enumerate(tops):
        entries = layer.entries(pass_)
        assert (entries // layer.variants).tolist() == [(3 * pass_ + i) % 7 for i in range(3)]
        assert layer.inputs(entries.flip(0)).flip(0).numpy().tobytes() == top.tobytes()
    assert layer.variants == (4 * 4 * 2 if transform else 1) and layer.cursor == 6
