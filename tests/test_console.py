"""The console commands as pip installs them."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def start(command: str, *arguments: str, path: Path = ROOT) -> subprocess.Popen[str]:
    """The command, with modules in `path` in front of what is installed."""
    module, function = SCRIPTS[command].split(":")
    return subprocess.Popen([sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())", *arguments],
                            env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}/python{os.pathsep}{ROOT}"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("command", "wrong"), [("hintkd", "prepare nothing"), ("torchcaffe", "summary nothing")])
def test_the_status_is_that_of_the_command(command, wrong):
    with start(command, *wrong.split()) as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (2, "") and err.startswith(f"{command}: ")


@pytest.mark.parametrize(("command", "imported"), [("hintkd", "typer"), ("torchcaffe", "torch")])
def test_ctrl_c_while_it_is_imported_prints_nothing(tmp_path, command, imported):
    (tmp_path / f"{imported}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)")
    with start(command, "--help", path=tmp_path) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGINT             # which a shell calls 130
