"""A table of one row, from what a command line names: a method, a student and its teacher by their titles."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hintkd.methods.papers import paper
from hintkd.nets.networks import NETWORKS
from hintkd.nets.titles import network
from hintkd.study.table import Table, table_of

PAPER, DATASET, TAU = "zoo", "cifar100-zoo", 4               # the papers' own


def pair_table(student: str, teacher: str | None, method: str) -> Table:
    """One method of the zoo for one pair of networks by the zoo's protocol.  Raises UserError on what there is none of."""
    content: dict[str, Any] = {
        "title": f"{method} from {teacher or 'labels'} to {student}", "source": paper(PAPER).source, "paper": PAPER, "dataset": DATASET,
        "tau": TAU, "nets": 1, "student": learner(student), "rows": [{"method": method}]}
    if teacher:
        content["teacher"] = learner(teacher)
    return table_of(content, f"{method}-{student}", "the command line", Path())


def learner(title: str) -> dict[str, Any]:
    """A network by its title, as a table has it.  Raises UserError if there is none."""
    found = network(title)
    name = next(name for name, kind in NETWORKS.items() if kind is type(found))
    return {"net": name, **dataclasses.asdict(found)}
