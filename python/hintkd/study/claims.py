"""Claims as data: which of two rows is better, by which measure, and where a paper says so.

A claim is written as its formula alone, `layerwise-hint > hint-kd`, or as a mapping with the words and the place in the paper:
`{claim: layerwise-hint > hint-kd, text: the proposed method is ahead, section: abstract}`.  Rows are compared by their table's last column
unless a formula names another, `byot > deep-supervision in column 1/4`.  Whether a claim holds is judged in results/.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from hintkd.errors import UserError
from hintkd.study.fields import near

FIELDS = ("claim", "text", "section")
TO = "iterations to "
COLUMN = "column "


@dataclass(frozen=True)
class Operand:
    """One side of a claim: a method, `original` or `teacher`, of this table or of another one."""
    method: str
    table: str | None = None
    best: bool = False                                       # the best net instead of the mean


@dataclass(frozen=True)
class Claim:
    """`A > B`: A is better than B, a higher accuracy, a lower error, a lower loss; `A <= B`: it is no better.

    `measure` is the table's metric (""), "test loss" (the KD loss on the test set, of a table with test_loss) or "training loss", both
    of the last stage in the table's window, or "hint loss N" (of pair N at the end of Stage 1), or "column NAME": the metric in a column of
    the table that is not the last, or "iterations to N", where fewer are better: the last stage's up to the first test on the way whose
    value is N, in the table's metric, or better; all of them for a net that never gets there, whatever it would have taken.
    """
    text: str                                                # the formula
    left: Operand
    better: bool                                             # ">", or "<="
    right: Operand
    measure: str = ""
    words: str = ""                                          # what the paper says, quoted or in words of our own
    section: str = ""                                        # where it says so

    @property
    def aim(self) -> float | None:
        """The value that it counts the iterations to, if it does."""
        return float(self.measure.removeprefix(TO)) if self.measure.startswith(TO) else None

    @property
    def column(self) -> str:
        """The column that it compares, "" for the last."""
        return self.measure.removeprefix(COLUMN) if self.measure.startswith(COLUMN) else ""

    @staticmethod
    def parse(text: str) -> Claim:
        """Read `[best] [TABLE/]METHOD > [TABLE/]METHOD [in MEASURE]`.  Raises ValueError."""
        side = r"(?:(\w[\w-]*)/)?([\w-]+)"
        measure = r"(test loss|training loss|hint loss [1-9]|column \S+|iterations to \d+(?:\.\d+)?)"
        found = re.fullmatch(f"(best )?{side} (>|<=) {side}(?: in {measure})?", text)
        if not found:
            raise ValueError(f"{text!r} is not a claim; write for example 'layerwise-hint > hint-kd'")
        best, left_table, left, sign, right_table, right, measured = found.groups()
        return Claim(text, Operand(left, left_table, bool(best)), sign == ">", Operand(right, right_table), measured or "")


def _read(given: Any) -> Claim:
    if isinstance(given, Claim):
        return given
    if isinstance(given, str):
        return Claim.parse(given)
    if not isinstance(given, dict) or "claim" not in given or not all(isinstance(value, str) for value in given.values()):
        raise ValueError(f"{given!r} is not a claim; write 'A > B', or a mapping of texts with {', '.join(FIELDS)}")
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; a claim has {', '.join(FIELDS)}")
    return replace(Claim.parse(given["claim"]), words=given.get("text", ""), section=given.get("section", ""))


def _written(claim: Claim) -> str | dict[str, str]:
    """As `_read` takes it."""
    said = {name: value for name, value in (("text", claim.words), ("section", claim.section)) if value}
    return {"claim": claim.text, **said} if said else claim.text


ClaimField = Annotated[Claim, BeforeValidator(_read), PlainSerializer(_written)]


def require_compared(kind: str, claims: Sequence[Claim], rows: Sequence[str], columns: Sequence[str], test_loss: bool) -> None:
    """Raise UserError unless a table with these rows and columns, and with test losses or not, has what its claims of a kind compare."""
    for index, claim in enumerate(claims):
        if claim.measure == "test loss" and not test_loss:
            raise UserError(f"{kind}[{index}]: {claim.text!r} needs `test_loss: true` in the table")
        if claim.column and claim.column not in columns:
            raise UserError(f"{kind}[{index}]: the table has no column {claim.column!r}; {near(claim.column, columns)}")
        for side in (claim.left, claim.right):
            if side.table is None and side.method not in rows:
                raise UserError(f"{kind}[{index}]: the table has no row {side.method!r}; {near(side.method, rows)}")
