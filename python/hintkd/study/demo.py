"""The main job in small: every method on scikit-learn's digits, in minutes, in a workspace of its own.

It is `hintkd reproduce demo` with the data prepared first; what departs from the paper stands in demo.yaml and in the report.
"""
from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from hintkd.errors import UserError
from hintkd.files import new_folder
from hintkd.study.reproduce import Request, reproduce, resources
from hintkd.study.table import find_table


def demo(workspace: Path, console: Console, jobs: int | None = None) -> bool:
    """Run the demo in a folder, which becomes the current one; whether all of it is there now.

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
    return reproduce(Request(find_table("demo")), used, console)
