"""Methods in a file of one's own: a table in a folder of its own, with a loss of its own, trained on the digits at a hundredth."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from hintkd import cli
from hintkd.errors import UserError
from hintkd.methods import papers
from hintkd.study.table import find_table, load_table

PYTHON = Path(cli.__file__).parents[1]
TABLE = """
title: Mine
source: me
methods: my_methods.py
dataset: digits
teacher: {depth: 8, widths: [2, 2, 4], dataset: digits-teacher}
student: {depth: 8, widths: [2, 2, 4]}
nets: 1
rows:
  - {name: pulled, method: pull, set: {lambda: 2}}
  - {name: pulled-harder, method: pull, set: {lambda: 20, shortcut: B}}
  - {method: kd}
claims:
  - pulled > kd
"""
METHODS = '''
"""Pulls a student's scores to its teacher's."""
from hintkd.methods.common import solver
from hintkd.methods.method import method, teacher_weights
from hintkd.methods.stage import Stage
from hintkd.nets import stages as nets, surgery


@method
def pull(x):
    """Labels, and the distance between the scores."""
    net = nets.plain_net(x)
    teacher, taps = nets.teacher_net(x)
    net.layer.extend(surgery.teacher_layers(teacher, [taps.logits]))
    bottoms = [nets.student_taps(x).logits, "teacher/" + taps.logits]
    nets.add_python_loss(net, "pull_loss", "my_losses", "Pull", bottoms, weight=x.lambda_)
    return [Stage.solve("pull", net, solver(x, x.scaled_schedule.iterations, x.net_seed, 0.01), (teacher_weights(x),), ("teacher/",))]
'''
LOSSES = '''
import caffe
import numpy as np


class Pull(caffe.Layer):
    """The mean squared distance."""

    def setup(self, bottom, top):
        pass

    def reshape(self, bottom, top):
        top[0].reshape(1)

    def forward(self, bottom, top):
        top[0].data[...] = np.square(bottom[0].data - bottom[1].data).mean()

    def backward(self, top, propagate_down, bottom):
        bottom[0].diff[...] = top[0].diff[0] * 2 * (bottom[0].data - bottom[1].data) / bottom[0].count

    def forward_torch(self, bottoms, blobs):
        return (bottoms[0] - bottoms[1]).square().mean().reshape(1)
'''


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with a table, its methods and their loss."""
    folder = tmp_path / "study"
    folder.mkdir()
    for name, text in (("mine.yaml", TABLE), ("my_methods.py", METHODS), ("my_losses.py", LOSSES)):
        (folder / name).write_text(text)
    return folder


def hintkd(place: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "hintkd.cli", *arguments], cwd=place, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PYTHON), str(PYTHON.parent)]), "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def test_two_rows_of_a_method_are_trained_and_shown_even_when_its_file_is_gone(study: Path) -> None:
    place = study.parent
    hintkd(place, "prepare", "digits")
    small = ["reproduce", "study/mine.yaml", "--device", "cpu", "--scale", "0.01"]
    out = hintkd(place, *small)
    assert "6 stages, 0 of them finished" in out and "pulled-harder" in out
    records = {name: json.loads((place / f"results/measured/mine-scale0.01/{name}/net1.json").read_text())
               for name in ("pulled", "pulled-harder", "kd")}
    assert {name: (r["row"], r["method"], r["choices"]["lambda"], r["options"]["shortcut"]) for name, r in records.items()} == {
        "pulled": ("pulled", "pull", 2.0, "A"), "pulled-harder": ("pulled-harder", "pull", 20.0, "B"), "kd": ("kd", "kd", 5.0, "A")}
    assert records["pulled"]["stages"][0]["train"]["pull_loss"]

    for file in ("my_methods.py", "my_losses.py"):           # a comment trains nothing again
        (study / file).write_text("# a comment\n" + (study / file).read_text())
    assert "6 stages, 6 of them finished" in hintkd(place, *small, "--dry-run")
    out = hintkd(place, "status")
    assert "6 of 6 stages finished" in out and "pulled-harder net1's teacher finished" in out
    (study / "my_methods.py").write_text(METHODS.replace("0.01", "0.02"))
    assert "6 stages, 4 of them finished" in hintkd(place, *small, "--dry-run")         # the package's own stages are the same
    assert re.search(r"pulled net1: pull changed was finished, and would run again, because of .*my_methods.py", hintkd(place, "status"))

    (study / "my_methods.py").unlink()
    assert "5 of 5 stages finished" in hintkd(place, "status")
    hintkd(place, "report")
    report = (place / "results/report.md").read_text()
    assert "| pulled-harder | measured |" in report and "`pulled > kd`" in report


