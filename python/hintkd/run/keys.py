"""A stage's key: a hash of all that decides its outcome, kept with its parts so that a changed key can be explained.

Two stages with the same key would leave the same weights and the same measured outputs, so a finished one is not run again.  The parts are
a flat, ordered dict of names such as `solver.base_lr` or `net.first_conv.convolution_param.num_output`; data count by their contents and
not by their path, Python layers by their code (sources.py).  Running and storing stages is the runner's business.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableSequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.methods.stage import Part, Stage
from hintkd.nets.records import source_of, with_source
from hintkd.run import digests
from hintkd.run.sources import code_digest

Parts = dict[str, Any]

# Fields of the solver that say how a run is watched, stored and placed, not what it computes.  When and how often a net is tested on the
# way is among them: a test shares the weights and draws nothing that training draws.  How many batches a test has is not: it decides what
# is measured at the end.
NOT_DECIDING = frozenset({"net", "display", "average_loss", "test_interval", "test_initialization", "test_compute_loss", "snapshot",
                          "snapshot_prefix", "snapshot_diff", "snapshot_format", "snapshot_after_train", "solver_mode", "device_id"})
DATA_PATHS = frozenset({"source", "mean_file"})              # fields of layers that name files with data


@dataclass(frozen=True)
class Numerics:
    """What arithmetic stages are run with; part of every key, because each of these can change the last bits of a result.

    engine     the backend's version, from backend.engine()
    device     "cpu" or "gpu"
    threads    of each stage; means nothing on a GPU
    precision  of products while a stage is trained: "fp32", "tf32" or "bf16"
    together   how many stages train side by side at most, on batched arithmetic
    """
    backend: str
    engine: str
    device: str = "cpu"
    threads: int = 1
    precision: str = "fp32"
    together: int = 1

    def parts(self) -> Parts:
        parts: Parts = {"backend": self.backend, "engine": self.engine, "device": self.device, "precision": self.precision}
        if self.device != "gpu":
            parts["threads"] = self.threads
        if self.together > 1:
            parts["together"] = self.together
        return parts


class Keys:
    """The keys of stages that are run with these numerics.

    kept    by the hash of a stage's parts, the key under which a workspace keeps it where that is another, of an earlier definition
    """

    def __init__(self, numerics: Numerics, kept: Mapping[str, str] | None = None):
        self.numerics, self.kept = numerics, kept or {}
        self._known: dict[Stage, tuple[str, Parts]] = {}

    def key(self, stage: Stage) -> str:
        """64 hexadecimal digits.  Raises UserError if data or weights that the stage names are missing."""
        today = self.today(stage)
        return self.kept.get(today, today)

    def today(self, stage: Stage) -> str:
        """The key by today's definition, whatever a folder of this workspace calls the stage."""
        return self._both(stage)[0]

    def parts(self, stage: Stage) -> Parts:
        """What the key is the hash of."""
        return self._both(stage)[1]

    def kind(self, stage: Stage) -> Parts:
        """What stages have in common that can train together: all parts of their keys but the seed and the weights in.

        A stage of several parts trains with no other.
        """
        parts = self.parts(stage)
        if len(stage.parts) > 1:
            return parts
        return {"snapshot": stage.solver.snapshot, **{name: value for name, value in parts.items()
                                                      if name != "solver.random_seed" and not name.startswith("weights[")}}

    def _both(self, stage: Stage) -> tuple[str, Parts]:
        if stage not in self._known:
            parts = self._parts(stage)
            self._known[stage] = digest(parts), parts
        return self._known[stage]

    def _parts(self, stage: Stage) -> Parts:
        """Those of a stage's only part stand as they are, those of several begin with the part's name."""
        parts: Parts = {"program": stage.program, **self.numerics.parts()}
        for part in stage.parts:
            own = self._of(part)
            parts.update({f"{part.name}.{name}": value for name, value in own.items()} if part.name else own)
        if stage.source:
            parts[f"source of {os.path.basename(stage.source)}"] = code_digest(stage.source)
        for module in sorted({layer.python_param.module for part in stage.parts for layer in part.net.layer if layer.type == "Python"}):
            parts[f"source of {module}"] = code_digest(module)
        return parts

    def _of(self, part: Part) -> Parts:
        parts: Parts = {}
        for index, weights in enumerate(part.weights_in):
            source = self.today(weights.source) if isinstance(weights.source, Stage) else f"file {file_digest(weights.source)}"
            parts[f"weights[{index}]"] = [source, weights.prefix, weights.layers and list(weights.layers), *filter(None, [weights.part])]
        parts["drop"] = list(part.drop)
        parts.update((name, value) for name, value in flatten(part.solver, "solver") if decides(name))
        for name, value in flatten(_with_fingerprints(part.net), "net"):
            if name == "net.name":
                continue
            parts[name] = f"data {data_fingerprint(value)}" if name.rsplit(".", 1)[1] in DATA_PATHS else value
        return parts


