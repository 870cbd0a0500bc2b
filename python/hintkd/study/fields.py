"""From YAML to frozen data: dataclasses made of mappings, with a sentence for what is wrong, and what `set` may name.

`set` changes any field of an experiment: `lambda`, an option or a field of the schedule by its bare name, and, with a dot, a field of
`student`, `teacher` or `dataset`.  `preset` stands for all that a paper's module has under that name.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hintkd.errors import UserError
from hintkd.limits import shown

T = TypeVar("T")


def near(name: object, known: Sequence[str]) -> str:
    """What to say after an unknown name: the nearest known one, or all of them."""
    close = get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def names_of(kind: type[Any]) -> list[str]:
    """The fields of a dataclass."""
    return [field.name for field in dataclasses.fields(kind)]


def built(kind: type[T], given: Any, place: str) -> T:
    """A dataclass from a mapping of its fields.  Raises UserError that names the field, `place` before it."""
    if not isinstance(given, Mapping):
        raise UserError(f"{place}: {shown(given)} will not do; give a mapping with {', '.join(names_of(kind))}")
    for name in given:
        if name not in names_of(kind):
            raise UserError(f"{place}.{name}: unknown field; {near(name, names_of(kind))}")
    return checked(kind, dict(given), place)


def checked(kind: Any, value: Any, place: str) -> Any:
    """The value as one of this type.  Raises UserError that names the field."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{place_of((place, *first['loc']))}: {first['msg']}") from None


_adapter = cache(TypeAdapter)


def place_of(parts: Sequence[int | str]) -> str:
    """("rows", 2, "method") as rows[2].method."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def path_of(name: str, bare: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Where `set` changes what it calls `name`, from the outside in.

    bare    the names that may stand alone, by the mapping they belong to; "" for the table's own
    Raises UserError on a name that is unknown.
    """
    first, dot, _ = name.partition(".")
    if dot and first in ("student", "teacher", "dataset", "schedule", "options"):
        return tuple(name.split("."))
    for owner, names in bare.items():
        if name in names:
            return (owner, name) if owner else (name,)
    raise UserError(f"{name}: unknown; {near(name, [each for names in bare.values() for each in names])}")


def expanded(changes: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Changes by name, with those of a preset in its place, before the others.  Raises UserError on a preset that there is not."""
    if "preset" not in changes:
        return dict(changes)
    name = changes["preset"]
    if name not in presets:
        raise UserError(f"preset: {shown(name)!r} is none of the paper's; " + (near(name, list(presets)) if presets else "it has none"))
    return {**presets[name], **{each: value for each, value in changes.items() if each != "preset"}}


def changed(settings: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """The nested mapping with one value at this path; mappings on the way that are not there are made."""
    made = deepcopy(dict(settings))
    inner = made
    for name in path[:-1]:
        inner[name] = dict(inner.get(name) or {})
        inner = inner[name]
    inner[path[-1]] = value
    return made
