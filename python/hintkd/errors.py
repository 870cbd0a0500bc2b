"""What hintkd and data_prep raise when their input, not their code, is wrong."""
from __future__ import annotations


class UserError(Exception):
    """One sentence for the user: which file, line or flag is wrong, and what to do.

    The command line prints it and exits with 2, without a traceback; from Python it is an ordinary exception.
    """
