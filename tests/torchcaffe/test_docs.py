"""docs/torchcaffe.md: its examples run, from top to bottom, and its tables are up to date."""
from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_golden import CASES, RUNNABLE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/torchcaffe.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files of the page, in which its Python has run."""
    folder = tmp_path_factory.mktemp("docs")
    for kind, text in BLOCKS:
        if kind == "prototxt":
            (folder / text.split()[1]).write_text(text)
    (folder / "page.py").write_text("\n".join(text for kind, text in BLOCKS if kind == "python"))
    run(folder, sys.executable, "page.py")
    return folder


def run(folder, *command):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "PATH": path},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_in_python_run(workplace):
    assert {path.name for path in workplace.iterdir()} >= {"net.prototxt", "stripes.caffemodel", "classify.py", "net.dot"}


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "console"])
def test_commands_print_what_the_page_shows(text, workplace):
    for example in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", text, flags=re.MULTILINE):
        command, output = example
        assert run(workplace, "bash", "-c", command) == output


def test_no_block_is_left_out():
    assert {kind for kind, _ in BLOCKS} == {"python", "prototxt", "console"}


def test_the_tables_are_what_the_golden_run_and_the_list_of_names_give(golden):
    spec = importlib.util.spec_from_file_location("render_torchcaffe", ROOT / "docs/render_torchcaffe.py")
    assert spec and spec.loader
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    results = {case: "ok" if case in RUNNABLE else "skipped" for case in CASES}         # test_golden.py sees to "ok"
    blocks = {"agreement": render.agreement(results, golden), "names": render.names()}
    assert render.filled(PAGE, blocks) == PAGE, "run `python docs/render_torchcaffe.py`"
