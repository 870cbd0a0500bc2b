"""convert_imageset, compute_image_mean and convert_leveldb, end to end: the records they write, and what they say about bad input."""
from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from lmdbs import numbered, write, write_images
from torchcaffe.cli import main
from torchcaffe.data import lmdb_writer
from torchcaffe.formats import read_mean
from torchcaffe.io import array_to_datum, datum_to_array
from torchcaffe.proto import caffe_pb2

PIXELS = [np.random.default_rng(i).integers(0, 256, (5 + i, 7, 3), dtype=np.uint8) for i in range(3)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / "images" / f"a {i}.png")
    (tmp_path / "list").write_text("a 0.png 4\na 1.png 5\na 2.png 6\n")
    return tmp_path


def records(path: str | Path) -> dict[str, caffe_pb2.Datum]:
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return {key.decode(): caffe_pb2.Datum.FromString(value) for key, value in transaction.cursor()}


def complaint(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must fail with 2, and leave nothing behind, says at the end."""
    before = sorted(os.listdir())
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in err and not out and sorted(os.listdir()) == before
    return err.splitlines()[-1]


# -- convert_imageset ----------------------------------------------------------------------------------------------
def test_images_become_raw_records_under_caffes_keys():
    assert main(["convert_imageset", "images/", "list", "out"]) == 0
    found = records("out")
    assert list(found) == ["00000000_a 0.png", "00000001_a 1.png", "00000002_a 2.png"]
    for datum, pixels, label in zip(found.values(), PIXELS, (4, 5, 6), strict=True):
        np.testing.assert_array_equal(datum_to_array(datum), pixels[:, :, ::-1].transpose(2, 0, 1))
        assert datum.label == label and not datum.encoded
    assert os.listdir("out") == ["data.mdb"]


@pytest.mark.parametrize("flags", [["-gray", "--resize_height=4", "-resize_width", "3"],
                                   ["--gray=true", "--resize_height=4", "--resize_width=3"]])
def test_gray_and_resized(flags):
    assert main(["convert_imageset", *flags, "images/", "list", "out"]) == 0
    assert {(d.channels, d.height, d.width) for d in records("out").values()} == {(1, 4, 3)}


def test_shuffled_labels_stay_with_their_images():
    (Path("images") / "more").mkdir()
    names = [f"more/{i}.png" for i in range(30)]
    for i, name in enumerate(names):
        Image.fromarray(np.full((2, 2), i, np.uint8)).save(f"images/{name}")
    Path("list").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    assert main(["convert_imageset", "--shuffle", "--nogray", "images/", "list", "out"]) == 0
    found = records("out")
    labels = [datum.label for datum in found.values()]
    assert sorted(labels) == list(range(30)) != labels
    assert all(name == f"{i:08d}_more/{d.label}.png" and d.data[0] == d.label for i, (name, d) in enumerate(found.items()))


def test_encoded_images_are_the_files_themselves_unless_another_kind_or_size_is_asked_for():
    assert main(["convert_imageset", "--encoded", "images/", "list", "kept"]) == 0
    assert main(["convert_imageset", "--encode_type=jpg", "images/", "list", "jpeg"]) == 0
    assert main(["convert_imageset", "--encoded", "--resize_height=4", "--resize_width=3", "images/", "list", "small"]) == 0
    for i, (kept, jpeg, small) in enumerate(zip(*(records(name).values() for name in ("kept", "jpeg", "small")), strict=True)):
        assert kept.encoded and kept.data == Path(f"images/a {i}.png").read_bytes() and kept.label == 4 + i
        picture = Image.open(io.BytesIO(jpeg.data))
        assert jpeg.encoded and picture.format == "JPEG" and picture.size == (7, 5 + i)
        assert Image.open(io.BytesIO(small.data)).size == (3, 4)
    assert main(["compute_image_mean", "small"]) == 0


def test_images_that_cannot_be_read_are_left_out_and_named(capfd):
    Path("images/a 1.png").write_bytes(b"no image")
    assert main(["convert_imageset", "images/", "list", "out"]) == 0
    assert list(records("out")) == ["00000000_a 0.png", "00000002_a 2.png"]
    err = capfd.readouterr().err
    assert "images/a 1.png is encoded, but not as an image" in err and "Processed 2 files. 1 could not be read and were left out." in err


@pytest.mark.parametrize(("arguments", "words"), [
    (["images/", "none", "out"], "cannot read the list of images none"),
    (["elsewhere/", "list", "out"], "none of the 3 images in list could be read; is ROOTFOLDER 'elsewhere/' right?"),
    (["images/", "list", "images"], "images exists already"),
    (["images/", "list", "none/out"], "cannot write the LMDB none/out (No such file or directory)"),
    (["--check_size", "images/", "list", "out"], "--check_size: images/a 1.png has shape (3, 6, 7), the first image (3, 5, 7)"),
    (["--resize_width=3", "images/", "list", "out"], "--resize_width and --resize_height go together"),
    (["--encode_type=xyz", "images/", "list", "out"], "images cannot be encoded as 'xyz'"),
    (["--backend=leveldb", "images/", "list", "out"], "LevelDB is not written here"),
    (["images/", "list"], "required: DB_NAME"),
])
def test_convert_imageset_refuses(capfd, arguments, words):
    assert words in complaint(capfd, "convert_imageset", *arguments)


def test_names_too_long_for_a_key_are_refused(capfd):
    deep = "./" * 300 + "a 0.png"
    Path("list").write_text(f"{deep} 1\n")
    assert "LMDB takes 1 to 511, so shorten the names" in complaint(capfd, "convert_imageset", "images/", "list", "out")


def test_databases_grow_as_they_need_to(monkeypatch):
    monkeypatch.setattr(lmdb_writer, "START_BYTES", 1 << 15)
    monkeypatch.setattr(lmdb_writer, "BATCH", 7)
    with lmdb_writer.LmdbWriter("out") as database:
        for i in range(100):
            database.put(b"%03d" % i, bytes(5000))
    with lmdb.open("out", readonly=True, lock=False) as environment:
        assert environment.stat()["entries"] == 100


# -- compute_image_mean ----------------------------------------------------------------------------------------------
def test_the_mean_is_that_of_every_pixel_and_channel(folder, capfd):
    images = numbered(9)
    write_images(folder / "lmdb", images)
    assert main(["compute_image_mean", "lmdb", "mean.binaryproto"]) == 0
    np.testing.assert_allclose(read_mean("mean.binaryproto"), images.mean(axis=0), rtol=1e-6)
    err = capfd.readouterr().err
    assert "Processed 9 files." in err and "mean_value channel [0]: 71.5\n" in err and "mean_value channel [1]: 4\n" in err


def test_float_records_have_means_too(folder):
    images = np.random.default_rng(0).standard_normal((4, 2, 3, 3)).astype(np.float32)
    write_images(folder / "lmdb", images)
    assert main(["compute_image_mean", "-backend", "lmdb", "lmdb", "mean.binaryproto"]) == 0
    np.testing.assert_allclose(read_mean("mean.binaryproto"), images.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_compute_image_mean_refuses(folder, capfd):
    assert "there is no LMDB none" in complaint(capfd, "compute_image_mean", "none", "out")
    write_images(folder / "uneven", [np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 3), np.uint8)])
    assert "record 1 (key b'000001') of uneven has shape (1, 2, 3), the first one (1, 2, 2)" in complaint(
        capfd, "compute_image_mean", "uneven", "out")
    write(folder / "bad", {b"0": b"no datum"})
    assert "record 0 (key b'0') of bad is not a Datum message" in complaint(capfd, "compute_image_mean", "bad", "out")
    write_images(folder / "good", numbered(2))
    assert "none/out: cannot be written" in complaint(capfd, "compute_image_mean", "good", "none/out")


# -- LevelDB -------------------------------------------------------------------------------------------------------
def write_leveldb(path: str, count: int) -> dict[bytes, bytes]:
    plyvel = pytest.importorskip("plyvel")
    values = {b"%d" % i: array_to_datum(numbered(1)[0] + np.uint8(i % 7), i).SerializeToString() for i in range(count)}
    with plyvel.DB(path, create_if_missing=True) as database:
        for key, value in values.items():
            database.put(key, value)
    return values


def test_a_leveldb_becomes_an_lmdb_with_the_same_records(folder, capfd):
    values = write_leveldb("old", 2500)
    assert main(["convert_leveldb", "old", "new"]) == 0
    with lmdb.open("new", readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert list(transaction.cursor()) == sorted(values.items())
    assert 'write source: "new" and backend: LMDB' in capfd.readouterr().err
    assert main(["compute_image_mean", "--backend=leveldb", "old", "a"]) == main(["compute_image_mean", "new", "b"]) == 0
    np.testing.assert_array_equal(read_mean("a"), read_mean("b"))


def test_convert_leveldb_refuses(folder, capfd):
    assert "there is no LevelDB none" in complaint(capfd, "convert_leveldb", "none", "new")
    write_leveldb("old", 10)
    assert "images exists already" in complaint(capfd, "convert_leveldb", "old", "images")
    write_leveldb("empty", 0)
    assert "the LevelDB empty holds no records" in complaint(capfd, "convert_leveldb", "empty", "new")
    table = max(Path("old").iterdir(), key=lambda path: path.stat().st_size)
    table.write_bytes(table.read_bytes()[:300] + bytes(100) + table.read_bytes()[400:])
    assert "cannot read the LevelDB old: Corruption" in complaint(capfd, "convert_leveldb", "old", "new")


def test_without_plyvel_the_sentence_says_what_to_install(folder, capfd, monkeypatch):
    (folder / "old").mkdir()
    (folder / "old" / "CURRENT").write_text("MANIFEST-000002\n")
    monkeypatch.setitem(sys.modules, "plyvel", None)
    assert re.search(r"takes plyvel: .+ -m pip install \S*(plyvel|hintkd\[leveldb\])", complaint(capfd, "convert_leveldb", "old", "new"))
