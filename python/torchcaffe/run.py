"""`python -m torchcaffe.run script.py arguments...` runs a script that was written for pycaffe, with torchcaffe as its caffe.

The script sees what it would see if Python ran it: its arguments, its folder first on sys.path, the name __main__.
"""
from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torchcaffe
from torchcaffe.errors import CaffeError
from torchcaffe.files import read_bytes

USAGE = "usage: python -m torchcaffe.run script.py [arguments...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; the exit status is 2 where there is no such script, or none that this Python can read."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    try:
        _check(given[0])
        torchcaffe.install()
    except CaffeError as error:
        print(f"torchcaffe.run: {error}", file=sys.stderr)
        return 2
    sys.argv = given
    sys.path[0] = str(Path(given[0]).resolve().parent)
    runpy.run_path(given[0], run_name="__main__")
    return 0


def _check(script: str) -> None:
    """Raise CaffeError for a file that cannot be run."""
    try:
        compile(read_bytes(script), script, "exec")
    except OSError as error:
        raise CaffeError(f"{script}: cannot be read ({error.strerror or error})") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise CaffeError(f"{script}{f':{line}' if line else ''}: is not Python 3 ({getattr(error, 'msg', error)}); "
                         "a script for Python 2 is converted by the program 2to3") from None


if __name__ == "__main__":
    sys.exit(main())
