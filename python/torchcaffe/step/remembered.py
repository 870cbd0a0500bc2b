"""What frozen operations have given once is read from a table the next time: a teacher is asked once about each of its inputs.

What they give depends on the record and on its window and mirror alone, and these have numbers (layers/data.py).  A file (table.py) has a
row for each number with the frontier's tops (frontier.py); later runs and other processes read and fill the same one.  Before a
pass, whatever it needs and the file lacks is computed, in one batch as large as the net's that is filled up with what the next passes
will lack: the operations run on full batches only, no more often than without a memory, and less and less.

A pass ends with the same bytes as without a memory, because a kernel gives an item of a full batch the same wherever it lies in it and
whatever lies beside it.  That is not believed but tried when a file is begun, and a batch is compared with what an older file has of it.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass
from itertools import count
from math import ceil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from torchcaffe import glog
from torchcaffe.data.lmdb_reader import open_database
from torchcaffe.errors import CaffeError
from torchcaffe.graph.build import Graph
from torchcaffe.net import Net
from torchcaffe.step import frontier
from torchcaffe.step.operations import Operation, Tops
from torchcaffe.step.table import WORD, Damaged, Table
from torchcaffe.version import ENGINE

LIMIT = 4 * 2**30                           # bytes of a file; what is larger is not remembered
AHEAD = 128                                 # how many passes ahead a batch may take its inputs from
CHUNK = 64 * 2**20                          # bytes that are moved to a device at a time
ENTRIES = "the numbers of the inputs"       # among a pass's tops, which have names without blanks


class Program(Protocol):
    """As much of a program (program.py) as a memory needs."""
    net: Net
    graph: Graph
    at_rest: Set[int] | None
    operations: list[Operation]

    def compute(self, op: Operation, bottoms: list[Tensor]) -> Tops: ...


@dataclass(frozen=True)
class Place:
    """Where a top of one item lies in a row: from which word on, and as what."""
    word: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    size: int

    @property
    def words(self) -> int:
        return ceil(self.size * self.dtype.itemsize / WORD)

    def values(self, rows: Tensor) -> Tensor:
        """The part of rows (n, words) that is this top's, (n, size)."""
        start = self.word * WORD // self.dtype.itemsize
        return rows.view(self.dtype)[:, start:start + self.size]

    def put(self, top: Tensor, rows: Tensor) -> None:
        self.values(rows).copy_(top.as_strided((len(top), self.size), (self.size, 1)))

    def get(self, rows: Tensor) -> Tensor:
        """The top of all items, laid out in memory as its maker lays it out."""
        return self.values(rows).contiguous().as_strided((len(rows), *self.shape), (self.size, *self.stride))


def places(tops: list[Tensor]) -> list[Place]:
    """Where the tops (n, ...) of an item lie in a row, one after the other.  Raises CaffeError where a top is not its items in a row."""
    found: list[Place] = []
    for top in tops:
        size = top.numel() // len(top)
        last = sum((n - 1) * step for n, step in zip(top.shape, top.stride(), strict=True))
        if last != top.numel() - 1 or (len(top) > 1 and top.stride(0) != size):
            raise CaffeError("the items of a top do not follow one another in memory")
        word = found[-1].word + found[-1].words if found else 0
        found.append(Place(word, top.dtype, tuple(top.shape[1:]), top.stride()[1:], size))
    return found


