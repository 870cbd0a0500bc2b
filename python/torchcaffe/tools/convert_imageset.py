"""convert_imageset: a list of image files becomes an LMDB of Datum messages.  Flags, keys and records are those of Caffe's tool."""
from __future__ import annotations

import argparse
import os

import numpy as np

from torchcaffe.data import datum
from torchcaffe.data.images import read_file, read_list
from torchcaffe.data.lmdb_writer import LmdbWriter
from torchcaffe.errors import CaffeError
from torchcaffe.files import read_bytes
from torchcaffe.glog import error as log_error
from torchcaffe.glog import info
from torchcaffe.io import array_to_datum
from torchcaffe.proto import caffe_pb2
from torchcaffe.tools import Add

SOURCE = "convert_imageset.cpp:0"
QUALITY = 95                                    # of JPEG, OpenCV's own


def register(add: Add) -> None:
    """Add the command."""
    parser = add("convert_imageset", convert)
    for name, text in (("gray", "treat images as grayscale ones"), ("shuffle", "put the images in a random order"),
                       ("check_size", "require all images to have the same size"),
                       ("encoded", "keep images encoded, as their files are where nothing is changed")):
        parser.add_argument(f"--{name}", action="store_true", help=text)
        parser.add_argument(f"--{name}=true", dest=name, action="store_true", help=argparse.SUPPRESS)           # gflags' other forms
        parser.add_argument(f"--{name}=false", f"--no{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
    parser.add_argument("--backend", choices=("lmdb", "leveldb"), default="lmdb", help="kind of database; only lmdb is written")
    parser.add_argument("--resize_width", type=int, default=0, metavar="N", help="width that images are resized to")
    parser.add_argument("--resize_height", type=int, default=0, metavar="N", help="height that images are resized to")
    parser.add_argument("--encode_type", default="", metavar="TYPE", help="what to encode images as, as png or jpg; means --encoded")
    parser.add_argument("root", metavar="ROOTFOLDER/", help="what file names are appended to, so with a / at its end")
    parser.add_argument("list", metavar="LISTFILE", help="lines of a file name, a blank and a label")
    parser.add_argument("database", metavar="DB_NAME", help="folder of the database to write; must not exist")


def convert(args: argparse.Namespace) -> None:
    """Write the images that a list names, with their labels, to an LMDB; an image that cannot be read is left out, and a line says so."""
    if args.backend == "leveldb":
        raise CaffeError("--backend leveldb: LevelDB is not written here; leave --backend away and write `backend: LMDB` in the net")
    if (args.resize_width > 0) != (args.resize_height > 0):
        raise CaffeError("--resize_width and --resize_height go together; give both or neither")
    datum.pillow("reading images")
    lines = read_list(args.list)
    if args.shuffle:
        info("Shuffling data", SOURCE)
        np.random.default_rng().shuffle(lines)
    info(f"A total of {len(lines)} images.", SOURCE)
    first: tuple[int, ...] | None = None
    count = 0
    with LmdbWriter(args.database) as database:
        for number, (name, label) in enumerate(lines):
            try:
                image = read_file(args.root + name, not args.gray, max(0, args.resize_height), max(0, args.resize_width))
            except CaffeError as problem:
                log_error(str(problem), SOURCE)
                continue
            first = first or image.shape
            if args.check_size and image.shape != first:
                raise CaffeError(f"--check_size: {args.root}{name} has shape {image.shape}, the first image {first}")
            record = _record(args, image, name, label)
            database.put(f"{number:08d}_{name}".encode(errors="surrogateescape"), record.SerializeToString())
            count += 1
            if count % 1000 == 0:
                info(f"Processed {count} files.", SOURCE)
        if not count:
            raise CaffeError(f"none of the {len(lines)} images in {args.list} could be read; is ROOTFOLDER '{args.root}' right?")
    left = f" {len(lines) - count} could not be read and were left out." if count < len(lines) else ""
    info(f"Processed {count} files.{left}", SOURCE)


def _record(args: argparse.Namespace, image: np.ndarray, name: str, label: int) -> caffe_pb2.Datum:
    """The Datum of an image: raw; or its file as it is, where it has the wanted encoding and size; or encoded anew."""
    own = os.path.splitext(name)[1][1:].lower()
    wanted = args.encode_type.lower() or (own if args.encoded else "")
    if not wanted:
        return array_to_datum(image, label)
    if {"jpeg": "jpg"}.get(own, own) == wanted and args.resize_height <= 0:
        return caffe_pb2.Datum(data=read_bytes(args.root + name), label=label, encoded=True)
    return caffe_pb2.Datum(data=datum.encode(image, wanted, QUALITY), label=label, encoded=True)
