#!/usr/bin/env python3
"""Writes the tables of torchcaffe.md: what agrees with BVLC Caffe, from a run of the golden vectors, and pycaffe's names with their tests.

    python docs/render_torchcaffe.py            from the repository's root; half a minute

A test compares the tables with what this program would write.
"""
from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/torchcaffe.md"
sys.path[:0] = [str(ROOT / folder) for folder in ("python", "tests/golden", "tests/torchcaffe")]

import check  # noqa: E402
import torchcaffe  # noqa: E402
from pycaffe_names import NAMES  # noqa: E402
from torchcaffe.layers import LAYERS  # noqa: E402

MODULES = {"vision": "convolution, pooling, LRN, Im2col", "neuron": "activations, powers, Dropout", "norm": "BatchNorm, Scale, MVN",
           "loss": "losses and Accuracy", "shape": "shapes, splits and selections", "arithmetic": "products, sums, reductions, Embed",
           "recurrent": "recurrent layers", "input": "inputs", "python": "Python layers"}
FAMILIES = {"nets": "whole nets",
            "solvers": "solvers: 20 iterations, snapshots in both formats, and 5 iterations after restoring Caffe's own",
            "data_layer": "data layers", "proto": "weight files, old and new, loaded into a net",
            "messages": "old prototxts upgraded, blobs, records and weight files read"}


def family(case: str) -> str:
    """The row of the table that a case belongs to."""
    first, second, *_ = case.split("/")
    if first == "layers":
        return "layers: " + MODULES[LAYERS[second].__module__.rpartition(".")[2]]
    return FAMILIES[first]


def agreement(results: dict[str, str], folder: Path) -> str:
    """Cases per family, how many of them agree and within what; `results` as check.run_all returns them, for the cases under `folder`.

    What is not for that runner (messages, upgrades) is compared by tests of its own, exactly.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    tolerances: defaultdict[str, set[tuple[float, float]]] = defaultdict(set)
    for case, result in results.items():
        if result == "skipped":
            counts[FAMILIES["messages"]].update(["cases", "ok"])
            tolerances[FAMILIES["messages"]].add((0, 0))
            continue
        counts[family(case)].update(["cases", check.outcome(result)])
        settings = json.loads((folder / case / "case.json").read_text())
        if "rtol" in settings:
            tolerances[family(case)].add((settings["rtol"], settings["atol"]))
        elif case.startswith("proto/"):
            tolerances[family(case)].add((0, 0))
    order = {f"layers: {name}": i for i, name in enumerate(MODULES.values())} | {name: 100 + i for i, name in enumerate(FAMILIES.values())}
    rows = [[name, str(counts[name]["cases"]), str(counts[name]["ok"]), _tolerance(tolerances[name])]
            for name in sorted(counts, key=order.__getitem__)]
    total = sum(map(Counter, counts.values()), Counter())
    return table(["family", "cases", "agree", "relative + absolute tolerance"], *rows, ["all", str(total["cases"]), str(total["ok"]), ""])


def _tolerance(found: set[tuple[float, float]]) -> str:
    if not found:
        return "facts about random draws"
    least, most = min(found), max(found)
    words = ["exact" if pair == (0, 0) else f"{pair[0]:g} + {pair[1]:g}" for pair in dict.fromkeys((least, most))]
    return " to ".join(words)


def names() -> str:
    """pycaffe's names, each with the test that uses it."""
    return table(["name", "used by"], *([f"`{name}`", f"{test.replace('::', ' ')}"] for name, test in sorted(NAMES.items(), key=_key)))


def _key(item: tuple[str, str]) -> tuple[str, str]:
    owner, _, name = item[0].rpartition(".")
    return owner, name.lower()


def table(*rows: Iterable[str]) -> str:
    """Rows of cells, the first of them the head, as a Markdown table."""
    head, *others = (list(row) for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *others))


def filled(page: str, blocks: dict[str, str]) -> str:
    """The page with what stands between `<!-- NAME -->` and `<!-- end -->` written anew."""
    return re.sub(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{blocks[found[2]]}{found[3]}", page, flags=re.DOTALL)


def main() -> None:
    check.caffe = torchcaffe
    torchcaffe.init_log(2)
    with tempfile.TemporaryDirectory() as folder:
        check.unpack(folder)
        results = check.run_all(Path(folder), [], verbose=False)
        PAGE.write_text(filled(PAGE.read_text(), {"agreement": agreement(results, Path(folder)), "names": names()}))


if __name__ == "__main__":
    main()
