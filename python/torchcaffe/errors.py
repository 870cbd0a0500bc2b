"""What torchcaffe raises when its input, not its code, is wrong."""
from __future__ import annotations


class CaffeError(Exception):
    """One sentence for the user: which file, layer, blob or flag is wrong, and what to do.

    The command line tools print it and exit with 2; from Python it is an ordinary exception.
    Where BVLC Caffe stops the process with a failed CHECK, torchcaffe raises this.
    """
