"""convert_leveldb: the records of a LevelDB, Caffe's first kind of database, as an LMDB, which is what the Data layer reads."""
from __future__ import annotations

import argparse

from torchcaffe.data.leveldb_reader import records
from torchcaffe.data.lmdb_writer import LmdbWriter
from torchcaffe.errors import CaffeError
from torchcaffe.glog import info
from torchcaffe.tools import Add

SOURCE = "convert_leveldb:0"


def register(add: Add) -> None:
    """Add the command."""
    parser = add("convert_leveldb", convert)
    parser.add_argument("source", metavar="SRC", help="folder of the LevelDB")
    parser.add_argument("target", metavar="DST", help="folder of the LMDB to write; must not exist")


def convert(args: argparse.Namespace) -> None:
    """Write the records of a LevelDB to an LMDB, with the same keys and in the same order."""
    count = 0
    with LmdbWriter(args.target) as database:
        for key, value in records(args.source):
            database.put(key, value)
            count += 1
            if count % 10000 == 0:
                info(f"Processed {count} records.", SOURCE)
        if not count:
            raise CaffeError(f"the LevelDB {args.source} holds no records")
    info(f"Wrote {count} records to {args.target}; in data_param write source: \"{args.target}\" and backend: LMDB", SOURCE)
