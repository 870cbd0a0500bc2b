"""A Caffe engine on PyTorch with pycaffe's API: `import torchcaffe as caffe`.

Loads train and solver prototxts, trains, snapshots and restores as BVLC Caffe 1.0 does, on CPU and GPU.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # torch's spinning threads make two busy processes 20 times slower

from torchcaffe.errors import CaffeError, SidecarError
from torchcaffe.glog import init_log, log
from torchcaffe.layers import LAYERS as _LAYERS
from torchcaffe.layers.python import PyLayer as Layer
from torchcaffe.net import TEST, TRAIN, Net
from torchcaffe.settings import number_type, set_device, set_mode_cpu, set_mode_gpu, set_random_seed, set_threads
from torchcaffe.solver import (
    AdaDeltaSolver,
    AdaGradSolver,
    AdamSolver,
    NesterovSolver,
    RMSPropSolver,
    SGDSolver,
    get_solver,
)

__version__ = "0.1.0"
NUMERIC = 1                                             # raised when the same run would give other bytes
ENGINE = f"torchcaffe {__version__} numeric {NUMERIC}"


def layer_type_list() -> list[str]:
    """The names of all layer types that can be used."""
    return sorted(_LAYERS)


__all__ = [
    "ENGINE",
    "NUMERIC",
    "TEST",
    "TRAIN",
    "AdaDeltaSolver",
    "AdaGradSolver",
    "AdamSolver",
    "CaffeError",
    "Layer",
    "NesterovSolver",
    "Net",
    "RMSPropSolver",
    "SGDSolver",
    "SidecarError",
    "get_solver",
    "init_log",
    "layer_type_list",
    "log",
    "number_type",
    "set_device",
    "set_mode_cpu",
    "set_mode_gpu",
    "set_random_seed",
    "set_threads",
]
