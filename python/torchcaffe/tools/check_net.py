"""What is in the way of a net or a solver: found by reading it and by building it without contents, not by running it.

Each finding is one sentence that names the place and says what to do.  Paths are relative to the current directory, as when it runs.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from google.protobuf import text_format

from torchcaffe import settings
from torchcaffe.data.images import read_list
from torchcaffe.errors import CaffeError
from torchcaffe.files import read_text
from torchcaffe.graph import filter as graph
from torchcaffe.graph.build import check_differentiable
from torchcaffe.layers.base import LAYERS
from torchcaffe.layers.window_data import read_windows
from torchcaffe.net import TEST, TRAIN, Net
from torchcaffe.proto import caffe_pb2, prototxt, upgrade
from torchcaffe.proto.prototxt import nearest
from torchcaffe.tools.outline import READERS, outline, placed
from torchcaffe.train.solver import Solver, snapshot_problem

SOURCES = ("data_param", "hdf5_data_param", "image_data_param", "infogain_loss_param", "window_data_param")


class Check:
    """What a prototxt has in the way: `problems`, and the nets that can be built, without contents."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.nets: list[Net] = []

    def _read(self, path: str) -> tuple[caffe_pb2.NetParameter, bool]:
        """The net in a file and whether that is all of it: fields that Caffe does not have are passed over, and a problem."""
        try:
            return prototxt.read_net(path), True
        except CaffeError as error:
            if "unknown field" not in str(error):
                self._add(str(error))
                return caffe_pb2.NetParameter(), False
            self._add(f"{error}; a field that Caffe does not have belongs to a custom layer; write that anew as a Python layer")
        net = caffe_pb2.NetParameter()
        try:
            text_format.Parse(read_text(path, "replace"), net, allow_unknown_field=True)
            return upgrade.upgrade_net(net), False
        except (text_format.ParseError, CaffeError):
            return caffe_pb2.NetParameter(), False

    def look(self, param: caffe_pb2.NetParameter, path: str, whole: bool) -> None:
        """Add the problems of a message whose state is set; it is built if it is the `whole` of what the file says."""
        try:
            layers = graph.filter_net(param).layer
        except CaffeError as error:
            self._add(str(placed(error, path)))
            return
        found = [(layer, list(_layer_problems(layer))) for layer in layers]
        for layer, sentences in found:
            for sentence in sentences:
                self._add(str(placed(CaffeError(f"layer '{layer.name}' ({layer.type}): {sentence}", layer=layer.name), path)))
        if whole and all(layer.type in LAYERS for layer in layers):
            self._build(param, path, {layer.name for layer, sentences in found if sentences})

    def _build(self, param: caffe_pb2.NetParameter, path: str, known: set[str]) -> None:
        """Build the net; `known` names the layers whose problems are told already."""
        try:
            look = outline(param, path)
            if look.net.phase == TRAIN:
                with look.net.located():
                    check_differentiable(look.net.graph)
        except CaffeError as error:
            if not any(f"layer '{name}' " in str(error) for name in known):
                self._add(str(error))
        except ImportError as error:
            self._add(f"{path}: a Python layer's module cannot be imported ({error}); install what it needs")
        except Exception as error:  # noqa: BLE001    a Python layer may raise anything
            self._add(f"{path}: a Python layer raises {type(error).__name__}: {error}; make it work with Python 3 and this net")
        else:
            self.nets.append(look.net)
            for name, complaint in look.missing.items():
                if name not in known:
                    self._add(str(complaint))

    def _add(self, sentence: str) -> None:
        if sentence not in self.problems:
            self.problems.append(sentence)


class NetCheck(Check):
    """A net prototxt, in the phases it is made for."""

    def __init__(self, path: str):
        super().__init__()
        param, whole = self._read(path)
        if whole and not param.layer:
            self._add(f"{path}: has no layers, so it is not a net; name a prototxt of a net, a solver, or another kind of file")
        for phase in _phases(param):
            self.look(graph.set_state(param, phase), path, whole)


