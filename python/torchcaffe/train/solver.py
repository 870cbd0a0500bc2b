"""Solvers: the training loop of Caffe's solver.cpp and sgd_solver.cpp, with its order of tests, displays, updates and snapshots.

A solver runs its nets layer by layer, as pycaffe's users expect, or as whole-iteration functions (`fast`), which is what the
training programs ask for.  The rates, the update rules, the files and what a GPU replays are in policies.py, updates.py,
continuation.py and step/capture.py; solvers that train together combine their gradients in a callback (parallel.py), and only the first of
them tests, displays and snapshots.
"""
from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchcaffe import formats, glog, settings
from torchcaffe.errors import CaffeError
from torchcaffe.graph import debug, work
from torchcaffe.graph.build import Learnable
from torchcaffe.net import Net, NetVec
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.step import capture, compiled
from torchcaffe.step.capture import Fed, Replay
from torchcaffe.step.operations import Operation
from torchcaffe.step.program import Program, why_not
from torchcaffe.step.remembered import Remembered
from torchcaffe.step.tiny import Tiny, suits
from torchcaffe.train import continuation, policies, solver_nets, updates
from torchcaffe.train.state import Callbacks, Hook


class Solver:
    """A solver of a solver prototxt; use get_solver() or the class of one rule.

    net, test_nets, iter, param, lr       as in pycaffe
    random_seed      the seed of all its draws; the prototxt's, or one drawn now
    fast             run whole iterations as one function (extension; set before the first step).  A net that cannot is run layer
                     by layer, and a line in the log says why.
    replay           run these functions from device memory alone (capture.py): recorded once and replayed, on a GPU; the same unrecorded on
                     a CPU.  The default is True on a GPU.  A net that cannot is run step by step, and a line in the log says why.
    compile          compile these functions for the trained net with torch.compile, which needs a C++ compiler (compiled.py).  A net that
                     cannot is run as it is, and a line in the log says why.
    remember         a folder with files of what frozen layers have given for records of an LMDB, whose work is done once then, for all
                     runs that name it (step/remembered.py; set before the first step).  No byte of the result depends on it.
    exact            write a sidecar with each snapshot, and continue data cursors and draws from it on restore (extension)
    root             whether it is the first of the solvers that train together, or alone (Caffe: root_solver)
    gradients        one entry per learnable parameter, None where there is none: while the callbacks on_gradients_ready run, which
                     may put others there, what the update is made of
    """

    rule = "SGD"

    def __init__(self, solver_file: str | Path, rule: str | None = None, param: caffe_pb2.SolverParameter | None = None):
        self.source = str(solver_file)
        self.param = param or prototxt.read_solver(solver_file)
        self.rule = rule or self.rule
        if self.param.iter_size < 1:
            raise CaffeError(f"{self.source}: iter_size is {self.param.iter_size}; it must be at least 1")
        self.root = settings.solver_rank() == 0
        if self.param.snapshot and self.root:
            self._require_snapshot_folder()
        try:
            policies.check_policy(self.param)
            updates.check_rule(self.param, self.rule)
        except CaffeError as error:
            raise CaffeError(f"{self.source}: {error}") from None
        self.random_seed = self.param.random_seed if self.param.random_seed >= 0 else settings.next_net_seed()
        self.fast = False
        self.compile = False
        self.remember: str | Path | None = None
        self.exact = False
        self.iter = 0
        self.current_step = 0
        self.net = solver_nets.train_net(self.param, self.source, self.random_seed)
        self.test_nets = NetVec(solver_nets.test_nets(self.param, self.source, self.random_seed, self.net) if self.root else ())
        for net in (self.net, *self.test_nets):
            for names in self.param.weights:
                for name in names.split(","):
                    net.copy_from(name.strip())
        self.learnable: list[Learnable] = self.net.graph.learnable
        self.updater = updates.Updater(self.rule, self.param, self.learnable)
        self.histories = self.updater.histories
        self.gradients: list[Tensor | None] = []
        self.replay = self.net.context.device.type == "cuda"
        self._losses: deque[Tensor | float] = deque(maxlen=max(1, self.param.average_loss))
        self._callbacks: list[tuple[Hook, Hook]] = []
        self._programs: dict[int, Program | None] = {}
        self._replays: dict[int, Replay | None] = {}
        self._request = ""
        self._display_mark = (time.monotonic(), 0)

    # -- the loop --------------------------------------------------------------------------------------------------
    def step(self, iterations: int) -> None:
        """Train for `iterations` updates, testing, displaying and snapshotting as the prototxt says."""
        stop = self.iter + iterations
        with work.on_its_threads(self.net.graph):
            self._begin()
            while self.iter < stop and not self.is_stopped:
                self._test_if_due()
                self._iterate()
                self._snapshot_if_due()
            self._show()

    def _begin(self, on_device: bool | None = None) -> None:
        """Before some iterations in a row: somebody may have written parameters, or looked at them."""
        self._losses.clear()
        self._display_mark = (time.monotonic(), self.iter)
        self._request = ""
        self._refresh(self.net)
        self.updater.begin(self._replayed(self.net) is not None if on_device is None else on_device)

    def _test_if_due(self) -> None:
        p = self.param
        if p.test_interval and self.iter % p.test_interval == 0 and (self.iter > 0 or p.test_initialization):
            self._show()
            self.test_all()

    def _iterate(self) -> None:
        """One iteration: from records to new parameters."""
        replay = self._replayed(self.net)
        if replay is not None:
            self._set_rate()
            loss = replay()
            self._count(0.0 if loss is None else loss.clone())
            return
        for on_start, _ in self._callbacks:
            on_start()
        display = self._is_displayed()
        self.net.debug_info = display and self.param.debug_info
        self.gradients = self._pass()
        if display:
            self._display()
        for _, on_gradients_ready in self._callbacks:
            on_gradients_ready()
        self._set_rate()
        if display:
            self._display_rate()
        self._update(self.gradients)
        if self.net.debug_info:
            debug.update(self.net.graph)
        self.iter += 1

    def _count(self, loss: Tensor | float) -> None:
        """After an iteration in one piece."""
        self._losses.append(loss)
        if self._is_displayed():
            self._display()
            self._display_rate()
        self.iter += 1

    def _snapshot_if_due(self) -> None:
        if (self.param.snapshot and self.iter % self.param.snapshot == 0) or self._request == "snapshot":
            self._request = self._request.replace("snapshot", "")
            if self.root:
                self._show()
                self.snapshot()

    def solve(self, resume_file: str | Path | None = None) -> None:
        """Train to max_iter, from a .solverstate if given, with Caffe's end of a run by the root: snapshot, last loss, last test."""
        self.require_end()
        glog.info(f"Solving {self.net.name}")
        glog.info(f"Learning Rate Policy: {self.param.lr_policy}")
        if resume_file is not None:
            self.restore(resume_file)
        self.step(self.param.max_iter - self.iter)
        self._end()

    def _end(self) -> None:
        """After the last iteration, or the one at which somebody asked to stop."""
        p = self.param
        if not self.root:
            return
        if p.snapshot_after_train and (not p.snapshot or self.iter % p.snapshot != 0):
            self.snapshot()
        if self.is_stopped:
            glog.info("Optimization stopped early.")
            return
        if p.display and self.iter % p.display == 0:
            self._losses.append(self._forward(self.net))
            glog.info(f"Iteration {self.iter}, loss = {self._smoothed_loss():g}")
        if p.test_interval and self.iter % p.test_interval == 0:
            self.test_all()
        glog.info("Optimization Done.")

    def request(self, action: str) -> None:
        """Ask a running step() to "stop" after its iteration, or to take a "snapshot"; safe from a signal handler."""
        self._request = action

    @property
    def is_stopped(self) -> bool:
        """Whether the last step() was asked to stop, or a running one is."""
        return self._request == "stop"

    def add_callback(self, on_start: Hook | Callbacks, on_gradients_ready: Hook | None = None) -> None:
        """Call the first before each iteration and the second between backward and update; an NCCL has both as methods."""
        if isinstance(on_start, Callbacks):
            self._callbacks.append((on_start.on_start, on_start.on_gradients_ready))
        else:
            self._callbacks.append((on_start, on_gradients_ready or on_start))

    @property
    def memory(self) -> Remembered | None:
        """What the frozen layers of the trained net are remembered in, once it is open."""
        program = self._programs.get(id(self.net))
        return program.memory if program is not None and program.recalls else None

    @property
    def is_recorded(self) -> bool:
        """Whether iterations are replayed from a recording, as they should be on a GPU once the first is done (extension)."""
        replay = self._replayed(self.net)
        return replay is not None and replay.graph is not None

    @property
    def layer_by_layer(self) -> bool:
        """Whether iterations run layer by layer, so that the parameters' diffs are there for whoever looks."""
        return self._program(self.net) is None

    def _program(self, net: Net) -> Program | None:
        """The net as one function, or None where it runs layer by layer; decided once."""
        if id(net) not in self._programs:
            reason = "debug_info is on" if self.param.debug_info else why_not(net)
            if self.fast and reason:
                glog.info(f"{net.source} runs layer by layer: {reason}", "program.py:1")
            self._programs[id(net)] = self._make_program(net) if self.fast and not reason else None
        return self._programs[id(net)]

    def _make_program(self, net: Net) -> Program:
        if net is not self.net:
            return Program(net)
        reason = compiled.why_not(net) if self.compile else None
        if reason:
            glog.info(f"{net.source} is not compiled: {reason}", "compiled.py:1")
        if self.compile and not reason:
            if self.remember:
                glog.info(f"{net.source} is compiled, so that nothing of it is remembered", "remembered.py:1")
            return compiled.Compiled(net, self.updater.at_rest)
        program = (Tiny if suits(net) else Program)(net, self.updater.at_rest)
        if self.remember:
            program.remember(self.remember, resident=self.replay or net.context.device.type == "cuda")
        return program

    def _replayed(self, net: Net) -> Replay | None:
        """What runs the net from device memory alone, or None; decided once, unless somebody wants to be called in between."""
        program = self._program(net) if self.replay and not self._callbacks else None
        if program is None:
            return None
        if id(net) not in self._replays:
            reason = capture.why_not(program)
            if reason:
                glog.info(f"{net.source} is not replayed: {reason}", "capture.py:1")
            self._replays[id(net)] = None if reason else self._replay_of(net, program)
        return self._replays[id(net)]

    def _replay_of(self, net: Net, program: Program) -> Replay:
        """Iterations of the trained net, or passes of a test net."""
        def train(fed: list[list[Fed]]) -> Tensor | None:
            return self._whole_iteration(program, [feds[0] for feds in fed])

        @torch.no_grad()
        def test(fed: list[list[Fed]]) -> Tensor | None:
            return program.forward(fed[0][0])
        if net is self.net:
            return Replay([program], self.param.iter_size, train, self._state())
        return Replay([program], 1, test, [item.blob.data_slot.value() for item in net.graph.learnable])

    def _state(self) -> list[Tensor]:
        """All tensors that training changes."""
        return [item.blob.data_slot.value() for item in self.learnable] + [h for slot in self.histories for h in slot]

    def _whole_iteration(self, program: Program, fed: Sequence[Fed], done: Collection[Operation] = ()) -> Tensor | None:
        """Passes and update, from what the passes are fed, in which operations are `done`; the loss."""
        losses, gradients = self._passes(program, fed, done)
        self.updater.apply(gradients)
        return torch.stack(losses).mean() if losses else None

    def _refresh(self, net: Net) -> None:
        if self._programs.get(id(net)) and why_not(net):         # somebody has put other blobs into a layer since
            del self._programs[id(net)]
            self._replays.pop(id(net), None)
        program = self._program(net)
        if program is not None:
            program.refresh()

    def _forward(self, net: Net) -> Tensor | float:
        """The loss of a pass without gradients; the host does not wait for one that a program computes."""
        program = self._program(net)
        if program is None:
            return net._forward(0, len(net.layers) - 1)
        replay = self._replayed(net) if net is not self.net else None
        with work.on_its_threads(net.graph):
            if replay is not None:
                loss = replay()
            else:
                with torch.no_grad():
                    loss = program.forward()
        return 0.0 if loss is None else loss

    def _pass(self) -> list[Tensor | None]:
        """iter_size forward and backward passes: the sum of their gradients, one entry per learnable parameter."""
        net, size = self.net, self.param.iter_size
        program = self._program(net)
        if program is None:
            net.clear_param_diffs()
            total = 0.0
            for _ in range(size):
                total += net._forward(0, len(net.layers) - 1)
                net._backward(len(net.layers) - 1, 0)
            self._losses.append(total / size)
            return [item.blob.diff_value() for item in self.learnable]
        losses, gradients = self._passes(program, [None] * size)
        self._losses.append(torch.stack(losses).mean() if losses else 0.0)
        return gradients

    def _passes(self, program: Program, fed: Sequence[Fed | None],
                done: Collection[Operation] = ()) -> tuple[list[Tensor], list[Tensor | None]]:
        """The losses of a forward and backward pass for each of `fed`, and the sum of their gradients."""
        losses: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for given in fed:
            loss = program.forward(given, done)
            fresh = program.gradients(loss)
            gradients = [self._sum(i, a, b) for i, (a, b) in enumerate(zip(gradients, fresh, strict=True))] if gradients else fresh
            if loss is not None:
                losses.append(loss.detach())
        return losses, gradients

    def _sum(self, index: int, total: Tensor | None, fresh: Tensor | None) -> Tensor | None:
        """Gradients of several passes add up, except a Parameter layer's, whose last one stays (parameter_layer.hpp)."""
        if total is None or fresh is None:
            return fresh if total is None else total
        return fresh if self.learnable[index].type == "Parameter" else total + fresh

    # -- the update ------------------------------------------------------------------------------------------------
    @property
    def lr(self) -> float:
        """The rate at the present iteration.  With multistep, reading it may move the step, as in Caffe."""
        rate, self.current_step = policies.learning_rate(self.param, self.iter, self.current_step)
        return rate

    def _set_rate(self) -> None:
        self._rate = self.lr
        self.updater.set_rate(self._rate, self.iter)

    def apply_update(self) -> None:
        """One update from the diffs as they are, without counting an iteration (Caffe: ApplyUpdate)."""
        self.updater.begin()
        self._set_rate()
        self._update([item.blob.diff_value() for item in self.learnable])
        self._show()

    def _update(self, gradients: list[Tensor | None]) -> None:
        changes = self.updater.apply(gradients)
        if self.layer_by_layer:
            for i, change in changes.items():
                self.learnable[i].blob.diff_slot.assign(change)
                self.learnable[i].blob.data_slot.publish()

    def _show(self) -> None:
        """Before somebody can look: bring the arrays that somebody holds up to date."""
        for item in self.learnable:
            item.blob.data_slot.publish()
        self.net.flush()

    # -- tests and displays ----------------------------------------------------------------------------------------
    def test_all(self) -> None:
        """Run every test net over its test_iter batches and log the mean of each output element."""
        for index, net in enumerate(self.test_nets):
            self._test(index, net)

    def _test(self, index: int, net: Net) -> None:
        glog.info(f"Iteration {self.iter}, Testing net (#{index})", "solver.cpp:330")
        net.share_with(self.net)
        self._refresh(net)
        totals: list[Tensor] = []
        total_loss: Tensor | float = 0.0
        batches = self.param.test_iter[index]
        if batches < 1:                                      # how tests are switched off
            return
        for _ in range(batches):
            loss = self._forward(net)
            total_loss = total_loss + (loss.double() if isinstance(loss, Tensor) else loss)
            values = [net.blobs[name].data_slot.value().to(torch.float64, copy=True) for name in net.outputs]
            totals = [a + b for a, b in zip(totals, values, strict=True)] if totals else values
        net.flush()
        if self.param.test_compute_loss:
            glog.info(f"Test loss: {float(total_loss) / batches:g}", "solver.cpp:390")
        glog.outputs("Test", dict(zip(net.outputs, (t / batches for t in totals), strict=True)), net.blob_loss_weights, "solver.cpp:397")

    def _is_displayed(self) -> bool:
        return self.root and bool(self.param.display) and self.iter % self.param.display == 0

    def _display_rate(self) -> None:
        glog.info(f"Iteration {self.iter}, lr = {self._rate:g}", "sgd_solver.cpp:105")

    def _display(self) -> None:
        now, (then, since) = time.monotonic(), self._display_mark
        per_second = (self.iter - since) / max(now - then, 1e-9)
        glog.info(f"Iteration {self.iter} ({per_second:g} iter/s, {now - then:g}s/{self.param.display} iters), "
                 f"loss = {self._smoothed_loss():g}", "solver.cpp:218")
        self._display_mark = (now, self.iter)
        outputs = {name: self.net.blobs[name].data_slot.value() for name in self.net.outputs}
        glog.outputs("Train", outputs, self.net.blob_loss_weights, "solver.cpp:237")

    def _smoothed_loss(self) -> float:
        """The mean over the last average_loss iterations of this step() call."""
        return sum(float(x) for x in self._losses) / max(1, len(self._losses))

    # -- files -----------------------------------------------------------------------------------------------------
    def require_end(self) -> None:
        """Raise CaffeError where the snapshot at the end of a run could not be written: before hours of training."""
        if self.param.snapshot_after_train and self.root:
            self._require_snapshot_folder()

    def _require_snapshot_folder(self) -> None:
        if problem := snapshot_problem(self.param):
            raise CaffeError(f"{self.source}: {problem}")

    def snapshot(self) -> str:
        """Write the weights and then the solver state; returns the state's path.  Each file appears whole or not at all."""
        hdf5 = self.param.snapshot_format == caffe_pb2.SolverParameter.HDF5
        base, end = f"{self.param.snapshot_prefix}_iter_{self.iter}", ".h5" if hdf5 else ""
        model, state = f"{base}.caffemodel{end}", f"{base}.solverstate{end}"
        kind = "HDF5" if hdf5 else "binary proto"
        if self.exact:
            continuation.write(self, continuation.path_beside(state))
        glog.info(f"Snapshotting to {kind} file {model}", "solver.cpp:447")
        self.net.save(model, diffs=self.param.snapshot_diff)
        glog.info(f"Snapshotting solver state to {kind} file {state}", "sgd_solver.cpp:273")
        history = [h.detach().cpu().numpy() for slot in self.histories for h in slot]
        formats.write_state(state, formats.State(self.iter, model, self.current_step, history))
        return state

    def restore(self, state_file: str | Path) -> None:
        """Continue from a .solverstate[.h5] and the weights it names.

        As in Caffe, data layers start at their first record again, unless `exact` is set: then SidecarError says why a
        snapshot cannot be continued exactly.
        """
        state = formats.read_state(state_file)
        self.updater.check(state.history, str(state_file))
        if state.learned_net:
            recorded, beside = Path(state.learned_net), Path(state_file).parent / Path(state.learned_net).name
            self.net.copy_from(recorded if os.path.exists(recorded) else beside)         # which takes names too long for a file, too
        self.updater.restore(state.history)
        self.iter, self.current_step = state.iter, state.current_step
        self._programs.clear()
        self._replays.clear()
        if self.exact:
            continuation.read(self, continuation.path_beside(state_file))
        glog.info(f"Restored from {state_file} at iteration {self.iter}", "sgd_solver.cpp:318")

    def share_weights(self, net: Net) -> None:
        """Let another net use the trained net's parameters (data only) from now on."""
        net.share_with(self.net)


def snapshot_problem(param: caffe_pb2.SolverParameter) -> str | None:
    """Why no snapshot could be written, or None (Caffe: Solver::CheckSnapshotWritePermissions)."""
    folder = Path(param.snapshot_prefix).parent
    if folder.is_dir() and os.access(folder, os.W_OK):
        return None
    return f"snapshot_prefix '{param.snapshot_prefix}': there is no writable folder {folder}; make it, or write another"
