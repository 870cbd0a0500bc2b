"""What of a net is exported: the layers from its data to its scores, as steps on values that are written once.

Losses, accuracies and what only they read are left out; data layers become inputs; BatchNorm and the Scale behind it become one step.
How a step is written in another form is the business of torch_module.py and onnx_model.py.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchcaffe import formats
from torchcaffe.errors import CaffeError
from torchcaffe.graph import filter as graph
from torchcaffe.graph.blob import Shape
from torchcaffe.layers import LAYERS, Layer
from torchcaffe.net import TEST, Net
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.streams import Streams

BATCHES = (2, 3)                                        # the batch sizes that a net with a free batch axis is checked with


@dataclass(eq=False)
class Value:
    """What a blob holds from the layer that makes it to the next one that changes it in place."""
    blob: str
    name: str = ""                                      # unique; the blob's own for what it holds in the end
    shape: Shape = ()                                   # in the last sample
    dims: tuple[int | None, ...] = ()                   # the shape, None where it grows with the batch

    @property
    def template(self) -> list[int]:
        """The shape for a reshape, -1 where it grows with the batch."""
        return [-1 if size is None else size for size in self.dims]


@dataclass(eq=False)
class Step:
    """A layer, or a BatchNorm with the Scale behind it, and the values it reads and makes."""
    layer: Any                                          # a Layer, whose attributes say its geometry
    bottoms: list[Value]
    tops: list[Value]
    scale: Layer | None = None


@dataclass
class Sample:
    """A batch for every input, and what the net makes of it."""
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]


@dataclass
class Plan:
    source: str                                         # the prototxt
    weights: str
    inputs: list[Value]
    outputs: list[Value]
    steps: list[Step]                                   # in the prototxt's order
    notes: list[str]                                    # what data layers do to their records, which the user has to do now
    samples: list[Sample]


@dataclass
class _Link:
    message: caffe_pb2.LayerParameter
    bottoms: list[Value]
    tops: list[Value]

    @property
    def is_source(self) -> bool:
        """Whether the layer brings in data."""
        return not self.bottoms and self.message.type != "Parameter"


def make_plan(source: str | Path, weights: str | Path, types: Collection[str], phase: int = TEST, level: int = 0,
              stages: Sequence[str] = ()) -> Plan:
    """The plan of a prototxt's net with weights.  Phase, level and stages say which layers; they compute as in TEST in any case.

    Raises CaffeError for layers that are not of these types, for a net that cannot be built or has no scores, and for weights that
    lack one of its layers.
    """
    param = graph.set_state(prototxt.read_net(source), phase, level, list(stages))
    try:
        links = _trace(graph.filter_net(param).layer)
    except CaffeError as error:
        raise CaffeError(f"{place(source, error.layer)}: {error}") from None
    kept, outputs = _between_data_and_scores(links)
    if not outputs:
        raise CaffeError(f"{source}: nothing is left to export beside data, losses and accuracies; are --phase and --stage the right ones?")
    strange = [link.message for link in kept if not link.is_source and link.message.type not in types]
    if strange:
        names = " and ".join(f"layer '{message.name}' ({message.type})" for message in strange)
        raise CaffeError(f"{place(source, strange[0].name)}: {names} cannot be exported; export a net without")
    net = _build(param, kept, str(source))
    _load(net, weights)
    inputs = [value for link in kept if link.is_source for value in link.tops]
    steps = _merge(_steps(net, kept), outputs)
    plan = Plan(str(source), str(weights), inputs, outputs, steps, _notes(kept), [])
    _name(plan)
    _sample(plan, net)
    return plan


def place(source: str | Path, layer: str | None) -> str:
    """The file, with the line where the layer stands if that is known."""
    line = prototxt.layer_line(source, layer) if layer else None
    return f"{source}:{line}" if line else str(source)


def refuse(condition: bool, plan: Plan, step: Step, reason: str) -> None:
    """Raise CaffeError for a layer that cannot be written in the form asked for, if the condition holds."""
    if condition:
        name = step.layer.name
        raise CaffeError(f"{place(plan.source, name)}: layer '{name}' ({step.layer.type}) cannot be exported: it {reason}")


# -- what both forms ask of a layer --------------------------------------------------------------------------------
def trailing_axes(step: Step) -> int:
    """How many axes of a Scale's or Bias's bottom lie behind those that the factor or bias spans."""
    p = step.layer.param.scale_param if step.layer.type == "Scale" else step.layer.param.bias_param
    axes, spanned = len(step.bottoms[0].dims), len(step.bottoms[1].dims if len(step.bottoms) > 1 else step.layer.declared[0][0])
    return axes - spanned - (p.axis % axes if spanned else 0)


def power_constant(step: Step) -> float | None:
    """The number that a Power layer makes of everything, if it does."""
    p = step.layer.param.power_param
    with np.errstate(all="ignore"):
        return float(np.float64(p.shift) ** p.power) if p.scale == 0 or p.power == 0 else None


# -- which layers --------------------------------------------------------------------------------------------------
def _trace(layers: Sequence[caffe_pb2.LayerParameter]) -> list[_Link]:
    """Layers with the values they read and make, in order."""
    current: dict[str, Value] = {}
    links = []
    for message in layers:
        for name in message.bottom:
            if name not in current:
                raise graph.unknown_bottom(message, name, set(current))
        links.append(_Link(message, [current[name] for name in message.bottom], [Value(name) for name in message.top]))
        current.update((value.blob, value) for value in links[-1].tops)
    return links


def _is_measure(link: _Link, read: set[Value]) -> bool:
    """Whether the layer only says how good the scores are: it is made for that, or has a loss weight and is not read."""
    message = link.message
    return message.type.endswith("Loss") or message.type == "Accuracy" or (any(message.loss_weight) and not read.intersection(link.tops))


def _judged(link: _Link) -> list[Value]:
    """The bottoms that a measure judges, without those it judges by: labels and the like, which take no gradient."""
    fixed = LAYERS[link.message.type].not_differentiable if link.message.type in LAYERS else frozenset()
    return link.bottoms[:1] if isinstance(fixed, str) else [value for i, value in enumerate(link.bottoms) if i not in fixed]


def _between_data_and_scores(links: list[_Link]) -> tuple[list[_Link], list[Value]]:
    """The layers to export, with data layers cut down to the tops that are needed, and the outputs."""
    made_of_measures: set[Value] = set()
    scores: set[Value] = set()
    other: set[Value] = set()                           # read by what is left out, but no scores
    read = {value for link in links for value in link.bottoms}
    kept = []
    for link in links:
        measure = _is_measure(link, read)
        if link.tops and not measure and not made_of_measures.intersection(link.bottoms):
            kept.append(link)
            continue
        made_of_measures.update(link.tops)
        judged = _judged(link) if measure else []
        scores.update(judged)
        other.update(value for value in link.bottoms if value not in judged)
    read = {value for link in kept for value in link.bottoms}
    outputs = [value for link in kept if not link.is_source for value in link.tops
               if value in scores or (value not in read and value not in other)]
    needed = set(outputs)
    for link in reversed(kept):
        if needed.intersection(link.tops):
            needed.update(link.bottoms)
    return [_Link(link.message, link.bottoms, [value for value in link.tops if value in needed] if link.is_source else link.tops)
            for link in kept if needed.intersection(link.tops)], outputs


# -- the net -------------------------------------------------------------------------------------------------------
def _build(param: caffe_pb2.NetParameter, kept: list[_Link], source: str) -> Net:
    """A net of these layers alone, in TEST, with Input layers in place of data layers."""
    message = caffe_pb2.NetParameter(name=param.name, state=caffe_pb2.NetState(phase=caffe_pb2.TEST))
    for link in kept:
        layer = message.layer.add()
        if not link.is_source:
            layer.CopyFrom(link.message)
            for rule in ("phase", "include", "exclude", "loss_weight"):
                layer.ClearField(rule)
            continue
        alone = caffe_pb2.NetParameter(state=param.state, layer=[link.message])
        data = Net.from_message(alone, Streams(0), source)
        layer.MergeFrom(caffe_pb2.LayerParameter(name=link.message.name, type="Input", top=[value.blob for value in link.tops]))
        for value in link.tops:
            layer.input_param.shape.add(dim=data.blobs[value.blob].shape)
    return Net.from_message(message, Streams(0), source)


def _load(net: Net, weights: str | Path) -> None:
    """Load the weights, which have to cover all layers: nothing is exported as it was drawn."""
    known = {name for name, blobs in formats.read_weights(weights) if blobs}
    for item in net.graph.learnable:
        if item.layer not in known:
            raise CaffeError(f"{weights}: holds no parameters for layer '{item.layer}' of {net.source}")
    net.copy_from(weights)


def _steps(net: Net, kept: list[_Link]) -> list[Step]:
    """The layers that compute, as the net built them, without the splits that it added."""
    layers = (node.layer for node in net.graph.nodes)
    found = [(link, next(layer for layer in layers if layer.name == link.message.name)) for link in kept]
    return [Step(layer, link.bottoms, link.tops) for link, layer in found if not link.is_source]


def _merge(steps: list[Step], outputs: list[Value]) -> list[Step]:
    """BatchNorms with stored statistics take up the Scale that is the only one to read them, one factor per channel."""
    uses = Counter([value for step in steps for value in step.bottoms] + outputs)
    norms = {step.tops[0]: step for step in steps if step.layer.type == "BatchNorm" and step.layer.stored and uses[step.tops[0]] == 1}
    result = []
    for step in steps:
        if step.layer.type == "Scale" and len(step.bottoms) == 1 and step.bottoms[0] in norms and step.layer.per_channel:
            norm = norms[step.bottoms[0]]
            norm.scale, norm.tops = step.layer, step.tops
        else:
            result.append(step)
    return result


def _notes(kept: list[_Link]) -> list[str]:
    """Each data layer's transformation, in one line."""
    return [f"{' and '.join(value.blob for value in link.tops)} as layer {link.message.name} delivers: "
            + " ".join(prototxt.write(link.message.transform_param).split())
            for link in kept if link.is_source and link.message.HasField("transform_param")]


