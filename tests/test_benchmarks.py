"""benchmarks/step.py measures a real Caffe in an interpreter of its own; here a stand-in, and what is no Caffe."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import step
import zoo

CAFFE = """
import os, types
import numpy as np
def set_mode_cpu(): pass
def get_solver(path):
    assert os.environ["MARK"] == "the stand-in's interpreter"
    print("a line of its own")
    blobs = {name: types.SimpleNamespace(data=np.zeros(shape)) for name, shape in (("data", (2, 3)), ("label", (2,)))}
    params = {"teacher/a_bn": [types.SimpleNamespace(data=np.zeros(1)) for _ in range(3)]}
    def train(iterations):
        lines = open(path).read()
        if "broken" in lines: raise ValueError("the stand-in broke")
        with open(path, "w") as file: file.write(f"{lines}{blobs['data'].data.sum():g} {params['teacher/a_bn'][2].data.sum():g}\\\\n")
    return types.SimpleNamespace(net=types.SimpleNamespace(blobs=blobs, params=params), step=train)
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that has a caffe."""
    (tmp_path / "caffe.py").write_text(CAFFE.replace("\\\\n", "\\n"))
    return script(tmp_path / "python", f'MARK="the stand-in\'s interpreter" PYTHONPATH="{tmp_path}:$PYTHONPATH" exec {sys.executable} "$@"')


def script(path: Path, line: str) -> str:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_a_caffe_of_another_interpreter_is_measured_there(tmp_path, python):
    (tmp_path / "solver.prototxt").write_text("")
    ask = step.real_caffe(tmp_path, np.ones((2, 3)), np.zeros(2), python)
    assert 0 < ask(3) < 60
    assert (tmp_path / "solver.prototxt").read_text() == "6 1\n" * 3           # fed, and the teacher's statistics set
    assert step.no_caffe(python) is None and "caffe" not in step.impossible("cpu", python)
    assert step.impossible("gpu", python)["caffe"] == "it is measured on CPUs only"


def test_a_caffe_that_ends_on_the_way_is_a_line(tmp_path, python, capfd):
    (tmp_path / "solver.prototxt").write_text("broken")
    ask = step.real_caffe(tmp_path, np.ones((2, 3)), np.zeros(2), python)
    with pytest.raises(SystemExit, match=r"step.py: the real Caffe's process ended \(status 1\)"):
        ask(1)
    assert "the stand-in broke" in capfd.readouterr().err


@pytest.mark.parametrize(("line", "words"), [
    ("exec {python} \"$@\"", "cannot import caffe: ModuleNotFoundError: No module named 'caffe'"),
    ("echo Traceback >&2; echo ImportError: libcaffe.so >&2; exit 1", "cannot import caffe: ImportError: libcaffe.so"),
    ("exit 3", "cannot import caffe: it ends with status 3"), (None, "cannot import caffe: No such file or directory"),
])
def test_what_cannot_import_caffe_is_one_line(tmp_path, line, words):
    python = script(tmp_path / "python", line.format(python=sys.executable)) if line else str(tmp_path / "none")
    program = [sys.executable, step.__file__, "--nets", "resnet8", "--ways", "hand", "caffe", "--caffe-python", python,
               "--output", str(tmp_path / "out.json")]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"step.py: --caffe-python {python} {words}\n")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("method", ["fitnet", "vid", "ft", "oh"])
def test_a_method_of_the_zoo_is_the_same_by_hand(tmp_path, monkeypatch, method):
    """What is compared before it is timed; measure() raises where losses differ."""
    monkeypatch.setattr(zoo, "BATCH", 4)
    monkeypatch.setitem(zoo.NETS, "small", ("wrn_10_1", "wrn_10_2"))
    monkeypatch.setattr(zoo, "BY_HAND", {"wrn_10_1": lambda: zoo.hand.WideResNet(10, 1), "wrn_10_2": lambda: zoo.hand.WideResNet(10, 2)})
    found = zoo.measure(method, "small", 2, tmp_path)
    assert [len(ms) for ms in found.values()] == [2, 2]
    run = {"threads": 1, "nets": {"resnet8x4": {method: {"hand": [4.0, 4.0], "step": [3.0, 3.0]}}}}
    assert list(zoo.rows(run)) == [["resnet8x4 under resnet32x4", method, "1", "step", "4", "3", "0.750 (0.750 to 0.750)", "1.00: met"]]
