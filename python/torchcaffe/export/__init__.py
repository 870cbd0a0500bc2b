"""The way out of Caffe: a net with weights as a PyTorch module, or as an ONNX model, checked by running it before it is there.

plan.py says what is exported, torch_module.py and onnx_model.py write it; here it is run beside the net and put in place.
"""
from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from torchcaffe.errors import CaffeError
from torchcaffe.export import torch_module
from torchcaffe.export.plan import Plan, make_plan
from torchcaffe.extras import how_to_get
from torchcaffe.formats import replacing
from torchcaffe.net import TEST

TOLERANCE = 1e-4                                        # of the largest number in an output
Run = Callable[[list[list[np.ndarray]]], list[Sequence[np.ndarray]]]       # from batches of inputs to their outputs


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its outputs are from the net's on drawn batches."""
    files: tuple[Path, ...]
    steps: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    runtime: str
    difference: float
    largest: float

    def __str__(self) -> str:
        return (f"{' and '.join(map(str, self.files))}: {', '.join(self.inputs)} to {', '.join(self.outputs)} in {self.steps} steps; "
                f"with {self.runtime}, outputs up to {self.largest:.2g} differ from the net's by at most {self.difference:.2g}")


def export(net: str | Path, weights: str | Path, out: str | Path, phase: int = TEST, level: int = 0,
           stages: Sequence[str] = ()) -> Exported:
    """Write a net as OUT.py with OUT.safetensors beside it, or as OUT.onnx, as `out` ends.

    Phase, level and stages choose the layers; they compute as in TEST.  Raises CaffeError, with nothing written, for layers that
    cannot be exported and where what would be written disagrees with the net.
    """
    out = Path(out)
    if out.suffix == ".py":
        return _export_module(out, make_plan(net, weights, torch_module.WRITERS, phase, level, stages))
    if out.suffix == ".onnx":
        _optional("onnx")
        from torchcaffe.export import onnx_model
        plan = make_plan(net, weights, onnx_model.WRITERS, phase, level, stages)
        data = onnx_model.write(plan)
        with replacing(out) as part:
            part.write_bytes(data)
            return _checked((out,), plan, *onnx_model.runner(plan, part))
    raise CaffeError(f"{out}: ends neither in .py, for a PyTorch module, nor in .onnx")


def _export_module(out: Path, plan: Plan) -> Exported:
    save = _optional("safetensors.torch").save
    module = torch_module.Module(plan)
    weights = out.with_suffix(".safetensors")
    with replacing(out) as code_part, replacing(weights) as weights_part:
        weights_part.write_bytes(save(module.state, {"format": "pt"}))
        code_part.write_text(module.text(weights.name), encoding="utf-8")
        net = runpy.run_path(str(code_part))["load"](weights_part)

        def run(batches: list[list[np.ndarray]]) -> list[Sequence[np.ndarray]]:
            with torch.no_grad():
                tops = [net(*map(torch.from_numpy, inputs)) for inputs in batches]
            return [[top.detach().numpy() for top in (each if isinstance(each, tuple) else (each,))] for each in tops]
        return _checked((out, weights), plan, "torch", run)


def _checked(files: tuple[Path, ...], plan: Plan, runtime: str, run: Run) -> Exported:
    """Run all samples; raises CaffeError where an output is not the net's."""
    differences, largest = [0.0], [0.0]
    results = run([sample.inputs for sample in plan.samples])
    for sample, result in zip(plan.samples, results, strict=True):
        for value, got, want in zip(plan.outputs, result, sample.outputs, strict=True):
            far, reach = _difference(got, want)
            if not far <= TOLERANCE * reach + 1e-6:
                raise CaffeError(f"{files[0]}: is not written, because with {runtime} output '{value.blob}' is {far:.2g} off from that of "
                                 f"{plan.source}, whose largest number is {reach:.2g}")
            differences.append(far)
            largest.append(reach)
    return Exported(files, len(plan.steps), tuple(value.blob for value in plan.inputs), tuple(value.blob for value in plan.outputs),
                    runtime, max(differences), max(largest))


def _difference(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """The largest difference, infinite for another shape or other places of NaN and infinity; and the largest finite number wanted."""
    if got.shape != want.shape:
        return np.inf, 0.0
    finite = np.isfinite(want)
    largest = float(np.abs(want[finite]).max(initial=0.0))
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return np.inf, largest
    return float(np.abs(got[finite] - want[finite]).max(initial=0.0)), largest


def _optional(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CaffeError(f"this export needs the package {error.name}: {how_to_get('export')}") from None
