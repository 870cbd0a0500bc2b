"""Passes that need nothing of the host: on a GPU recorded once as a CUDA graph and replayed, on a CPU the same function, called.

What changes from pass to pass lies in device memory: records of a data set (or the next batch, copied in before the pass), the layers'
cursors, rates, parameters and histories.  So the host only starts a replay, and waits where somebody looks: at a display, a
test or a snapshot.  What a pass computes is program.py's Program; what happens with its gradients is the solver's business.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchcaffe import glog
from torchcaffe.data.images import KEEP_BYTES
from torchcaffe.layers.data import Data
from torchcaffe.step.program import Pass, Program

Fed = dict[str, Tensor]                                 # tops that the host provides, by name
Work = Callable[[list[list[Fed]]], Tensor | None]
WARM_UP = 3                                             # times the work is done before the recording, while libraries choose and allocate
RECORDINGS = 2                                          # that are kept: one for whole batches, one for the short ones at the ends of epochs


@dataclass(eq=False)
class Recording:
    """The work for batches of certain sizes: what the host provides, and, once it is recorded, what the graph gives and writes."""
    fed: list[list[Fed]]
    graph: torch.cuda.CUDAGraph | None = None
    result: Tensor | None = None
    written: list[tuple[Pass, dict[str, Tensor]]] = field(default_factory=list)       # of each program


class Replay:
    """`work`, which makes `passes` passes of some programs and returns a loss, as something that can be called again and again.

    work     is called with what the host provides, fed[pass][program]; changes tensors in place only
    state    the tensors it changes, apart from the layers' cursors
    """

    def __init__(self, programs: Sequence[Program], passes: int, work: Work, state: Sequence[Tensor]):
        self.programs, self.passes, self.work, self.state = programs, passes, work, list(state)
        self.device = programs[0].net.context.device
        layers = [node.layer for program in programs for node in program.graph.nodes]
        for layer in layers:
            if isinstance(layer, Data):
                layer.reside(self._room())
        self.layers = [layer for layer in layers if not layer.needs_host]
        self.clocks = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in self.layers]
        self.cursors = [0] * len(self.layers)
        self.recordings: dict[Hashable, Recording] = {}                 # by the sizes of their batches
        self.now = Recording([])
        self.can_record = self.device.type == "cuda"
        self.recalls: list[bool] = []

    def _room(self) -> int:
        """How many bytes a data set may take: at most half of what is free on a GPU."""
        return min(KEEP_BYTES, torch.cuda.mem_get_info(self.device)[0] // 2) if self.device.type == "cuda" else KEEP_BYTES

    def __call__(self) -> Tensor | None:
        """Do the work once.  The tensor that is returned is overwritten by the next call.

        Blobs show it when somebody asks.  Arrays that somebody has are brought up to date before somebody can look (Net.flush).
        """
        self._prepare()
        self._feed()
        self._set_clocks()
        now = self.now
        if now.graph is None and self.can_record:
            with torch.cuda.device(self.device):
                self._record()
        if now.graph is None:
            now.result = self._run()
        else:
            with torch.cuda.device(self.device):
                now.graph.replay()
            for program, written in zip(self.programs, now.written, strict=True):
                program.repeated(*written)
        self._count()
        for program in self.programs:
            program.show(now=False)
        return now.result

    @property
    def graph(self) -> torch.cuda.CUDAGraph | None:
        """The present recording's, and below what it gives."""
        return self.now.graph

    @property
    def result(self) -> Tensor | None:
        return self.now.result

    def _prepare(self) -> None:
        """Let the programs have what they will recall.  One that has lost its memory needs another recording."""
        for program in self.programs:
            program.prepare(self.passes)
        recalls = [program.recalls for program in self.programs]
        if recalls != self.recalls:
            self.recalls = recalls
            self.recordings.clear()

    def _feed(self) -> None:
        """Find the recording for the sizes of the next batches, and put what the host provides where it reads it."""
        provided = [[program.sources(lambda layer: layer.needs_host) for program in self.programs] for _ in range(self.passes)]
        sizes = (*(layer.size(layer.cursor + number) for layer in self.layers if isinstance(layer, Data) for number in range(self.passes)),
                 *(value.shape for feds in provided for fed in feds for value in fed.values()))
        known = self.recordings.get(sizes)
        if known is None:
            while len(self.recordings) >= RECORDINGS:
                del self.recordings[next(iter(self.recordings))]
            self.now = self.recordings[sizes] = Recording([[{name: value.clone() for name, value in fed.items()} for fed in feds]
                                                           for feds in provided])
            return
        self.now = known
        for places, feds in zip(known.fed, provided, strict=True):
            for place, fed in zip(places, feds, strict=True):
                for name, value in fed.items():
                    place[name].copy_(value, non_blocking=True)

    def _set_clocks(self) -> None:
        """A cursor that somebody else has moved, as restoring a snapshot does, counts."""
        for i, layer in enumerate(self.layers):
            if layer.cursor != self.cursors[i]:
                self.clocks[i].fill_(layer.cursor)
                self.cursors[i] = layer.cursor

    def _count(self) -> None:
        """Let the cursors on the host follow those in device memory."""
        for i, layer in enumerate(self.layers):
            if layer.ticks:
                self.cursors[i] = layer.cursor = layer.cursor + self.passes

    def _run(self) -> Tensor | None:
        for layer, clock in zip(self.layers, self.clocks, strict=True):
            layer.clock, layer.ticked = clock, 0
        try:
            return self.work(self.now.fed)
        finally:
            for layer in self.layers:
                layer.clock = None

    def _record(self) -> None:
        """Warm up, take back what that changed, and record; or find that it cannot be recorded, and say so."""
        state = [*self.state, *self.clocks, *(tensor for layer in self.layers for tensor in layer.state)]
        kept = [tensor.clone() for tensor in state]
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        for program in self.programs:
            program.renew()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run()
        here.wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.now.result = self._run()
            self.now.graph = graph
            self.now.written = [(program.last, {name: top.detach() for name, top in program.last.items()}) for program in self.programs]
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:                       # an operation of a Python layer, say, that waits for its result
            self.can_record = False
            before = error.__context__                      # what the operation said, where ending the recording failed, too
            reason = before if isinstance(before, RuntimeError) else error
            glog.warning(f"{self.programs[0].net.source} is not replayed: {str(reason).splitlines()[0]}", "capture.py:1")
        finally:
            if self.now.graph is None:
                _abandon(pool, here)
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)


def _abandon(pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Take back what torch leaves behind when a recording fails: its stream as the current one, and an allocator that fills its pool."""
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):                            # it may have stopped
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)


def why_not(program: Program) -> str | None:
    """Why the program's passes cannot run from device memory alone, in words, or None if they can."""
    for node in program.graph.nodes:
        if node.layer.needs_host and node.bottoms:
            return f"layer '{node.layer.name}' ({node.layer.type}) needs the host in every pass"
    return None
