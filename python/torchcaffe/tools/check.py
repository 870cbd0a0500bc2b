"""check: whether files of Caffe's will run here, and if not, what is in the way and what to do about it.

What a file is, is told from its content.  Nets and solvers are check_net.py's work.
"""
from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import torch

from torchcaffe import formats, glog
from torchcaffe.data import datum
from torchcaffe.data.leveldb_reader import is_leveldb
from torchcaffe.data.lmdb_reader import open_database
from torchcaffe.errors import CaffeError
from torchcaffe.files import read_text, require_regular
from torchcaffe.proto import caffe_pb2, prototxt
from torchcaffe.tools import Add
from torchcaffe.tools.check_net import Check, NetCheck, SolverCheck
from torchcaffe.tools.states import Use, uses_of

SAMPLE = 1000                                   # records of a database that are looked at
SEVERAL_GPUS = re.compile(r"-gpus?[= ]+[\"']?(\d+\s*,[\d,\s]*\d|all)\b|\b(NCCL|set_solver_count|set_multiprocess)\(")


class Finding:
    """What one file is, what can be said of it, and the problems it has."""

    def __init__(self, path: str, kind: str, about: str = "", problems: list[str] | None = None):
        self.path, self.kind, self.about, self.problems = path, kind, about, problems or []
        self.check: Check | None = None


def register(add: Add) -> None:
    """Add the command."""
    parser = add("check", check)
    parser.add_argument("files", metavar="FILE", nargs="+",
                        help="prototxts of nets and solvers, caffemodels, solver states, means, databases, HDF5 files, scripts; weights "
                             "and states are held against the net or solver, if there is one among the files")


def check(args: argparse.Namespace) -> int:
    """Say of each file whether it will run here, and what is in the way; status 1 when something is."""
    missing = [path for path in args.files if not os.path.exists(path)]
    if missing:
        raise CaffeError(f"there {'is no file' if len(missing) == 1 else 'are no files'} {', '.join(missing)}")
    with glog.silent():
        uses = solvers_uses(args.files)
        findings = [look(path, uses) for path in args.files]
        checks = [finding.check for finding in findings if finding.check]
        checks = [check for check in checks if isinstance(check, SolverCheck)] or checks
        if len(checks) == 1:
            for finding in findings:
                _hold_against(finding, checks[0])
    for finding in findings:
        fine = "will run" if finding.kind in ("net", "solver", "script") else "can be used"
        about = ", ".join(filter(None, (finding.kind, finding.about)))
        print(f"{finding.path}: {about}: {'in the way:' if finding.problems else fine}")
        for problem in finding.problems:
            print(f"  - {problem}")
    return 1 if any(finding.problems for finding in findings) else 0


def solvers_uses(paths: list[str]) -> dict[str, list[Use]]:
    """How the solvers among the files use their nets, by the nets' real paths."""
    found: dict[str, list[Use]] = {}
    for path in paths:
        try:
            if os.path.isfile(path) and is_solver(read_text(path, "replace")):
                for file, use in uses_of(prototxt.read_solver(path)):
                    found.setdefault(os.path.realpath(file), []).append(use)
        except (CaffeError, OSError):
            continue                                        # which looking at the file tells
    return found


def look(path: str, uses: dict[str, list[Use]]) -> Finding:
    """What the file is and what is in its way; nets are looked at as the solvers use them."""
    if os.path.isdir(path):
        return _guarded(path, "folder", _folder)
    try:
        require_regular(path)
        with open(path, "rb") as file:
            start = file.read(8192)
    except OSError as error:
        return Finding(path, "file", problems=[f"{path}: cannot be read ({error.strerror or error}); name a file that can"])
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return _guarded(path, "HDF5 file", _hdf5)
    if b"\0" in start or Path(path).suffix in (".caffemodel", ".solverstate", ".binaryproto"):
        return _guarded(path, "binary file", _binary)
    text = read_text(path, "replace")
    if text.startswith("#!") or Path(path).suffix in (".sh", ".py"):
        return _script(path, text)
    return _guarded(path, "prototxt", lambda path: _prototxt(path, text, uses.get(os.path.realpath(path), [])))


def _guarded(path: str, kind: str, inspect: Callable[[str], Finding]) -> Finding:
    """What `inspect` finds; what it raises is a problem."""
    try:
        return inspect(path)
    except CaffeError as error:
        return Finding(path, kind, problems=[str(error)])


def _hold_against(finding: Finding, check: Check) -> None:
    """Add to weights or a state what does not fit the one net or solver."""
    try:
        if finding.kind == "caffemodel" and check.nets:
            net = check.nets[0]
            known = {name for name, blobs in formats.read_weights(finding.path) if blobs} & set(net.params)
            if net.params and not known:
                raise CaffeError(f"{finding.path}: none of its layers has the name of one in {net.source}; rename those of one of them")
            net.copy_from(finding.path)
        if finding.kind == "solver state" and isinstance(check, SolverCheck) and check.solver:
            check.solver.restore(finding.path)
    except CaffeError as error:
        finding.problems.append(str(error))


# -- kinds ---------------------------------------------------------------------------------------------------------
def is_solver(text: str) -> bool:
    """Whether a prototxt is a solver's, by the fields outside of all blocks; where they are in its lines means nothing."""
    fields, solver, net = prototxt.top_fields(text), *({field.name for field in kind.DESCRIPTOR.fields}
                                                       for kind in (caffe_pb2.SolverParameter, caffe_pb2.NetParameter))
    return len(fields & (solver - net)) > len(fields & (net - solver))