class Resident:
    """The rows of a table in device memory, where a recorded pass can gather them; the file gets what is new when the device has it."""

    def __init__(self, table: Table, device: torch.device):
        need = Table.bytes(table.count, table.words)
        if device.type == "cuda" and need > torch.cuda.mem_get_info(device)[0] // 2:
            raise CaffeError(f"{need / 1e6:,.0f} MB are more than half of the GPU's free memory")
        self.known = torch.zeros(table.count, dtype=torch.bool)
        self.rows = torch.zeros((table.count, table.words), dtype=torch.int64, device=device)
        self._pending: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
        self.load(table)

    def load(self, table: Table) -> None:
        """Take what a table has in the place of what was there."""
        self.settle(wait=True)
        self.table = table
        step = max(1, CHUNK // (WORD * table.words))
        for start in range(0, table.count, step):
            numbers = torch.arange(start, min(start + step, table.count))
            rows, self.known[numbers] = table.read(numbers)
            self.rows[start:start + len(rows)].copy_(rows)

    def has(self, numbers: Tensor) -> Tensor:
        return self.known.index_select(0, numbers)

    whole = has

    def rows_of(self, numbers: Tensor) -> Tensor:
        return self.rows.index_select(0, numbers)

    def write(self, numbers: Tensor, rows: Tensor) -> None:
        self.rows.index_copy_(0, numbers.to(rows.device), rows)
        self.known[numbers] = True
        if rows.device.type != "cuda":
            self.table.write(numbers, rows)
            return
        copied = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        self._pending.append((numbers, copied, torch.cuda.current_stream(rows.device).record_event()))
        self.settle()

    def settle(self, wait: bool = False) -> None:
        """Write to the file what has arrived on the host; with `wait`, all."""
        while self._pending and (wait or self._pending[0][2].query()):
            numbers, rows, event = self._pending.pop(0)
            event.synchronize()
            self.table.write(numbers, rows)


class Mapped:
    """The rows of a table where the file is mapped, each looked over before it is used."""

    def __init__(self, table: Table):
        self.table = table

    def has(self, numbers: Tensor) -> Tensor:
        return self.table.has(numbers)

    def whole(self, numbers: Tensor) -> Tensor:
        known = self.table.has(numbers)
        written = known.nonzero().flatten()                  # pages that nobody has written need not be looked at
        known[written] = self.table.read(numbers[written])[1]
        return known

    def rows_of(self, numbers: Tensor) -> Tensor:
        return self.table.rows.index_select(0, numbers)

    def write(self, numbers: Tensor, rows: Tensor) -> None:
        self.table.write(numbers, rows)

    def load(self, table: Table) -> None:
        self.table = table

    def settle(self, wait: bool = False) -> None:
        """Nothing is on its way."""


class Remembered:
    """The memory of one program, in a file of `folder` that belongs to what its frozen operations compute now.

    resident    rows lie in device memory, for recorded passes and on a GPU
    batch       how many items the frozen operations compute at once
    done        the operations that a pass leaves away whose tops are known
    count       how many inputs there are
    variants    in how many ways each record is shown
    bytes       of the file
    kind        a digest of all that belongs to the file, parameters left out
    """

    def __init__(self, program: Program, found: frontier.Frontier, folder: Path, resident: bool):
        self.program, self.found, self.folder, self.resident = program, found, folder, resident
        self.data, self.device = found.data, program.net.context.device
        self.batch, self.done = self.data.batch, found.done
        self.variants = self.data.variants
        self.count = self.data.images.count * self.variants
        self.identity = ""
        self.store: Mapped | Resident | None = None
        self._ahead: dict[int, Tensor] = {}                 # pass -> its entries
        readers = {name: op for op in found.chain for name in op.bottoms}          # the last of each
        self._released = {op: [name for name, last in readers.items() if last is op and name not in found.tops] for op in found.chain}

    # -- the file ------------------------------------------------------------------------------------------------------
    def refresh(self) -> None:
        """Before some passes in a row: find the file that belongs to the parameters as they are."""
        if self.store is not None:
            self.store.settle(wait=True)
        identity = f"{self.found.identity()} {self.batch}"      # solvers side by side have changed the batch
        if identity != self.identity:
            self.identity = identity
            self._or_forget(lambda: self._open(identity))

    def _or_forget(self, work: Callable[[], None]) -> None:
        """Do some work; where that cannot be, passes run without a memory from now on, and a line says why."""
        try:
            work()
        except CaffeError as error:
            self.store = None
            tell(self.program, str(error))

    def _open(self, identity: str) -> None:
        entries = self._entries(self.data.cursor)
        for later in count(self.data.cursor + 1):           # a batch may be a short one
            if len(entries) >= self.batch:
                break
            entries = torch.cat([entries, self._entries(later)])[:self.batch]
        tops = self._ask(entries)
        self.places = places(tops)
        self.words = self.places[-1].word + self.places[-1].words
        self.bytes = Table.bytes(self.count, self.words)
        if self.bytes > LIMIT:
            raise CaffeError(too_large(self.count, self.words))
        rows = self._rows(tops)
        key = json.dumps(self._key(identity))
        self.kind = hashlib.sha256(json.dumps(self._key(self.found.identity(parameters=False))).encode()).hexdigest()
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.table"
        try:
            table = Table(path, key, self.count, self.words)
        except Damaged as error:
            glog.warning(f"{error}; it is made again", "remembered.py:1")
            path.unlink(missing_ok=True)
            table = Table(path, key, self.count, self.words)
        if table.is_new:
            mixed = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0))
            if not torch.equal(self._rows(self._ask(entries[mixed])), rows[mixed.to(rows.device)]):
                table.discard()
                raise CaffeError("what the frozen layers give for an item depends here on its place in the batch")
            table.write(entries, rows.cpu())
        known, whole = table.read(entries)
        if not torch.equal(known[whole], rows.cpu()[whole]):
            raise CaffeError(f"{path} was computed with other arithmetic than this machine's; delete it, or name another folder")
        if self.store is not None:
            self.store.load(table)
        else:
            self.store = Resident(table, self.device) if self.resident else Mapped(table)
        glog.info(f"{self.program.net.source}: {table.path} remembers {' and '.join(self.found.tops)} of {table.known():,} of "
                  f"{self.count:,} inputs", "remembered.py:1")

    def _key(self, identity: str) -> dict[str, object]:
        """All that decides the bytes of a row."""
        context = self.program.net.context
        cuda = self.device.type == "cuda"
        return {"engine": ENGINE, "torch": torch.__version__, "precision": context.precision, "dtype": str(context.dtype),
                "device": torch.cuda.get_device_name(self.device) if cuda else torch.backends.cpu.get_cpu_capability(),
                "threads": 0 if cuda else torch.get_num_threads(),
                "records": open_database(self.data.source).digest, "transform": self.data.transform.identity(),
                "layers": identity, "tops": hashlib.sha256(repr(self.places).encode()).hexdigest()}

    # -- the work ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _ask(self, entries: Tensor) -> list[Tensor]:
        """The frontier's tops for a full batch of inputs."""
        tops = {self.found.source.tops[0]: self.data.inputs(entries)}
        for op in self.found.chain:
            op.store(self.program.compute(op, [tops[name] for name in op.bottoms]), tops)
            for name in self._released[op]:
                tops.pop(name, None)
        return [tops[name] for name in self.found.tops]

    def _rows(self, tops: list[Tensor]) -> Tensor:
        """The tops as rows (n, words)."""
        rows = torch.zeros((len(tops[0]), self.words), dtype=torch.int64, device=tops[0].device)
        for place, top in zip(self.places, tops, strict=True):
            place.put(top, rows)
        return rows

    def _entries(self, number: int) -> Tensor:
        """The numbers of a pass's inputs, (batch,)."""
        if number not in self._ahead:
            self._ahead[number] = self.data.entries(number)
        return self._ahead[number]

    def prepare(self, passes: int = 1) -> None:
        """Have all that the next passes ask for; what is missing is computed, with what later passes will miss."""
        if self.store is not None:
            self._or_forget(lambda: self._complete(passes))

    def _complete(self, passes: int) -> None:
        assert self.store is not None
        now = self.data.cursor
        for old in [number for number in self._ahead if not now <= number < now + AHEAD + passes]:
            del self._ahead[old]
        for number in range(now, now + passes):
            entries = self._entries(number)
            missing = entries[~self.store.whole(entries)]
            if len(missing):
                self._learn(missing, number)

    def _learn(self, missing: Tensor, number: int) -> None:
        """Compute rows for the inputs that pass `number` misses, and for as many of the next passes' as a batch has room for."""
        assert self.store is not None
        wanted = dict.fromkeys(missing.tolist())            # a set that keeps its order
        for later in range(number + 1, number + AHEAD):
            if len(wanted) >= self.batch:
                break
            entries = self._entries(later)
            wanted.update(dict.fromkeys(entries[~self.store.has(entries)].tolist()))
        chosen = torch.tensor(list(wanted)[:self.batch])
        batch = chosen.repeat(ceil(self.batch / len(chosen)))[:self.batch]
        rows = self._rows(self._ask(batch))
        self.store.write(chosen, rows[:len(chosen)])

    def number(self, tops: dict[str, Tensor]) -> None:
        """Before the records of the next pass are read: have what it will recall, and note among its tops which they are."""
        if self.data.clock is not None:
            tops[ENTRIES] = self.data.entries(self.data.clock, self.device)
        else:
            self.prepare()
            tops[ENTRIES] = self._entries(self.data.cursor).to(self.device)

    def recall(self, tops: dict[str, Tensor]) -> Collection[Operation]:
        """Put the frontier's tops for the records of this pass among its tops; the operations that need not run then."""
        if ENTRIES not in tops:
            if self.found.source.tops[0] in tops:           # records from elsewhere, which have no numbers
                return ()
            self.number(tops)
        if self.store is None:
            return ()
        rows = self.store.rows_of(tops[ENTRIES])
        tops.update((name, place.get(rows)) for name, place in zip(self.found.tops, self.places, strict=True))
        return self.done


def too_large(count: int, words: int) -> str:
    return f"the rows of {count:,} inputs take {Table.bytes(count, words) / 1e6:,.0f} MB, and at most {LIMIT / 1e6:,.0f} are remembered"


def remembered(program: Program, folder: Path, resident: bool) -> Remembered | None:
    """The memory of a training program, in `folder`; None where it has no frozen work, or, as a line in the log says, too large tops."""
    assert program.at_rest is not None
    found = frontier.find(program.graph, program.operations, program.at_rest)
    if found is None:
        return None
    count, words = found.data.images.count * found.data.variants, ceil(found.bytes / WORD)
    if Table.bytes(count, words) > LIMIT:
        tell(program, too_large(count, words))
        return None
    return Remembered(program, found, folder, resident)


def tell(program: Program, reason: str) -> None:
    """Say why nothing is remembered."""
    glog.info(f"{program.net.source}: what its frozen layers give is not remembered: {reason}", "remembered.py:1")
