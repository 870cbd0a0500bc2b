"""Log lines against the pattern by which Caffe's own log parser reads them."""
import os
import re

import pytest

from torchcaffe.glog import _level_from_environment, error, info, init_log, log, warning


@pytest.fixture(autouse=True)
def all_levels():
    init_log(0)
    yield
    init_log(0)


def test_prefix_is_glogs(capfd):
    info("Iteration 100, loss = 0.5", "solver.cpp:218")
    line = capfd.readouterr().err
    assert re.fullmatch(r"I\d{4} \d\d:\d\d:\d\d\.\d{6} +" + str(os.getpid()) + r" solver\.cpp:218\] Iteration 100, loss = 0\.5\n", line)


def test_severities(capfd):
    info("a")
    warning("b")
    error("c")
    log("d")
    assert [line[0] for line in capfd.readouterr().err.splitlines()] == ["I", "W", "E", "I"]


def test_init_log_sets_the_least_severity(capfd):
    init_log(1)
    info("a")
    warning("b")
    assert capfd.readouterr().err.endswith("b\n")
    init_log(2)
    warning("b")
    assert capfd.readouterr().err == ""


def test_the_environment_sets_the_least_severity(monkeypatch):
    for value, level in (("2", 2), ("", 0), ("much", 0)):
        monkeypatch.setenv("GLOG_minloglevel", value)
        assert _level_from_environment() == level


def test_nothing_goes_to_standard_output(capfd):
    info("a")
    assert capfd.readouterr().out == ""
