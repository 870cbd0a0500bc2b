"""What a solver is to the modules that it calls: those that keep its state or combine its gradients see this much of it."""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from torchcaffe.graph.build import Learnable
from torchcaffe.net import Net, NetVec
from torchcaffe.proto import caffe_pb2

Hook = Callable[[], object]


class SolverState(Protocol):
    """A solver, as solver.py describes it."""
    param: caffe_pb2.SolverParameter
    net: Net
    test_nets: NetVec
    iter: int
    random_seed: int
    learnable: list[Learnable]
    histories: list[list[Tensor]]
    gradients: list[Tensor | None]
    root: bool
    fast: bool
    replay: bool
    compile: bool
    exact: bool

    @property
    def layer_by_layer(self) -> bool: ...

    def request(self, action: str) -> None: ...


@runtime_checkable
class Callbacks(Protocol):
    """What a solver calls in every iteration: before it, and between backward and update."""

    def on_start(self) -> object: ...

    def on_gradients_ready(self) -> object: ...
