"""What hintkd and data_prep raise for what their user can mend; their own mistakes are ordinary exceptions."""
from __future__ import annotations


class UserError(Exception):
    """One sentence for the user: which file, line or flag is wrong, and what to do.

    The command line prints it and exits with 2, without a traceback; from Python it is an ordinary exception.
    """


class StageFailed(UserError):
    """A stage cannot be finished; the sentence says at which iteration and where its log is."""
