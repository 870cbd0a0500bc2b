"""What is in the way of a net or a solver: found by reading it and by building it without contents, not by running it.

Each finding is one sentence that names the place and says what to do.  Paths are relative to the current directory, as when it runs.
"""
from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from google.protobuf import text_format

from torchcaffe import settings
from torchcaffe.data.images import read_list
from torchcaffe.errors import CaffeError, sentence
from torchcaffe.files import read_text
from torchcaffe.graph import filter as graph
from torchcaffe.graph.build import check_differentiable
from torchcaffe.layers.base import LAYERS
from torchcaffe.layers.window_data import read_windows
from torchcaffe.net import TRAIN, Net
from torchcaffe.proto import caffe_pb2, prototxt, upgrade
from torchcaffe.proto.prototxt import nearest
from torchcaffe.tools.outline import READERS, outline, placed
from torchcaffe.tools.states import Use, in_state, in_words, own_uses, uses_of
from torchcaffe.train.solver import Solver, snapshot_problem

SOURCES = ("data_param", "hdf5_data_param", "image_data_param", "infogain_loss_param", "window_data_param")
SHOWN = 20                                      # files of a list that are named one by one


class Check:
    """What a prototxt has in the way, and the nets that can be built, without contents.

    A sentence that is true of a net in some of the states that it is looked at in, and not in all, names these.
    """

    def __init__(self) -> None:
        self.nets: list[Net] = []
        self._told: dict[str, set[str]] = {}            # sentence -> the states it is about, none if it is about the file
        self._states: dict[str, set[str]] = {}          # sentence -> the states in which the net of that file was looked at
        self._looked: dict[str, set[str]] = {}          # file of a net -> states

    @property
    def problems(self) -> list[str]:
        """One sentence for each."""
        return [sentence + (f" (in {' and in '.join(sorted(states))})" if states and states != self._states[sentence] else "")
                for sentence, states in self._told.items()]

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

    def look(self, net: caffe_pb2.NetParameter, path: str, whole: bool, use: Use) -> None:
        """Add the problems of a net in the state it is used in; it is built if it is the `whole` of what the file says."""
        param = in_state(net, use)
        state = in_words(param.state)
        self._looked.setdefault(path, set()).add(state)
        try:
            layers = graph.filter_net(param).layer
        except CaffeError as error:
            self._add(str(placed(error, path)), path, state)
            return
        found = [(layer, list(_layer_problems(layer))) for layer in layers]
        for layer, problems in found:
            for problem in problems:
                self._add(str(placed(CaffeError(f"layer '{layer.name}' ({layer.type}): {problem}", layer=layer.name), path)), path, state)
        if whole and all(layer.type in LAYERS for layer in layers):
            self._build(param, path, state, {layer.name for layer, problems in found if problems})

    def _build(self, param: caffe_pb2.NetParameter, path: str, state: str, known: set[str]) -> None:
        """Build the net; `known` names the layers whose problems are told already."""
        try:
            look = outline(param, path)
            if look.net.phase == TRAIN:
                with look.net.located():
                    check_differentiable(look.net.graph)
        except CaffeError as error:
            if not any(f"layer '{name}' " in str(error) for name in known):
                self._add(str(error), path, state)
        except (Exception, SystemExit) as error:
            words = sentence(error)                         # of what a Python layer raises
            if words is None:
                raise
            cure = "install what it needs" if isinstance(error, ImportError) else "make it work with Python 3 and this net"
            self._add(f"{path}: {words}; {cure}", path, state)
        else:
            self.nets.append(look.net)
            for name, complaint in look.missing.items():
                if name not in known:
                    self._add(str(complaint), path, state)

    def _add(self, sentence: str, path: str = "", state: str = "") -> None:
        states = self._told.setdefault(sentence, set())
        if path:
            states.add(state)
            self._states[sentence] = self._looked[path]


