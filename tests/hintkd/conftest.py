"""What tests of runners share: a folder to run in, and stage processes that stay."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from hintkd.run.executor import LocalExecutor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for the module, so that its stage processes can stay."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny.write_data(folder)
    return folder


@pytest.fixture
def workspace(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that tests run in: a small data set, and no runs."""
    monkeypatch.chdir(place)
    yield place
    shutil.rmtree("runs", ignore_errors=True)


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    """One for the module: starting stage processes takes seconds."""
    with LocalExecutor(2) as pool:
        yield pool
