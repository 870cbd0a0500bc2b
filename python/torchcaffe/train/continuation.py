"""Exact continuation: what a snapshot needs beyond Caffe's two files so that a resumed run ends with the same bytes.

Draws are functions of (seed, purpose, layer, pass), so all there is to keep is every layer's pass count, and what recurrent layers
carry from pass to pass, in a small JSON file beside the solver state.  It names the weights and history it belongs to by a
digest, and the settings on which bytes depend.
"""
from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchcaffe import settings
from torchcaffe.errors import SidecarError
from torchcaffe.files import read_text
from torchcaffe.graph import work
from torchcaffe.net import Net
from torchcaffe.train.state import SolverState

VERSION = 2


def path_beside(state_file: str | Path) -> Path:
    """The sidecar of a solver state: same place, same iteration."""
    return Path(str(state_file).removesuffix(".h5").removesuffix(".solverstate") + ".sidecar.json")


def write(solver: SolverState, path: Path) -> None:
    """Write the sidecar of the solver's present state, atomically."""
    content = {"version": VERSION, "digest": _digest(solver), "settings": _settings(solver),
               "layers": [_layers(net) for net in (solver.net, *solver.test_nets)]}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def read(solver: SolverState, path: Path) -> None:
    """Set the cursors and carried states of a solver whose weights and history were just restored.

    Raises SidecarError if there is no sidecar, it is damaged, or it belongs to other weights or other settings.
    """
    try:
        content = json.loads(read_text(path))
        version, digest, known_settings, layers = (content[k] for k in ("version", "digest", "settings", "layers"))
    except FileNotFoundError:
        raise SidecarError(f"{path}: missing, so the run cannot be continued exactly") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise SidecarError(f"{path}: damaged, so the run cannot be continued exactly") from None
    if version != VERSION or digest != _digest(solver):
        raise SidecarError(f"{path}: belongs to another snapshot")
    now = _settings(solver)
    for name, value in known_settings.items():
        if now.get(name) != value:
            raise SidecarError(f"{path}: the run was made with {name} {value}, now it is {now.get(name)}; results would not be byte-equal")
    if settings.solver_count() > 1 and any(node.layer.state for node in solver.net.graph.nodes):
        raise SidecarError(f"{path}: keeps what recurrent layers carry on of the root only, so several solvers cannot be continued exactly")
    nets = (solver.net, *solver.test_nets)
    if solver.root and len(layers) != len(nets):        # the others have no test nets
        raise SidecarError(f"{path}: belongs to another solver")
    for net, known in zip(nets, layers, strict=False):
        for layer in (node.layer for node in net.graph.nodes):
            entry = known.get(layer.name, {"cursor": 0, "state": [None] * len(layer.state)})
            layer.cursor = int(entry["cursor"])
            for tensor, text in zip(layer.state, entry["state"], strict=True):
                stored = np.frombuffer(base64.b64decode(text), np.float64).copy() if text else np.zeros(tensor.numel())
                tensor.copy_(torch.from_numpy(stored.reshape(tensor.shape)))


def _layers(net: Net) -> dict[str, dict[str, Any]]:
    """Per layer that has any: how many passes it has made, and what it carries on as float64 in base64."""
    return {layer.name: {"cursor": layer.cursor,
                         "state": [base64.b64encode(s.detach().cpu().double().numpy().tobytes()).decode() for s in layer.state]}
            for layer in (node.layer for node in net.graph.nodes) if layer.cursor or layer.state}


def _settings(solver: SolverState) -> dict[str, Any]:
    """What bytes depend on beyond the prototxts."""
    context = solver.net.context
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"seed": solver.random_seed, "solvers": settings.solver_count(), "fast": solver.fast, "replay": solver.replay,
            "compile": solver.compile, "threads": work.threads(solver.net.graph), "precision": context.precision,
            "torch": torch.__version__, "device": device, "dtype": str(context.dtype)}


def _digest(solver: SolverState) -> str:
    """SHA-256 over iteration, parameters and history, whatever the file format."""
    digest = hashlib.sha256(str(solver.iter).encode())
    tensors = [item.blob.data_slot.value() for item in solver.learnable] + [h for slot in solver.histories for h in slot]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
