"""A workspace in small: random images in LMDBs with means, under the paths that hintkd.experiment.DATASETS names."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np

from hintkd.experiment import DATASETS, Dataset
from torchcaffe.proto import caffe_pb2


def write_lmdb(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            channels, height, width = image.shape
            datum = caffe_pb2.Datum(channels=channels, height=height, width=width, data=image.tobytes(), label=int(label))
            transaction.put(f"{i:08}".encode(), datum.SerializeToString())


def write_mean(path: Path, images: np.ndarray) -> None:
    mean = images.mean(axis=0)
    path.write_bytes(caffe_pb2.BlobProto(num=1, channels=mean.shape[0], height=mean.shape[1], width=mean.shape[2],
                                         data=mean.ravel()).SerializeToString())


def write_dataset(name: str, folder: Path, items: int = 24, seed: int = 0) -> Dataset:
    """Write `items` random images of each part of a known data set under `folder`; returns it, with small batches."""
    dataset = replace(DATASETS[name], batch=8, test_batch=8, test_iter=items // 8)
    draw = np.random.default_rng(seed)
    parts = ((dataset.train_lmdb, dataset.train_mean, 4 * dataset.crop), (dataset.test_lmdb, dataset.test_mean, 0))
    for lmdb_path, mean_path, margin in parts:
        side = dataset.size + 2 * margin
        labels = draw.integers(0, dataset.classes, items)
        images = draw.integers(0, 100, (items, dataset.channels, side, side)) + 10 * labels[:, None, None, None]
        images = images.clip(0, 255).astype(np.uint8)
        write_lmdb(folder / lmdb_path, images, labels)
        if mean_path:
            write_mean(folder / mean_path, images)
    return dataset