def _prototxt(path: str, text: str, uses: list[Use]) -> Finding:
    if "{" not in text and ":" not in text:
        raise CaffeError(f"{path}: is neither a net nor a solver; if it is a list of files, name the net that reads it")
    check: Check = SolverCheck(path) if is_solver(text) else NetCheck(path, uses)
    about = check.about if isinstance(check, NetCheck) else ""
    finding = Finding(path, "solver" if isinstance(check, SolverCheck) else "net", about, check.problems)
    finding.check = check
    return finding


def _script(path: str, text: str) -> Finding:
    asked = list(SEVERAL_GPUS.finditer(text))
    problems = [f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {problem}" for match in asked if (problem := _gpus_missing(match[0]))]
    return Finding(path, "script", "trains on several GPUs" if asked else "", problems)


def _gpus_missing(words: str) -> str | None:
    """What is in the way of a script with these words, and what to do, where there are fewer GPUs than they ask for."""
    needed, found = max(map(int, re.findall(r"\d+", words)), default=1) + 1, torch.cuda.device_count()
    if found >= needed:
        return None
    cure = ("write --processes N in place of it to train in N processes on the CPU, or name one GPU and write iter_size: N in the solver"
            if words.startswith("-") else "without set_mode_gpu its processes train on the CPU")
    return f"asks for several GPUs ({words}), but torch finds {found or 'none'} here; {cure}"


def _binary(path: str) -> Finding:
    """Weights, a state or a mean: what the name says, or else what the content can be read as."""
    readers = {".solverstate": _state, ".caffemodel": _weights, ".binaryproto": _mean}
    if Path(path).suffix in readers:
        return readers[Path(path).suffix](path)
    for reader in readers.values():
        try:
            return reader(path)
        except CaffeError:
            continue
    raise CaffeError(f"{path}: is none of the binary files of Caffe's (weights, solver states, means), or is damaged; copy it again")


def _weights(path: str) -> Finding:
    layers = [blobs for _, blobs in formats.read_weights(path) if blobs]
    count = sum(blob.size for blobs in layers for blob in blobs if blob is not None)
    return Finding(path, "caffemodel", f"{count:,} parameters in {len(layers)} layer(s)")


def _state(path: str) -> Finding:
    state = formats.read_state(path)
    recorded = Path(state.learned_net)
    problems = []
    if state.learned_net and not os.path.exists(recorded) and not os.path.exists(Path(path).parent / recorded.name):
        problems.append(f"{path}: its weights are neither at {recorded}, where they were written, nor beside it; put {recorded.name} there")
    return Finding(path, "solver state", f"iteration {state.iter}", problems)


def _mean(path: str) -> Finding:
    return Finding(path, "mean file", _shape(formats.read_mean(path)))


def _hdf5(path: str) -> Finding:
    with h5py.File(path, "r") as file:
        if "learned_net" in file:
            return _state(path)
        if isinstance(file.get("data"), h5py.Group):
            return _weights(path)
        about = ", ".join(f"{name} {'x'.join(map(str, item.shape))}" for name, item in file.items() if isinstance(item, h5py.Dataset))
    return Finding(path, "HDF5 data", about or "no dataset",
                   [] if about else [f"{path}: has no dataset, so no HDF5Data layer can read it; write it again"])


def _folder(path: str) -> Finding:
    if os.path.exists(os.path.join(path, "data.mdb")):
        return _lmdb(path)
    if is_leveldb(path):
        new = f"{path.rstrip('/')}_lmdb"
        raise CaffeError(f"{path}: is a LevelDB, which is not read in training; run `torchcaffe convert_leveldb {path} {new}`, "
                         f"and write source: \"{new}\" and backend: LMDB in data_param")
    raise CaffeError(f"{path}: is a folder without a database (data.mdb or CURRENT) in it; name files or databases")


def _lmdb(path: str) -> Finding:
    """An LMDB of images: some records from the whole of it are decoded."""
    database = open_database(path)
    shapes, labels, problems = set(), set(), []
    for position in np.unique(np.linspace(0, len(database) - 1, SAMPLE).astype(int)).tolist():
        where = database.where(position)
        try:
            message = datum.parse(database[position], where)
            shapes.add(datum.image(message, where).shape)
            labels.add(message.label)
        except CaffeError as error:
            problems.append(str(error))
            break
    if len(shapes) > 1 and len({shape[0] for shape in shapes}) > 1:
        channels = " or ".join(map(str, sorted({shape[0] for shape in shapes})))
        problems.append(f"{path}: the images have {channels} channels; write it again with images of one kind, or set force_color or "
                        "force_gray in transform_param if they are encoded")
    about = f"{len(database):,} records" + (f" of {_sizes(shapes)}, labels {min(labels)} to {max(labels)}" if shapes else "")
    return Finding(path, "LMDB", about, problems)


def _sizes(shapes: set[tuple[int, ...]]) -> str:
    if len(shapes) == 1:
        return "x".join(map(str, next(iter(shapes))))
    return f"{len(shapes)} shapes (so crop_size is needed)"


def _shape(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape))
