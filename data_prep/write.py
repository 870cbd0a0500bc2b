"""A prepared data set on disk: LMDBs of Datum messages, mean files, dataset.json.

    <folder>/train_lmdb test_lmdb ...     keys 00000000, 00000001, ...: byte order is the records' order
    <folder>/train_mean.binaryproto       mean over the training records, padding included, of their size
    <folder>/test_mean.binaryproto        its centre, of the test records' size
    <folder>/dataset.json                 what this is: counts, shapes, seed, fingerprint, digests of the files

Everything is written into a folder beside it and renamed when it is complete and on disk.
"""
from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.check import DESCRIPTION, Fingerprint, files, mean_path, records_path, summary
from data_prep.split import Progress, Split
from hintkd.errors import UserError
from hintkd.files import write_sealed
from torchcaffe.data.lmdb_writer import BATCH, LmdbWriter
from torchcaffe.errors import CaffeError
from torchcaffe.formats import write_mean
from torchcaffe.proto import caffe_pb2

FORMAT = 1


def write_dataset(folder: Path, splits: dict[str, Split], mean: np.ndarray, about: dict[str, Any], progress: Progress) -> None:
    """Write everything and put it at `folder`, in the place of what is there.  Raises UserError when the disk does not take it."""
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    test = splits["test"].images.shape[2:]
    top, left = ((big - small) // 2 for big, small in zip(mean.shape[1:], test, strict=True))
    means = {"train": mean, "test": mean[:, top:top + test[0], left:left + test[1]]}
    with storage_errors(folder):
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            partial.mkdir()
            fingerprint = Fingerprint()
            for name, split in sorted(splits.items()):
                fingerprint.split(name, len(split), split.images.shape[1:], [split.images], split.labels)
                _write_lmdb(records_path(partial, name), split, progress)
            for name, image in sorted(means.items()):
                fingerprint.mean(name, image)
                write_mean(mean_path(partial, name), image)
            write_sealed(partial / DESCRIPTION, {"format": FORMAT, **about, "fingerprint": fingerprint.hexdigest(),
                                                 "summary": summary(partial), "files": files(partial)})
            _sync(partial)
            if folder.exists():
                os.rename(folder, old)
            os.rename(partial, folder)
            _sync_entry(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses into one sentence about `folder`."""
    try:
        yield
    except (CaffeError, OSError) as error:
        refused = error.__cause__ if isinstance(error, CaffeError) else error
        if isinstance(refused, OSError) and refused.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: cannot write {folder}; free some space or name another folder with --out") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot write {folder}: {reason}; name another folder with --out") from None


def _write_lmdb(folder: Path, split: Split, progress: Progress) -> None:
    channels, height, width = split.images.shape[1:]
    starts = range(0, len(split), BATCH)
    with LmdbWriter(folder) as database:
        for start in progress(starts, f"writing {folder.name}", len(starts)):
            for i in range(start, min(start + BATCH, len(split))):
                datum = caffe_pb2.Datum(channels=channels, height=height, width=width, data=split.images[i].tobytes(),
                                        label=int(split.labels[i]))
                database.put(b"%08d" % i, datum.SerializeToString())


def _sync(folder: Path) -> None:
    """Bring a folder and all in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
