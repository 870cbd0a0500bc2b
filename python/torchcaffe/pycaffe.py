"""The names of pycaffe's Python module, for scripts that go there: `from caffe.pycaffe import Net`.  Caffe: python/caffe/pycaffe.py."""
from torchcaffe import io
from torchcaffe._caffe import (
    NCCL,
    AdaDeltaSolver,
    AdaGradSolver,
    AdamSolver,
    NesterovSolver,
    Net,
    RMSPropSolver,
    SGDSolver,
    Timer,
)

__all__ = ["NCCL", "AdaDeltaSolver", "AdaGradSolver", "AdamSolver", "NesterovSolver", "Net", "RMSPropSolver", "SGDSolver", "Timer", "io"]
