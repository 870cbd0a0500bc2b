"""prepare: what it writes, and that it writes all or nothing."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest

import published
from data_prep import check_dataset, mnist, prepare, write
from data_prep.digits import read_digits, stratified_order
from hintkd.errors import UserError
from torchcaffe.data import lmdb_writer
from torchcaffe.formats import read_mean
from torchcaffe.io import datum_to_array
from torchcaffe.proto import caffe_pb2


def quiet(message: str) -> None:
    """A `say` that says nothing."""


def records(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an LMDB in the order of its keys."""
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        datums = [caffe_pb2.Datum.FromString(value) for _, value in transaction.cursor()]
    return np.array([datum_to_array(d) for d in datums]), np.array([d.label for d in datums])


def content(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_mnist(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(mnist, "COUNTS", {"train": published.TRAIN, "test": published.TEST})
    published.mnist(tmp_path / "files")
    return tmp_path / "files"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return prepare("digits", tmp_path_factory.mktemp("data"), say=quiet)


# -- what is written -------------------------------------------------------------------------------------------------
def test_training_records_are_shuffled_once_and_test_records_keep_their_order(tmp_path, small_mnist):
    given = mnist.read_mnist(small_mnist)
    seen = {}
    for seed in (0, 1, 1):
        folder = prepare("mnist", tmp_path / f"seed{seed}", small_mnist, seed, say=quiet)
        images, labels = records(folder / "test_lmdb")
        np.testing.assert_array_equal(images, given["test"].images)
        np.testing.assert_array_equal(labels, given["test"].labels)
        images, labels = records(folder / "train_lmdb")
        pairs = [(image.tobytes(), label) for image, label in zip(images, labels, strict=True)]
        assert sorted(pairs) == sorted((i.tobytes(), n) for i, n in zip(given["train"].images, given["train"].labels, strict=True))
        assert seen.setdefault(seed, pairs) == pairs
    assert seen[0] != seen[1]


def test_keys_are_padded_numbers(digits):
    with lmdb.open(str(digits / "test_lmdb"), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert list(transaction.cursor().iternext(values=False)) == [b"%08d" % i for i in range(1000)]


def test_digits_are_split_into_nested_stratified_sets(digits):
    images = {name: records(digits / f"{name}_lmdb") for name in ("teacher", "train", "test")}
    assert {name: data.shape for name, (data, _) in images.items()} == {
        "teacher": (797, 1, 10, 10), "train": (200, 1, 10, 10), "test": (1000, 1, 8, 8)}
    pixels = {name: [(data if name == "test" else data[:, :, 1:-1, 1:-1])[i].tobytes() for i in range(len(data))]
              for name, (data, _) in images.items()}
    assert set(pixels["train"]) <= set(pixels["teacher"])
    assert not set(pixels["teacher"]) & set(pixels["test"])
    share = np.bincount(np.concatenate([images["teacher"][1], images["test"][1]])) / 1797
    for _, labels in images.values():
        assert abs(np.bincount(labels) - share * len(labels)).max() <= 1
    for name in ("teacher", "train"):
        border = images[name][0].copy()
        border[:, :, 1:-1, 1:-1] = 0
        assert not border.any()
    assert max(data.max() for data, _ in images.values()) == 16


def test_digits_do_not_depend_on_the_seed(tmp_path, digits):
    other = prepare("digits", tmp_path, seed=5, say=quiet)
    for name in ("teacher", "train", "test"):
        mine, theirs = (records(folder / f"{name}_lmdb")[0] for folder in (digits, other))
        assert sorted(i.tobytes() for i in mine) == sorted(i.tobytes() for i in theirs)
        assert (mine != theirs).any() == (name != "test")


def test_every_beginning_of_a_stratified_order_is_stratified():
    labels = np.random.default_rng(0).integers(0, 4, 300)
    order = stratified_order(labels, 0)
    assert sorted(order) == list(range(300))
    for end in range(1, 300):
        counts = np.bincount(labels[order[:end]], minlength=4)
        assert abs(counts - np.bincount(labels) * end / 300).max() <= 2


def test_means_are_of_the_padded_teacher_images_and_of_their_centre(digits):
    teacher = read_digits()["teacher"].images.astype(float).mean(axis=0)
    train, test = (read_mean(digits / f"{name}_mean.binaryproto") for name in ("train", "test"))
    np.testing.assert_allclose(test, teacher, rtol=1e-6)
    np.testing.assert_array_equal(train, np.pad(test, [(0, 0), (1, 1), (1, 1)]))
    blob = caffe_pb2.BlobProto.FromString((digits / "train_mean.binaryproto").read_bytes())
    assert (blob.num, blob.channels, blob.height, blob.width) == (1, 1, 10, 10)


def test_the_description_says_what_is_there(digits):
    about, info = json.loads((digits / "dataset.json").read_text()), check_dataset(digits)
    assert (about["name"], about["seed"], about["classes"], about["mean_of"]) == ("digits", 0, 10, "teacher")
    assert info.fingerprint == about["fingerprint"] and len(info.fingerprint) == 64
    assert info.splits["train"].count == 200 and info.splits["train"].shape == (1, 10, 10)


def test_no_map_is_much_larger_than_its_file(digits):
    with lmdb.open(str(digits / "test_lmdb"), readonly=True, lock=False) as environment:
        assert environment.info()["map_size"] < 1 << 25


# -- what is there already -------------------------------------------------------------------------------------------
def test_a_prepared_set_is_left_alone(tmp_path):
    said = []
    folder = prepare("digits", tmp_path, say=said.append)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert prepare("digits", tmp_path, say=said.append) == folder
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
    assert said == [f"{folder} is prepared: 797 teacher images, 200 train images, 1,000 test images", f"{folder} is already prepared"]


def truncate(folder: Path) -> None:
    with open(folder / "train_lmdb" / "data.mdb", "r+b") as file:
        file.truncate(20_000)


def change_a_record(folder: Path) -> None:
    with lmdb.open(str(folder / "train_lmdb"), map_size=1 << 24, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"00000000", transaction.get(b"00000001"))


@pytest.mark.parametrize("damage", [truncate, change_a_record, lambda folder: shutil.rmtree(folder / "test_lmdb"),
                                    lambda folder: (folder / "train_mean.binaryproto").unlink(),
                                    lambda folder: (folder / "train_mean.binaryproto").write_bytes(b"")])
def test_a_damaged_set_is_replaced(tmp_path, digits, damage):
    shutil.copytree(digits, tmp_path / "digits")
    damage(tmp_path / "digits")
    said = []
    folder = prepare("digits", tmp_path, say=said.append)
    assert "damaged" in said[0]
    assert check_dataset(folder).fingerprint == check_dataset(digits).fingerprint
    assert os.listdir(tmp_path) == ["digits"]


@pytest.mark.parametrize(("make", "reason"), [
    (lambda folder: (folder / "train_lmdb").mkdir(parents=True), "exists but is no prepared data set"),
    (lambda folder: folder.write_text("a file"), "exists but is no prepared data set"),
    (lambda folder: folder.symlink_to("nowhere"), "exists but is no prepared data set"),
    (lambda folder: (folder.mkdir(), (folder / "dataset.json").write_text("{")), "does not describe a data set"),
])
def test_what_is_not_ours_is_not_touched(tmp_path, make, reason):
    make(tmp_path / "digits")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=reason):
        prepare("digits", tmp_path, say=quiet)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_seed_or_name_is_not_taken_for_it(tmp_path, digits):
    shutil.copytree(digits, tmp_path / "digits")
    shutil.copytree(digits, tmp_path / "mnist")
    with pytest.raises(UserError, match="prepared with seed 0 in format 1, not with seed 3"):
        prepare("digits", tmp_path, seed=3, say=quiet)
    with pytest.raises(UserError, match="holds the data set digits"):
        prepare("mnist", tmp_path, tmp_path, say=quiet)


def test_two_processes_do_not_write_at_once(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is preparing data"):
        prepare("digits", tmp_path, say=quiet)
    os.close(descriptor)
    prepare("digits", tmp_path, say=quiet)


# -- when it goes wrong ----------------------------------------------------------------------------------------------
def in_child(work: Callable[[], object]) -> int:
    """The wait status of a forked process that does `work`; it exits with 2 for a UserError of one line, and with 1 for any other."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except UserError as error:
            status = 1 if "\n" in str(error) else 2
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_after(chunks: int) -> Callable:
    """A progress during which the process is killed."""
    left = iter(range(chunks))

    def progress(items, description, total):
        for item in items:
            yield item
            if next(left, None) is None:
                die()

    return progress


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("moment", [0, 1, 2, "write_mean", "_sync", "rename"])
def test_a_killed_run_leaves_nothing_behind_for_the_next(tmp_path, digits, monkeypatch, moment, damaged):
    if damaged:
        shutil.copytree(digits, tmp_path / "digits")
        truncate(tmp_path / "digits")

    def work():
        if moment == "rename":
            rename = os.rename
            write.os.rename = lambda a, b: (rename(a, b), die())
        elif isinstance(moment, str):
            setattr(write, moment, die)
        prepare("digits", tmp_path, progress=dying_after(moment if isinstance(moment, int) else 99), say=quiet)

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    folder = prepare("digits", tmp_path, say=quiet)
    assert check_dataset(folder).fingerprint == check_dataset(digits).fingerprint
    assert os.listdir(tmp_path) == ["digits"]


def test_a_file_size_limit_is_one_sentence_and_leaves_nothing(tmp_path):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        prepare("digits", tmp_path / "data", say=quiet)

    assert os.waitstatus_to_exitcode(in_child(work)) == 2
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("place", ["_write_lmdb", "write_mean", "_sync"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, digits, monkeypatch, place, damaged):
    if damaged:
        shutil.copytree(digits, tmp_path / "digits")
        truncate(tmp_path / "digits")
    before = content(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, place, full)
    with pytest.raises(UserError, match=r"the disk is full: cannot write .*digits; free some space"):
        prepare("digits", tmp_path, say=quiet)
    assert content(tmp_path) == before


def test_lmdbs_own_word_for_a_full_disk_is_understood(tmp_path, monkeypatch):
    class Full:
        def begin(self, write):
            raise lmdb.Error("mdb_txn_commit: Input/output error")

        def close(self):
            pass

    monkeypatch.setattr(lmdb_writer.lmdb, "open", lambda path, **_: Full())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(UserError, match="the disk is full"):
        prepare("digits", tmp_path, say=quiet)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    with pytest.raises(UserError, match="Input/output error"):
        prepare("digits", tmp_path, say=quiet)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/digits: "):
        prepare("digits", tmp_path / "file", say=quiet)


def test_wrong_files_leave_nothing(tmp_path, small_mnist):
    (small_mnist / "t10k-labels-idx1-ubyte.gz").write_bytes(b"junk")
    with pytest.raises(UserError, match="t10k-labels"):
        prepare("mnist", tmp_path / "data", small_mnist, say=quiet)
    assert not (tmp_path / "data").exists()


def test_arguments_that_make_no_sense(tmp_path):
    for arguments, reason in ((("cifar-10",), "unknown data set 'cifar-10'; did you mean 'cifar10'"),
                              (("svhn",), "known are mnist, cifar10"),
                              (("digits", tmp_path, tmp_path), "leave --from away"),
                              (("mnist", tmp_path, "nowhere"), "nowhere is not a folder")):
        with pytest.raises(UserError, match=reason):
            prepare(*arguments, say=quiet)


# -- the real ones ---------------------------------------------------------------------------------------------------
def test_real_mnist(tmp_path, real_data):
    folder = prepare("mnist", tmp_path, real_data, say=quiet)
    images, labels = records(folder / "train_lmdb")
    assert images.shape == (60_000, 1, 28, 28) and len(records(folder / "test_lmdb")[1]) == 10_000
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(read_mean(folder / "train_mean.binaryproto").mean() - 33.318) < 0.001


@pytest.mark.slow
@pytest.mark.parametrize(("name", "classes", "mean"), [("cifar10", 10, (125.3, 123.0, 113.9)), ("cifar100", 100, (129.3, 124.1, 112.4))])
def test_real_cifar(tmp_path, real_data, name, classes, mean):
    folder = prepare(name, tmp_path, real_data, say=quiet)
    info = check_dataset(folder)
    assert {split: (part.count, part.shape) for split, part in info.splits.items()} == {
        "train": (50_000, (3, 40, 40)), "test": (10_000, (3, 32, 32))}
    for split, count in (("train", 50_000), ("test", 10_000)):
        assert np.bincount(records(folder / f"{split}_lmdb")[1]).tolist() == [count // classes] * classes
    train, test = (read_mean(folder / f"{split}_mean.binaryproto") for split in ("train", "test"))
    np.testing.assert_allclose(test.mean(axis=(1, 2)), mean, atol=0.06)
    np.testing.assert_array_equal(train, np.pad(test, [(0, 0), (4, 4), (4, 4)]))
