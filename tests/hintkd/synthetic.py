"""Made-up records for tests of the report: what hintkd.study.record writes, with results that a test chooses."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hintkd.backend import engine
from hintkd.experiment import Experiment
from hintkd.methods.method import stages_of
from hintkd.study.probabilities import keep
from hintkd.study.record import fixed, hint_layers
from hintkd.study.table import Table

PROVENANCE = {"machine": "Linux x86_64", "cpu": "a processor", "cores": 2, "threads": 1, "device": "cpu", "gpu": None, "precision": "fp32",
              "python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6", "engine": engine("torchcaffe"), "backend": "torchcaffe",
              "commit": "0123456789abcdef", "dirty": False, "started": "2024-05-17T12:30:00+0000", "finished": "2024-05-17T12:40:00+0000",
              "data_fingerprint": {}}


def curve(first: float, last: float, iterations: int, points: int = 100) -> list[list[float]]:
    """An exponential fall (or rise) from the first value to, nearly, the last."""
    return [[round(iterations * k / points), last + (first - last) * math.exp(-6 * k / points)] for k in range(points + 1)]


def record(x: Experiment, accuracy: float, repeat: int = 1, **changed: Any) -> dict[str, Any]:
    """One record with this accuracy (a fraction) after the last iteration, the best 0.001 above it; `changed` replaces entries."""
    stages, found = stages_of(x), []
    for stage in stages:
        count, last = stage.solver.max_iter, stage is stages[-1]
        outputs = [layer.top[0] for layer in stage.net.layer if layer.name.endswith("_loss")]
        test = {"kd_loss": curve(13.0, 8 - accuracy, count, 40)} if x.test_loss and "kd_loss" in outputs else {}
        train = {name: curve(100.0, 100 * (0.3 if len(outputs) == 1 else 0.4), count) for name in outputs}
        found.append({"title": stage.title, "key": stage.digest, "iterations": count, "wall_s": 10.0, "resumed": 0, "inexact": False,
                      "random_seed": stage.solver.random_seed, "lr": [[0, stage.solver.base_lr]],
                      "loss": curve(12.0, 7 - accuracy, count), "train": train,
                      "hints": hint_layers(stage.net),
                      "test": {"accuracy": curve(0.1, accuracy, count, 40), **test} if last else {},
                      "last": {"accuracy": accuracy} if last else {}, "weights": "runs/weights/somewhere.caffemodel"})
    return {"schema": 1, "table": x.table, "row": x.name, "method": x.method.name, "net": x.net, "repeat": repeat,
            "scale": x.scale, "seed": x.seed,
            "options": x.options.as_dict(), "choices": fixed(x), "metric": "accuracy", "last": {"accuracy": accuracy},
            "best": {"accuracy": {"value": accuracy + 0.001, "iteration": 5}}, "iterations": [each["iterations"] for each in found],
            "wall_s": 12.0, "stages": found, "provenance": PROVENANCE, "scaled_from": {}, **changed}


def measure(root: Path, table: Table, values: Mapping[str, Sequence[float]], scale: float = 1.0, repeat: int = 1, folder: str | None = None,
            images: int = 0, **changed: Any) -> None:
    """Write records into root/results/measured: row -> one value per net, in percent of the table's metric.

    images    so many that class probabilities are kept of
    """
    name = folder or table.name + (f"-scale{scale:g}" if scale != 1 else "")
    for x in table.experiments(rows=list(values), scale=scale, repeat=repeat):
        given = values.get(x.name, ())
        if x.net <= len(given):
            percent = given[x.net - 1] if table.metric == "accuracy" else 100 - given[x.net - 1]
            path = root / "results/measured" / name / (f"repeat{repeat}" if repeat > 1 else "") / x.name / f"net{x.net}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record(x, percent / 100, repeat, **changed)))
            if images:
                keep_right(path.with_suffix(".npz"), images, round(percent / 100 * images), x.net)


def keep_right(path: Path, images: int, right: int, net: int) -> None:
    """Class probabilities of a net that is sure of two classes and right on so many of its images, wrong on the last ones of its turn."""
    wrong = np.roll(np.arange(images) >= right, net * (images - right))
    keep(path, np.where(wrong[:, None], [0.0, 1.0], [1.0, 0.0]), np.zeros(images))


def published(table: Table) -> dict[str, list[float]]:
    """The table's own published values, as if they had been measured."""
    found = {name: (table.published(name), table.published_mean(name)) for name in table.names}
    return {name: list(values) or [mean] * table.nets_of(name) for name, (values, mean) in found.items() if mean is not None}
