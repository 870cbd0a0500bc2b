"""Class probabilities beside records: what is kept of them, and the ensembles that are made of what is kept."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hintkd.errors import Damaged, UserError
from hintkd.study.probabilities import ensemble, keep, read


def write(path: Path, probabilities: list[list[float]], labels: list[int]) -> Path:
    keep(path, np.log(np.array(probabilities)), np.array(labels))
    return path


def test_what_is_kept_is_the_softmax_to_a_thousandth(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    scores, labels = draw.normal(size=(50, 7, 1, 1)).astype(np.float32), draw.integers(0, 7, (50, 1))
    keep(tmp_path / "a/net1.npz", scores, labels)
    probabilities, found = read(tmp_path / "a/net1.npz")
    exact = np.exp(scores.reshape(50, 7)) / np.exp(scores.reshape(50, 7)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, exact, atol=0.0005001)
    assert found.tolist() == labels.reshape(-1).tolist()


def test_large_scores_do_not_overflow(tmp_path: Path) -> None:
    keep(tmp_path / "net1.npz", np.array([[1e4, 0.0], [-1e4, 0.0]], np.float32), np.array([0, 1]))
    assert read(tmp_path / "net1.npz")[0].tolist() == [[1, 0], [0, 1]]


def test_the_same_probabilities_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, [[0.9, 0.1]], [0]).read_bytes() for name in ("one.npz", "two.npz"))
    assert one == two


def test_nets_that_err_on_different_images_are_better_together(tmp_path: Path) -> None:
    first = write(tmp_path / "net1.npz", [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [0, 1, 0])
    second = write(tmp_path / "net2.npz", [[0.4, 0.6], [0.1, 0.9], [0.3, 0.7]], [0, 1, 0])
    assert ensemble([first]) == 1 / 3
    assert ensemble([first, second]) == 2 / 3


def test_nets_of_other_images_and_damaged_files_are_refused(tmp_path: Path) -> None:
    first, other = write(tmp_path / "net1.npz", [[0.9, 0.1]], [0]), write(tmp_path / "net2.npz", [[0.9, 0.1]], [1])
    with pytest.raises(UserError, match="net2.npz: was tested on other images than .*net1.npz"):
        ensemble([first, other])
    other.write_bytes(first.read_bytes()[:40])
    with pytest.raises(Damaged, match="net2.npz is damaged"):
        ensemble([first, other])


def test_what_lies_there_and_is_whole_stays(tmp_path: Path) -> None:
    path, scores, labels = tmp_path / "net1.npz", np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([1, 0])
    assert keep(path, scores, labels) == [f"{path} is missing"]
    before = path.stat().st_mtime_ns
    assert keep(path, scores, labels) == [] and path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:40])
    assert keep(path, scores, labels) == [f"{path} is damaged"]
    assert keep(path, scores, 1 - labels) == [f"{path} is damaged"]          # of another net
    assert read(path)[1].tolist() == [0, 1]
