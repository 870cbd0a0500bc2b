"""Text files of messages: nets and solvers in, text out, and errors that say where and what.

Parsing is protobuf's own; this module turns its complaints into one sentence with file, line and column, and brings what was read to
today's form (upgrade.py).  Whether the layers exist and fit together is the engine's business.
"""
from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from google.protobuf import text_format
from google.protobuf.message import Message

from torchcaffe.errors import CaffeError, CaffeRuntimeError
from torchcaffe.files import read_bytes
from torchcaffe.proto import caffe_pb2, upgrade

M = TypeVar("M", bound=Message)
StrPath = str | os.PathLike[str]


def read_net(path: StrPath) -> caffe_pb2.NetParameter:
    """The net in a prototxt, in today's form.  CaffeError: `file:line:column: what is wrong`, or why it cannot be read."""
    net = read(path, caffe_pb2.NetParameter())
    try:
        return upgrade.upgrade_net(net)
    except CaffeError as error:
        raise CaffeError(f"{path}: {error}") from None


def read_solver(path: StrPath) -> caffe_pb2.SolverParameter:
    """The solver in a prototxt, `solver_type` replaced by `type` and `snapshot_prefix` filled in as Caffe does.

    Without a prefix it is the file's own path less its extension; a folder as prefix gets the file's name in it.
    """
    solver = read(path, caffe_pb2.SolverParameter())
    try:
        upgrade.upgrade_solver(solver)
    except CaffeError as error:
        raise CaffeError(f"{path}: {error}") from None
    if not solver.HasField("snapshot_prefix"):
        solver.snapshot_prefix = str(Path(path).with_suffix(""))
    elif os.path.isdir(solver.snapshot_prefix):
        solver.snapshot_prefix = str(Path(solver.snapshot_prefix) / Path(path).stem)
    return solver


def read(path: StrPath, message: M) -> M:
    """Merge a text file into `message` and return it, in whatever form it is written."""
    parse(_read(path), message, str(path))
    if any("\0" in text for text in _strings(message)):
        raise CaffeError(f"{path}: a string holds the character \\0, which no name and no path can")
    return message


def parse(text: str, message: M, filename: str = "<text>") -> M:
    """Merge `text` into `message` and return it; `filename` is for errors only."""
    try:
        text_format.Parse(text, message)
        if missing := message.FindInitializationErrors():  # type: ignore[attr-defined]
            raise CaffeError(f"{filename}: {missing[0]} is missing and has no default")
        return message
    except text_format.ParseError as error:
        line, column = error.GetLine() or 1, error.GetColumn() or 1
        sentence = _explain(str(error), text, line, column)
    except (ValueError, RecursionError) as error:               # surrogates in strings, blocks thousands deep
        line, column, sentence = 1, 1, f"cannot be parsed: {error}"
    except SystemError:                                         # protobuf's look-up of bytes that are no UTF-8 among an enum's values
        line, column, sentence = 1, 1, "holds a value that is not UTF-8"
    raise CaffeError(f"{filename}:{line}:{column}: {sentence}")


def write(message: Message) -> str:
    """`message` as text, fields in the order of their numbers; parse() gives the same message back."""
    return text_format.MessageToString(message, as_utf8=True)


def layer_line(path: StrPath, name: str) -> int | None:
    """The line where the first layer called `name` begins in a prototxt; None if that cannot be told."""
    try:
        text = _read(path)
    except CaffeError:
        return None
    opened: list[tuple[str, int]] = []                          # the blocks around a token: field name and offset
    field, value = "", ""
    for token, offset in _tokens(text):
        if token in "{<":
            opened.append((field, offset))
        elif token in "}>":
            if opened:
                opened.pop()
        elif token == ":":
            value = field
            continue
        elif value == "name" and token[0] in "\"'" and token[1:-1] == name:
            if [block for block, _ in opened] in (["layer"], ["layers"], ["layers", "layer"]):
                return _position(text, opened[0][1])[0]
        else:
            field = token
        value = ""
    return None


def top_fields(text: str) -> set[str]:
    """The names of the fields that stand outside of all blocks, as far as the text goes."""
    found, depth, word = set(), 0, ""
    for token, _ in _tokens(text):
        if depth == 0 and word and token in ":{<":
            found.add(word)
        depth = max(0, depth + (token in "{<[") - (token in "}>]"))
        word = token if token[0].isalpha() or token[0] == "_" else ""
    return found


def _strings(message: Message) -> Iterator[str]:
    """All strings in a message."""
    for field, value in message.ListFields():
        for item in value if hasattr(value, "extend") else [value]:
            if field.message_type:
                yield from _strings(item)
            elif field.type == field.TYPE_STRING:
                yield item