class SolverCheck(Check):
    """A solver prototxt and its nets, each in its state; `solver` is there when all of it can be built."""

    def __init__(self, path: str):
        super().__init__()
        self.solver: Solver | None = None
        param = prototxt.read_solver(path)
        self.problems.extend(f"{path}: {sentence}" for sentence in _solver_problems(param))
        for file, phase, extra in _uses(param):
            if not os.path.exists(file):
                self._add(f"{path}: {path_problem(file, 'net')}")
            else:
                self._look_at(file, phase, extra)
        if self.problems:
            return
        try:
            with settings.shapes_only():
                self.solver = Solver(path, param.type, param)
        except CaffeError as error:
            self._add(str(error))

    def _look_at(self, file: str, phase: int, extra: caffe_pb2.NetState) -> None:
        """Look at a net's file in the state that the solver builds it in."""
        net, whole = self._read(file)
        state = caffe_pb2.NetState(phase=caffe_pb2.Phase.Name(phase))
        state.MergeFrom(net.state)
        state.MergeFrom(extra)
        net.state.CopyFrom(state)
        self.look(net, file, whole)


def _uses(param: caffe_pb2.SolverParameter) -> list[tuple[str, int, caffe_pb2.NetState]]:
    """The files of a solver's nets, each with its phase and what the solver adds to its state."""
    uses = [(param.net or param.train_net, TRAIN, param.train_state)]
    tests = [*param.test_net, *[param.net] * (len(param.test_iter) - len(param.test_net) - len(param.test_net_param))]
    states = list(param.test_state[len(param.test_net_param):])
    uses += [(file, TEST, state) for file, state in zip(tests, states + [caffe_pb2.NetState()] * len(tests), strict=False)]
    return [use for use in uses if use[0]]


def path_problem(path: str, field: str) -> str | None:
    """What to say of a path that is not there."""
    if os.path.exists(path):
        return None
    if os.path.isabs(path):
        return (f"{field} '{path}' is an absolute path that does not exist here; write the path that it has here, best relative to the "
                "folder you start from")
    return f"{field} '{path}' does not exist, seen from {os.getcwd()}; start from another folder, or write the path it has"


def _phases(param: caffe_pb2.NetParameter) -> list[int]:
    """The phases that a net by itself is made for: those of its inputs, where these are for one phase only."""
    rules = [[rule.phase for rule in layer.include if rule.HasField("phase")] for layer in param.layer if not layer.bottom]
    for only in (TRAIN, TEST):
        if rules and all(rule == [only] for rule in rules):
            return [only]
    return [TRAIN, TEST]


def _layer_problems(layer: caffe_pb2.LayerParameter) -> Iterator[str]:
    """What can be told from a layer by itself, before it is built."""
    if layer.type not in LAYERS:
        yield (f"is not a layer type of Caffe's{nearest(layer.type, LAYERS)}; a custom layer has to be written anew as a Python layer "
               "(type: \"Python\"), or the net without it")
        return
    paths = [("mean_file", layer.transform_param.mean_file)]
    paths += [("source", getattr(layer, name).source) for name in SOURCES]
    missing = [sentence for field, path in paths if path and (sentence := path_problem(path, field))]
    yield from missing
    if layer.type == "Data" and layer.data_param.backend != caffe_pb2.DataParameter.LMDB:
        source = layer.data_param.source
        if missing or not os.path.exists(os.path.join(source, "data.mdb")):
            yield (f"the backend is LEVELDB, Caffe's default; run `torchcaffe convert_leveldb {source} {source}_lmdb`, make that the "
                   "source and write `backend: LMDB`")
    if layer.type in READERS and not missing:
        yield from _files_problems(layer)


def _files_problems(layer: caffe_pb2.LayerParameter) -> Iterator[str]:
    """Images that a list or a window file names and that are not there."""
    reader: Any = {"ImageData": layer.image_data_param, "WindowData": layer.window_data_param}.get(layer.type)
    if reader is None:
        return
    try:
        files = [name for name, _ in read_list(reader.source)] if layer.type == "ImageData" else read_windows(reader.source, 1, 0).images
    except CaffeError:
        return                                              # building the layer says it
    gone = [path for path in (reader.root_folder + name for name in files) if not os.path.exists(path)]
    if gone:
        yield (f"{len(gone):,} of the {len(files):,} images in {reader.source} do not exist, the first being {gone[0]}; "
               "put them there, or set root_folder, which is written before each name")


def _solver_problems(param: caffe_pb2.SolverParameter) -> Iterator[str]:
    """What a solver message by itself tells."""
    if param.HasField("solver_mode") and param.solver_mode == caffe_pb2.SolverParameter.GPU:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            yield "solver_mode is GPU, but torch finds no CUDA device here; write solver_mode: CPU"
        elif param.device_id >= count:
            yield f"device_id is {param.device_id}, but there are GPUs 0 to {count - 1} only; write one of them"
    if problem := snapshot_problem(param):
        yield problem
    for name in (name.strip() for names in param.weights for name in names.split(",")):
        if sentence := path_problem(name, "weights"):
            yield sentence
