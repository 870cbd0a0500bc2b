#!/usr/bin/env python3
"""How long `make demo` and `make test` take, set-up apart, on a machine that does nothing else.

    python benchmarks/durations.py       from the repository's root: measures both and writes benchmarks/durations.json, which `make docs`
                                         puts into README.md
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hintkd.stage.program import machine

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/durations.json"


def seconds(*command: str) -> float:
    """Of a command that must succeed, in the repository's root."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        demo = seconds(sys.executable, "-m", "hintkd.cli", "demo", "--workspace", f"{folder}/demo")
    FILE.write_text(json.dumps({"demo_s": demo, "test_s": seconds("make", "test"), **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
