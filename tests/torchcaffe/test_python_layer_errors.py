"""What a Python layer raises reaches a script as it was raised, and a user of the tools as a sentence with layer, error and line."""
from __future__ import annotations

from pathlib import Path

import pytest

import torchcaffe as caffe
from nets import write_solver
from torchcaffe.cli import main
from torchcaffe.errors import sentence

LAYER = """import caffe
import numpy as np
class L(caffe.Layer):
    def setup(self, bottom, top):
        {setup}
    def reshape(self, bottom, top):
        {reshape}
        top[0].reshape(1)
    def forward(self, bottom, top):
        {forward}
        top[0].data[...] = 1
    def backward(self, top, propagate_down, bottom):
        {backward}
        bottom[0].diff[...] = 1
"""
NET = """
layer {{ name: "x" type: "DummyData" top: "x" dummy_data_param {{ shape {{ dim: 2 dim: 3 }} }} }}
layer {{ name: "f" type: "InnerProduct" bottom: "x" top: "f" inner_product_param {{ num_output: 1 }} }}
layer {{ name: "mine" type: "Python" bottom: "f" top: "loss" loss_weight: 1 python_param {{ module: "{module}" layer: "L" }} }}
"""
LINES = {"setup": 5, "reshape": 7, "forward": 10, "backward": 13}


@pytest.fixture
def solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request):
    """A function that writes a layer whose methods do what is said, in a module of its own, and a solver of a net with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def write(module: str = "", **methods: str) -> str:
        module = module or f"raising_{abs(hash(str(methods)))}"
        (tmp_path / f"{module}.py").write_text(LAYER.format(**{name: methods.get(name, "pass") for name in LINES}))
        return write_solver(tmp_path, NET.format(module=module), max_iter=2)
    return write


@pytest.mark.parametrize("method", LINES)
def test_the_sentence_has_the_layer_the_error_and_its_line(solver, capfd, method):
    path = solver(**{method: "raise ValueError(f'no\\n{1 + 1}')"})
    assert main(["train", "--solver", path]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("torchcaffe: layer 'mine' (Python) raises ValueError: no 2 (raising_") and last.endswith(f".py:{LINES[method]})")


def test_the_line_is_the_layer_s_own_where_others_raise(solver, capfd):
    assert main(["train", "--solver", solver(forward="np.testing.assert_array_equal(1, 2)")]) == 2
    assert capfd.readouterr().err.splitlines()[-1].endswith(".py:10)")


def test_debug_shows_the_traceback_too(solver, capfd):
    path = solver(forward="1 / 0")
    assert main(["train", "--solver", path]) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert main(["train", "--debug", "--solver", path]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines and "ZeroDivisionError: division by zero" in lines
    assert lines[-1].startswith("torchcaffe: layer 'mine' (Python) raises ZeroDivisionError: division by zero (")


@pytest.mark.parametrize(("code", "shown"), [("sys.exit()", ""), ("sys.exit(0)", ": 0"), ("raise SystemExit('bye')", ": bye")])
def test_a_layer_does_not_end_the_tool(solver, capfd, code, shown):
    assert main(["train", "--solver", solver(forward=f"import sys; {code}")]) == 2
    assert f"layer 'mine' (Python) ends the program with SystemExit{shown} (raising_" in capfd.readouterr().err.splitlines()[-1]


def test_a_module_that_cannot_be_imported(solver, tmp_path, capfd):
    path = solver("raising_module")
    for text, words in (("x = 1\nx.y\n", "raises AttributeError: 'int' object has no attribute 'y' (raising_module.py:2)"),
                        ("def f(:\n", "raises SyntaxError: invalid syntax (raising_module.py:1)"),
                        ("import caffe\nclass L: pass\n", "'raising_module.L' is not a caffe.Layer")):
        (tmp_path / "raising_module.py").write_text(text)
        assert main(["time", "--model", "net.prototxt"]) == 2
        assert "layer 'mine' (Python)" in (last := capfd.readouterr().err.splitlines()[-1]) and words in last
    assert path


def test_one_of_several_processes_says_it(solver, capfd):
    assert main(["train", "--solver", solver("raising_in_processes", forward="import sys; sys.exit()"), "--processes", "2"]) == 2
    assert "layer 'mine' (Python) ends the program with SystemExit (raising_in_processes.py:10)" in capfd.readouterr().err


def test_a_script_sees_what_was_raised(solver):
    trained = caffe.get_solver(solver(backward="raise KeyError('gone')"))
    with pytest.raises(KeyError) as caught:
        trained.step(1)
    assert type(caught.value) is KeyError and caught.value.__notes__ == ["raised by layer 'mine' (Python)"]
    with pytest.raises(SystemExit):
        caffe.get_solver(solver(setup="raise SystemExit"))


def test_a_caffe_error_in_a_layer_names_it_as_well(solver):
    with pytest.raises(caffe.CaffeError) as caught:
        caffe.get_solver(solver(reshape="top[0].reshape(-1)"))
    assert "layer 'mine' (Python) raises CaffeError: blob: shape (-1,) is not possible" in str(sentence(caught.value))


def test_a_layer_inside_a_layer_s_net_is_the_one_that_is_named(solver, tmp_path):
    inner = solver("raising_inner", forward="raise ValueError(1)")
    (tmp_path / "inner.prototxt").write_text((tmp_path / "net.prototxt").read_text().replace('"mine"', '"inner"'))
    trained = caffe.get_solver(solver("raising_outer", forward="caffe.Net('inner.prototxt', caffe.TRAIN).forward()"))
    with pytest.raises(ValueError, match="1") as caught:
        trained.step(1)
    assert str(sentence(caught.value)).startswith("layer 'inner' (Python) raises ValueError: 1 (raising_inner.py:10)") and inner
