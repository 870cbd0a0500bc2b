#!/usr/bin/env python3
"""Compute the golden vectors of the distillation zoo with this project, and say how many agree.

    python tests/golden_kd/check.py [--root FOLDER] [--dtype float64|float32] [--only losses/KD nets ...] [-v]

The vectors are unpacked from the archive beside this file, or taken from --root, a folder of the same layout.  One line per method, and
last `N agree, M differ, K not for this runner of T`; exit status 1 if any differs.  README.md describes the formats.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parents[1] / "python")]

import losses  # noqa: E402  the path has to be there first
import networks  # noqa: E402
import steps  # noqa: E402

RESULTS = ("out", "grad", "after", "eval", "train", "stage")             # what keys begin with, beside inputs and states
OUTCOMES = ("agree", "differ", "not for this runner")


class Mismatch(Exception):
    """What was computed is not what the authors' code computed."""


def unpack(folder: Path) -> None:
    """Write the cases that are packed beside this file into `folder`."""
    for path in sorted(HERE.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    shutil.copy(HERE / "list.json", folder)


def compare(found: dict[str, np.ndarray], arrays: dict[str, np.ndarray], case: dict[str, Any], dtype: str) -> None:
    """Every expected array by the rules of README.md.  Raises Mismatch."""
    wide = dtype == "float64"
    for key, want in arrays.items():
        if key.split("/")[0].rstrip("0123456789") not in RESULTS or (case["quirk"] and key.startswith("grad/")):
            continue
        if key not in found:
            raise Mismatch(f"{key} is not computed")
        got = np.asarray(found[key])
        if got.size != want.size:
            raise Mismatch(f"{key}: shape {got.shape}, expected {want.shape}")
        got = got.reshape(want.shape)
        if np.issubdtype(want.dtype, np.integer):
            allowed = np.zeros(want.shape)
        elif key in case["zero"]:
            want, allowed = np.zeros(want.shape), np.full(want.shape, case["zero64"] if wide else case["zero32"])
        else:
            tolerance = case["tol64"] if wide else case["tol32_of"].get(key, case["tol32"])
            of_rows = case["family"] == "steps" and want.ndim == 2 and want.shape[1] == 6
            largest = np.abs(want).max(axis=1, keepdims=True) if of_rows else np.abs(want).max(initial=0)
            allowed = tolerance * (np.abs(want) + 1e-4 * largest if key.endswith("grad_norm") else np.broadcast_to(largest, want.shape))
        away = np.abs(got - want)
        if not (away <= allowed).all():
            i = np.unravel_index(np.argmax(away - allowed), away.shape)
            raise Mismatch(f"{key}: {int((~(away <= allowed)).sum())} of {want.size} differ, as {got[i]:.9g} at {tuple(map(int, i))}, "
                           f"expected {want[i]:.9g}")


def run(folder: Path, dtype: str) -> str | None:
    """Compute one case; the outcome.  Raises Mismatch, or what the project raises."""
    case, arrays, kind = json.loads((folder / "case.json").read_text()), load(folder / "data.npz"), getattr(torch, dtype)
    if case["family"] == "losses" and case["method"] in (*losses.METHODS, "CRD"):
        found = losses.results(case["method"], case["hyper"], arrays, kind)
    elif case["family"] == "nets" and networks.knows(case["net"]):
        images = load(folder.parent / "images.npz")
        found = networks.results(case, next(iter(images.values())), kind)
    elif case["family"] == "steps" and steps.knows(case):
        found = steps.results(case, arrays, kind)
    else:
        return None
    compare(found, arrays, case, dtype)
    return "agree"


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def check(root: Path, dtype: str, only: list[str], verbose: bool) -> int:
    """Run all cases under `root` and print; the number that differ."""
    counts: dict[str, Counter[str]] = {}
    for listed in json.loads((root / "list.json").read_text()):
        name = listed["case"]
        if only and not any(name == each or name.startswith(each.rstrip("/") + "/") for each in only):
            continue
        try:
            outcome, why = run(root / name, dtype) or "not for this runner", ""
        except Exception as error:  # noqa: BLE001  whatever a case makes the project raise is a difference
            outcome, why = "differ", f"{'' if isinstance(error, (Mismatch, ValueError)) else type(error).__name__ + ': '}{error}"
        counts.setdefault(f"{listed['family']}/{listed['method']}", Counter())[outcome] += 1
        if verbose or outcome == "differ":
            print(f"  {name}: {outcome}" + (f": {why}" if why else ""))
    for method, each in counts.items():
        print(f"{method:28s}" + ", ".join(f"{each[outcome]} {outcome}" for outcome in OUTCOMES if each[outcome]))
    total = sum(counts.values(), Counter())
    print(", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES) + f" of {total.total()}")
    return total["differ"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="a folder with cases, instead of those beside this file")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--only", nargs="+", default=[], help="cases or folders of cases, such as losses/KD")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every case")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if a.root is None:
            unpack(Path(folder))
        elif not (a.root / "list.json").is_file():
            parser.error(f"--root {a.root}: there is no list.json in it")
        return int(bool(check(a.root or Path(folder), a.dtype, a.only, a.verbose)))


if __name__ == "__main__":
    sys.exit(main())
