"""Student branches on a teacher: from the end of each of its stages but the last, what a student has above its own stage of that number.

They stand in the TRAIN phase only, under names that begin with "branch/", and are left behind when the teacher is trained.  What is lost
in them is said by the method that trains them.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Network, Options, Taps
from hintkd.nets import adapters, surgery

BRANCH = "branch/"
TRANSFORMS = ("conv-bn-relu", "conv-bn", "where-needed")


@dataclass(frozen=True)
class Branch:
    """One branch: what the names of its layers begin with, and its class scores."""
    name: str
    scores: str


def add_branches(net: caffe_pb2.NetParameter, taps: Taps, student: Network, image: surgery.Shape, classes: int, options: Options,
                 transform: str) -> list[Branch]:
    """Add a student's branches to the teacher that `taps` belong to, bottom up: one fewer than there are stages.

    image        (channels, height, width) of "data"
    transform    T_i, from the teacher's shape to the student's: a convolution with BatchNorm and ReLU, or without ReLU, or with both where
                 the shapes differ, and nothing elsewhere
    Raises UserError where teacher and student have not as many stages, or their sizes are too far apart for a convolution.
    """
    alone = caffe_pb2.NetParameter()
    own = student.write(alone, "data", classes, options).stages
    if len(own) != len(taps.stages):
        raise UserError(f"a branch joins equal stages, and the teacher has {len(taps.stages)} where {student.title} has {len(own)}")
    here, there, branches = surgery.shapes(net.layer, image), surgery.shapes(alone.layer, image), []
    for begin, (end, aim) in enumerate(zip(taps.stages[:-1], own[:-1], strict=True), start=1):
        name, begun = f"{BRANCH}{student.title}/{begin}", len(net.layer)
        bottom = _transform(net, f"{name}/transform", end, here[end], there[aim], transform)
        scores = student.write(net, bottom, classes, options, prefix=f"{name}/", begin=begin).logits
        for layer in net.layer[begun:]:
            layer.include.add(phase=caffe_pb2.TRAIN)
        branches.append(Branch(name, scores))
    return branches


def _transform(net: caffe_pb2.NetParameter, name: str, bottom: str, source: Sequence[int], target: Sequence[int], kind: str) -> str:
    if kind == "where-needed" and tuple(source) == tuple(target):
        return bottom
    (channels, height, width), (wanted, *size) = source, target
    adapters.fitted(net, name, bottom, (channels, height, width), (wanted, size[0], size[1]))
    return name if kind == "conv-bn" else adapters.rectified(net, name)
