"""A network with exits on the way: where its sections end, and the branch and the classifier that stand at each end.

Layers of the k-th exit from below begin with "exit<k>_"; the last exit is the network's own end.  What is lost at exits is said by the
methods that train them.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Taps
from hintkd.nets import surgery
from hintkd.nets.blocks import Blocks

BRANCHES = ("bottleneck", "separable")


@dataclass(frozen=True)
class Exit:
    """A classifier and what it sees.

    map      the features, as large and as many at all exits: what a branch makes, or the network's last
    pooled   the same, averaged over the image
    scores   of classes
    """
    map: str
    pooled: str
    scores: str


def section_ends(taps: Taps, sections: int) -> tuple[str, ...]:
    """Where the sections below the last one end, bottom up: with the stages where these are as many, else after equal parts of the modules.

    Raises UserError where there are fewer modules than sections.
    """
    if len(taps.stages) == sections:
        return taps.stages[:-1]
    count = len(taps.modules)
    if count < sections:
        raise UserError(f"{sections} sections cannot be cut from {count} modules; give fewer")
    return tuple(taps.modules[ceil(count * k / sections) - 1] for k in range(1, sections))


def add_exits(net: caffe_pb2.NetParameter, taps: Taps, image: surgery.Shape, classes: int, sections: int, branch: str,
              fraction: float) -> list[Exit]:
    """Add an exit at the end of each section, bottom up; the last of them is the network's own.

    image       (channels, height, width) of "data"
    branch      one of BRANCHES: how a section's end is brought to the shape of the network's last map
    fraction    BatchNorm's moving_average_fraction
    Raises UserError where the sections cannot be cut, or their sizes are no multiples of the last one.
    """
    known = surgery.shapes(net.layer, image)
    (last,) = (layer.bottom[0] for layer in net.layer if list(layer.top) == [taps.pooled])
    exits = []
    for number, end in enumerate(section_ends(taps, sections), start=1):
        b = Blocks(net, f"exit{number}_", fraction)
        source, target = _shape(known, end), _shape(known, last)
        made = (_bottleneck if branch == "bottleneck" else _separable)(b, end, source, target)
        exits.append(Exit(made, *b.scores(made, target[0], classes)))
    return [*exits, Exit(last, taps.pooled, taps.logits)]


def _shape(known: Mapping[str, surgery.Shape], blob: str) -> tuple[int, int]:
    """Channels and side of a square map."""
    if blob not in known:
        raise UserError(f"the shape of '{blob}' is not known, so that no exit can be built there")
    channels, height, _ = known[blob]
    return channels, height


def _factor(b: Blocks, source: tuple[int, int], target: tuple[int, int]) -> int:
    """How many times larger a side is."""
    if source[1] % target[1]:
        raise UserError(f"{b.prefix}: a map of {source[1]} x {source[1]} is not brought to {target[1]} x {target[1]} by whole steps")
    return source[1] // target[1]


def _bottleneck(b: Blocks, bottom: str, source: tuple[int, int], target: tuple[int, int]) -> str:
    """1x1 to a quarter of the last map's channels, a convolution whose windows meet without overlapping, 1x1 to all; BatchNorm and ReLU."""
    middle, factor = max(1, target[0] // 4), _factor(b, source, target)
    first = b.conv_norm("conv1", bottom, source[0], middle, 1)
    second = b.conv_norm("conv2", first, middle, middle, factor, factor, pad=0)
    return b.conv_norm("conv3", second, middle, target[0], 1)


def _separable(b: Blocks, bottom: str, source: tuple[int, int], target: tuple[int, int]) -> str:
    """A separable convolution for each halving, and one where there is none; channels double on the way to the last map's."""
    halvings = _factor(b, source, target).bit_length() - 1
    if 2 ** halvings * target[1] != source[1]:
        raise UserError(f"{b.prefix}: a map of {source[1]} x {source[1]} is not halved to {target[1]} x {target[1]}")
    blob, before, steps = bottom, source[0], max(1, halvings)
    for step in range(1, steps + 1):
        width = target[0] if step == steps else 2 * before
        first = b.conv(f"step{step}_deep1", blob, before, before, 3, 2 if halvings else 1, group=before)
        second = b.conv_norm(f"step{step}_conv1", first, before, before, 1)
        third = b.conv(f"step{step}_deep2", second, before, before, 3, group=before)
        blob, before = b.conv_norm(f"step{step}_conv2", third, before, width, 1), width
    return blob