class NetCheck(Check):
    """A net prototxt, in the states that solvers use it in, or else in those it is made for; `about` says which where that is not all."""

    def __init__(self, path: str, uses: list[Use]):
        super().__init__()
        param, whole = self._read(path)
        if whole and not param.layer:
            self._add(f"{path}: has no layers, so it is not a net; name a prototxt of a net, a solver, or another kind of file")
        own, passed_over = own_uses(param)
        for use in uses or own:
            self.look(param, path, whole, use)
        self.about = f"in {' and in '.join(sorted(self._looked[path]))}" if passed_over and not uses else ""


class SolverCheck(Check):
    """A solver prototxt and its nets, each in its state; `solver` is there when all of it can be built."""

    def __init__(self, path: str):
        super().__init__()
        self.solver: Solver | None = None
        param = prototxt.read_solver(path)
        for problem in _solver_problems(param):
            self._add(f"{path}: {problem}")
        for file, use in uses_of(param):
            if missing := path_problem(file, "net"):
                self._add(f"{path}: {missing}")
            else:
                net, whole = self._read(file)
                self.look(net, file, whole, use)
        if self.problems:
            return
        try:
            with settings.shapes_only():
                self.solver = Solver(path, param.type, param)
        except CaffeError as error:
            self._add(str(error))


def path_problem(path: str, field: str) -> str | None:
    """What to say of a path that is not there."""
    if os.path.exists(path):
        return None
    if os.path.isabs(path):
        return (f"{field} '{path}' is an absolute path that does not exist here; write the path that it has here, best relative to the "
                "folder you start from")
    return f"{field} '{path}' does not exist, seen from {os.getcwd()}; start from another folder, or write the path it has"


def _layer_problems(layer: caffe_pb2.LayerParameter) -> Iterator[str]:
    """What can be told from a layer by itself, before it is built."""
    if layer.type not in LAYERS:
        yield (f"is not a layer type of Caffe's{nearest(layer.type, LAYERS)}; a custom layer has to be written anew as a Python layer "
               "(type: \"Python\"), or the net without it")
        return
    reader = READERS.get(layer.type)
    absent = [name for name in ("source", "batch_size") if reader and not getattr(getattr(layer, reader), name)]
    if absent:
        yield f"{reader} has no {' and no '.join(absent)}; write {'it' if len(absent) == 1 else 'them'}"
    paths = [("mean_file", layer.transform_param.mean_file)]
    paths += [("source", getattr(layer, name).source) for name in SOURCES]
    missing = [sentence for field, path in paths if path and (sentence := path_problem(path, field))]
    yield from missing
    if layer.type == "Data" and layer.data_param.source and layer.data_param.backend != caffe_pb2.DataParameter.LMDB:
        source = layer.data_param.source
        if missing or not os.path.exists(os.path.join(source, "data.mdb")):
            yield (f"the backend is LEVELDB, Caffe's default; run `torchcaffe convert_leveldb {source} {source}_lmdb`, make that the "
                   "source and write `backend: LMDB`")
    if not missing and not absent:
        yield from _files_problems(layer)


def _files_problems(layer: caffe_pb2.LayerParameter) -> Iterator[str]:
    """Files that a list names and that are not there."""
    root, cure = "", "put them there, or set root_folder, which is written before each name"
    try:
        if layer.type == "ImageData":
            source, root = layer.image_data_param.source, layer.image_data_param.root_folder
            files = [name for name, _ in read_list(source)]
        elif layer.type == "WindowData":
            source, root = layer.window_data_param.source, layer.window_data_param.root_folder
            files = read_windows(source, 1, 0).images
        elif layer.type == "HDF5Data":
            source, cure = layer.hdf5_data_param.source, "put them there, or start from the folder that their names are relative to"
            files = read_text(source, "replace").split()
        else:
            return
    except (CaffeError, OSError):
        return                                              # building the layer says it
    gone = [path for path in (root + name for name in files) if not os.path.exists(path)]
    if gone:
        more = f" and {len(gone) - SHOWN:,} more" if len(gone) > SHOWN else ""
        yield f"{len(gone):,} of the {len(files):,} files in {source} do not exist: {', '.join(gone[:SHOWN])}{more}; {cure}"


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
