"""The nets that a solver prototxt asks for: one to train, and any number to test, which share its parameters."""
from __future__ import annotations

from torchcaffe import settings
from torchcaffe.errors import CaffeError
from torchcaffe.graph import filter as graph
from torchcaffe.net import TEST, TRAIN, Net
from torchcaffe.proto import caffe_pb2, prototxt, upgrade
from torchcaffe.streams import Streams

Param = caffe_pb2.SolverParameter


def train_net(p: Param, source: str, seed: int) -> Net:
    """The net of net, net_param, train_net or train_net_param.  `source` names the solver in errors (its file)."""
    sources = [f for f in ("net", "net_param", "train_net", "train_net_param") if p.HasField(f)]
    if len(sources) != 1:
        raise CaffeError(f"{source}: exactly one of net, net_param, train_net and train_net_param says what to train, "
                         f"not {' and '.join(sources) or 'none'}")
    return _make(getattr(p, sources[0]), TRAIN, [p.train_state] if p.HasField("train_state") else [], source, seed)


def test_nets(p: Param, source: str, seed: int, trained: Net) -> list[Net]:
    """One net for each test_iter: those of test_net_param and test_net first, then the net that is trained, in its TEST phase."""
    named: list[caffe_pb2.NetParameter | str] = [*p.test_net_param, *p.test_net]
    generic = p.net_param if p.HasField("net_param") else p.net if p.HasField("net") else None
    more = len(p.test_iter) - len(named)
    if more < 0 or (more > 0 and generic is None):
        raise CaffeError(f"{source}: {len(p.test_iter)} test_iter for {len(named)} test net(s); write one for each test net")
    sources = named + ([] if generic is None else [generic] * more)
    if p.test_state and len(p.test_state) != len(sources):
        raise CaffeError(f"{source}: {len(p.test_state)} test_state for {len(sources)} test net(s); write one for each or none")
    if sources and p.test_interval <= 0:
        raise CaffeError(f"{source}: there are test nets, so test_interval must be above 0")
    states = [[s] for s in p.test_state] or [[] for _ in sources]
    nets = [_make(s, TEST, state, source, seed * 1_000_003 + i) for i, (s, state) in enumerate(zip(sources, states, strict=True), 1)]
    for net in nets:
        net.share_with(trained)
        net.debug_info = p.debug_info
    return nets


def _make(described: caffe_pb2.NetParameter | str, phase: int, states: list[caffe_pb2.NetState], source: str, seed: int) -> Net:
    """A net whose state is: the phase, then what the net says, then what the solver says."""
    if isinstance(described, str):
        param, name = prototxt.read_net(described), described
    else:
        param, name = upgrade.upgrade_net(described), source
    state = caffe_pb2.NetState(phase=caffe_pb2.Phase.Name(phase))
    state.MergeFrom(param.state)
    for extra in states:
        state.MergeFrom(extra)
    whole = graph.set_state(param, state.phase, state.level)
    whole.state.CopyFrom(state)
    return Net.from_message(whole, Streams(seed, settings.solver_rank()), name)