def test_results_of_a_file_that_is_gone_cannot_be_made_but_read(study: Path, tmp_path: Path) -> None:
    table = load_table(study / "mine.yaml")
    copy = tmp_path / "elsewhere/table.yaml"
    copy.parent.mkdir()
    copy.write_text(table.dump(copy.parent))
    assert "methods: ../study/my_methods.py" in copy.read_text() and load_table(copy) == table
    (study / "my_methods.py").unlink()
    with pytest.raises(UserError, match=r"study/my_methods.py: there is no such file of methods"):
        load_table(copy)
    shown = load_table(copy, shown=True)
    assert shown.names == table.names and shown.missing.endswith("my_methods.py") and shown.method("kd") is None
    with pytest.raises(UserError, match="is gone; put it there"):
        shown.experiments()


@pytest.mark.parametrize(("text", "sentence"), [
    ("import nothing_like_it", r"my_methods.py:1: ModuleNotFoundError: No module named 'nothing_like_it'"),
    ("x = (", r"my_methods.py:1: SyntaxError"),
    ("def helper():\n    raise ValueError('no')\n\nhelper()", r"my_methods.py:2: ValueError: no"),
])
def test_a_file_that_cannot_be_run_is_a_sentence_with_its_line(study: Path, text: str, sentence: str) -> None:
    (study / "my_methods.py").write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        load_table(study / "mine.yaml")
    assert "\n" not in str(error.value)


def test_an_unknown_method_is_named_with_the_nearest(study: Path) -> None:
    (study / "mine.yaml").write_text(TABLE.replace("method: pull,", "method: pul,"))
    with pytest.raises(UserError, match=r"rows\[0\].method: 'pul' is not a method; did you mean 'pull'"):
        load_table(study / "mine.yaml")


def test_an_installed_package_brings_methods_by_its_entry_point(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(study))
    (study / "mine.yaml").write_text(TABLE.replace("my_methods.py", "pulling"))
    with pytest.raises(UserError, match=r"'pulling' is no file that ends in .py, and no entry point of the group hintkd.methods"):
        load_table(study / "mine.yaml")
    found = EntryPoints([EntryPoint("pulling", "my_methods", papers.GROUP)])
    monkeypatch.setattr(papers, "entry_points", lambda group: found)
    x = load_table(study / "mine.yaml").experiment("pulled")
    assert x.method.name == "pull" and x.method.source == "my_methods"


def test_options_and_schedule_of_ones_own_take_the_papers_place(study: Path) -> None:
    (study / "my_methods.py").write_text(METHODS + '''

from dataclasses import dataclass
from hintkd.experiment import option
from hintkd.methods import hint_2019


@dataclass(frozen=True)
class Options(hint_2019.Options):
    """One more."""
    push: bool = option(False, False, True)
''')
    (study / "mine.yaml").write_text(TABLE.replace("shortcut: B", "push: true"))
    table = load_table(study / "mine.yaml")
    assert [table.experiment(name).options.as_dict()["push"] for name in ("pulled", "pulled-harder")] == [False, True]
    assert "push" not in find_table("table1").default_options()
