"""What the batch normalisations of a pass find, added to their stored statistics all at once when the pass is over.

Layer by layer that takes eight small kernels each, which a recorded iteration on a GPU waits for one by one: a fifth of the kernels of a
ResNet's.  Nothing reads these parameters before the pass is over.  What is added up is norm.py's business.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchcaffe.graph.build import Graph, Node
from torchcaffe.layers.norm import BatchNorm


def collects(node: Node) -> bool:
    """Whether it is worth while for a BatchNorm: on a CPU a kernel costs no more than its work, where that is not little."""
    assert isinstance(node.layer, BatchNorm)
    return node.layer.context.device.type == "cuda" or node.layer.is_little(node.bottoms[0].shape)


class Statistics:
    """The means and variances of a pass's batches, for those BatchNorm layers of a net whose parameters no other layer has."""

    def __init__(self, graph: Graph, device: torch.device, dtype: torch.dtype):
        uses = Counter(owner for node in graph.nodes for owner in node.owners)
        self.layers = [node.layer for node in graph.nodes if isinstance(node.layer, BatchNorm) and not node.layer.stored
                       and collects(node) and all(uses[owner] == 1 for owner in node.owners)]
        sizes = [layer.channels for layer in self.layers for _ in range(2)]
        self.found = torch.zeros(sum(sizes), device=device, dtype=dtype)
        self._parts = list(self.found.split(sizes)) if sizes else []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """While a pass is made: the layers leave what they find here, and it is added up behind the last one."""
        if not self.layers:
            yield
            return
        self.found.zero_()                                  # batch normalisation reads what it overwrites
        for i, layer in enumerate(self.layers):
            layer.batch = self._parts[2 * i], self._parts[2 * i + 1]
        try:
            yield
        finally:
            for layer in self.layers:
                layer.batch = None
        stored = [p.detach() for layer in self.layers for p in layer.params[:2]]
        factors = [layer.params[2].detach() for layer in self.layers]
        fractions = [layer.fraction for layer in self.layers]
        torch._foreach_mul_(stored + factors, [fraction for fraction in fractions for _ in range(2)] + fractions)
        torch._foreach_add_(stored, self._parts)
        torch._foreach_add_(factors, 1)
