"""From the net a file describes to the net that is built: filtering by state, inserted splits.

Messages in, messages out; nothing here knows tensors.  Caffe: net.cpp (FilterNet, StateMeetsRule), insert_splits.cpp.
"""
from __future__ import annotations

import difflib
from collections import Counter

from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2


def meets(state: caffe_pb2.NetState, rule: caffe_pb2.NetStateRule) -> bool:
    """Whether `rule` matches: phase, level range, all of its stages and none of its not_stages."""
    if rule.HasField("phase") and rule.phase != state.phase:
        return False
    if rule.HasField("min_level") and state.level < rule.min_level:
        return False
    if rule.HasField("max_level") and state.level > rule.max_level:
        return False
    stages = set(state.stage)
    return set(rule.stage) <= stages and not set(rule.not_stage) & stages


def is_included(layer: caffe_pb2.LayerParameter, state: caffe_pb2.NetState) -> bool:
    """Whether the rules of a layer, of one kind only, let it be in a net of this state."""
    if layer.include:
        return any(meets(state, rule) for rule in layer.include)
    return not any(meets(state, rule) for rule in layer.exclude)


def filter_net(param: caffe_pb2.NetParameter) -> caffe_pb2.NetParameter:
    """The layers of `param` that its own state includes.  Raises CaffeError where a layer has both include and exclude."""
    result = caffe_pb2.NetParameter()
    result.CopyFrom(param)
    del result.layer[:]
    for layer in param.layer:
        if layer.include and layer.exclude:
            raise CaffeError(f"layer '{layer.name}': has include and exclude rules; write one kind only", layer=layer.name)
        if is_included(layer, param.state):
            result.layer.add().CopyFrom(layer)
    return result


def unknown_bottom(layer: caffe_pb2.LayerParameter, bottom: str, available: set[str]) -> CaffeError:
    """The error for a bottom that no earlier layer makes, or that an earlier layer has changed in place or used up."""
    near = difflib.get_close_matches(bottom, sorted(available), n=1)
    hint = f"; did you mean '{near[0]}'?" if near and near[0] != bottom else ""
    return CaffeError(f"layer '{layer.name}' ({layer.type}): unknown bottom blob '{bottom}': no earlier layer has such a top{hint}",
                      layer=layer.name)


def split_name(layer: str, blob: str, top: int, k: int | None = None) -> str:
    """Caffe's name of an inserted split, or of its k-th top."""
    return f"{blob}_{layer}_{top}_split" + ("" if k is None else f"_{k}")


def insert_splits(param: caffe_pb2.NetParameter) -> caffe_pb2.NetParameter:
    """Put a Split layer after every top that is used more than once.

    A written, non-zero loss weight counts as a use and moves to the split's first top.
    """
    producer: dict[str, tuple[int, int]] = {}
    source: dict[tuple[int, int], tuple[int, int]] = {}
    uses: Counter[tuple[int, int]] = Counter()
    weight: dict[tuple[int, int], float] = {}
    for i, layer in enumerate(param.layer):
        for j, bottom in enumerate(layer.bottom):
            if bottom not in producer:
                raise unknown_bottom(layer, bottom, set(producer))
            source[i, j] = producer[bottom]
            uses[producer[bottom]] += 1
        for j, top in enumerate(layer.top):
            producer[top] = (i, j)
        for j, value in enumerate(layer.loss_weight[: len(layer.top)]):
            top_id = producer[layer.top[j]]
            weight[top_id] = value
            uses[top_id] += value != 0

    result = caffe_pb2.NetParameter()
    result.CopyFrom(param)
    del result.layer[:]
    taken: Counter[tuple[int, int]] = Counter()
    for i, original in enumerate(param.layer):
        layer = result.layer.add()
        layer.CopyFrom(original)
        for j, bottom in enumerate(original.bottom):
            top_id = source[i, j]
            if uses[top_id] > 1:
                layer.bottom[j] = split_name(param.layer[top_id[0]].name, bottom, top_id[1], taken[top_id])
                taken[top_id] += 1
        for j, top in enumerate(original.top):
            if uses[i, j] <= 1:
                continue
            split = result.layer.add(name=split_name(original.name, top, j), type="Split", bottom=[top])
            split.top.extend(split_name(original.name, top, j, k) for k in range(uses[i, j]))
            if weight.get((i, j)):
                split.loss_weight.extend([weight[i, j]] + [0.0] * (uses[i, j] - 1))
                layer.ClearField("loss_weight")
                taken[i, j] += 1
    return result


def set_state(param: caffe_pb2.NetParameter, phase: int, level: int = 0, stages: list[str] | None = None) -> caffe_pb2.NetParameter:
    """A copy of `param` whose state is what pycaffe's Net() arguments say."""
    result = caffe_pb2.NetParameter()
    result.CopyFrom(param)
    result.state.MergeFrom(caffe_pb2.NetState(phase=caffe_pb2.Phase.Name(phase), level=level, stage=stages or []))
    return result
