"""Log lines as BVLC Caffe writes them: glog's prefix and the message, to standard error.

Tools that read Caffe's logs take the time from the prefix, so it is glog's to the column:
`I1120 21:05:28.123456 12345 solver.cpp:218] Iteration 100, loss = 0.5` is severity, month and day, time of day, process and
the place in Caffe's source that says the same.  What the lines say belongs to those who call `info`.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from torch import Tensor

INFO, WARNING, ERROR = range(3)


def _level_from_environment() -> int:
    """GLOG_minloglevel, with which pycaffe's users silence it before the import."""
    value = os.environ.get("GLOG_minloglevel", "")
    return int(value) if value.isdigit() else INFO


_level = _level_from_environment()


def init_log(level: int = INFO) -> None:
    """Write only lines of at least this severity: 0 information, 1 warnings, 2 errors (pycaffe's init_log)."""
    global _level
    _level = level


@contextmanager
def silent() -> Iterator[None]:
    """Write errors only."""
    global _level
    before, _level = _level, ERROR
    try:
        yield
    finally:
        _level = before


def _write(severity: int, message: str, source: str) -> None:
    if severity < _level:
        return
    now = datetime.now()
    prefix = f"{'IWE'[severity]}{now:%m%d %H:%M:%S.%f} {os.getpid():5d} {source}] "
    sys.stderr.write(prefix + message + "\n")
    sys.stderr.flush()


def info(message: str, source: str = "solver.cpp:0") -> None:
    """One line of what happens; `source` is the file and line of Caffe that prints it."""
    _write(INFO, message, source)


def outputs(what: str, values: Mapping[str, Tensor], loss_weights: Mapping[str, float], source: str) -> None:
    """A net's outputs, every element of each on a line of its own, numbered throughout; `what` net, "Train" or "Test"."""
    elements = [(name, value) for name, tensor in values.items() for value in tensor.reshape(-1).tolist()]
    for number, (name, value) in enumerate(elements):
        weight = loss_weights[name]
        note = f" (* {weight:g} = {weight * value:g} loss)" if weight else ""
        info(f"    {what} net output #{number}: {name} = {value:g}{note}", source)


def log(message: str) -> None:
    """A line of the user's own, as pycaffe's `caffe.log` writes it."""
    _write(INFO, message, "_caffe.cpp:0")


def warning(message: str, source: str = "solver.cpp:0") -> None:
    """One line about something that is probably not meant."""
    _write(WARNING, message, source)


def error(message: str, source: str = "solver.cpp:0") -> None:
    """One line about something that was wrong and passed over."""
    _write(ERROR, message, source)
