"""What torchcaffe raises when its input, not its code, is wrong."""
from __future__ import annotations


class CaffeError(Exception):
    """One sentence for the user: which file, layer, blob or flag is wrong, and what to do.

    The command line tools print it and exit with 2; from Python it is an ordinary exception.
    Where BVLC Caffe stops the process with a failed CHECK, torchcaffe raises this.  `layer` names the layer the sentence
    is about, so that whoever knows the file can add the line.
    """

    def __init__(self, message: str, layer: str | None = None):
        super().__init__(message)
        self.layer = layer


class SidecarError(CaffeError):
    """A snapshot cannot be continued exactly: its sidecar is missing, belongs to another snapshot, or to another setting."""


class PeerLost(CaffeError):
    """Another of the solvers that train together has ended; what it says is the cause, this only follows."""
