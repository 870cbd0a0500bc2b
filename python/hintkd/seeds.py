"""Where every random_seed comes from: one for each role, which no other role of any table, replication or net has.

Two nets that should be independent must not begin with the same seed: a layer's first weights depend on the seed and on the layer's
name alone, so a student of the teacher's seed would start from the teacher's own first weights.  Within a solver's seed the engine keeps
fillers, augmentation and dropout of every layer apart.
"""
from __future__ import annotations

from hintkd.errors import UserError

ROLES = ("teacher", "stage1", "net")                         # the order is part of every seed: new roles go to the end, at most seven
SEEDS, TABLE_SEEDS, REPEATS, NETS = 2**11, 2**4, 2**6, 2**7  # how many values of each there is room for


def require_range(what: str, value: int, lowest: int, highest: int) -> None:
    """Raise UserError, naming `what`, unless lowest <= value <= highest."""
    if not lowest <= value <= highest:
        raise UserError(f"{what} is {value}; it must be from {lowest} to {highest}")


def role_seed(role: str, seed: int, table_seed: int = 0, repeat: int = 1, net: int = 0) -> int:
    """The random_seed of a role, below 2^31 so that every Caffe takes it; different for different arguments.

    role          one of ROLES; the first replication's teacher has 100 * seed whatever the table, all others are packed into 31 bits
    seed          of the run, 0 to 2047
    table_seed    of the table, 0 to 15
    repeat        which replication, 1 to 64
    net           1 to 127 for what is a net's own; of what nets share 0, and 1, 2 ... for their teacher's, the teacher's teacher's ...
    Raises UserError on numbers out of these ranges.
    """
    require_range("seed", seed, 0, SEEDS - 1)
    require_range("the table's seed", table_seed, 0, TABLE_SEEDS - 1)
    require_range("repeat", repeat, 1, REPEATS)
    require_range("net", net, 0, NETS - 1)
    if role == "teacher" and repeat == 1 and net == 0:
        return 100 * seed                                    # below 2^28, where the packed ones begin
    packed = ROLES.index(role) + 1
    for value, room in ((table_seed, TABLE_SEEDS), (repeat - 1, REPEATS), (seed, SEEDS), (net, NETS)):
        packed = packed * room + value
    return packed
