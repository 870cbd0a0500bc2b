"""Several solvers that train side by side: what is frozen and equal in their nets, a teacher as a rule, runs once on all their batches.

The batches go side by side through the shared layers, and each solver goes on with its own part.  On a GPU the iterations of all are
recorded as one CUDA graph, in which the solvers' own parts run on streams of their own.  A solver ends with the weights it would have
had alone, but for the rounding of convolutions of a larger batch.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.graph import work
from torchcaffe.step import capture
from torchcaffe.step.capture import Fed, Replay
from torchcaffe.step.frontier import computes, is_itemwise, settings
from torchcaffe.step.operations import Operation
from torchcaffe.step.program import Program
from torchcaffe.step.remembered import Remembered
from torchcaffe.train.solver import Solver


class Together:
    """Solvers in step with each other.

    Raises CaffeError where a solver cannot run whole iterations (`fast`), has callbacks, or differs from the first in device, number
    type, precision or iter_size.
    shared    of each solver the operations that run once for all, in the same order
    turn      turn(number) surrounds what that solver does alone: its tests, displays and snapshots, whose lines may go to a log of its own
    """

    def __init__(self, solvers: Sequence[Solver], turn: Callable[[int], AbstractContextManager[object]] = nullcontext):
        if not solvers:
            raise CaffeError("there are no solvers to train together")
        self.turn = turn
        self.solvers, self.programs = solvers, [_program(solver, solvers[0]) for solver in solvers]
        self.device = self.programs[0].net.context.device
        self._find_shared()
        self._remember_together()
        replayable = all(s.replay for s in solvers) and not any(capture.why_not(p) for p in self.programs)
        state = [tensor for solver in solvers for tensor in solver._state()]
        self.replay = Replay(self.programs, solvers[0].param.iter_size, self._iteration, state) if replayable else None
        self.streams = [torch.cuda.Stream(self.device) for _ in solvers] if self.device.type == "cuda" else []

    def step(self, iterations: int) -> None:
        """Train each solver for so many updates, or until one is asked to stop; each tests, displays and snapshots as its prototxt says."""
        with work.on_its_threads(*(solver.net.graph for solver in self.solvers)):
            self._step(iterations)

    def _step(self, iterations: int) -> None:
        for number, solver in enumerate(self.solvers):
            with self.turn(number):
                solver._begin(on_device=self.replay is not None)
        for _ in range(iterations):
            if any(solver.is_stopped for solver in self.solvers):
                for solver in self.solvers:
                    solver.request("stop")
                break
            for number, solver in enumerate(self.solvers):
                with self.turn(number):
                    solver._test_if_due()
                    solver._set_rate()
            losses = self.replay() if self.replay is not None else self._iteration(None)
            assert losses is not None
            for number, (solver, loss) in enumerate(zip(self.solvers, losses.clone(), strict=True)):
                with self.turn(number):
                    solver._count(loss)
                    solver._snapshot_if_due()
        for solver in self.solvers:
            solver._show()

    # -- one iteration ---------------------------------------------------------------------------------------------
    def _iteration(self, fed: list[list[Fed]] | None) -> Tensor:
        """Passes and updates of all solvers; their losses, (solvers,)."""
        passes = [self._known(feds) for feds in fed] if fed else [self._known(None) for _ in range(self.solvers[0].param.iter_size)]

        def of(number: int) -> Tensor:
            program = self.programs[number]
            done = [*self.shared[number], *(program.memory.done if self._recalls and program.memory else ())]
            loss = self.solvers[number]._whole_iteration(program, [known[number] for known in passes], done)
            return torch.zeros((), device=self.device) if loss is None else loss
        losses = torch.stack(self._side_by_side(of))
        if fed is None:
            for program in self.programs:
                program.show()
        return losses

    def _known(self, feds: list[Fed] | None) -> list[Fed]:
        """What each solver's pass starts from: its records, and the shared tops of them."""
        known: list[Fed] = []
        for number, program in enumerate(self.programs):
            if feds is None:
                known.append(program.sources())
            else:                                           # the rest, with which a recording meets nothing of the host
                known.append({**program.sources(lambda layer: not layer.needs_host, inputs=False), **feds[number]})
        asked = self.shared[0]
        if self._recalls:
            recalled = [memory.recall(tops) for memory, tops in zip(self._memories, known, strict=True)]
            asked = [op for op in asked if op not in recalled[0]]
        wide: dict[str, Tensor] = {}
        with torch.no_grad():
            for op in asked:
                for name in op.bottoms:
                    if name not in wide:
                        wide[name] = torch.cat([tops[self._names[number][name]] for number, tops in enumerate(known)])
                op.store(self.programs[0].compute(op, [wide[name] for name in op.bottoms]), wide)
        for op in asked:
            for name in wide.keys() & op.tops:
                for tops, part, names in zip(known, wide[name].chunk(len(known)), self._names, strict=True):
                    tops[names[name]] = part
        return known

    def _side_by_side(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        """work(0), work(1) ...: on a GPU each on a stream of its own."""
        if not self.streams:
            return [work(number) for number in range(len(self.solvers))]
        here = torch.cuda.current_stream(self.device)
        results = []
        for number, stream in enumerate(self.streams):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(work(number))
        for stream in self.streams:
            here.wait_stream(stream)
        return results

    # -- what is shared --------------------------------------------------------------------------------------------
    def _find_shared(self) -> None:
        """The first solver's operations that all have, the same ones of each solver, and what a blob of the first is called in each."""
        described = [_described(program) for program in self.programs]
        common = [identity for identity in described[0] if all(identity in operations for operations in described)]
        self.shared = [[operations[identity] for identity in common] for operations in described]
        self._names = [{mine: theirs for one, other in zip(self.shared[0], operations, strict=True)
                        for mine, theirs in zip(one.bottoms + one.tops, other.bottoms + other.tops, strict=True)}
                       for operations in self.shared]

    # -- what is remembered ----------------------------------------------------------------------------------------
    @property
    def _memories(self) -> list[Remembered]:
        return [program.memory for program in self.programs if program.memory is not None]

    @property
    def _recalls(self) -> bool:
        """Whether all take from a memory what is shared and would be computed once."""
        return all(program.recalls for program in self.programs)

    def _remember_together(self) -> None:
        """Let frozen operations compute as many items at once as without a memory; where the solvers differ in them, forget."""
        left_away = [[op in memory.done for op in shared] for memory, shared in zip(self._memories, self.shared, strict=False)]
        if len(left_away) == len(self.programs) and all(each == left_away[0] for each in left_away):
            for memory in self._memories:
                memory.batch = memory.data.batch * len(self.programs)
        else:
            for program in self.programs:
                program.forget("solvers that train side by side must have the same frozen layers")


def solve_together(solvers: Sequence[Solver]) -> None:
    """Train all solvers to their max_iter, which is one for all, or until one is asked to stop; each ends as solve() ends."""
    ends = {solver.param.max_iter - solver.iter for solver in solvers}
    if len(ends) > 1:
        raise CaffeError(f"solvers that train together have as many iterations before them, not {' and '.join(map(str, sorted(ends)))}")
    for solver in solvers:
        solver.require_end()
    Together(solvers).step(max(*ends, 0))
    for solver in solvers:
        solver._end()


def _program(solver: Solver, first: Solver) -> Program:
    """The solver's trained net as a program.  Raises CaffeError if it cannot train together with `first`."""
    program = solver._program(solver.net)
    if program is None:
        raise CaffeError(f"{solver.source}: solvers train together as whole iterations; set fast to True before the first step, and see "
                         "the log for why a net cannot")
    if solver._callbacks:
        raise CaffeError(f"{solver.source}: a solver with callbacks cannot train together with others")
    mine, others = ((s.net.context.device, s.net.context.dtype, s.net.context.precision, s.param.iter_size) for s in (solver, first))
    if mine != others:
        raise CaffeError(f"{solver.source}: differs from {first.source} in device, number type, precision or iter_size, so they cannot "
                         "train together")
    return program


def _described(program: Program) -> dict[str, Operation]:
    """The operations that another program may have too, under what they compute from which kind of records."""
    operations: dict[str, Operation] = {}
    known = {name: f"input {name} {program.net.blobs[name].shape}" for name in program.net.inputs}
    for op in program.operations:
        identity = ""
        if not op.bottoms:
            identity = f"{settings(op.nodes[0].layer)} {[program.net.blobs[name].shape for name in op.tops]}"
        elif all(name in known for name in op.bottoms) and is_itemwise(op, program.at_rest):
            identity = " ".join([*(known[name] for name in op.bottoms), *(computes(node) for node in op.nodes)])
            identity = hashlib.sha256(identity.encode()).hexdigest()
            operations[identity] = op
        for i, name in enumerate(op.tops):
            known.pop(name, None)
            if identity:
                known[name] = f"{identity} {i}"
    return operations
