"""What a GPU would record and what the host still does there, on a stand-in for a GPU: needs a Python with a CUDA build of torch.

HINTKD_CUDA_PYTHON names it where it is not the one that runs the tests.  The numbers are tests/torchcaffe/test_gpu.py's business.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import standin

HERE = Path(__file__).resolve().parent
PYTHON = os.environ.get("HINTKD_CUDA_PYTHON", sys.executable)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return standin.build(PYTHON, tmp_path_factory.mktemp("standin"))
    except standin.Missing as missing:
        pytest.skip(f"{missing}; HINTKD_CUDA_PYTHON names another Python")


def found(library: Path, name: str, forbidden: bool = False) -> dict[str, Any]:
    """What a check of gpu_standin/checks.py finds; nothing may happen in its captures that is not allowed there."""
    done = subprocess.run([PYTHON, HERE / "gpu_standin/checks.py", name], env={**standin.environment(library), "GLOG_minloglevel": "2"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result.pop("check") == name and bool(result.pop("violations")) == forbidden
    return result


def test_an_iteration_of_a_student_under_a_teacher_is_recorded_and_short(library: Path) -> None:
    nodes = found(library, "kernels")
    assert 0 < nodes["fp32"] == nodes["tf32"] <= 230 and 0 < nodes["bf16"] <= 340


def test_the_host_starts_an_iteration_and_waits_for_nothing(library: Path) -> None:
    host = found(library, "host")
    assert host["recorded"] and host["iteration"] == host["looked"] == {"graphs": 1, "waits": 0, "copies": 0, "all": 3}
    assert host["test of 8"]["graphs"] == 8 and host["test of 8"]["waits"] == host["test of 4"]["waits"]


@pytest.mark.parametrize("check", ["orders", "rules", "together"])
def test_whatever_came_before_iterations_are_recorded_and_go_on_as_they_should(library: Path, check: str) -> None:
    assert {name for name, holds in found(library, check).items() if not holds} == set()


def test_shuffled_records_and_losses_that_draw_are_recorded_for_whole_batches_and_for_short_ones(library: Path) -> None:
    for each in found(library, "shuffled").values():
        assert each["recorded"] and each["recordings"] == 2
        assert each["iterations"] == 3 * [{"graphs": 1, "waits": 0, "copies": 0, "all": each["iterations"][0]["all"]}]


def test_a_recording_that_fails_leaves_nothing_behind(library: Path) -> None:
    assert found(library, "refused", forbidden=True) == {
        "recorded": False, "iterations": 2, "recordings": 2, "going on": 0, "stream stays": True, "another recorded": True,
        "more violations": []}


def test_every_layer_has_kernels_forward_and_backward(library: Path) -> None:
    layers = found(library, "layers")
    assert layers["tried"] > 40 and layers["failed"] == {}


def test_all_parameters_are_updated_in_a_few_kernels_whatever_their_shapes(library: Path) -> None:
    shapes = found(library, "shapes")
    assert shapes["recorded"] and shapes["update"]["all"] <= 4


def test_every_net_of_every_table_is_recorded(library: Path) -> None:
    tables = found(library, "tables")
    assert tables["recorded"] > 50 and tables["others"] == []


@pytest.mark.parametrize("part", ["recorded", "changes", "together"])
def test_what_is_to_be_measured_on_a_gpu_runs(library: Path, part: str, tmp_path: Path) -> None:
    done = subprocess.run([PYTHON, HERE.parent / "benchmarks/gpu.py", part, "--output", tmp_path / "found.json"], check=False,
                          env={**standin.environment(library), "GLOG_minloglevel": "2"}, capture_output=True, text=True)
    content = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == (part == "recorded"), done.stderr
    assert "recorded" not in content.get("fails", [])                   # the other failures are numbers, which no kernel has computed


def test_the_stage_program_trains_alone_in_a_group_and_measures(library: Path) -> None:
    assert found(library, "stages") == {"alone": 60, "group": [60, 60], "probe": True, "not replayed": []}
