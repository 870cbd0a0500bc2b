"""What all tests share: one thread, the golden vectors, and real data sets where there are some."""
from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"               # before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")           # of processes that tests start, too

import pytest
import torch
from hypothesis import HealthCheck, settings

import check

torch.set_num_threads(1)
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])     # the machine may be busy
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where torch finds no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the golden vectors, unpacked (tests/golden/README.md)."""
    folder = tmp_path_factory.mktemp("golden")
    check.unpack(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with publishers' files: mnist/*-ubyte.gz, cifar-10-batches-bin/*.bin, cifar-100-binary/*.bin."""
    if "HINTKD_TEST_DATA" not in os.environ:
        pytest.skip("HINTKD_TEST_DATA names no folder with publishers' files")
    return Path(os.environ["HINTKD_TEST_DATA"])
