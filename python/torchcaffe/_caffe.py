"""The names of pycaffe's C++ module, for scripts that go there: `from caffe._caffe import BlobVec`.  Caffe: python/caffe/_caffe.cpp."""
from __future__ import annotations

from torchcaffe.glog import init_log, log
from torchcaffe.graph.blob import Blob
from torchcaffe.graph.vectors import BlobVec, BoolVec, DtypeVec, IntVec, LayerVec, RawBlobVec, StringVec
from torchcaffe.layers import LAYERS
from torchcaffe.layers.python import PyLayer as Layer
from torchcaffe.net import Net, NetVec
from torchcaffe.proto.caffe_pb2 import LayerParameter, SolverParameter
from torchcaffe.settings import (
    set_device,
    set_mode_cpu,
    set_mode_gpu,
    set_random_seed,
    set_solver_count,
    set_solver_rank,
    solver_count,
    solver_rank,
)
from torchcaffe.timer import Timer
from torchcaffe.train.parallel import NCCL, has_nccl, set_multiprocess
from torchcaffe.train.solver import Solver
from torchcaffe.train.solver_types import AdaDeltaSolver, AdaGradSolver, AdamSolver, NesterovSolver, RMSPropSolver, SGDSolver, get_solver
from torchcaffe.version import __version__


def layer_type_list() -> StringVec:
    """The names of all layer types that can be used."""
    return StringVec(sorted(LAYERS))


__all__ = [
    "NCCL",
    "AdaDeltaSolver",
    "AdaGradSolver",
    "AdamSolver",
    "Blob",
    "BlobVec",
    "BoolVec",
    "DtypeVec",
    "IntVec",
    "Layer",
    "LayerParameter",
    "LayerVec",
    "NesterovSolver",
    "Net",
    "NetVec",
    "RMSPropSolver",
    "RawBlobVec",
    "SGDSolver",
    "Solver",
    "SolverParameter",
    "StringVec",
    "Timer",
    "__version__",
    "get_solver",
    "has_nccl",
    "init_log",
    "layer_type_list",
    "log",
    "set_device",
    "set_mode_cpu",
    "set_mode_gpu",
    "set_multiprocess",
    "set_random_seed",
    "set_solver_count",
    "set_solver_rank",
    "solver_count",
    "solver_rank",
]
