"""check_dataset: folders that prepare wrote, and folders of one's own."""
from __future__ import annotations

import io
import shutil
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from data_prep import check_dataset, prepare
from hintkd.errors import UserError
from torchcaffe.formats import write_mean
from torchcaffe.io import array_to_datum
from torchcaffe.proto import caffe_pb2


def write(folder: Path, messages: list[caffe_pb2.Datum]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 24, lock=False) as environment, environment.begin(write=True) as transaction:
        for i, message in enumerate(messages):
            transaction.put(b"%04d" % i, message.SerializeToString())


def images(count: int, *shape: int) -> list[caffe_pb2.Datum]:
    draw = np.random.default_rng(count)
    return [array_to_datum(draw.integers(0, 256, shape, dtype=np.uint8), i % 5) for i in range(count)]


@pytest.fixture
def own(tmp_path) -> Path:
    """A data set without dataset.json and means."""
    write(tmp_path / "own" / "train_lmdb", images(12, 3, 6, 6))
    write(tmp_path / "own" / "test_lmdb", images(7, 3, 4, 4))
    return tmp_path / "own"


def test_shapes_counts_and_classes(own):
    info = check_dataset(own)
    assert {name: (split.count, split.shape) for name, split in info.splits.items()} == {"train": (12, (3, 6, 6)), "test": (7, (3, 4, 4))}
    assert info.classes == 5 and not info.means


def test_reading_all_records_gives_the_fingerprint_that_prepare_computed(tmp_path):
    folder = prepare("digits", tmp_path, say=lambda message: None)
    described = check_dataset(folder)
    (folder / "dataset.json").unlink()
    read = check_dataset(folder)
    assert read == described and described.means


def test_the_fingerprint_depends_on_all_that_a_net_can_see(own):
    seen = {check_dataset(own).fingerprint}
    records = images(7, 3, 4, 4)
    for change in (lambda: setattr(records[3], "label", 0), lambda: records.reverse(), records.pop,
                   lambda: setattr(records[0], "data", bytes(48))):
        change()
        write(own / "test_lmdb", records)
        seen.add(check_dataset(own).fingerprint)
    for value in (1, 2):
        for split, size in (("train", 6), ("test", 4)):
            write_mean(own / f"{split}_mean.binaryproto", np.full((3, size, size), value, np.float32))
        seen.add(check_dataset(own).fingerprint)
    assert len(seen) == 7


def test_the_folders_name_does_not_matter(own):
    before = check_dataset(own).fingerprint
    assert check_dataset(own.rename(own.with_name("moved"))).fingerprint == before


def test_encoded_records_may_differ_in_size(own):
    messages = []
    for size in (6, 9):
        file = io.BytesIO()
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(file, "PNG")
        messages.append(caffe_pb2.Datum(encoded=True, data=file.getvalue(), label=1))
    write(own / "train_lmdb", messages)
    assert check_dataset(own).splits["train"].shape == (3, 6, 6)


def test_what_does_not_fit_is_named(own):
    write_mean(own / "train_mean.binaryproto", np.zeros((3, 6, 6), np.float32))
    with pytest.raises(UserError, match=r"has train_mean.binaryproto only"):
        check_dataset(own)
    write_mean(own / "test_mean.binaryproto", np.zeros((3, 6, 6), np.float32))
    with pytest.raises(UserError, match=r"test_mean.binaryproto has shape \(3, 6, 6\), but the records of test_lmdb have \(3, 4, 4\)"):
        check_dataset(own)
    (own / "test_mean.binaryproto").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match="test_mean.binaryproto"):
        check_dataset(own)
    for split in ("train", "test"):
        (own / f"{split}_mean.binaryproto").unlink()
    write(own / "train_lmdb", [*images(3, 3, 6, 6), *images(1, 3, 6, 5)])
    with pytest.raises(UserError, match=r"record 3 .*shape \(3, 6, 5\), but the first record has \(3, 6, 6\)"):
        check_dataset(own)
    write(own / "train_lmdb", [caffe_pb2.Datum(channels=1, height=1, width=1, data=b"a", label=-1)])
    with pytest.raises(UserError, match="holds the label -1"):
        check_dataset(own)
    shutil.rmtree(own / "train_lmdb")
    with pytest.raises(UserError, match="has no train_lmdb"):
        check_dataset(own)
    with pytest.raises(UserError, match="cannot read the data set nowhere"):
        check_dataset("nowhere")


def test_a_description_of_something_else_is_not_believed(tmp_path):
    folder = prepare("digits", tmp_path, say=lambda message: None)
    shutil.rmtree(folder / "train_lmdb")
    shutil.copytree(folder / "test_lmdb", folder / "train_lmdb")
    shutil.copy(folder / "test_mean.binaryproto", folder / "train_mean.binaryproto")
    with pytest.raises(UserError, match="train_lmdb/data.mdb is damaged; prepare .* again"):
        check_dataset(folder)
