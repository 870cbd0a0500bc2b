"""The readers of publishers' files: right content, and one sentence for anything else."""
from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import published
from data_prep import cifar, mnist
from hintkd.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(mnist, "COUNTS", {"train": published.TRAIN, "test": published.TEST})
    for name in ("BATCH", "TRAIN", "TEST"):
        monkeypatch.setattr(cifar, name, published.TEST)


@given(arrays.arrays(np.uint8, arrays.array_shapes(max_dims=4, min_side=0)))
def test_an_idx_file_gives_back_its_array(array):
    np.testing.assert_array_equal(mnist.parse_idx(published.idx(array), "file"), array)


@given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda rest: b"\0\0\x08" + rest),
                 st.integers(1, 255).map(lambda axes: bytes([0, 0, 8, axes]) + bytes(4 * axes)),
                 st.integers(1, 60).map(lambda axes: bytes([0, 0, 8, axes]) + bytes(4) + b"\xff" * 4 * (axes - 1))))
def test_random_bytes_are_an_idx_array_or_an_error(data):
    try:
        mnist.parse_idx(data, "some file")
    except UserError as error:
        assert str(error).startswith("some file ")


@given(st.binary(max_size=20), st.sampled_from([(10,), (20, 100)]), st.integers(0, 3))
def test_random_bytes_are_cifar_records_or_an_error(data, classes, repeat):
    data = data + bytes(3072 + len(classes)) * repeat
    try:
        images, labels = cifar.parse_records(data, classes, "some file")
    except UserError as error:
        assert str(error).startswith("some file ")
    else:
        assert images.shape == (len(labels), 3, 32, 32)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inner", ["mnist", "."])
def test_mnist(tmp_path, packed, inner):
    content = published.mnist(tmp_path / "files" / inner if inner != "." else tmp_path / "files", packed)
    for name, split in mnist.read_mnist(tmp_path / "files").items():
        np.testing.assert_array_equal(split.images[:, 0], content[name][0])
        np.testing.assert_array_equal(split.labels, content[name][1])


def test_mnist_files_that_do_not_serve_are_named(tmp_path):
    published.mnist(tmp_path / "mnist")
    images, labels = tmp_path / "mnist" / "train-images-idx3-ubyte.gz", tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    for content, reason in ((whole[:-20], "truncated or not a gzip file"), (b"junk", "truncated or not a gzip file"),
                            (gzip.compress(b"junk"), "not an idx file"), (labels.read_bytes(), r"shape \(10,\) instead of \(30, 28, 28\)"),
                            (gzip.compress(gzip.decompress(whole)[:-1]), "23,519 bytes of content where its header promises 23,520")):
        images.write_bytes(content)
        with pytest.raises(UserError, match=rf"train-images-idx3-ubyte.gz.*{reason}"):
            mnist.read_mnist(tmp_path)
    images.write_bytes(whole)
    labels.write_bytes(gzip.compress(published.idx(np.full(published.TEST, 10, np.uint8))))
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte holds the label 10"):
        mnist.read_mnist(tmp_path)
    labels.unlink()
    with pytest.raises(UserError, match="has no t10k-labels-idx1-ubyte"):
        mnist.read_mnist(tmp_path)


@pytest.mark.parametrize("place", ["outside", "itself", "archive"])
def test_cifar10(tmp_path, place):
    folder = tmp_path / "cifar-10-batches-bin"
    records = published.cifar10(folder)
    if place == "archive":
        published.archive(tmp_path / "cifar-10-binary.tar.gz", folder)
        folder.rename(tmp_path / "elsewhere")
    splits = cifar.read_cifar10(folder if place == "itself" else tmp_path)
    assert [len(splits[name]) for name in ("train", "test")] == [50, 10]
    for split, part in ((splits["train"], records[:50]), (splits["test"], records[50:])):
        np.testing.assert_array_equal(split.labels, part[:, 0])
        np.testing.assert_array_equal(split.images, part[:, 1:].reshape(-1, 3, 32, 32))


def test_cifar100_takes_the_fine_labels(tmp_path):
    records = published.cifar100(tmp_path / "cifar-100-binary")
    splits = cifar.read_cifar100(tmp_path)
    np.testing.assert_array_equal(np.concatenate([splits["train"].labels, splits["test"].labels]), records[:, 1])
    np.testing.assert_array_equal(splits["test"].images.reshape(10, -1), records[10:, 2:])


def test_cifar_files_that_do_not_serve_are_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    published.cifar10(folder)
    batch = folder / "data_batch_3.bin"
    whole = batch.read_bytes()
    for content, reason in ((whole[:-1], "is truncated or no CIFAR file"), (whole[:-3073], "holds 9 images instead of 10"),
                            (b"\x0a" + whole[1:], "holds labels beyond 9")):
        batch.write_bytes(content)
        with pytest.raises(UserError, match=f"data_batch_3.bin {reason}"):
            cifar.read_cifar10(tmp_path)
    batch.unlink()
    with pytest.raises(UserError, match=r"cannot read .*data_batch_3.bin: No such file"):
        cifar.read_cifar10(tmp_path)
    with pytest.raises(UserError, match=r"holds neither cifar-100-binary/ nor cifar-100-binary.tar.gz"):
        cifar.read_cifar100(tmp_path)


def test_archives_that_do_not_serve_are_named(tmp_path):
    published.cifar10(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    path = published.archive(tmp_path / "cifar-10-binary.tar.gz", tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin").rename(tmp_path / "elsewhere")
    whole = path.read_bytes()
    for content, reason in ((whole, "has no test_batch.bin in it"), (whole[:-2000], "cannot read .*cifar-10-binary.tar.gz"),
                            (b"junk", "cannot read .*cifar-10-binary.tar.gz")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            cifar.read_cifar10(tmp_path)
