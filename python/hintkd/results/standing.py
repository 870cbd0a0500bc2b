"""Whether a table was reproduced, in one sentence that is made of its numbers and verdicts, and in two or three words for a mark."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hintkd.results.measured import Group, Judgement
from hintkd.results.report import expected_nets, is_reproduced, judgements
from hintkd.results.verdicts import Verdict

Kind = Literal["good", "bad", "mixed", "none"]
SOME: dict[Verdict, tuple[str, str]] = {                     # one of several claims, and more
    "holds": ("holds", "hold"), "does not hold": ("does not", "do not"), "within noise": ("is within noise", "are within noise"),
    "not judged": ("cannot be judged", "cannot be judged")}
ALIKE: dict[Verdict, tuple[str, str]] = {                    # the only claim, and all claims
    "holds": ("{0} holds", "{0} hold"), "does not hold": ("{0} does not hold", "none of its {1} claims holds"),
    "within noise": ("{0} is within noise", "{0} are within noise"),
    "not judged": ("{0} cannot be judged", "none of its {1} claims can be judged")}
OF_VERDICT: dict[Verdict, Kind] = {"holds": "good", "does not hold": "bad", "within noise": "mixed", "not judged": "none"}


@dataclass(frozen=True)
class Mark:
    """A verdict in a few words, and how it bears on the paper."""
    kind: Kind
    words: str


@dataclass(frozen=True)
class Standing:
    """What became of a table; `sentence` goes on from the table's name: "Table 3 " + sentence."""
    mark: Mark
    sentence: str


def standing(group: Group, groups: Sequence[Group]) -> Standing:
    """Of one group of records; `groups` are all of them, because a claim may name another table."""
    claims = claims_in_words(judgements(group, groups).get("claims", []))
    if not group.is_full:
        text = f"was run with every schedule at {group.scale:g} of its length, so that its values are not comparable with the paper's"
        return Standing(Mark("none", "not comparable"), f"{text}{'; at that scale, ' if claims else ''}{claims}.")
    mark, means = _means(group)
    return Standing(mark, f"{'; '.join(filter(None, [means, claims]))}.")


def _means(group: Group) -> tuple[Mark, str]:
    """What is to be said of the published means."""
    known = [verdict for name in group.table.names for column in group.table.columns or [""]
             if (verdict := is_reproduced(group, name, column)) is not None]
    count, good, wanted = len(known), sum(known), expected_nets(group)
    if len(group.records) < wanted:
        so_far = f", and {good} of {count} published means so far are reproduced" if count else ""
        return Mark("none", "incomplete"), f"is not complete: {len(group.records)} of {wanted} nets are measured{so_far}"
    if not count:
        return Mark("none", "no values printed"), "prints no values, only claims"
    within = f"within {group.table.measure.close} points of {group.table.metric}"
    if good == count:
        return Mark("good", "reproduced"), f"is reproduced: {_all(count, 'published mean')} {'lies' if count == 1 else 'lie'} {within}"
    if good:
        return Mark("mixed", "in part"), f"is reproduced in part: {good} of {count} published means lie {within}"
    none = "its published mean does not lie" if count == 1 else f"none of its {count} published means lies"
    return Mark("bad", "not reproduced"), f"is not reproduced: {none} {within}"


def claims_in_words(found: Sequence[Judgement]) -> str:
    """How many claims hold, do not, and are left open; "" where there are none."""
    counts = Counter[Verdict](judgement.verdict for judgement in found)
    parts = [f"{counts[verdict]} {words[counts[verdict] > 1]}" for verdict, words in SOME.items() if counts[verdict]]
    if len(parts) > 1:
        return f"of its {len(found)} claims {', '.join(parts[:-1])} and {parts[-1]}"
    return next((alike[min(len(found), 2) - 1].format(_all(len(found), "claim"), len(found))
                 for verdict, alike in ALIKE.items() if counts[verdict]), "")


def _all(count: int, what: str) -> str:
    return f"its {what}" if count == 1 else f"{'both' if count == 2 else f'all {count}'} {what}s"
