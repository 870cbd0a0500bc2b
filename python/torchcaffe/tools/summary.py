"""summary: a net as a table of its layers, their shapes, parameters, multiply-adds and memory, without reading data or making any."""
from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from math import prod

from rich.console import Console
from rich.table import Table

from torchcaffe.graph import filter as graph
from torchcaffe.graph.blob import Blob
from torchcaffe.graph.build import Node
from torchcaffe.net import Net
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.tools import Add, add_state
from torchcaffe.tools.outline import outline

BYTES = 4                                       # of a float32
WIDTH = 140                                     # of a table that goes to a file or a pipe


@dataclass
class Row:
    """One layer: `multiply_adds` of one forward pass, `bytes` of the blobs it adds (none where it works in place or only splits)."""
    name: str
    type: str
    tops: list[tuple[str, tuple[int, ...]]]
    parameters: int
    multiply_adds: int
    bytes: int


def register(add: Add) -> None:
    """Add the command."""
    parser = add("summary", summary)
    parser.add_argument("net", metavar="NET", help="net prototxt")
    parser.add_argument("--shape", type=_shape, action="append", default=[], metavar="TOP=N,C,H,W",
                        help="what a data layer's top would have for a shape, where its data are not there and its crop_size, mean or new "
                             "size do not tell; may be given several times")
    add_state(parser)


def summary(args: argparse.Namespace) -> None:
    """Print the layers of a net with shapes, parameters, multiply-adds and memory; data sets need not be there."""
    param = graph.set_state(prototxt.read_net(args.net), caffe_pb2.Phase.Value(args.phase), args.level, args.stage)
    look = outline(param, args.net, dict(args.shape))
    table = Table(title=f"{look.net.name or args.net} ({args.phase})", title_justify="left")
    for heading in ("layer", "type", "tops"):
        table.add_column(heading, overflow="fold")
    for heading in ("parameters", "multiply-adds", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    found = rows(look.net)
    for row in found:
        tops = "\n".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in row.tops)
        table.add_row(row.name, row.type, tops, _count(row.parameters), _count(row.multiply_adds), _size(row.bytes))
    table.add_section()
    table.add_row("total", f"{len(found)} layers", "", *totals(look.net, found))
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, emoji=False, markup=False)
    console.print(table)
    for line in _notes(look.net, found):
        console.print(line, soft_wrap=True)
    for complaint in look.missing.values():
        console.print(f"assumed shapes: {complaint}", soft_wrap=True)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    """A top and its shape as --shape has them."""
    top, _, sizes = text.rpartition("=")
    if not top or not re.fullmatch(r"\d+(,\d+)*", sizes, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a top's name, = and whole numbers with commas between, as in data=1,3,32,32")
    return top, tuple(map(int, sizes.split(",")))


def rows(net: Net) -> list[Row]:
    """The layers of a net, without the splits that Caffe adds."""
    found, known = [], set[int]()
    for node in net.graph.nodes:
        fresh = [blob for blob in node.tops if id(blob) not in known and node.layer.type != "Split"]
        known.update(id(blob) for blob in node.tops)
        if node.layer.type != "Split" or not node.layer.name.endswith("_split"):
            tops = [(name, blob.shape) for name, blob in zip(node.top_names, node.tops, strict=True)]
            found.append(Row(node.layer.name, node.layer.type, tops, sum(blob.count for blob in node.layer.blobs), multiply_adds(node),
                             BYTES * sum(blob.count for blob in fresh)))
    return found


def totals(net: Net, found: list[Row]) -> tuple[str, str, str]:
    """Parameters (shared ones once), multiply-adds and memory of all layers."""
    return (_count(sum(item.blob.count for item in net.graph.learnable)), _count(sum(row.multiply_adds for row in found)),
            _size(sum(row.bytes for row in found)))


def multiply_adds(node: Node) -> int:
    """Multiplications with a weight in one forward pass of the whole batch: of convolutions, inner products and recurrent layers."""
    weights = [blob for blob in node.layer.blobs if len(blob.shape) > 1]
    if node.layer.type == "Convolution":
        return sum(top.count for top in node.tops) * prod(weights[0].shape[1:])
    if node.layer.type == "Deconvolution":
        return sum(bottom.count for bottom in node.bottoms) * prod(weights[0].shape[1:])
    if node.layer.type == "InnerProduct":
        return node.tops[0].count * weights[0].count // node.layer.param.inner_product_param.num_output
    if node.layer.type in ("LSTM", "RNN"):
        steps, items = node.bottoms[0].shape[:2]
        static = weights[1:2] if len(node.bottoms) > 2 and len(weights) > (2 if node.layer.type == "LSTM" else 3) else []
        return steps * items * (_sum(weights) - _sum(static)) + items * _sum(static)
    return 0


def _sum(blobs: list[Blob]) -> int:
    return sum(blob.count for blob in blobs)


def _notes(net: Net, found: list[Row]) -> list[str]:
    """What the totals mean."""
    parameters, blobs = sum(item.blob.count for item in net.graph.learnable) * BYTES, sum(row.bytes for row in found)
    notes = [f"memory: {_size(blobs)} of blobs and {_size(parameters)} of parameters in a forward pass; "
             f"{_size(2 * blobs + 3 * parameters)} in training, with gradients and one history"]
    batch = next((shape[0] for row in found for _, shape in row.tops if shape), 0)
    if batch > 1 and any(row.multiply_adds for row in found):
        notes.insert(0, f"multiply-adds: {_count(sum(row.multiply_adds for row in found) // batch)} for each of {batch} items")
    return notes


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _size(count: int) -> str:
    """Bytes, in a unit that suits."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return "" if not count else f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
