"""benchmarks/gpu_run.sh: each step once, tables in workspaces of their precision, what failed again the next time, one archive."""
from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu_run.sh"
STUB = """#!/usr/bin/env bash
echo "$(basename "$PWD") $*" >> "$STUB_LOG"
case "$*" in
  *prepare*) mkdir -p data/mnist && touch data/mnist/dataset.json ;;
  *reproduce*) mkdir -p results/measured/table3 && touch results/measured/table3/record.json ;;
  *memory.py*) exit 3 ;;
  *profile*) sleep 60 ;;
  *no-torch*) exit 1 ;;
esac
"""


def call(folder: Path, minutes: str = "2", steps: str = "tests memory table3:tf32", check: bool = True, script: Path = SCRIPT,
         **settings: str) -> str:
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = subprocess.run([script, folder / "work", minutes, folder / "out/results.tar.gz"], capture_output=True, text=True, check=check,
                          env={**os.environ, "PYTHON": str(stub), "STUB_LOG": str(folder / "calls"), "STEPS": steps,
                                           "SOURCES": "/files", **settings})
    return done.stdout


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_each_step_is_done_once_and_what_failed_again(tmp_path):
    assert "memory ended with status 3" in call(tmp_path)
    tests, memory, prepare, reproduce = calls(tmp_path)
    assert "tests/torchcaffe/test_gpu.py -k not golden" in tests and "benchmarks/memory.py --device gpu" in memory
    assert prepare == "workspace-tf32 -m hintkd.cli prepare mnist --from /files"
    assert reproduce == "workspace-tf32 -m hintkd.cli reproduce table3 --precision tf32 --device gpu"
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        assert {"results/tf32/measured/table3/record.json", "results/memory.log"} <= set(archive.getnames())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.tar.gz"]
    call(tmp_path)
    assert calls(tmp_path)[4:] == [memory]


def test_a_step_is_stopped_at_its_limit_and_the_next_one_begins(tmp_path):
    script = tmp_path / "repository/benchmarks/gpu_run.sh"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text().replace("[profile]=45", "[profile]=1"))
    script.chmod(0o755)
    output = call(tmp_path, steps="profile changes", script=script)
    assert "profile took longer than 1 s" in output and "Everything is done" in output and len(calls(tmp_path)) == 2
    assert [path.name for path in (tmp_path / "work/done").iterdir()] == ["changes"]


def test_wheels_are_installed_first_and_nothing_is_tried_without_what_is_needed(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/no-torch-1.whl").touch()
    output = call(tmp_path, steps="start tests", check=False, WHEELS=str(tmp_path / "wheels"))
    assert "start ended with status 1" in output and len(calls(tmp_path)) == 1
    assert f"--no-index --no-deps --no-compile --upgrade --target {tmp_path}/work/site" in calls(tmp_path)[0]


def test_tables_stop_a_minute_before_the_slice_is_over(tmp_path):
    assert call(tmp_path, minutes="1", steps="tests table3:tf32").splitlines()[-1] == "The slice is over; table3:tf32 is next."


def test_a_slice_that_is_over_says_what_is_next(tmp_path):
    assert call(tmp_path, minutes="0") == "The slice is over; tests is next.\n"


def test_a_step_that_is_unknown(tmp_path):
    assert "table9x ended with status 2" in call(tmp_path, steps="table9x")


def test_without_a_folder_it_explains_itself():
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "benchmarks/gpu_run.sh WORK [MINUTES] [ARCHIVE]" in done.stderr
