"""Which tops of a net say all that its frozen part has to say about a record.

An operation is frozen if it gives for each item what it would give without the others, now and after any update, and starts from a Data
layer's images alone: a teacher in a student's net.  What the rest of the net needs of it can be cut off at several places.  The one with
the fewest bytes is the frontier: whoever knows its tops needs none of the work before it.  Who knows them is remembered.py's business.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterable, Set
from dataclasses import dataclass
from math import inf

from torchcaffe.graph.build import Graph, Node
from torchcaffe.layers.base import Layer
from torchcaffe.layers.data import Data
from torchcaffe.layers.norm import BatchNorm
from torchcaffe.proto import caffe_pb2
from torchcaffe.step.folding import is_plain_scale
from torchcaffe.step.operations import Operation, rests

# Types whose result for an item depends on that item alone, as long as nothing is drawn; BatchNorm is one with stored statistics.
ITEMWISE = {"Convolution", "Deconvolution", "InnerProduct", "BatchNorm", "Scale", "ReLU", "ELU", "Sigmoid", "TanH", "AbsVal",
            "Power", "Exp", "Log", "BNLL", "Pooling", "LRN", "Eltwise", "Split", "Softmax", "Concat"}
AXES = {"InnerProduct": "inner_product_param", "Softmax": "softmax_param", "Concat": "concat_param", "Convolution": "convolution_param",
        "Deconvolution": "convolution_param"}


def is_itemwise(op: Operation, at_rest: Set[int] | None) -> bool:
    """Whether the operation gives for each item what it would give without the others, now and after any number of updates."""
    return not op.learns and all(_is_itemwise(node, at_rest) for node in op.nodes)


def _is_itemwise(node: Node, at_rest: Set[int] | None) -> bool:
    layer = node.layer
    if layer.type not in ITEMWISE or not rests(node, at_rest):
        return False
    if isinstance(layer, BatchNorm):
        return layer.stored
    if layer.type == "Scale":
        return is_plain_scale(node)
    return getattr(layer.param, AXES[layer.type]).axis == 1 if layer.type in AXES else True


def computes(node: Node) -> str:
    """What a layer computes: its type, settings and parameters."""
    digest = hashlib.sha256()
    for blob in node.layer.blobs:
        digest.update(blob.data_slot.value().detach().cpu().numpy().tobytes())
    return f"{settings(node.layer)} {digest.hexdigest()}"


def settings(layer: Layer) -> str:
    """The layer's message without what it is called, where it lies in the net and how it learns."""
    message = caffe_pb2.LayerParameter()
    message.CopyFrom(layer.param)
    for name in ("name", "bottom", "top", "param", "blobs", "include", "exclude", "propagate_down", "loss_weight"):
        message.ClearField(name)
    return f"{layer.phase} {message.SerializeToString(deterministic=True).hex()}"


@dataclass(eq=False)
class Value:
    """What a name holds from one operation to the next: a top, what made it from which others, and its bytes per item."""
    name: str
    maker: Operation
    bottoms: list[Value]
    bytes: int

    def __post_init__(self) -> None:
        self.is_fixed = any(node.layer.blobs for node in self.maker.nodes)      # parameters: work that is not done again behind a frontier
        self.has_work: bool = self.is_fixed or any(bottom.has_work for bottom in self.bottoms)


@dataclass
class Frontier:
    """source: the Data layer's operation; tops: the frontier's names; chain: what computes them from the source's first top, in order;
    done: the operations that a pass leaves away that knows the tops; bytes: of the tops, per item
    """
    source: Operation
    tops: list[str]
    chain: list[Operation]
    done: set[Operation]
    bytes: int

    @property
    def data(self) -> Data:
        layer = self.source.nodes[0].layer
        assert isinstance(layer, Data)
        return layer

    def identity(self, parameters: bool = True) -> str:
        """A digest of all that the chain computes, whatever its blobs and layers are called, with its parameters or without."""
        known = {self.source.tops[0]: "data"}
        for op in self.chain:
            layers = (computes(node) if parameters else settings(node.layer) for node in op.nodes)
            words = [type(op.run).__name__, *(known[name] for name in op.bottoms), *layers]
            made = hashlib.sha256("\n".join(words).encode()).hexdigest()
            known.update((name, f"{made} {i}") for i, name in enumerate(op.tops))
        return hashlib.sha256("\n".join(known[name] for name in self.tops).encode()).hexdigest()


