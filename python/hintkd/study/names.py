"""Where tables lie and what they are called, without reading any: what a shell completes must come at once."""
from __future__ import annotations

import re
from pathlib import Path

FOLDERS = (Path("results/paper"),                            # of the workspace; of the installed package; of a checkout
           Path(__file__).parents[1] / "paper", Path(__file__).parents[3] / "results" / "paper")


def table_names() -> list[str]:
    """The names that `find_table` knows, in the paper's order."""
    def order(name: str) -> tuple[str, int]:
        found = re.fullmatch(r"(\D*)(\d*)", name)
        return (found[1], int(found[2] or 0)) if found else (name, 0)
    names = {path.stem for folder in FOLDERS for path in folder.glob("*.yaml")}
    return sorted(names, key=lambda name: (not name.startswith("table"), *order(name)))
