"""What to do where an optional package is missing: a command that can be copied, for the Python that runs, from where the user stands."""
from __future__ import annotations

import os
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path


def how_to_get(extra: str) -> str:
    """How to install what the extra of this name in pyproject.toml needs: `PYTHON -m pip install PACKAGES`."""
    python = sys.executable
    if Path(python).is_relative_to(Path.cwd()):
        python = os.path.relpath(python)
    return shlex.join([python, "-m", "pip", "install", *packages(extra)])


def packages(extra: str) -> list[str]:
    """The requirements of an extra; hintkd[EXTRA] where the installed hintkd does not name it."""
    try:
        known = metadata.requires("hintkd") or []
    except metadata.PackageNotFoundError:
        known = []
    found = []
    for line in known:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if re.search(rf"extra\s*==\s*[\"']{re.escape(extra)}[\"']", marker):
            nested = re.match(r"hintkd\[([\w,-]+)\]", requirement)
            found += [each for part in nested[1].split(",") for each in packages(part)] if nested else [requirement]
    return list(dict.fromkeys(found)) or [f"hintkd[{extra}]"]
