"""draw: a net as a picture, with the arguments of Caffe's draw_net.py; the drawing is torchcaffe.draw's."""
from __future__ import annotations

import argparse

from torchcaffe.draw import draw_net_to_file
from torchcaffe.glog import info
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.tools import Add


def register(add: Add) -> None:
    """Add the command."""
    parser = add("draw", draw)
    parser.add_argument("net", metavar="NET", help="net prototxt")
    parser.add_argument("picture", metavar="PICTURE", help="file to write; its ending names the type: .svg, .png, .pdf, .dot")
    parser.add_argument("--rankdir", choices=("LR", "TB", "BT", "RL"), default="LR", help="direction of the graph (default: %(default)s)")
    parser.add_argument("--phase", choices=("TRAIN", "TEST", "ALL"), default="ALL", help="layers to draw (default: %(default)s)")
    parser.add_argument("--display_lrm", action="store_true", help="write the lr_mult of weights and biases too")


def draw(args: argparse.Namespace) -> None:
    """Draw a net's layers and blobs; pictures take graphviz, .dot files do not."""
    phase = None if args.phase == "ALL" else caffe_pb2.Phase.Value(args.phase)
    draw_net_to_file(prototxt.read_net(args.net), args.picture, args.rankdir, phase, args.display_lrm)
    info(f"Drew {args.net} to {args.picture}", "draw_net.py:0")