def _read(path: StrPath) -> str:
    try:
        data = read_bytes(path)
    except OSError as error:
        raise CaffeRuntimeError(f"{path}: cannot be read ({error.strerror or error})") from None
    if b"\0" in data:
        raise CaffeError(f"{path}: is a binary file where a prototxt, a text file, is expected")
    return data.decode("utf-8-sig", errors="surrogateescape")   # comments may be in any encoding


_TOKEN = re.compile(r"#[^\n]*|\s+|([A-Za-z_][\w.+-]*|\"(?:\\.|[^\"\\\n])*\"?|'(?:\\.|[^'\\\n])*'?|.)", re.DOTALL)


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Words, strings and marks with their offsets, without blanks and comments."""
    for match in _TOKEN.finditer(text):
        if match[1]:
            yield match[1], match.start()


def _position(text: str, offset: int) -> tuple[int, int]:
    """Line and column of an offset, both from 1."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _unclosed(text: str) -> int | None:
    """The line of the innermost block that is still open at the end."""
    opened: list[int] = []
    for token, offset in _tokens(text):
        if token in "{<":
            opened.append(offset)
        elif token in "}>" and opened:
            opened.pop()
    return _position(text, opened[-1])[0] if opened else None


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing; case does not count, and a part of a name is near to it."""
    folded = {candidate.lower(): candidate for candidate in known}
    near = [candidate for candidate in folded if name.lower() in candidate and len(name) > 1]
    near = near or difflib.get_close_matches(name.lower(), folded, n=1)
    return f"; did you mean '{folded[near[0]]}'?" if near else ""


_DEVICES = re.compile(r"\bdevice_id\s*:\s*[\[\"']?\s*(\d+(?:\s*,\s*\d+)+)")


def _explain(complaint: str, text: str, line: int, column: int) -> str:
    """protobuf's complaint as a sentence for whoever wrote the file."""
    lines = text.split("\n")
    if found := next((found for found in _DEVICES.finditer(lines[line - 1] if line <= len(lines) else "")
                      if found.start() < column <= found.end()), None):
        return (f"device_id is the number of one GPU, not {found[1]}; leave it away, and name several for training with "
                f"`torchcaffe train --gpu {found[1].replace(' ', '')}`")
    pool = caffe_pb2.DESCRIPTOR.pool
    if found := re.search(r'Message type "([\w.]+)" has no field named "(.*)"', complaint):
        message = pool.FindMessageTypeByName(found[1])
        known = [field.name for field in message.fields]
        other = {"SolverParameter": "NetParameter", "NetParameter": "SolverParameter"}.get(message.name)
        if other and found[2] in pool.FindMessageTypeByName(f"caffe.{other}").fields_by_name:
            return f"'{found[2]}' belongs in a {other}, but this file is read as a {message.name}"
        return f"unknown field '{found[2]}' in {message.name}" + (
            nearest(found[2], known) or f"; it has {', '.join(known[:-1])} and {known[-1]}" * (1 < len(known) <= 12))
    if found := re.search(r'Enum type "([\w.]+)" has no value (?:named|with number) (.*)\.$', complaint):
        enum = pool.FindEnumTypeByName(found[1])
        quoted = ", without quotes" if found[2].startswith('"') else ""
        return f"{found[2]} is not a value of {enum.name}, which are {', '.join(enum.values_by_name)}{quoted}"
    if found := re.search(r'Message type "(?:\w+\.)*(\w+)" should not have multiple "(\w+)" fields', complaint):
        return f"'{found[2]}' is given twice in one {found[1]}"
    if found := re.search(r"Couldn't parse (integer|float): (.*)", complaint):
        return f"{found[2]} is not a {'whole number' if found[1] == 'integer' else 'number'}"
    if found := re.search(r"Value out of range: (.*)", complaint):
        return f"{found[1]} is out of range for this field"
    if found := re.search(r"Expected string but found: '(.*)'", complaint):
        return f"a string in quotes is expected here, not {found[1]}"
    if found := re.search(r"Expected identifier or number, got (.*)\.$", complaint, re.DOTALL):
        return "a '}' without its '{'" if found[1] == "}" and not _unclosed(text) else f"a field name is expected here, not {found[1]!r}"
    if "codec can't" in complaint:
        return "this string has a bad escape or is not UTF-8"
    if "missing ending quote" in complaint:
        return "a string is not closed before the end of its line"
    if found := re.search(r'Expected "(.*)"\.$', complaint):
        opened = _unclosed(text)
        if found[1] in "}>" and opened:
            return f"the file ends inside the block that begins on line {opened}; a '{found[1]}' is missing"
        return f"'{found[1]}' is expected here" if '"' not in found[1] else "true or false is expected here"
    source = lines[line - 1] if line <= len(lines) else ""
    return complaint.removeprefix(f"{line}:{column} : ").removeprefix(f"'{source}': ").rstrip(".").replace("\n", " ")