def _name(plan: Plan) -> None:
    """Give every value its name."""
    values = plan.inputs + [value for step in plan.steps for value in step.tops]
    last = {value.blob: value for value in values}
    taken = set(last)
    for value in values:
        value.name, count = value.blob, 0
        while value is not last[value.blob] and value.name in taken:
            count += 1
            value.name = f"{value.blob}@{count}"
        taken.add(value.name)


# -- samples -------------------------------------------------------------------------------------------------------
def _sample(plan: Plan, net: Net) -> None:
    """Run the net on two drawn batches, of two sizes if it can, and note all shapes.

    The first batch is normal with deviation 1, the second uniform in 0 to 255: as standardised data and as pixels.
    """
    values = plan.inputs + [value for step in plan.steps for value in step.tops]
    declared = [net.blobs[value.blob].shape for value in plan.inputs]
    free = len({shape[:1] for shape in declared}) == 1 and len(declared[0]) > 0 and _shapes_follow(plan, net, values, declared)
    if not free:
        _reshape(plan, net, declared)
        for value in values:
            value.dims = net.blobs[value.blob].shape
    draw = np.random.default_rng(0)
    for size, pixels in zip(BATCHES, (False, True), strict=True):
        _reshape(plan, net, [(size, *shape[1:]) for shape in declared] if free else declared)
        inputs = [(draw.uniform(0, 255, shape) if pixels else draw.standard_normal(shape)).astype(np.float32)
                  for shape in (net.blobs[value.blob].shape for value in plan.inputs)]
        for value, array in zip(plan.inputs, inputs, strict=True):
            net.blobs[value.blob].data[...] = array
        net._forward(0, len(net.layers) - 1)
        plan.samples.append(Sample(inputs, [net.blobs[value.blob].data.copy() for value in plan.outputs]))
    for value in values:
        value.shape = net.blobs[value.blob].shape


