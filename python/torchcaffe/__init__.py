"""A Caffe engine on PyTorch with pycaffe's API: `import torchcaffe as caffe`.

Loads train and solver prototxts, trains, snapshots and restores as BVLC Caffe 1.0 does, on CPU and GPU.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # torch's spinning threads make two busy processes 20 times slower
if os.environ["OMP_WAIT_POLICY"].lower() == "passive":  # but some 20 us of it, before a thread sleeps, save a tenth on two threads
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from torchcaffe import coord_map, draw, io, layers, pycaffe
from torchcaffe._caffe import (
    NCCL,
    AdaDeltaSolver,
    AdaGradSolver,
    AdamSolver,
    Layer,
    NesterovSolver,
    Net,
    RMSPropSolver,
    SGDSolver,
    Timer,
    get_solver,
    has_nccl,
    init_log,
    layer_type_list,
    log,
    set_device,
    set_mode_cpu,
    set_mode_gpu,
    set_multiprocess,
    set_random_seed,
    set_solver_count,
    set_solver_rank,
    solver_count,
    solver_rank,
)
from torchcaffe.alias import install
from torchcaffe.classifier import Classifier
from torchcaffe.detector import Detector
from torchcaffe.errors import CaffeError, SidecarError
from torchcaffe.net import TEST, TRAIN
from torchcaffe.net_spec import NetSpec, params, to_proto
from torchcaffe.settings import number_type, set_precision, set_threads
from torchcaffe.train.together import Together, solve_together
from torchcaffe.version import ENGINE, NUMERIC
from torchcaffe.version import __version__ as __version__

__all__ = [
    "ENGINE",
    "NCCL",
    "NUMERIC",
    "TEST",
    "TRAIN",
    "AdaDeltaSolver",
    "AdaGradSolver",
    "AdamSolver",
    "CaffeError",
    "Classifier",
    "Detector",
    "Layer",
    "NesterovSolver",
    "Net",
    "NetSpec",
    "RMSPropSolver",
    "SGDSolver",
    "SidecarError",
    "Timer",
    "Together",
    "coord_map",
    "draw",
    "get_solver",
    "has_nccl",
    "init_log",
    "install",
    "io",
    "layer_type_list",
    "layers",
    "log",
    "number_type",
    "params",
    "pycaffe",
    "set_device",
    "set_mode_cpu",
    "set_mode_gpu",
    "set_multiprocess",
    "set_precision",
    "set_random_seed",
    "set_solver_count",
    "set_solver_rank",
    "set_threads",
    "solve_together",
    "solver_count",
    "solver_rank",
    "to_proto",
]
