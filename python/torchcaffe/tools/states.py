"""The states (phase, level, stages) that a net is looked at in: as its solver uses it, or as its own rules suggest."""
from __future__ import annotations

from typing import NamedTuple

from torchcaffe.graph import filter as graph
from torchcaffe.net import TEST, TRAIN
from torchcaffe.proto import caffe_pb2


class Use(NamedTuple):
    """A phase, and what a solver adds to the state that the net itself names."""
    phase: int
    extra: caffe_pb2.NetState


def uses_of(solver: caffe_pb2.SolverParameter) -> list[tuple[str, Use]]:
    """The files of a solver's nets and how it uses each."""
    found = [(solver.net or solver.train_net, Use(TRAIN, solver.train_state))]
    tests = [*solver.test_net, *[solver.net] * (len(solver.test_iter) - len(solver.test_net) - len(solver.test_net_param))]
    states = list(solver.test_state[len(solver.test_net_param):])
    found += [(file, Use(TEST, state)) for file, state in zip(tests, states + [caffe_pb2.NetState()] * len(tests), strict=False)]
    return [(file, use) for file, use in found if file]


def own_uses(net: caffe_pb2.NetParameter) -> tuple[list[Use], bool]:
    """The uses that a net by itself is made for, and whether one that it could have had is passed over.

    It is made for those that the rules of its inputs name.  Inputs without rules are for both phases, but for one that takes a layer's
    bottom away the net is not made, if there is another.
    """
    named, supposed = dict[bytes, Use](), dict[bytes, Use]()
    for layer in net.layer:
        for rule in (layer.include or [caffe_pb2.NetStateRule()]) if not layer.bottom else []:
            extra = caffe_pb2.NetState(stage=rule.stage, level=rule.min_level)
            for phase in [rule.phase] if rule.HasField("phase") else [TRAIN, TEST]:
                kind = named if rule.ListFields() else supposed
                kind[bytes([phase]) + extra.SerializeToString()] = Use(phase, extra)
    found = named | {key: use for key, use in supposed.items() if key in named or not _takes_bottoms_away(net, use)}
    every = list((supposed | named).values()) or [Use(phase, caffe_pb2.NetState()) for phase in (TRAIN, TEST)]
    return list(found.values()) or every, 0 < len(found) < len(every)


def _takes_bottoms_away(net: caffe_pb2.NetParameter, use: Use) -> bool:
    """Whether a layer is left without a bottom because the layers that make it are left out."""
    made, anywhere = set[str](), {top for layer in net.layer for top in layer.top}
    for layer in net.layer:
        if not graph.is_included(layer, in_state(net, use).state):
            continue
        if any(bottom in anywhere and bottom not in made for bottom in layer.bottom):
            return True
        made.update(layer.top)
    return False


def in_state(net: caffe_pb2.NetParameter, use: Use) -> caffe_pb2.NetParameter:
    """The net as a solver builds it: its state is the phase, then what the net says, then what the solver adds."""
    found = caffe_pb2.NetParameter()
    found.CopyFrom(net)
    found.state.CopyFrom(caffe_pb2.NetState(phase=caffe_pb2.Phase.Name(use.phase)))
    found.state.MergeFrom(net.state)
    found.state.MergeFrom(use.extra)
    return found


def in_words(state: caffe_pb2.NetState) -> str:
    """A state as sentences name it."""
    stages = " and ".join(f"'{stage}'" for stage in state.stage)
    level = f", level {state.level}" if state.level else ""
    return f"phase {caffe_pb2.Phase.Name(state.phase)} {f'with stage {stages}' if stages else 'without stages'}{level}"
