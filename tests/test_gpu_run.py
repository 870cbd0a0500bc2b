"""benchmarks/gpu_run.sh: each step once, tables in workspaces of their precision, what failed again the next time."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu_run.sh"
STUB = """#!/usr/bin/env bash
echo "$(basename "$PWD") $*" >> "$STUB_LOG"
case "$*" in
  *prepare*) mkdir -p data/mnist && touch data/mnist/dataset.json ;;
  *reproduce*) mkdir -p results/measured/table3 && touch results/measured/table3/record.json ;;
  *memory.py*) exit 3 ;;
esac
"""


def call(folder: Path, minutes: str = "1", steps: str = "tests memory table3:tf32") -> str:
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = subprocess.run([SCRIPT, folder / "out", minutes], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHON": str(stub), "STUB_LOG": str(folder / "calls"), "STEPS": steps, "SOURCES": "/files"})
    return done.stdout


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_each_step_is_done_once_and_what_failed_again(tmp_path):
    assert "memory ended with status 3" in call(tmp_path)
    tests, memory, prepare, reproduce = calls(tmp_path)
    assert "-m pytest -q -m gpu" in tests and "benchmarks/memory.py --device gpu" in memory
    assert prepare == "workspace-tf32 -m hintkd.cli prepare mnist --from /files"
    assert reproduce == "workspace-tf32 -m hintkd.cli reproduce table3 --precision tf32 --device gpu"
    assert (tmp_path / "out/results/tf32/measured/table3/record.json").exists()
    call(tmp_path)
    assert calls(tmp_path)[4:] == [memory]


def test_a_slice_that_is_over_says_what_is_next(tmp_path):
    assert call(tmp_path, minutes="0") == "The slice is over; tests is next.\n"


def test_a_step_that_is_unknown(tmp_path):
    assert "table9x ended with status 2" in call(tmp_path, steps="table9x")


def test_without_a_folder_it_explains_itself():
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "benchmarks/gpu_run.sh OUT [MINUTES]" in done.stderr
