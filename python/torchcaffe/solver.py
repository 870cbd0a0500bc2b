"""Solvers: the training loop of Caffe's solver.cpp and sgd_solver.cpp, with its order of tests, displays, updates and snapshots.

A solver runs its nets layer by layer, as pycaffe's users expect, or as whole-iteration functions (`fast`), which is what the
training programs ask for.  The rates, the update rules and the files are in policies.py, updates.py and continuation.py; solvers
that train together combine their gradients in a callback (parallel.py), and only the first of them tests, displays and snapshots.
"""
from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchcaffe import continuation, debug, formats, glog, graph, parallel, policies, settings, updates
from torchcaffe.build import Learnable
from torchcaffe.errors import CaffeError
from torchcaffe.net import TEST, TRAIN, Net
from torchcaffe.proto import caffe_pb2, prototxt, upgrade
from torchcaffe.step import Program, why_not
from torchcaffe.streams import Streams

Hook = Callable[[], object]


class Solver:
    """A solver of a solver prototxt; use get_solver() or the class of one rule.

    net, test_nets, iter, param, lr       as in pycaffe
    random_seed      the seed of all its draws; the prototxt's, or one drawn now
    fast             run whole iterations as one function (extension; set before the first step).  A net that cannot is run layer
                     by layer, and a line in the log says why.
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
        try:
            policies.check_policy(self.param)
            updates.check_rule(self.param, self.rule)
        except CaffeError as error:
            raise CaffeError(f"{self.source}: {error}") from None
        self.random_seed = self.param.random_seed if self.param.random_seed >= 0 else settings.next_net_seed()
        self.fast = False
        self.exact = False
        self.root = parallel.solver_rank() == 0
        self.iter = 0
        self.current_step = 0
        self.net = self._train_net()
        self.test_nets = self._test_nets() if self.root else []
        for net in (self.net, *self.test_nets):
            for names in self.param.weights:
                for name in names.split(","):
                    net.copy_from(name.strip())
        self.learnable: list[Learnable] = self.net.graph.learnable
        count = updates.HISTORIES.get(self.rule, 1)
        self.histories = [[torch.zeros_like(item.blob.data_slot.value()) for item in self.learnable] for _ in range(count)]
        self.gradients: list[Tensor | None] = []
        self._losses: deque[Tensor | float] = deque(maxlen=max(1, self.param.average_loss))
        self._callbacks: list[tuple[Hook, Hook]] = []
        self._programs: dict[int, Program | None] = {}
        self._request = ""
        self._display_mark = (time.monotonic(), 0)

    # -- nets ------------------------------------------------------------------------------------------------------
    def _train_net(self) -> Net:
        p = self.param
        sources = [f for f in ("net", "net_param", "train_net", "train_net_param") if p.HasField(f)]
        if len(sources) != 1:
            raise CaffeError(f"{self.source}: exactly one of net, net_param, train_net and train_net_param says what to train, "
                             f"not {' and '.join(sources) or 'none'}")
        return self._make_net(getattr(p, sources[0]), TRAIN, [p.train_state] if p.HasField("train_state") else [], 0)

    def _test_nets(self) -> list[Net]:
        p = self.param
        named: list[caffe_pb2.NetParameter | str] = [*p.test_net_param, *p.test_net]
        generic = p.net_param if p.HasField("net_param") else p.net if p.HasField("net") else None
        more = len(p.test_iter) - len(named)
        if more < 0 or (more > 0 and generic is None):
            raise CaffeError(f"{self.source}: {len(p.test_iter)} test_iter for {len(named)} test net(s); write one for each test net")
        sources = named + ([] if generic is None else [generic] * more)
        if p.test_state and len(p.test_state) != len(sources):
            raise CaffeError(f"{self.source}: {len(p.test_state)} test_state for {len(sources)} test net(s); write one for each or none")
        if sources and p.test_interval <= 0:
            raise CaffeError(f"{self.source}: there are test nets, so test_interval must be above 0")
        states = [[s] for s in p.test_state] or [[] for _ in sources]
        nets = [self._make_net(s, TEST, state, i + 1) for i, (s, state) in enumerate(zip(sources, states, strict=True))]
        for net in nets:
            net.share_with(self.net)
            net.debug_info = p.debug_info
        return nets

    def _make_net(self, source: caffe_pb2.NetParameter | str, phase: int, states: list[caffe_pb2.NetState], index: int) -> Net:
        """A net whose state is: the phase, then what the net says, then what the solver says."""
        if isinstance(source, str):
            param, name = prototxt.read_net(source), source
        else:
            param, name = upgrade.upgrade_net(source), self.source
        state = caffe_pb2.NetState(phase=caffe_pb2.Phase.Name(phase))
        state.MergeFrom(param.state)
        for extra in states:
            state.MergeFrom(extra)
        whole = graph.set_state(param, state.phase, state.level)
        whole.state.CopyFrom(state)
        seed = self.random_seed if index == 0 else self.random_seed * 1_000_003 + index
        return Net.from_message(whole, Streams(seed, parallel.solver_rank()), name)

    # -- the loop --------------------------------------------------------------------------------------------------
    def step(self, iterations: int) -> None:
        """Train for `iterations` updates, testing, displaying and snapshotting as the prototxt says."""
        p, stop = self.param, self.iter + iterations
        self._losses.clear()
        self._display_mark = (time.monotonic(), self.iter)
        self._request = ""
        self._refresh(self.net)
        while self.iter < stop and self._request != "stop":
            if p.test_interval and self.iter % p.test_interval == 0 and (self.iter > 0 or p.test_initialization):
                self.test_all()
            for on_start, _ in self._callbacks:
                on_start()
            display = self.root and bool(p.display) and self.iter % p.display == 0
            self.net.debug_info = display and p.debug_info
            self.gradients = self._pass()
            if display:
                self._display()
            for _, on_gradients_ready in self._callbacks:
                on_gradients_ready()
            self._update(self.gradients, display)
            if self.net.debug_info:
                debug.update(self.net)
            self.iter += 1
            if (p.snapshot and self.iter % p.snapshot == 0) or self._request == "snapshot":
                self._request = self._request.replace("snapshot", "")
                if self.root:
                    self.snapshot()

    def solve(self, resume_file: str | Path | None = None) -> None:
        """Train to max_iter, from a .solverstate if given, with Caffe's end of a run by the root: snapshot, last loss, last test."""
        p = self.param
        glog.info(f"Solving {self.net.name}")
        glog.info(f"Learning Rate Policy: {p.lr_policy}")
        if resume_file is not None:
            self.restore(resume_file)
        self.step(p.max_iter - self.iter)
        if not self.root:
            return
        if p.snapshot_after_train and (not p.snapshot or self.iter % p.snapshot != 0):
            self.snapshot()
        if self._request == "stop":
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

    def add_callback(self, on_start: Hook | parallel.NCCL, on_gradients_ready: Hook | None = None) -> None:
        """Call the first before each iteration and the second between backward and update; an NCCL has both."""
        if isinstance(on_start, parallel.NCCL):
            self._callbacks.append((on_start.on_start, on_start.on_gradients_ready))
        else:
            self._callbacks.append((on_start, on_gradients_ready or on_start))

    @property
    def layer_by_layer(self) -> bool:
        """Whether iterations run layer by layer, so that the parameters' diffs are there for whoever looks."""
        return self._program(self.net) is None

    def _program(self, net: Net) -> Program | None:
        """The net as one function, or None where it runs layer by layer; decided once."""
        if id(net) not in self._programs:
            reason = "debug_info is on" if self.param.debug_info else why_not(net)
            if self.fast and reason:
                glog.info(f"{net.source} runs layer by layer: {reason}", "step.py:1")
            moving = {i for indices in self._groups().values() for i in indices}
            at_rest = set(range(len(self.learnable))) - moving if net is self.net else None
            self._programs[id(net)] = Program(net, at_rest) if self.fast and not reason else None
        return self._programs[id(net)]

    def _refresh(self, net: Net) -> None:
        program = self._program(net)
        if program is not None:
            program.refresh()

    def _forward(self, net: Net) -> float:
        program = self._program(net)
        if program is None:
            return net._forward(0, len(net.layers) - 1)
        with torch.no_grad():
            loss = program.forward()
        return 0.0 if loss is None else float(loss)

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
        losses: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for _ in range(size):
            loss = program.forward()
            fresh = program.gradients(loss)
            gradients = [self._sum(i, a, b) for i, (a, b) in enumerate(zip(gradients, fresh, strict=True))] if gradients else fresh
            if loss is not None:
                losses.append(loss.detach())
        self._losses.append(torch.stack(losses).mean() if losses else 0.0)
        return gradients

    def _sum(self, index: int, total: Tensor | None, fresh: Tensor | None) -> Tensor | None:
        """Gradients of several passes add up, except a Parameter layer's, whose last one stays (parameter_layer.hpp)."""
        if total is None or fresh is None:
            return fresh if total is None else total
        return fresh if self.net.layer_dict[self.learnable[index].layer].type == "Parameter" else total + fresh

    # -- the update ------------------------------------------------------------------------------------------------
    @property
    def lr(self) -> float:
        """The rate at the present iteration.  With multistep, reading it may move the step, as in Caffe."""
        rate, self.current_step = policies.learning_rate(self.param, self.iter, self.current_step)
        return rate

    def apply_update(self) -> None:
        """One update from the diffs as they are, without counting an iteration (Caffe: ApplyUpdate)."""
        self._update([item.blob.diff_value() for item in self.learnable], display=False)

    def _update(self, gradients: list[Tensor | None], display: bool) -> None:
        p, rate = self.param, self.lr
        if display:
            glog.info(f"Iteration {self.iter}, lr = {rate:g}", "sgd_solver.cpp:105")
        present = [i for i, g in enumerate(gradients) if g is not None]
        known = updates.clip([g for g in gradients if g is not None], p.clip_gradients)
        if p.iter_size != 1 and known:
            known = list(torch._foreach_mul(known, 1 / p.iter_size))
        gradient = dict(zip(present, known, strict=True))
        for (lr_mult, decay_mult), indices in self._groups().items():
            weights = [self.learnable[i].blob.data_slot.value() for i in indices]
            group = [gradient[i] if i in gradient else torch.zeros_like(w) for i, w in zip(indices, weights, strict=True)]
            group = updates.regularise(group, weights, updates.single(p.weight_decay * decay_mult), p.regularization_type)
            histories = [[h[i] for i in indices] for h in self.histories]
            change = updates.RULES[self.rule](group, histories, updates.single(rate * lr_mult), self.iter, p)
            torch._foreach_sub_(weights, change)
            for i, value in zip(indices, change, strict=True):
                if self.layer_by_layer:
                    self.learnable[i].blob.diff_slot.assign(value)
                self.learnable[i].blob.data_slot.publish()

    def _groups(self) -> dict[tuple[float, float], list[int]]:
        """Parameters by (lr_mult, decay_mult), without those that no update can change."""
        if self._group_cache is None:
            groups: dict[tuple[float, float], list[int]] = {}
            for i, item in enumerate(self.learnable):
                at_rest = self.rule in updates.MOVED_BY_RATE_ONLY and item.lr_mult == 0 and not self.histories[0][i].any()
                if not at_rest:
                    groups.setdefault((item.lr_mult, item.decay_mult), []).append(i)
            self._group_cache = groups
        return self._group_cache

    _group_cache: dict[tuple[float, float], list[int]] | None = None

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
        total_loss, batches = 0.0, self.param.test_iter[index]
        if batches < 1:                                      # how tests are switched off
            return
        for _ in range(batches):
            total_loss += self._forward(net)
            values = [net.blobs[name].data_slot.value().detach().double() for name in net.outputs]
            totals = [a + b for a, b in zip(totals, values, strict=True)] if totals else values
        if self.param.test_compute_loss:
            glog.info(f"Test loss: {total_loss / batches:g}", "solver.cpp:390")
        self._log_outputs("Test", net, [t / batches for t in totals], "solver.cpp:397")

    def _display(self) -> None:
        now, (then, since) = time.monotonic(), self._display_mark
        per_second = (self.iter - since) / max(now - then, 1e-9)
        glog.info(f"Iteration {self.iter} ({per_second:g} iter/s, {now - then:g}s/{self.param.display} iters), "
                 f"loss = {self._smoothed_loss():g}", "solver.cpp:218")
        self._display_mark = (now, self.iter)
        self._log_outputs("Train", self.net, [self.net.blobs[n].data_slot.value() for n in self.net.outputs], "solver.cpp:237")

    def _log_outputs(self, what: str, net: Net, values: list[Tensor], where: str) -> None:
        """Every element of every output on a line of its own, numbered throughout."""
        number, weights = 0, net.blob_loss_weights
        for name, tensor in zip(net.outputs, values, strict=True):
            for value in tensor.reshape(-1).tolist():
                note = f" (* {weights[name]:g} = {weights[name] * value:g} loss)" if weights[name] else ""
                glog.info(f"    {what} net output #{number}: {name} = {value:g}{note}", where)
                number += 1

    def _smoothed_loss(self) -> float:
        """The mean over the last average_loss iterations of this step() call."""
        return sum(float(x) for x in self._losses) / max(1, len(self._losses))

    # -- files -----------------------------------------------------------------------------------------------------
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
        count = sum(len(slot) for slot in self.histories)
        if len(state.history) != count:
            raise CaffeError(f"{state_file}: {len(state.history)} history blobs, but {self.source} needs {count}; "
                             "it belongs to another net or solver")
        if state.learned_net:
            recorded, beside = Path(state.learned_net), Path(state_file).parent / Path(state.learned_net).name
            self.net.copy_from(recorded if os.path.exists(recorded) else beside)         # which takes names too long for a file, too
        for target, array in zip([h for slot in self.histories for h in slot], state.history, strict=True):
            if tuple(target.shape) != array.shape and target.numel() != array.size:
                raise CaffeError(f"{state_file}: a history blob has shape {array.shape}, but {tuple(target.shape)} is needed")
            target.copy_(torch.from_numpy(array).reshape(target.shape))
        self.iter, self.current_step = state.iter, state.current_step
        self._group_cache = None
        self._programs.clear()
        if self.exact:
            continuation.read(self, continuation.path_beside(state_file))
        glog.info(f"Restored from {state_file} at iteration {self.iter}", "sgd_solver.cpp:318")

    def share_weights(self, net: Net) -> None:
        """Let another net use the trained net's parameters (data only) from now on."""
        net.share_with(self.net)


class SGDSolver(Solver):
    """Stochastic gradient descent with momentum, whatever `type` the prototxt names."""
    rule = "SGD"


class NesterovSolver(Solver):
    """Nesterov's accelerated gradient."""
    rule = "Nesterov"


class AdaGradSolver(Solver):
    """AdaGrad."""
    rule = "AdaGrad"


class RMSPropSolver(Solver):
    """RMSProp."""
    rule = "RMSProp"


class AdaDeltaSolver(Solver):
    """AdaDelta."""
    rule = "AdaDelta"


class AdamSolver(Solver):
    """Adam."""
    rule = "Adam"


def get_solver(solver_file: str | Path, param: caffe_pb2.SolverParameter | None = None) -> Solver:
    """The solver of the type that the prototxt names; `param` is what it says, where a caller has changed it after reading."""
    param = param or prototxt.read_solver(solver_file)
    kinds = (SGDSolver, NesterovSolver, AdaGradSolver, RMSPropSolver, AdaDeltaSolver, AdamSolver)
    kind = {kind.rule: kind for kind in kinds}.get(param.type, Solver)
    return kind(solver_file, param.type, param)
