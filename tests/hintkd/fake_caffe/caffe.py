"""A stand-in for a real Caffe: pycaffe's functions and files as far as the stage process uses them, and nothing of torchcaffe's extensions.

Its "training" adds a thousandth of the rate to every weight in each iteration, so that a test can tell what came out.  Like Caffe it writes
its log past Python to the standard error, and ends the process where a CHECK fails: here, at a negative rate.
"""
import importlib.util
import os
from pathlib import Path

import numpy as np
from google.protobuf import text_format

_file = Path(__file__).resolve().parents[3] / "python/torchcaffe/proto/caffe_pb2.py"
_spec = importlib.util.spec_from_file_location("caffe_pb2", _file)
pb = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pb)

TRAIN, TEST = 0, 1
__version__ = "1.0.0-fake"
Layer = object


def set_mode_cpu():
    pass


def _log(severity, where, text):
    os.write(2, f"{severity}1120 21:05:28.123456 12345 {where}] {text}\n".encode())


class _Blob:
    def __init__(self, data):
        self.data = data


class Net:
    def __init__(self, path, phase):
        self.message = text_format.Parse(Path(path).read_text(), pb.NetParameter())
        self.params = {layer.name: [_Blob(np.zeros((layer.inner_product_param.num_output, 2), np.float32))]
                       for layer in self.message.layer if layer.type == "InnerProduct"}
        self.outputs = ["accuracy", "loss"] if phase == TEST else ["loss"]
        self.blobs = {name: _Blob(np.zeros((), np.float32)) for name in self.outputs}
        self.blobs.update(fc=_Blob(np.eye(4, dtype=np.float32)), label=_Blob(np.arange(4, dtype=np.float32)))

    def copy_from(self, path):
        message = pb.NetParameter.FromString(Path(path).read_bytes())
        for layer in message.layer:
            for blob, source in zip(self.params.get(layer.name, ()), layer.blobs):  # noqa: B905  the oldest interpreter knows no strict
                blob.data[...] = np.reshape(source.data, blob.data.shape)

    def save(self, path):
        message = pb.NetParameter()
        for name, blobs in self.params.items():
            for blob in blobs:
                message.layer.add(name=name).blobs.add(shape={"dim": blob.data.shape}, data=blob.data.ravel())
        Path(path).write_bytes(message.SerializeToString())

    def forward(self):
        self.blobs["accuracy"].data[...] = 0.5
        self.blobs["loss"].data[...] = next(iter(self.params.values()))[0].data.mean()
        return {name: self.blobs[name].data for name in self.outputs}


class _Solver:
    def __init__(self, path):
        self.param = text_format.Parse(Path(path).read_text(), pb.SolverParameter())
        self.net, self.iter = Net(self.param.net, TRAIN), 0

    def step(self, iterations):
        if self.param.base_lr < 0:
            _log("F", "solver.cpp:1", "Check failed: base_lr >= 0 (-1 vs. 0) The rate must not be negative")
            os.abort()
        for _ in range(iterations):
            if self.param.display and self.iter % self.param.display == 0:
                _log("I", "solver.cpp:218", f"Iteration {self.iter} (9 iter/s, 1s/10 iters), loss = 1.5")
                _log("I", "sgd_solver.cpp:105", f"Iteration {self.iter}, lr = {self.param.base_lr:g}")
            for blobs in self.net.params.values():
                for blob in blobs:
                    blob.data += self.param.base_lr / 1000
            self.iter += 1
            if self.param.snapshot and self.iter % self.param.snapshot == 0:
                self.snapshot()

    def snapshot(self):
        base = f"{self.param.snapshot_prefix}_iter_{self.iter}"
        self.net.save(base + ".caffemodel")
        Path(base + ".solverstate").write_bytes(b"")

    def restore(self, path):
        raise AssertionError("a real Caffe would start its data at row 0: the stage process must not restore")

    def solve(self):
        if not self.param.snapshot or self.iter % self.param.snapshot:
            self.snapshot()
        _log("I", "solver.cpp:315", "Optimization Done.")


def get_solver(path):
    return _Solver(path)
