"""Whose code a net may run: a Python layer's module comes from sys.path as the caller left it, and not at all where it is refused."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchcaffe as caffe
from torchcaffe import settings
from torchcaffe.cli import main
from torchcaffe.errors import CaffeError

NET = """
layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 1 } } }
layer { name: "mine" type: "Python" bottom: "x" top: "y" python_param { module: "module_beside_the_net" layer: "Mine" } }
"""
MODULE = """
import caffe
print("module runs")
class Mine(caffe.Layer):
    def setup(self, bottom, top): pass
    def reshape(self, bottom, top): top[0].reshape(1)
    def forward(self, bottom, top): pass
"""
CONSOLE_SCRIPT = "import sys\nfrom hintkd_console import torchcaffe\nsys.exit(torchcaffe())\n"           # as pip writes it
REFUSED = "layer 'mine' (Python): module 'module_beside_the_net' is not imported, as --no-python-layers says; "


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchcaffe").write_text(CONSOLE_SCRIPT)
    (tmp_path / "nets" / "net.prototxt").write_text(NET)
    (tmp_path / "nets" / "module_beside_the_net.py").write_text(MODULE)
    (tmp_path / "solver.prototxt").write_text('base_lr: 1 net: "nets/net.prototxt" lr_policy: "fixed" max_iter: 1 snapshot_prefix: "s"')
    return tmp_path


def summary(*start: str, net: str, folder: Path, more: str = "") -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, (str(Path(caffe.__file__).parents[1]), more)))
    return subprocess.run([sys.executable, *start, "summary", net], cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
                          text=True, check=False)


def test_the_folder_of_the_net_is_not_searched(folder):
    before = list(sys.path)
    with pytest.raises(CaffeError, match="no module 'module_beside_the_net' on sys.path; put its folder on PYTHONPATH"):
        caffe.Net("nets/net.prototxt", caffe.TEST)
    assert sys.path == before


def test_the_console_script_searches_no_current_directory(folder):
    done = summary(str(folder / "bin" / "torchcaffe"), net="net.prototxt", folder=folder / "nets")
    assert done.returncode == 2 and "no module 'module_beside_the_net' on sys.path" in done.stderr and "module runs" not in done.stdout


@pytest.mark.parametrize(("start", "more"), [(["bin/torchcaffe"], "nets"), (["-m", "torchcaffe"], "")])
def test_pythonpath_is_searched_and_by_python_m_the_current_directory(folder, start, more):
    start = [str(folder / part) if "/" in part else part for part in start]
    done = summary(*start, net="net.prototxt", folder=folder / "nets", more=str(folder / more) if more else "")
    assert done.returncode == 0 and "module runs" in done.stdout


@pytest.mark.parametrize("command", [
    "train --solver solver.prototxt", "test --model nets/net.prototxt --weights w", "time --model nets/net.prototxt",
    "summary nets/net.prototxt", "extract_features w nets/net.prototxt y out 1 lmdb",
])
def test_commands_refuse_python_layers_where_asked(folder, monkeypatch, capsys, command):
    monkeypatch.syspath_prepend(str(folder / "nets"))
    assert main([*command.split(), "--no-python-layers"]) == 2
    assert f"nets/net.prototxt:3: {REFUSED}" in capsys.readouterr().err.splitlines()[-1]
    assert "module_beside_the_net" not in sys.modules
    assert settings.python_layers()


def test_export_takes_the_flag_and_never_imports_one(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(folder / "nets"))
    assert main(["export", "--no-python-layers", "nets/net.prototxt", "w", "out.py"]) == 2
    assert "layer 'mine' (Python) cannot be exported" in capsys.readouterr().err
    assert "module_beside_the_net" not in sys.modules


def test_check_says_that_they_are_refused(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(folder / "nets"))
    assert main(["check", "--no-python-layers", "nets/net.prototxt", "solver.prototxt"]) == 1
    assert capsys.readouterr().out.count(REFUSED) == 2
    assert "module_beside_the_net" not in sys.modules


def test_code_refuses_them_for_a_while(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder / "nets"))
    with settings.without_python_layers(), pytest.raises(CaffeError, match="is not imported"):
        caffe.Net("nets/net.prototxt", caffe.TEST)
    assert caffe.Net("nets/net.prototxt", caffe.TEST).blobs["y"].shape == (1,)
    del sys.modules["module_beside_the_net"]