def _with_fingerprints(net: caffe_pb2.NetParameter) -> caffe_pb2.NetParameter:
    """The net with fingerprints in the place of the paths that Python layers read."""
    made = caffe_pb2.NetParameter()
    made.CopyFrom(net)
    for layer in made.layer:
        source = source_of(layer) if layer.type == "Python" else None
        if source:
            layer.CopyFrom(with_source(layer, f"data {data_fingerprint(source)}"))
    return made


def digest(parts: Parts) -> str:
    """The hash that is a key, of its parts in their order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def decides(name: str) -> bool:
    """Whether the part of this name, a field of a solver or a net, decides an outcome."""
    owner, _, field = name.partition(".")
    return not (owner == "solver" and field.partition("[")[0] in NOT_DECIDING)


def flatten(message: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The fields that are set in a protobuf message, as (dotted name, number or text), in the order of the schema.

    Elements of a repeated message are called by their `name` (with #2, #3 where one comes again), or else by their index.
    """
    for field, value in message.ListFields():
        inner = f"{name}.{field.name}"
        if not isinstance(value, MutableSequence):
            yield from _flatten_one(field, value, inner)
            continue
        seen: dict[str, int] = {}
        for index, element in enumerate(value):
            called = getattr(element, "name", "")
            seen[called] = seen.get(called, 0) + 1
            again = f"#{seen[called]}" if seen[called] > 1 else ""
            yield from _flatten_one(field, element, f"{name}.{called}{again}" if called else f"{inner}[{index}]")


def _flatten_one(field: Any, value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if field.message_type is not None:
        yield name, {}                                       # that the message is there counts, even if nothing in it is set
        yield from flatten(value, name)
    elif field.enum_type is not None:
        yield name, field.enum_type.values_by_number[value].name
    else:
        yield name, value.hex() if isinstance(value, bytes) else value


def differences(old: Parts, new: Parts) -> list[str]:
    """What changed from one key's parts to another's, a phrase each."""
    found = [_difference(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return found or (["the order of layers"] if list(old) != list(new) else [])


def _difference(name: str, old: Any, new: Any) -> str:
    if "weights[" in name:
        return "the weights it starts from" if old and new else f"{name} {'added' if new else 'removed'}"
    if name.startswith("source of"):
        return f"the {name}"
    if str(old).startswith("data ") and str(new).startswith("data "):
        return f"the data of {name}"
    return f"{name} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "(none)" if value is None else "(set)" if value == {} else str(value)


# -------------------------------------------------------------------------------------------------------------------- files

@lru_cache(maxsize=256)
def _digest_of(path: str, size: int, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's content.  Raises UserError if it cannot be read."""
    try:
        status = os.stat(path)
        if not S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a file; name one that can be read")
        return _digest_of(str(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that can be read") from None


def data_fingerprint(source: str) -> str:
    """Of what a `source` or `mean_file` in a prototxt names: from the dataset.json beside it, or else a digest of its contents.

    Raises UserError if there is nothing at that path, or not what dataset.json says.
    """
    path = Path(source)
    if not path.exists():
        name = path.parent.name
        raise UserError(f"{source} is missing: prepare the data set first, with `hintkd prepare {name}`, or name its folder with --data")
    facts = digests.facts(path.parent)
    if facts:
        return f"{facts['fingerprint']}/{path.name}"
    return file_digest(path / "data.mdb" if path.is_dir() else path)