def _reshape(plan: Plan, net: Net, shapes: Sequence[Shape]) -> None:
    for value, shape in zip(plan.inputs, shapes, strict=True):
        net.blobs[value.blob].reshape(*shape)
    net.reshape()


def _shapes_follow(plan: Plan, net: Net, values: list[Value], declared: list[Shape]) -> bool:
    """Whether the net runs with any batch size, told from two; then the values' dims are known."""
    seen = []
    for size in BATCHES:
        try:
            _reshape(plan, net, [(size, *shape[1:]) for shape in declared])
        except CaffeError:
            return False
        seen.append([net.blobs[value.blob].shape for value in values])
    for value, one, other in zip(values, *seen, strict=True):
        value.dims = tuple(a if a == b else None for a, b in zip(one, other, strict=True))
    return all(value.dims.count(None) <= 1 for value in values) and not any(_works_on_batch(step) for step in plan.steps)


def _works_on_batch(step: Step) -> bool:
    """Whether the layer cuts or numbers the items of the batch, so that its form depends on how many there are."""
    layer = step.layer
    axes = [axis for axis, _, _ in layer.places] if layer.type == "Crop" else [layer.along] if layer.type in ("Slice", "ArgMax") else []
    return any(axis is not None and step.bottoms[0].dims[axis] is None for axis in axes)
