"""Where tables lie and what they and their changed copies are called, without reading any: what a shell completes must come at once."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DEMO = "demo"                                                # the table of the first demo; others are called demo-NAME
FOLDERS = (Path("results/paper"),                            # of the workspace; of the installed package; of a checkout
           Path(__file__).parents[1] / "paper", Path(__file__).parents[3] / "results" / "paper")


def table_names() -> list[str]:
    """The names that `find_table` knows, in the paper's order."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")}, key=in_order)


def demo_names() -> list[str]:
    """What `hintkd demo` takes: the tables called demo-NAME."""
    return [name.removeprefix(DEMO + "-") for name in table_names() if name.startswith(DEMO + "-")]


def in_order(name: str) -> tuple[bool, str, int]:
    """What sorts tables before figures, and both by their numbers."""
    found = re.match(r"(\D*)(\d{0,9})", name)
    assert found
    return not name.startswith("table"), found[1], int(found[2] or 0)


def in_a_name(what: str, value: Any) -> str:
    """What was set, as part of a folder's name: teacher32, my-teacher, lambda-3, shortcut-B."""
    if what in ("teacher.depth", "student.depth"):
        return f"{what.partition('.')[0]}{value}"
    if what == "teacher.weights":
        return Path(value).stem
    shown = "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return re.sub(r"[^\w.]+|_", "-", f"{what}-{shown}").replace(".", "-" if "." in what else ".").strip("-")
