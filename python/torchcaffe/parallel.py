"""pycaffe's settings for several solvers at once.  One solver trains on one device here, so the group has one member.

Scripts that are written for several GPUs and started with one run unchanged.
"""
from __future__ import annotations

from typing import Any

from torchcaffe.errors import CaffeError


def solver_count() -> int:
    """How many solvers train together: one."""
    return 1


def set_solver_count(count: int) -> None:
    """Raises CaffeError unless `count` is one."""
    if count != 1:
        raise CaffeError(f"{count} solvers cannot train together here; start the script with one GPU, and a batch_size "
                         f"{count} times as large")


def solver_rank() -> int:
    """The number of this solver: zero."""
    return 0


def set_solver_rank(rank: int) -> None:
    """Raises CaffeError unless `rank` is zero."""
    if rank != 0:
        raise CaffeError(f"there is no solver {rank}: one solver trains here, number 0")


def set_multiprocess(multiprocess: bool) -> None:
    """Whether the solvers of a group are processes of their own, which makes no difference to one."""


def has_nccl() -> bool:
    """Whether several GPUs can train together: no."""
    return False


class NCCL:
    """The group of one solver: broadcasts reach nobody, and a sum over its members is what is there already.

    Can be given to Solver.add_callback and to Net.after_backward, as in Caffe.
    """

    def __init__(self, solver: Any, uid: str):
        self.solver, self.uid = solver, uid

    @staticmethod
    def new_uid() -> str:
        """What the members of a group find each other by."""
        return ""

    def bcast(self) -> None:
        """Give the first solver's parameters to the others."""

    def __call__(self, layer: int | None = None) -> None:
        """Add up the members' gradients."""
