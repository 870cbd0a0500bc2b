"""What the authors' own code of the distillation zoo computes, computed here: a test for each case, in float64 and in float32."""
from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parents[1] / "golden_kd"


def load() -> ModuleType:
    sys.path.insert(0, str(HERE))
    try:
        spec = importlib.util.spec_from_file_location("golden_kd_check", HERE / "check.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(HERE))


check = load()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("golden_kd")
    check.unpack(folder)
    return folder


CASES, NETS, STEPS = ([case["case"] for case in json.loads((HERE / "list.json").read_text()) if case["family"] == family]
               for family in ("losses", "nets", "steps"))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_is_the_authors(root: Path, case: str, dtype: str) -> None:
    assert check.run(root / case, dtype) == "agree"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", NETS)
def test_a_network_is_the_authors(root: Path, case: str, dtype: str) -> None:
    assert check.run(root / case, dtype) == "agree"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", STEPS)
def test_two_iterations_of_a_method_are_the_authors(root: Path, case: str, dtype: str) -> None:
    assert check.run(root / case, dtype) in ("agree", None)


@pytest.mark.parametrize("case", ["kd_resnet8_from_resnet14", "abound_wrn_16_1_from_wrn_16_2", "oh_10_1_from_10_2",
                                  "crd_resnet8_from_resnet8x4", "sskd_resnet8_from_wrn_16_2"])
def test_two_iterations_in_one_piece_are_the_authors(root: Path, case: str) -> None:
    import torch
    told = json.loads((root / f"steps/{case}/case.json").read_text())
    arrays = check.load(root / f"steps/{case}/data.npz")
    check.compare(check.steps.results(told, arrays, torch.float64, fast=True), arrays, told, "float64")


def test_the_runner_counts_what_differs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    import numpy as np
    shutil.copytree(root / "losses/KD/base", tmp_path / "losses/KD/base")
    (tmp_path / "list.json").write_text(json.dumps([{"case": "losses/KD/base", "family": "losses", "method": "KD", "quirk": False}]))
    arrays = dict(np.load(tmp_path / "losses/KD/base/data.npz"))
    np.savez(tmp_path / "losses/KD/base/data.npz", **{**arrays, "out/loss": arrays["out/loss"] * 1.00001})
    assert check.check(tmp_path, "float64", [], False) == 1
    assert capsys.readouterr().out.endswith("0 agree, 1 differ, 0 not for this runner of 1\n")


@pytest.mark.parametrize("case", ["losses/SP/zero_student", "losses/RKD/duplicate_student", "losses/PKT/zero_student"])
def test_degenerate_inputs_have_finite_gradients(root: Path, case: str) -> None:
    import numpy as np
    import torch
    told = json.loads((root / case / "case.json").read_text())
    found = check.losses.results(told["method"], told["hyper"], dict(np.load(root / case / "data.npz")), torch.float64)
    gradients = [array for key, array in found.items() if key.startswith("grad/")]
    assert gradients and all(np.abs(array).max() < 1e6 for array in gradients)
