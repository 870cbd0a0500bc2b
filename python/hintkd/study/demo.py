"""A paper in small: its methods on scikit-learn's digits, in minutes, in a workspace of its own.

It is `hintkd reproduce demo`, or `demo-NAME`, with the data prepared first; what departs from the paper stands in the table and in the
report.
"""
from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from hintkd import limits
from hintkd.errors import UserError
from hintkd.files import new_folder
from hintkd.study.fields import near
from hintkd.study.names import DEMO, demo_names
from hintkd.study.reproduce import Request, reproduce, resources
from hintkd.study.table import find_table


def demo_table(name: str | None) -> str:
    """The table of a demo; of the first one without a name.  Raises UserError if there is none of this name."""
    if name is None:
        return DEMO
    if name not in demo_names():
        raise UserError(f"there is no demo {limits.shown(name)!r}; {near(name, demo_names())}")
    return f"{DEMO}-{name}"


def demo(table: str, workspace: Path, console: Console, jobs: int | None = None) -> bool:
    """Run a demo's table in a folder, which becomes the current one; whether all of it is there now.

    Raises UserError if the folder or the data cannot be made.
    """
    from data_prep import prepare
    before = Path.cwd()
    try:
        with new_folder(workspace):
            os.chdir(workspace)
            try:
                used = resources(device="cpu", jobs=jobs)
                prepare("digits", say=lambda text: console.print(text, highlight=False))
            except BaseException:
                os.chdir(before)
                raise
    except OSError as error:
        raise UserError(f"{workspace}: {error.strerror}; name another folder for the demo") from None
    return reproduce(Request(find_table(table)), used, console)