def find(graph: Graph, operations: list[Operation], at_rest: Set[int]) -> Frontier | None:
    """The frontier behind the first Data layer that has one; None in a net without frozen work."""
    for source in operations:
        layer = source.nodes[0].layer
        if isinstance(layer, Data) and layer.is_numbered:
            found = _behind(source, graph, operations, at_rest)
            if found is not None:
                return found
    return None


def _behind(source: Operation, graph: Graph, operations: list[Operation], at_rest: Set[int]) -> Frontier | None:
    """The frontier behind one Data layer."""
    def bytes_of(name: str) -> int:
        blob = graph.blobs[name]
        return blob.count // blob.shape[0] * blob.data_slot.dtype.itemsize

    held = {source.tops[0]: Value(source.tops[0], source, [], bytes_of(source.tops[0]))}      # by name, at this point of the pass
    frozen: list[Operation] = []
    values: list[Value] = []
    read: list[Value] = []                                   # by operations that are not frozen
    for op in operations:
        bottoms = [held[name] for name in op.bottoms if name in held]
        for name in {*op.tops, *op.overwrites} if op is not source else ():
            held.pop(name, None)
        if op.bottoms and len(bottoms) == len(op.bottoms) and not op.losses and is_itemwise(op, at_rest):
            made = [Value(name, op, bottoms, bytes_of(name)) for name in op.tops]
            held.update(zip(op.tops, made, strict=True))
            frozen.append(op)
            values += made
        else:
            read += bottoms
    worth = [value for value in values if value.has_work]
    wanted = [value for value in worth if value in read]
    if not wanted:
        return None
    cut = smallest_cut(worth, wanted)
    chain = _makers(cut, frozen, until=())
    needed = _makers([value for value in read if value not in cut], frozen, until=cut)
    return Frontier(source, [value.name for value in cut], chain, {value.maker for value in worth} - set(needed),
                    sum(value.bytes for value in cut))


def _makers(values: Iterable[Value], frozen: list[Operation], until: Collection[Value]) -> list[Operation]:
    """The operations that compute the values, from those in `until` and the data."""
    found, open_ = set(), list(values)
    while open_:
        value = open_.pop()
        found.add(value.maker)
        open_ += [bottom for bottom in value.bottoms if bottom not in until]
    return [op for op in frozen if op in found]


def smallest_cut(values: Collection[Value], wanted: Collection[Value]) -> list[Value]:
    """The values of the fewest bytes from which those wanted follow without any work of an operation with parameters.

    Of several such sets the one nearest to what is wanted.  It is the smallest cut of a flow network (Ford and Fulkerson 1956) in which a
    value's bytes are the capacity between its two ends.
    """
    room: dict[Hashable, dict[Hashable, float]] = {}

    def pipe(one: Hashable, other: Hashable, capacity: float) -> None:
        room.setdefault(one, {})[other] = capacity
        room.setdefault(other, {}).setdefault(one, 0)
    for value in values:
        pipe((value, "in"), (value, "out"), value.bytes)
        if value.is_fixed:
            pipe("work", (value, "in"), inf)
        else:
            for bottom in value.bottoms:
                if bottom in values:
                    pipe((bottom, "out"), (value, "in"), inf)
        if value in wanted:
            pipe((value, "out"), "wanted", inf)
    while path := _path(room):
        amount = min(room[one][other] for one, other in path)
        for one, other in path:
            room[one][other] -= amount
            room[other][one] += amount
    near = _reached("wanted", lambda end: [other for other in room[end] if room[other][end] > 0])
    return [value for value in values if (value, "out") in near and (value, "in") not in near]


def _path(room: dict[Hashable, dict[Hashable, float]]) -> list[tuple[Hashable, Hashable]]:
    """Pipes with room from the work to what is wanted; none where nothing more can flow."""
    before = _reached("work", lambda end: [other for other in room[end] if room[end][other] > 0])
    path: list[tuple[Hashable, Hashable]] = []
    end: Hashable = "wanted"
    while end in before and before[end] is not None:
        path.insert(0, (before[end], end))
        end = before[end]
    return path


def _reached(start: Hashable, neighbours: Callable[[Hashable], Iterable[Hashable]]) -> dict[Hashable, Hashable]:
    """All ends that can be reached, each with the one before it (breadth first)."""
    before: dict[Hashable, Hashable] = {start: None}
    queue = [start]
    for end in queue:
        for other in neighbours(end):
            if other not in before:
                before[other] = end
                queue.append(other)
    return before
