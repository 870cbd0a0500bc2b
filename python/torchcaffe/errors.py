"""What torchcaffe raises when its input, not its code, is wrong, and what a user is told of that."""
from __future__ import annotations

import os
import re
import traceback

import torch


class CaffeError(Exception):
    """One sentence for the user: which file, layer, blob or flag is wrong, and what to do.

    The command line tools print it and exit with 2; from Python it is an ordinary exception.
    Where BVLC Caffe stops the process with a failed CHECK, torchcaffe raises this.  `layer` names the layer the sentence
    is about, so that whoever knows the file can add the line.  Where pycaffe raises an error of Python's own, the subclass below that is
    of that type too is raised, so that scripts written for pycaffe catch what they always caught.
    """

    def __init__(self, message: str, layer: str | None = None):
        super().__init__(re.sub(r"[\0-\x1f\x7f]", lambda found: repr(found[0])[1:-1], message))     # names in files may hold line ends
        self.layer = layer

    __str__ = Exception.__str__                         # a KeyError's own would quote the sentence


class CaffeAssertionError(CaffeError, AssertionError):
    """coord_map: what cannot be cropped."""


class CaffeAttributeError(CaffeError, AttributeError):
    """net_spec: a parameter that is no field of a message."""


class CaffeImportError(CaffeError, ImportError):
    """A package that is not installed."""


class CaffeKeyError(CaffeError, KeyError):
    """Net.forward and backward: a blob that is not there."""


class CaffeOSError(CaffeError, OSError):
    """io.load_image: a file that cannot be read."""


class CaffeRuntimeError(CaffeError, RuntimeError):
    """Files that cannot be opened, arrays for a MemoryData layer, tops that no map connects (C++: std::runtime_error)."""


class CaffeTypeError(CaffeError, TypeError):
    """Arguments of another number or type than a function takes (C++: Boost.Python.ArgumentError)."""


class CaffeValueError(CaffeError, ValueError):
    """Arrays of a wrong shape, layers that are not there."""


class SidecarError(CaffeError):
    """A snapshot cannot be continued exactly: its sidecar is missing, belongs to another snapshot, or to another setting."""


class PeerLost(CaffeError):
    """Another of the solvers that train together has ended; what it says is the cause, this only follows."""


def blame(error: BaseException, layer: str, module: str) -> None:
    """Remember that the error comes out of the code of a Python layer, in the file `module`: it reaches a script as it was raised."""
    if not hasattr(error, "python_layer"):
        error.python_layer = layer, module  # type: ignore[attr-defined]
        error.add_note(f"raised by layer '{layer}' (Python)")


def sentence(error: BaseException) -> str | None:
    """What to tell the user of a mistake in the input or in a Python layer, or of full memory; None of anything else, which is a bug."""
    if hasattr(error, "python_layer"):
        return _of_python_layer(error, *error.python_layer)
    if isinstance(error, CaffeError):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the GPU's memory is full; use a smaller batch_size or leave --gpu away"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):  # torch's words
        return "the memory is full; use a smaller batch_size"
    return None


def _of_python_layer(error: BaseException, layer: str, module: str) -> str:
    """What a layer's code has raised, and on which line of its own."""
    frames = traceback.extract_tb(error.__traceback__)
    place = [(frame.filename, frame.lineno) for frame in frames if frame.filename == module] or [(frames[-1].filename, frames[-1].lineno)]
    if isinstance(error, SyntaxError):
        place = [(error.filename or module, error.lineno)]
    file, line = place[-1]
    words = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    kind = "ends the program with SystemExit" if isinstance(error, SystemExit) else f"raises {type(error).__name__}"
    return f"layer '{layer}' (Python) {kind}{f': {words}' if words else ''} ({os.path.relpath(file)}:{line})"
