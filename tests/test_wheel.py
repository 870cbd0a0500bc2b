"""hintkd as pip installs it: the README's method of one's own, outside of the checkout, from a wheel in a fresh environment."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from tiny_data import write_lmdb, write_mean

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.slow


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return text


def run(*command: str | Path, cwd: Path) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**inherited, "COLUMNS": "200"}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of a fresh environment that has the wheel; what that needs is the present environment's."""
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"
    for name in ("python", "data_prep", "results/paper"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", place, source, cwd=place)
    (wheel,) = place.glob("hintkd-*.whl")
    venv.create(place / "venv", with_pip=True)
    python = place / "venv/bin/python"
    (packages,) = (place / "venv/lib").glob("python*/site-packages")
    (packages / "needed.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=place)
    return python.parent


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A workspace with the README's files, and a few small images in the place of CIFAR-10."""
    draw = np.random.default_rng(0)
    for part, side in (("train", 40), ("test", 32)):
        images, labels = draw.integers(0, 256, (16, 3, side, side)).astype(np.uint8), draw.integers(0, 10, 16)
        write_lmdb(tmp_path / f"data/few/{part}_lmdb", images, labels)
        write_mean(tmp_path / f"data/few/{part}_mean.binaryproto", images)
    (tmp_path / "my_methods.py").write_text(block("python"))
    (tmp_path / "my-table.yaml").write_text(block("yaml"))
    return tmp_path


def test_the_readmes_method_works_as_it_is_written(installed: Path, study: Path) -> None:
    hintkd = installed / "hintkd"
    where = run(installed / "python", "-c", "import hintkd.cli, torchcaffe; print(hintkd.cli.__file__, torchcaffe.__file__)", cwd=study)
    assert all(path.startswith(str(installed.parent)) for path in where.split())
    assert "prototxts in" in run(hintkd, "generate", "my-table.yaml", "--rows", "top-hint,lambda-falling", "--nets", "1", cwd=study)
    assert (study / "prototxt/cifar10/resnet26-to-resnet14/top-hint/1-hint.prototxt").exists()

    small = ["reproduce", "my-table.yaml", "--data", "data/few", "--scale", "0.0001", "--rows", "hint-kd,top-hint,lambda-falling", "--nets",
             "1", "--device", "cpu", "--set", "teacher.depth=8", "--set", "student.depth=8", "--set", "dataset.batch=4"]
    out = run(hintkd, *small, cwd=study)
    # a teacher, Stage 1 of the middle pair and of the top pair, KD after each, and KD with lambda falling after the first
    assert "6 stages, 0 of them finished" in out
    (results,) = study.glob("results/measured/my-table-*")
    assert {path.parent.name for path in results.glob("*/net1.json")} == {"teacher", "hint-kd", "top-hint", "lambda-falling"}

    (study / "my_methods.py").unlink()                       # what was measured can be looked at all the same
    assert "stages finished" in run(hintkd, "status", cwd=study)
    run(hintkd, "report", cwd=study)
    assert "| top-hint | measured |" in (study / "results/report.md").read_text()
