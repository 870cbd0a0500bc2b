"""pycaffe's interface, name by name: each is there, and the test that is said to use it does."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

import torchcaffe as caffe
from nets import write_solver
from pycaffe_names import NAMES

HERE = Path(__file__).parent
LAYER = "import caffe\nclass Mine(caffe.Layer):\n    def setup(self, b, t): pass\n    def reshape(self, b, t): pass\n"
NET = 'layer { name: "p" type: "Python" top: "y" python_param { module: "layer_with_all_names" layer: "Mine" } }'


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What the names before the first dot stand for."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "layer_with_all_names.py").write_text(LAYER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        solver = caffe.SGDSolver(write_solver(folder, NET))
    net = solver.net
    return {"Net": net, "Blob": net.blobs["y"], "Layer": net.layers[0], "Solver": solver, "Timer": caffe.Timer()}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_there(name, objects):
    first, *rest = name.split(".")
    thing = objects[first] if rest and first in objects else getattr(caffe, first)
    for part in rest:
        thing = getattr(thing, part)


@pytest.mark.parametrize("test", sorted(set(NAMES.values())))
def test_its_test_uses_it(test):
    file, name = test.split("::")
    source = (HERE / file).read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    parts = [functions[name], *(functions[arg.arg] for arg in functions[name].args.args if arg.arg in functions)]       # with its fixtures
    parts += [node for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.ImportFrom))]                # and constants
    text = "\n".join(map(ast.unparse, parts))
    missing = [used for used in NAMES if NAMES[used] == test and used.split(".")[-1] not in text]
    assert not missing
