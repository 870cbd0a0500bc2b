"""What it saves that a teacher is asked once about each of its inputs, which are records in their windows and mirrors.

Here it is only counted how often a plan's stages ask what; torchcaffe remembers the answers.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hintkd.run.plan import Plan, Task


@dataclass(frozen=True)
class Memory:
    """What is remembered of the teacher in a net.

    kind          equal for nets that remember the same of a teacher
    inputs        how many there are
    variants      of each record
    batch         inputs of a pass
    bytes         of the file
    recalled_s    seconds of an iteration all of whose inputs are known
    """
    kind: str
    inputs: int
    variants: int
    batch: int
    bytes: int
    recalled_s: float = 0.0

    def known(self, asked: float) -> float:
        """How many different inputs are to be expected among so many, which come in the order of their records, in random variants."""
        epochs, rest = divmod(asked * self.variants / self.inputs, 1)
        unseen = (1 - 1 / self.variants)**epochs * (1 - rest / self.variants)
        return self.inputs * (1 - unseen)


File = tuple[str, ...]                      # of what kind, and of which teacher


def file_of(plan: Plan, task: Task, memory: Memory) -> File:
    """The same for stages that remember the same of the same teacher, which is what comes in under a prefix."""
    teachers = [weights.source for weights in task.stage.weights_in if weights.prefix]
    return memory.kind, *(str(source) if isinstance(source, Path) else plan.keys.key(source) for source in teachers)


def shares_asked(plan: Plan, memories: dict[str, Memory]) -> dict[str, float]:
    """Per task that remembers something, by key: for which share of its inputs the teacher runs, if tasks run in the plan's order."""
    asked: dict[File, float] = {}
    shares = {}
    for key, memory in memories.items():
        task = plan.tasks[key]
        file, count = file_of(plan, task, memory), task.iterations * memory.batch * task.stage.solver.iter_size
        before = asked.get(file, 0.0)
        asked[file] = before + count
        shares[key] = (memory.known(asked[file]) - memory.known(before)) / count
    return shares
