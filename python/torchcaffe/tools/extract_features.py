"""extract_features: what a trained net makes of its input data, blob by blob, as LMDBs of float records."""
from __future__ import annotations

import argparse
from contextlib import ExitStack

from torchcaffe.data.lmdb_writer import LmdbWriter
from torchcaffe.errors import CaffeError
from torchcaffe.glog import info
from torchcaffe.net import TEST, Net
from torchcaffe.proto import caffe_pb2
from torchcaffe.settings import set_device, set_mode_cpu, set_mode_gpu
from torchcaffe.tools import Add

SOURCE = "extract_features.cpp:0"


def register(add: Add) -> None:
    """Add the command; its arguments are positional, in the order of Caffe's tool."""
    parser = add("extract_features", extract)
    parser.add_argument("weights", metavar="pretrained_net_param", help="caffemodel")
    parser.add_argument("model", metavar="feature_extraction_proto_file", help="net prototxt, with a data layer")
    parser.add_argument("blobs", metavar="extract_feature_blob_name1[,name2,...]", help="blobs to write")
    parser.add_argument("datasets", metavar="save_feature_dataset_name1[,name2,...]", help="a folder for each; must not exist")
    parser.add_argument("batches", metavar="num_mini_batches", type=int, help="forward passes to run")
    parser.add_argument("backend", metavar="db_type", choices=("lmdb", "leveldb"), help="kind of database; only lmdb is written")
    parser.add_argument("mode", metavar="CPU/GPU", nargs="?", choices=("CPU", "GPU"), default="CPU", help="where to run")
    parser.add_argument("device", metavar="DEVICE_ID=0", nargs="?", default="0", help="number of the GPU")


def extract(args: argparse.Namespace) -> None:
    """Write blobs of a net in the TEST phase, item by item, to LMDBs; keys count the items in ten digits."""
    blobs, datasets = args.blobs.split(","), args.datasets.split(",")
    device = args.device.removeprefix("DEVICE_ID=")
    if args.backend == "leveldb":
        raise CaffeError("db_type leveldb: LevelDB is not written here; write lmdb")
    if len(blobs) != len(datasets):
        raise CaffeError(f"{len(blobs)} blob name(s) and {len(datasets)} dataset name(s); there must be one dataset for each blob")
    if args.batches < 1:
        raise CaffeError(f"num_mini_batches is {args.batches}; it must be at least 1")
    if not device.isdecimal():
        raise CaffeError(f"DEVICE_ID '{device}' is not the number of a GPU")
    if args.mode == "GPU":
        set_device(int(device))
        set_mode_gpu()
    else:
        set_mode_cpu()
    net = Net(args.model, TEST, weights=args.weights)
    for name in blobs:
        if name not in net.blobs:
            raise CaffeError(f"{args.model}: no blob '{name}'; there are {', '.join(net.blobs)}")
    info("Extracting Features", SOURCE)
    counts = [0] * len(blobs)
    with ExitStack() as stack:
        databases = [stack.enter_context(LmdbWriter(path)) for path in datasets]
        for _ in range(args.batches):
            net._forward(0, len(net.layers) - 1)
            for i, (name, database) in enumerate(zip(blobs, databases, strict=True)):
                counts[i] = _put(net, name, database, counts[i])
    for name, count in zip(blobs, counts, strict=True):
        info(f"Extracted features of {count} query images for feature blob {name}", SOURCE)
    info("Successfully extracted the features!", SOURCE)


def _put(net: Net, name: str, database: LmdbWriter, count: int) -> int:
    """Write the items of a blob behind `count` others; returns how many there are now."""
    blob = net.blobs[name]
    channels, height, width = blob.channels, blob.height, blob.width
    for item in blob.data.reshape(blob.num, -1):
        record = caffe_pb2.Datum(channels=channels, height=height, width=width, float_data=item.tolist())
        database.put(b"%010d" % count, record.SerializeToString())
        count += 1
        if count % 1000 == 0:
            info(f"Extracted features of {count} query images for feature blob {name}", SOURCE)
    return count
