"""Process-wide settings that pycaffe also keeps globally: device, number type, seed, and which of how many solvers this process has; and
whether Python layers may be imported.

A net takes them when it is built; changing them later affects later nets only.
"""
from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchcaffe.errors import CaffeError

_device_id = 0
PRECISIONS = ("fp32", "tf32", "bf16")
_gpu = False
_shapes_only = False
_python_layers = True
_dtype = torch.float32
_precision = "fp32"
_seed: int | None = None
_nets_since_seed = 0
_solver_count = 1
_solver_rank = 0


def set_mode_cpu() -> None:
    """Nets built from now on live on the CPU."""
    global _gpu
    _gpu = False


def set_mode_gpu() -> None:
    """Nets built from now on live on the GPU chosen by set_device.  Raises CaffeError where torch sees none.

    Of cuDNN's kernels only those that give the same bytes every time are used.
    """
    global _gpu
    if not torch.cuda.is_available():
        raise CaffeError("no GPU: torch finds no CUDA device; use set_mode_cpu() or leave --gpu away")
    torch.backends.cudnn.deterministic = True
    _gpu = True
    set_precision(_precision)


def set_precision(name: str) -> None:
    """How products are computed: "fp32" (at first), "tf32" or "bf16".

    tf32: the factors of convolutions and matrix products have 11 bits, a GPU's business alone.  bf16: in whole iterations (Solver.fast)
    convolutions, inner products and what follows them up to the losses have 8 bits; parameters, their gradients and histories, batch
    statistics and losses stay float32.  Layer by layer a net computes in float32.  tf32 holds from now on, bf16 for nets built from now on.
    """
    global _precision
    if name not in PRECISIONS:
        raise CaffeError(f"precision '{name}' is none of {', '.join(PRECISIONS)}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    _precision = name


def precision() -> str:
    """The precision of a net built now."""
    if _precision == "tf32" and not _gpu:
        raise CaffeError("precision tf32 is a GPU's; use fp32 on a CPU")
    return _precision


def set_device(index: int) -> None:
    """Choose the GPU for set_mode_gpu, before or after it."""
    global _device_id
    if torch.cuda.is_available() and not 0 <= index < torch.cuda.device_count():
        raise CaffeError(f"no GPU {index}: there are {torch.cuda.device_count()}")
    _device_id = index


def device() -> torch.device:
    """Where a net built now would live."""
    if _shapes_only:
        return torch.device("meta")
    return torch.device("cuda", _device_id) if _gpu else torch.device("cpu")


def dtype() -> torch.dtype:
    """The number type of a net built now: float32 outside `number_type`."""
    return _dtype


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build nets whose blobs have shapes and no contents, for looking at: they take no memory, and cannot run."""
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


def python_layers() -> bool:
    """Whether a net built now may import the modules of its Python layers, which is to run their code."""
    return _python_layers


@contextmanager
def without_python_layers() -> Iterator[None]:
    """Refuse nets with Python layers, and import nothing for them: for files of unknown origin."""
    global _python_layers
    before, _python_layers = _python_layers, False
    try:
        yield
    finally:
        _python_layers = before


@contextmanager
def number_type(kind: torch.dtype) -> Iterator[None]:
    """Build nets in another number type, for numeric checks in float64."""
    global _dtype
    before, _dtype = _dtype, kind
    try:
        yield
    finally:
        _dtype = before


def set_threads(count: int) -> None:
    """How many threads torch computes with.  Results are byte-equal only for equal counts."""
    torch.set_num_threads(count)


def set_random_seed(seed: int) -> None:
    """Seed all nets built from now on, the first, the second and so on each with its own draws."""
    global _seed, _nets_since_seed
    _seed, _nets_since_seed = int(seed), 0


def draw_seed() -> int:
    """A seed nobody chose, from the operating system; 31 bits, so that it fits a solver's random_seed."""
    return secrets.randbits(31)


def next_net_seed() -> int:
    """The seed of the next net: it depends on set_random_seed and on how many nets were built since."""
    global _nets_since_seed
    if _seed is None:
        return draw_seed()
    _nets_since_seed += 1
    return _seed * 1_000_003 + _nets_since_seed - 1 if _nets_since_seed > 1 else _seed


# -- solvers that train together, a process each (train/parallel.py) ---------------------------------------------
def solver_count() -> int:
    """How many solvers train together."""
    return _solver_count


def set_solver_count(count: int) -> None:
    """Let nets and solvers made from now on be of a group of `count`.  Raises CaffeError below one."""
    global _solver_count
    if count < 1:
        raise CaffeError(f"{count} solvers cannot train; solver_count is at least 1")
    _solver_count = int(count)


def solver_rank() -> int:
    """The number of this process's solver; the root is number 0."""
    return _solver_rank


def set_solver_rank(rank: int) -> None:
    """Let nets and solvers made from now on be number `rank` of their group.  Raises CaffeError below zero."""
    global _solver_rank
    if rank < 0:
        raise CaffeError(f"there is no solver {rank}; solver_rank is at least 0")
    _solver_rank = int(rank)


def share() -> tuple[int, int]:
    """(rank, count) of this process's solver.  Raises CaffeError if they contradict each other."""
    if _solver_rank >= _solver_count:
        raise CaffeError(f"there is no solver {_solver_rank} among {_solver_count}; call set_solver_count with the number of processes, "
                         "and set_solver_rank with one below it")
    return _solver_rank, _solver_count
