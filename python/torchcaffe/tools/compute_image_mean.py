"""compute_image_mean: the mean of all images in a database, as the file that transform_param's mean_file names."""
from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from torchcaffe.data import datum, leveldb_reader
from torchcaffe.data.lmdb_reader import open_database
from torchcaffe.errors import CaffeError
from torchcaffe.formats import write_mean
from torchcaffe.glog import info
from torchcaffe.tools import Add

SOURCE = "compute_image_mean.cpp:0"


def register(add: Add) -> None:
    """Add the command."""
    parser = add("compute_image_mean", compute)
    parser.add_argument("--backend", choices=("lmdb", "leveldb"), default="lmdb", help="kind of database (default: %(default)s)")
    parser.add_argument("input", metavar="INPUT_DB", help="folder of the database")
    parser.add_argument("output", metavar="OUTPUT_FILE", nargs="?",
                        help="mean file to write; without it only the channels' means are printed")


def compute(args: argparse.Namespace) -> None:
    """Average all images of a database, pixel by pixel, and print the mean of each channel."""
    total: np.ndarray | None = None
    count = 0
    for image, where in _images(args):
        if total is None:
            total = np.zeros(image.shape, np.float32)       # sums are rounded as Caffe's are
        if image.shape != total.shape:
            raise CaffeError(f"{where} has shape {image.shape}, the first one {total.shape}; a mean needs images of one size")
        total += image
        count += 1
        if count % 10000 == 0:
            info(f"Processed {count} files.", SOURCE)
    if total is None:
        raise CaffeError(f"{args.input} holds no records")
    mean = total / np.float32(count)
    info(f"Processed {count} files.", SOURCE)
    if args.output:
        info(f"Write to {args.output}", SOURCE)
        write_mean(args.output, mean)
    info(f"Number of channels: {len(mean)}", SOURCE)
    for channel, plane in enumerate(mean):
        info(f"mean_value channel [{channel}]: {plane.mean(dtype=np.float64):g}", SOURCE)


def _images(args: argparse.Namespace) -> Iterator[tuple[np.ndarray, str]]:
    """All images of the database, each with what an error calls it."""
    if args.backend == "leveldb":
        for key, value in leveldb_reader.records(args.input):
            where = f"the record with key {key!r} of {args.input}"
            yield datum.image(datum.parse(value, where), where), where
        return
    database = open_database(args.input)
    for position in range(len(database)):
        where = database.where(position)
        yield datum.image(datum.parse(database[position], where), where), where
