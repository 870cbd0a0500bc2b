"""One pass of a net as one function of tensors: what training and testing programs run.

The same layers as net.py, without blobs in between: what is computed together is one operation (operations.py), autograd goes through
the whole net, nothing is kept that training does not need, and nothing waits for the host.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from torchcaffe.graph.build import check_differentiable
from torchcaffe.layers.base import Layer
from torchcaffe.layers.python import PythonLayer
from torchcaffe.net import Net
from torchcaffe.step.folding import Folded, FoldedSum
from torchcaffe.step.memory import keep_freed
from torchcaffe.step.operations import Operation, Tops, plan
from torchcaffe.step.remembered import Remembered, remembered, tell
from torchcaffe.step.statistics import Statistics

# Layers that may compute on bfloat16 with a precision of bf16; all others are given float32.
HALF = {"Convolution", "Deconvolution", "InnerProduct", "BatchNorm", "Scale", "Bias", "ReLU", "PReLU", "Pooling", "Eltwise", "Concat",
        "Slice", "Split", "Flatten", "Reshape", "Dropout"}


def why_not(net: Net) -> str | None:
    """Why the net cannot run as one function, in words, or None if it can."""
    for node in net.graph.nodes:
        if isinstance(node.layer, PythonLayer) and not node.layer.has_torch_form:
            values = sum(blob.count for blob in (*node.bottoms, *node.tops))
            return (f"Python layer '{node.layer.name}' has no forward_torch, so that {4 * values / 2**20:.3g} MiB pass through numpy "
                    "on the way forward, and their gradients on the way back")
        if node.layer.blobs.changed:
            return f"layer '{node.layer.name}' has other blobs than it was built with"
        if node.layer.varies:
            return f"layer '{node.layer.name}' reads images one by one, which may differ in size"
    consumed = {name for node in net.graph.nodes for name in node.bottom_names}
    for node in net.graph.nodes:
        for name, weight in zip(node.top_names, node.loss_weights, strict=True):
            if weight and name in consumed and node.layer.type != "Split":
                return f"the loss '{name}' is also the bottom of another layer"
            if name in net.inputs and node.layer.type != "Input":
                return f"layer '{node.layer.name}' changes the input '{name}' in place"
    return None


class Pass(dict[str, Tensor]):
    """The tops of a pass by name.  Those that were let go of are computed again when somebody asks for them."""

    def __init__(self, operations: list[Operation], compute: Callable[[Operation, list[Tensor]], Tops]):
        super().__init__()
        self._compute = compute
        self._all_makers: dict[object, list[Operation]] = {}          # several where layers work in place
        for op in operations:
            for name in op.tops:
                self._all_makers.setdefault(name, []).append(op)
        self._makers: dict[object, list[Operation]] = {}
        self.allow(())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (name in self._makers and all(bottom in self for bottom in self._makers[name][0].bottoms))

    def __missing__(self, name: str) -> Tensor:
        with torch.no_grad():
            for op in self._makers[name]:
                op.store(self._compute(op, [self[bottom] for bottom in op.bottoms]), self)
        return self[name]

    def could_again(self, name: str) -> bool:
        """Whether the top can be computed again."""
        return name in self._makers

    def allow(self, operations: Collection[Operation]) -> None:
        """Let tops be computed again by these operations, too."""
        for name, known in self._all_makers.items():
            if all(op in operations or op.is_repeatable for op in known):
                self._makers[name] = known


class Program:
    """A net as a list of operations.

    forward() returns the loss (a scalar tensor, or None without a loss); gradients() differentiates it.  The tops of the `last` pass
    are kept until the next one starts, for blobs that somebody looks at, or computed again then where no parameter is needed.
    """

    def __init__(self, net: Net, at_rest: Set[int] | None = None):
        """`at_rest`: the learnable parameters (positions in graph.learnable) that no update changes while the program runs.

        None makes a program without gradients, for tests.
        """
        keep_freed()
        self.net, self.graph, self.at_rest = net, net.graph, at_rest
        if at_rest is not None:
            with net.located():
                check_differentiable(net.graph)
        planned = plan(net.graph, at_rest)
        self.operations = [op for op in planned if not op.is_idle]
        self.losses = {op: op.losses for op in self.operations if op.losses}
        self.tops = self.last = Pass(planned, self.compute)
        readers = {name: op for op in self.operations for name in op.bottoms}         # the last of each
        for name, op in readers.items():
            if self.tops.could_again(name) and name not in op.tops and name not in op.overwrites:
                op.releases.append(name)
        self.shown = [(name, blob) for name, blob in net.blobs.items() if name not in net.inputs]
        self.memory: Remembered | None = None
        self.statistics = Statistics(net.graph, net.context.device, net.context.dtype)
        self.learned = [(node.layer, i, node.owners[i])
                        for node in self.graph.nodes if node.need_backward
                        for i, need in enumerate(node.param_need) if need]

    def refresh(self) -> None:
        """Read the parameters at rest again: somebody may have changed them between two runs."""
        for op in self.operations:
            if isinstance(op.run, Folded | FoldedSum):
                op.run.refresh()
        if self.memory is not None:
            self.memory.refresh()

    def remember(self, folder: str | Path, resident: bool) -> None:
        """Keep what frozen operations give in a file of `folder`, and take it from there (remembered.py); `resident`: in device memory."""
        self.memory = remembered(self, Path(folder), resident)
        if self.memory is not None:
            self.tops.allow(self.memory.done)

    def forget(self, reason: str) -> None:
        """Compute all of every pass from now on."""
        if self.memory is not None:
            self.memory = None
            tell(self, reason)

    @property
    def recalls(self) -> bool:
        """Whether passes take tops from a memory."""
        return self.memory is not None and self.memory.store is not None

    def prepare(self, passes: int) -> None:
        """Before so many recorded passes: have in device memory what they will recall."""
        if self.memory is not None:
            self.memory.prepare(passes)

    def sources(self, which: Callable[[Layer], bool] = lambda layer: True, inputs: bool = True) -> dict[str, Tensor]:
        """What a pass starts from: the `inputs`, and the next tops of those layers without bottoms that are wanted."""
        tops = {name: self.net.blobs[name].data_slot.value() for name in self.net.inputs if inputs}
        for op in self.operations:
            if not op.bottoms and op.nodes[0].layer.type != "Parameter" and which(op.nodes[0].layer):
                if self.memory is not None and op is self.memory.found.source:
                    self.memory.number(tops)
                op.store(op.run(), tops)
        return tops

    def forward(self, fed: Mapping[str, Tensor] | None = None, done: Collection[Operation] = ()) -> Tensor | None:
        """One pass over all layers.

        `fed` has the input blobs, whatever tops of layers without bottoms are known already, and the tops of the operations `done`.
        Without it, inputs are read from the input blobs, and the blobs show() the pass.
        """
        tops = self.last = self.tops
        tops.clear()
        tops.update(fed if fed is not None else ((name, self.net.blobs[name].data_slot.value()) for name in self.net.inputs))
        if self.memory is not None and not done:
            done = self.memory.recall(tops)
        held = {name for name, blob in self.shown if blob.data_slot.host is not None}         # arrays that are to show the pass
        with nullcontext() if self.net.context.traced else self.statistics.collected():
            loss = self._operate(tops, held, done)
        if fed is None:
            self.show()
        return loss

    def _operate(self, tops: Pass, held: Set[str], done: Collection[Operation]) -> Tensor | None:
        """The operations of a pass and their loss; `held`: names of blobs that somebody looks at."""
        loss: Tensor | None = None
        for op in self.operations:
            if not op.bottoms and all(name in tops for name in op.tops):
                self._fit(op, tops)
                continue
            if op in done:
                continue
            kept = {name: tops[name].clone() for name in op.overwrites if name in held and name in tops} if held else {}
            op.store(self.perform(op, [tops[name] for name in op.bottoms]), tops)
            if not op.bottoms:
                self._fit(op, tops)
            if op in self.losses:
                for name, weight in self.losses[op].items():
                    term = tops[name].sum() if weight == 1 else tops[name].sum() * weight
                    loss = term if loss is None else loss + term
            for name in op.releases:
                if name not in held:
                    tops.pop(name, None)
            if kept:
                tops.update(kept)
        return loss

    def _fit(self, op: Operation, tops: Pass) -> None:
        """Let the layers know where an operation without bottoms has made a batch of another size than before."""
        changed = [name for name in op.tops if self.net.blobs[name].shape != tuple(tops[name].shape)]
        for name in changed:
            self.net.blobs[name].reshape(*tops[name].shape)
        if changed:
            self.net.reshape()

    def perform(self, op: Operation, bottoms: list[Tensor]) -> Tops:
        """The tops of an operation in a pass, with what gradients() will need."""
        if op.learns:
            return self.compute(op, [x.detach() if stop else x for x, stop in zip(bottoms, op.stop, strict=True)])
        with torch.no_grad():
            return self.compute(op, bottoms)

    def compute(self, op: Operation, bottoms: list[Tensor]) -> Tops:
        """The tops of an operation in the net's precision."""
        if self.net.context.precision != "bf16":
            return op.run(*bottoms)
        half = all(node.layer.type in HALF for node in op.nodes)
        with torch.autocast(self.net.context.device.type, torch.bfloat16, enabled=half):
            return op.run(*bottoms) if half else op.run(*(x.float() if x.dtype == torch.bfloat16 else x for x in bottoms))

    def show(self, now: bool = True) -> None:
        """Let the blobs have the last pass, when somebody looks; arrays that somebody has are brought up to date, unless not `now`."""
        for name, blob in self.shown:
            blob.data_slot.defer(self.last, name)
            if now:
                blob.data_slot.flush()

    def repeated(self, last: Pass, tops: Mapping[str, Tensor]) -> None:
        """A recording has written what it always writes: `tops` are again the last pass."""
        self.last = last
        last.clear()
        last.update(tops)

    def renew(self) -> None:
        """Forget earlier passes, and what autograd knows of the parameters from these.

        It keeps a node for each parameter as long as a pass that used it is kept, on the stream of that pass; a recording that met one
        would wait for that stream, which is not being recorded.
        """
        self.tops.clear()
        self.net.forget()
        for node in self.graph.nodes:
            node.layer.bind(node.param_need)

    def gradients(self, loss: Tensor | None) -> list[Tensor | None]:
        """The gradient of `loss` for every learnable parameter, None where there is none."""
        result: list[Tensor | None] = [None] * len(self.graph.learnable)
        if loss is None or not loss.requires_grad:
            return result
        grads = torch.autograd.grad(loss, [layer.params[i] for layer, i, _ in self.learned], allow_unused=True)
        for grad, (_, _, owner) in zip(grads, self.learned, strict=True):
            if grad is None:
                continue
            known, grad = result[owner], grad.reshape(self.graph.learnable[owner].blob.shape)
            result[owner] = grad if known is None else known + grad
        return result
