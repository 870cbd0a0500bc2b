"""Solvers that train together, one process and device each: NCCL, which combines their gradients.

Caffe's way: every solver has a net, a data layer deals the records out to them, each computes the gradients of its own batch, all
take the mean of the gradients, and so all make the same update.  Number 0, the root, gives the others its weights at the start and
alone tests, displays and snapshots.  Messages go through torch.distributed: NCCL between GPUs, gloo between processes on a CPU.
Processes are started by launch.py or by the user's script.  Caffe: parallel.cpp, solver.cpp.
"""
from __future__ import annotations

import atexit
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchcaffe import settings
from torchcaffe.errors import CaffeError, PeerLost
from torchcaffe.train.state import SolverState

MEETING = timedelta(minutes=5)                          # how long solvers wait for each other at the start
TESTING = timedelta(days=30)                            # and later, when the root may be testing
REQUESTS = ("", "snapshot", "stop")                     # the later one wins

_hosts: Any = None                                      # the process group for what hosts agree on without waiting for GPUs
_meeting_places: list[Any] = []                         # those that new_uid() made; they last as long as this process


# -- settings ------------------------------------------------------------------------------------------------------
def set_multiprocess(multiprocess: bool) -> None:
    """Whether the solvers of a group are processes of their own, which they always are here."""


def has_nccl() -> bool:
    """Whether this torch can train on several GPUs."""
    return bool(dist.is_available() and dist.is_nccl_available())


