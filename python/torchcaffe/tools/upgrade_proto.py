"""upgrade_net_proto_text, upgrade_net_proto_binary, upgrade_solver_proto_text: old files, written anew in today's form.

How a message is brought to that form is proto/upgrade.py's business.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from torchcaffe import formats
from torchcaffe.errors import CaffeError
from torchcaffe.glog import error, info
from torchcaffe.proto import caffe_pb2, prototxt, upgrade
from torchcaffe.tools import Add

M = TypeVar("M", bound=Message)
SOURCE = "upgrade_net_proto_text.cpp:0"


def register(add: Add) -> None:
    """Add the three commands."""
    for name, run in (("upgrade_net_proto_text", net_text), ("upgrade_net_proto_binary", net_binary),
                      ("upgrade_solver_proto_text", solver_text)):
        parser = add(name, run)
        parser.add_argument("input", metavar="IN", help="file to upgrade")
        parser.add_argument("output", metavar="OUT", help="file to write; may be the same")


def net_text(args: argparse.Namespace) -> int:
    """Bring a net prototxt of any age to today's form; status 1 when it held fields that mean nothing to their layers."""
    net, status = _upgraded_net(args.input, prototxt.read(args.input, caffe_pb2.NetParameter()))
    formats.write_text(args.output, prototxt.write(net))
    info(f"Wrote upgraded NetParameter text proto to {args.output}", SOURCE)
    return status


def net_binary(args: argparse.Namespace) -> int:
    """Bring a binary net, such as a caffemodel of any age, to today's form; status as for upgrade_net_proto_text."""
    net, status = _upgraded_net(args.input, formats.read_message(args.input, caffe_pb2.NetParameter(), "a net in binary form"))
    formats.write_message(args.output, net)
    info(f"Wrote upgraded NetParameter binary proto to {args.output}", SOURCE)
    return status


def solver_text(args: argparse.Namespace) -> None:
    """Bring a solver prototxt to today's form, with its type as a string."""
    solver = _changed(args.input, prototxt.read(args.input, caffe_pb2.SolverParameter()), upgrade.upgrade_solver)
    formats.write_text(args.output, prototxt.write(solver))
    info(f"Wrote upgraded SolverParameter text proto to {args.output}", SOURCE)


def _upgraded_net(path: str, net: caffe_pb2.NetParameter) -> tuple[caffe_pb2.NetParameter, int]:
    """`net` in today's form, and the exit status."""
    dropped: list[str] = []
    _changed(path, net, lambda message: upgrade.upgrade_net(message, dropped.append))
    for complaint in dropped:
        error(complaint, SOURCE)
    return net, 1 if dropped else 0


def _changed(path: str, message: M, change: Callable[[M], object]) -> M:
    """`message` after `change`; a line says so when there was nothing to change."""
    before = message.SerializeToString(deterministic=True)
    try:
        change(message)
    except CaffeError as problem:
        raise CaffeError(f"{path}: {problem}") from None
    if message.SerializeToString(deterministic=True) == before:
        info(f"File already in latest proto format: {path}", SOURCE)
    return message
