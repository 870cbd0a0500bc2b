"""The papers that are known, and methods of one's own: each is a Python module, and what it holds is found by what it is.

A paper's module in this folder has SOURCE (what it is), methods (`@method`), and, where it needs them, Options and Schedule (subclasses of
experiment's), SCHEDULES (by data set), PRESETS (settings by name, for `set`), CHOICES and BASED_ON (a paper whose methods are its own,
too); `original` and `teacher` come on their own.  A table names its paper; it may also name a file of one's own, or an installed package
by its entry point in the group "hintkd.methods", whose methods come first and whose Options and Schedule, if any, take the place of the
paper's.  Nothing else has to know of them.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from hintkd.errors import UserError
from hintkd.experiment import Options, Schedule
from hintkd.methods.common import original, teacher
from hintkd.methods.method import Choice, Method

PAPERS = ("hint_2019", "zoo", "byot", "sftn")               # modules of this folder
GROUP = "hintkd.methods"                                     # of entry points


@dataclass(frozen=True)
class Paper:
    """What a paper's module holds.

    schedules    the full schedule by data set; `schedule`, with its defaults, for all others
    presets      what `set` changes at once under the name of a known code base
    """
    name: str
    source: str
    methods: Mapping[str, Method] = field(repr=False)
    options: type[Options] = Options
    schedule: type[Schedule] = Schedule
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()

    def with_own(self, module: ModuleType, source: str) -> Paper:
        """The paper with the methods of a module of one's own before its own; `source` is what they are signed with (Method.source)."""
        root = module.__name__.partition(".")[0]
        own = {name: replace(each, source=source) if each.train.__module__.partition(".")[0] == root else each
               for name, each in _methods(module).items()}
        found = _held(module)
        return replace(self, methods={**self.methods, **own}, options=found.get("options", self.options),
                       schedule=found.get("schedule", self.schedule))


def _methods(module: ModuleType) -> dict[str, Method]:
    return {each.name: each for each in vars(module).values() if isinstance(each, Method)}


def _held(module: ModuleType) -> dict[str, type]:
    """The module's own classes of options and schedules, if it has such."""
    return {name.lower(): kind for name, base in (("Options", Options), ("Schedule", Schedule))
            if isinstance(kind := getattr(module, name, None), type) and issubclass(kind, base)}


@cache
def paper(name: str) -> Paper:
    """A known paper.  Raises UserError for an unknown one."""
    if name not in PAPERS:
        raise UserError(f"there is no paper {name!r}; there are {', '.join(PAPERS)}")
    module = importlib.import_module(f"hintkd.methods.{name}")
    based = getattr(module, "BASED_ON", None)
    before = paper(based).methods if based else {original.name: original, teacher.name: teacher}
    return Paper(name, module.SOURCE, {**before, **_methods(module)}, **_held(module), schedules=getattr(module, "SCHEDULES", {}),
                 presets=getattr(module, "PRESETS", {}), choices=getattr(module, "CHOICES", ()))


def own_methods(named: str, folder: Path) -> tuple[ModuleType, str]:
    """The module that a table's `methods` names, and the file or module that its methods are signed with.

    named     a path that ends in .py, relative to `folder`; or an entry point
    Raises UserError if there is none, and with the line where the file cannot be run.
    """
    if named.endswith(".py"):
        path = folder / named
        if not path.is_file():
            raise UserError(f"{path}: there is no such file of methods; name one relative to the table's")
        return _module_in(path.resolve()), str(path)
    found = entry_points(group=GROUP)
    if named not in found.names:
        known = f"there are {', '.join(sorted(found.names))}" if found.names else "there are none"
        raise UserError(f"methods: {named!r} is no file that ends in .py, and no entry point of the group {GROUP}: {known}")
    module = found[named].load()
    return module, str(module.__name__)


def _module_in(path: Path) -> ModuleType:
    """The module in a file, imported once as it is now.  Its folder is put on the path, as for a script, for its imports and its layers."""
    name = f"hintkd_methods_{sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{path}{_line(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _line(error: BaseException, path: Path) -> str:
    """Where in the file it happened, as ":LINE"."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    trace, line = error.__traceback__, None
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
        trace = trace.tb_next
    return f":{line}" if line else ""
