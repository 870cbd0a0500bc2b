"""Scripts written for pycaffe: `import caffe` is torchcaffe, each module once, in a process of its own for each test."""
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from __future__ import print_function
import sys
import caffe
import caffe.io, caffe.draw
import caffe.coord_map as coord_map
from caffe import layers as L, params as P
from caffe.proto import caffe_pb2
from caffe.net_spec import NetSpec
from caffe.pycaffe import Net, SGDSolver
from caffe._caffe import Blob, Layer, LayerParameter, Solver, SolverParameter
import beside
import torchcaffe

assert caffe is torchcaffe
assert all(module is sys.modules["torch" + name] for name, module in sys.modules.items() if name.split(".")[0] == "caffe")
assert caffe.io.caffe_pb2 is caffe_pb2 is caffe.proto.caffe_pb2
assert Net is caffe.Net and SGDSolver is caffe.SGDSolver and issubclass(SGDSolver, Solver) and Layer is caffe.Layer
assert LayerParameter is caffe_pb2.LayerParameter and SolverParameter is caffe_pb2.SolverParameter and hasattr(Blob, "reshape")
assert caffe._caffe is torchcaffe._caffe and caffe.pycaffe is torchcaffe.pycaffe
assert caffe.io.__spec__.name == "torchcaffe.io"
n = NetSpec()
n.x = L.Input(shape=dict(dim=[1, 2]))
n.y = L.Pooling(n.x, pool=P.Pooling.AVE)
assert type(n.to_proto()) is caffe_pb2.NetParameter
print(__name__, sys.argv, beside.NAME)
sys.exit(3)
"""


def python(*arguments, folder):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          env={"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "python"), "OMP_NUM_THREADS": "1"})


def test_a_script_runs_unmodified(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/old.py").write_text(SCRIPT)
    (tmp_path / "scripts/beside.py").write_text("NAME = 'found beside the script'")
    done = python("-m", "torchcaffe.run", "scripts/old.py", "a", "--gpu=0", folder=tmp_path)
    assert done.stdout == "__main__ ['scripts/old.py', 'a', '--gpu=0'] found beside the script\n", done.stderr
    assert done.returncode == 3


def test_install_does_the_same_from_code_unless_another_caffe_is_there(tmp_path):
    (tmp_path / "caffe.py").write_text("here = True")
    done = python("-c", "import caffe, torchcaffe\ntry:\n    torchcaffe.install()\nexcept torchcaffe.CaffeError as e: print(e)\n"
                  "del __import__('sys').modules['caffe']\ntorchcaffe.install()\ntorchcaffe.install()\nimport caffe\n"
                  "print(caffe is torchcaffe, __import__('caffe.draw').draw is torchcaffe.draw)", folder=tmp_path)
    assert done.stdout.splitlines() == ["another caffe is imported in this process already; call torchcaffe.install() before, "
                                        "or use a process of its own", "True True"], done.stderr


@pytest.mark.parametrize(("name", "content", "message"), [
    ("missing.py", None, "missing.py: cannot be read (No such file or directory)"),
    ("old.py", "x = 1\nprint 'hello'\n", "old.py:2: is not Python 3 ("),
])
def test_what_cannot_be_run_is_said_in_a_sentence(tmp_path, monkeypatch, capsys, name, content, message):
    from torchcaffe import run
    monkeypatch.chdir(tmp_path)
    if content:
        Path(name).write_text(content)
    assert run.main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"torchcaffe.run: {message}") and len(error.splitlines()) == 1


def test_usage(capsys):
    from torchcaffe import run
    assert run.main([]) == 2 and run.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m torchcaffe.run script.py")


def test_a_python_layer_s_module_finds_all_of_caffe_and_leaves_nothing_behind(tmp_path, monkeypatch):
    import torchcaffe as caffe
    (tmp_path / "layer_of_this_test.py").write_text("import caffe\nimport caffe.io\nfrom caffe.proto import caffe_pb2\n"
                                                    "class Mine(caffe.Layer):\n    def setup(self, b, t): pass\n"
                                                    "    def reshape(self, b, t): t[0].reshape(1)\n")
    (tmp_path / "net.prototxt").write_text('layer { name: "p" type: "Python" top: "y" '
                                           'python_param { module: "layer_of_this_test" layer: "Mine" } }')
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    assert sys.modules["layer_of_this_test"].caffe is caffe
    assert "caffe" not in sys.modules and "caffe.io" not in sys.modules and sys.meta_path == finders
    assert sys.modules["torchcaffe.io"].__spec__.name == "torchcaffe.io"