# -- the group -----------------------------------------------------------------------------------------------------
@atexit.register
def leave() -> None:
    """Leave the group this process is in, if any.

    With the last reference to its process groups their threads end.  An interpreter that ends before them is aborted at times
    (SIGABRT, "terminate called without an active exception"), so every process leaves at its end.
    """
    global _hosts
    _hosts = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class NCCL:
    """A solver's membership in the group of those that got the same `uid`.

    Give it to Solver.add_callback, and to Net.after_backward to combine each layer's gradients as soon as they are there instead of
    all at once.  A process has one group; making another leaves the first.  Raises CaffeError if the others do not come, or have
    another net; PeerLost when one of them has ended.
    """

    def __init__(self, solver: SolverState, uid: str):
        self.solver = solver
        self.rank, self.count = settings.share()
        self._pending = ""
        self._layer_wise = False
        self._buffer: Tensor | None = None
        if self.count > 1:
            self._join(uid)

    @staticmethod
    def new_uid() -> str:
        """What the processes of a group find each other by: an address on this machine, open as long as the calling process runs."""
        listener = socket.create_server(("127.0.0.1", 0))
        host, port = listener.getsockname()
        store = dist.TCPStore  # type: ignore[attr-defined]
        _meeting_places.append(store(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()))
        return f"{host}:{port}"

    def _join(self, uid: str) -> None:
        global _hosts
        host, _, port = uid.rpartition(":")
        if not host or not port.isdecimal():
            raise CaffeError(f"'{uid}' is not a uid; take one from NCCL.new_uid(), the same for all solvers")
        device = self.solver.net.context.device
        leave()
        try:
            store = dist.TCPStore(host, int(port), timeout=MEETING)  # type: ignore[attr-defined]
            store.set(f"solver {self.rank}", "")
            store.wait([f"solver {rank}" for rank in range(self.count)], MEETING)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=self.rank, world_size=self.count,
                                    timeout=TESTING, device_id=device if device.type == "cuda" else None)
            _hosts = dist.new_group(backend="gloo", timeout=TESTING)
        except RuntimeError as error:
            raise CaffeError(f"solver {self.rank} did not meet the other {self.count - 1} at {uid} ({_first_line(error)}); start one "
                             f"process for each rank from 0 to {self.count - 1}, on one machine") from None
        net = [tuple(item.blob.shape) for item in self.solver.learnable]
        mine = {"iteration": self.solver.iter, "iter_size": self.solver.param.iter_size, "parameters": net}
        all_of_them: list[dict[str, Any]] = [{}] * self.count
        with self._together():
            dist.all_gather_object(all_of_them, mine, group=_hosts)
        for rank, other in enumerate(all_of_them):
            for name, value in all_of_them[0].items():
                if other[name] != value:
                    raise CaffeError(f"solvers 0 and {rank} differ in {name} ({_short(value)} and {_short(other[name])}); "
                                     "make all of them from the same files")

    def bcast(self) -> None:
        """Give the root's parameters, seed and place in the data to the others."""
        if self.count == 1:
            return
        net, layers = self.solver.net, [node.layer for node in self.solver.net.graph.nodes]
        state: list[Any] = [(self.solver.random_seed, [layer.cursor for layer in layers])]
        slots = [item.blob.data_slot for item in self.solver.learnable]
        with self._together():
            dist.broadcast_object_list(state, group=_hosts)
        for slot, value in zip(slots, self._exchanged([slot.value() for slot in slots], lambda flat: dist.broadcast(flat, 0)), strict=True):
            slot.assign(value)
            slot.publish()
        self.solver.random_seed, cursors = state[0]
        net.context.streams.seed = self.solver.random_seed
        for layer, cursor in zip(layers, cursors, strict=True):
            layer.cursor = cursor

    # -- what the solver calls -----------------------------------------------------------------------------------------
    def request(self, action: str) -> None:
        """Ask all solvers to "stop" after the same iteration, or the root to take a "snapshot"; safe from a signal handler."""
        self._pending = action

    def on_start(self) -> None:
        """Before an iteration: all learn what one was asked to do."""
        if self.count == 1:
            return
        wish = torch.tensor(REQUESTS.index(self._pending))
        self._pending, self._layer_wise = "", False
        with self._together():
            dist.all_reduce(wish, dist.ReduceOp.MAX, group=_hosts)
        if wish:
            self.solver.request(REQUESTS[int(wish)])

    def on_gradients_ready(self) -> None:
        """Between backward and update: the mean of all solvers' gradients, unless that was done layer by layer."""
        if self.count == 1 or self._layer_wise:
            self._layer_wise = False
            return
        gradients, learnable = self.solver.gradients, self.solver.learnable
        present = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        for i, mean in zip(present, self._mean(list(present.values())), strict=True):
            gradients[i] = mean
            if self.solver.layer_by_layer:                                          # somebody may look at the diffs
                learnable[i].blob.diff_slot.assign(mean)

    def __call__(self, layer: int) -> None:
        """After a layer's backward: the mean of all solvers' gradients of its parameters.

        What iter_size passes or layers with the same parameter have added before is a mean already, which this leaves as it is.
        """
        if self.count == 1:
            return
        self._layer_wise = True
        node = self.solver.net.graph.nodes[layer]
        slots = [blob.diff_slot for blob, need in zip(node.layer.blobs, node.param_need, strict=False) if need]
        for slot, mean in zip(slots, self._mean([slot.value() for slot in slots]), strict=True):
            slot.assign(mean)

    def _mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean over all solvers of each tensor."""
        def combine(flat: Tensor) -> None:
            dist.all_reduce(flat)
            flat.mul_(1 / self.count)
        return self._exchanged(tensors, combine)

    def _exchanged(self, tensors: list[Tensor], exchange: Callable[[Tensor], object]) -> list[Tensor]:
        """What `exchange` makes of all tensors, packed into one: views of a buffer that the next call overwrites."""
        if not tensors:
            return []
        sizes = [tensor.numel() for tensor in tensors]
        if self._buffer is None or len(self._buffer) < sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        flat = self._buffer[:sum(sizes)]
        torch.cat([tensor.reshape(-1) for tensor in tensors], out=flat)
        with self._together():
            exchange(flat)
        return [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Within the block messages are exchanged; when that fails, a member has ended."""
        try:
            yield
        except RuntimeError as error:
            raise PeerLost(f"solver {self.rank} of {self.count} lost another one ({_first_line(error)}); see what that says, and resume "
                           "all from the last snapshot") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
