"""What hintkd and data_prep raise for what their user can mend; their own mistakes are ordinary exceptions."""
from __future__ import annotations


class UserError(Exception):
    """One sentence for the user: which file, line or flag is wrong, and what to do.

    The command line prints it and exits with 2, without a traceback; from Python it is an ordinary exception.
    """


class StageFailed(UserError):
    """A stage cannot be finished; the sentence says at which iteration and where its log is."""


class ProcessDied(StageFailed):
    """The process that ran a stage ended without an answer, killed as a rule: another try may succeed."""


class Damaged(UserError):
    """A file is missing, empty or not what was written; the sentence names it and can be gone on with after a semicolon."""
