"""How little a net may compute to be called tiny, and how many threads a net is computed with.

A tiny net's operations take some microseconds each, in which no second thread wakes up: on two threads it is slower, and several times
slower beside other work.  Its shapes alone decide, because results depend on the number of threads.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchcaffe.graph.build import Graph, Node

NUMBERS = 2**16                         # of a blob
PRODUCTS = 2**22                        # of a layer's weights with what they meet


def is_tiny(graph: Graph) -> bool:
    """Whether every layer's tops and arithmetic are so small, on a CPU."""
    return all(node.layer.context.device.type == "cpu" and max((blob.count for blob in node.tops), default=0) <= NUMBERS
               and products(node) <= PRODUCTS for node in graph.nodes)


def products(node: Node) -> int:
    """How often a layer multiplies by one of its weights."""
    weights = [blob for blob in node.layer.blobs if len(blob.shape) > 1 and blob.shape[0]]
    return max((blob.count // blob.shape[0] * top.count for blob in weights for top in node.tops), default=0)


def threads(graph: Graph) -> int:
    """How many threads the net is computed with: one if it is tiny, as many as torch has otherwise."""
    return 1 if is_tiny(graph) else torch.get_num_threads()


@contextmanager
def on_its_threads(*graphs: Graph) -> Iterator[None]:
    """Let torch have as many threads as the nets are computed with, of which all or none are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(map(threads, graphs)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
