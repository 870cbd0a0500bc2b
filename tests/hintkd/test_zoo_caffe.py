"""Every method of the zoo, and teachers for them, with --backend caffe, on a stand-in for a real Caffe that offers numpy blobs alone."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import prepare
from hintkd.methods.method import stages_of
from hintkd.methods.stage import Stage
from hintkd.run.executor import Interpreter, LocalExecutor
from hintkd.run.keys import Numerics
from hintkd.run.plan import Plan
from hintkd.run.runner import Runner
from hintkd.study.table import find_table
from running import Watcher, interpreter, numerics, weights_of

HERE = Path(__file__).parent
TABLE = find_table("demo-zoo")
ROWS = [row.method for row in TABLE.rows]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Stage]]]:
    """Of every row, and of teachers with branches, three iterations on the digits, in a folder of their own."""
    place = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        prepare("digits")
        short = {"iterations": 3, "first_iterations": 2, "head_iterations": 2, "teacher_iterations": 3}
        small, friendly = TABLE.changed(short), find_table("demo-sftn").changed(short)
        yield {**{name: stages_of(small.experiment(name)) for name in ROWS},
               "friendly": stages_of(friendly.experiment("friendly-teacher")),
               "both ways": stages_of(friendly.changed({"branch_gradient": "both"}).experiment("friendly-teacher"))}


def trained(stages: dict[str, list[Stage]], there: Interpreter, how: Numerics) -> dict[str, dict[str, list[np.ndarray]]]:
    """What each row's last stage hands on."""
    plan = Plan([stage for each in stages.values() for stage in each], how)
    with LocalExecutor(1) as pool:
        runner = Runner(pool, there, Watcher())
        runner.run(plan)
    assert not runner.failures
    return {name: weights_of(plan.task(each[-1])) for name, each in stages.items()}


@pytest.mark.slow
def test_every_method_trains_in_numpy_as_in_one_piece(stages: dict[str, list[Stage]], monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path("python-with-caffe").absolute()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    ours = trained(stages, interpreter(), numerics())
    monkeypatch.setenv("PYTHONPATH", str(HERE / "numpy_caffe"))
    there = Interpreter(str(script), str(Path.cwd()))
    assert there.require_caffe() == "caffe 1.0.0-numpy"
    theirs = trained(stages, there, numerics(backend="caffe", engine=there.require_caffe()))
    for name in ours:
        for layer, blobs in theirs[name].items():
            for mine, other in zip(ours[name][layer], blobs, strict=True):
                assert np.abs(mine - other).max() <= 1e-3 * max(1, np.abs(other).max()), f"{name}: {layer}"
