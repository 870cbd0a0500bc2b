"""The house's rule: who may import whom.  Read from the syntax of every module, imports for types and inside functions included."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[1] / "python"
PACKAGES = ("torchcaffe", "hintkd")

# hintkd from the ground up; what stands in a line may import what stands in it and above it.
FLOORS = (
    ("errors",), ("seeds",), ("limits", "files", "metrics"), ("backend",), ("experiment",), ("nets",), ("layers",), ("methods",),
    ("stage",), ("run",), ("study",), ("results",), ("cli",))
# torchcaffe's rooms, and those that none of their modules may import.
FORBIDDEN = {
    "graph": ("step", "train", "tools", "export", "cli"), "layers": ("step", "train", "tools", "export", "cli"),
    "data": ("graph", "layers", "step", "train", "tools", "export", "cli"), "proto": ("graph", "layers", "data", "step", "train", "tools"),
    "step": ("train", "tools", "export", "cli"), "train": ("tools", "export", "cli"), "net": ("step", "train", "tools", "export", "cli")}


TORCH_FORMS = ("forward_torch", "torch_form")                # of a layer; the second is what a base class's forward_torch calls


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages, by its name."""
    found = {}
    for package in PACKAGES:
        for path in (PYTHON / package).rglob("*.py"):
            parts = path.relative_to(PYTHON).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_in(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The names that a syntax tree imports, in full; of `from a import b` both a.b and, where that is no module, a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[:len(module.split(".")) - node.level + is_package] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{start}.{alias.name}" if f"{start}.{alias.name}" in modules() else start


@cache
def graph() -> dict[str, set[str]]:
    """What each module imports of the two packages."""
    found = {}
    for name, path in modules().items():
        imported = set(imports_in(ast.parse(path.read_text()), name, path.name == "__init__.py"))
        found[name] = {each for each in imported if each in modules() and each != name}
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other: Tarjan's strongly connected components of more than one."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for other in sorted(arrows.get(name, ())):
            if other not in index:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], index[other])
        if lowest[name] == index[name]:
            group = stack[stack.index(name):]
            del stack[stack.index(name):]
            if len(group) > 1:
                found.append(sorted(group))
    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return found


def room(module: str) -> str:
    """The folder of a module inside its package, or the module itself at the top."""
    return module.partition(".")[2].partition(".")[0]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(("text", "expected"), [
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torchcaffe.net import Net", {"torchcaffe.net"}),
    ("def f():\n    from torchcaffe import settings, ENGINE", {"torchcaffe.settings", "torchcaffe"}),
    ("from ..net import Net\nfrom . import program", {"torchcaffe.net", "torchcaffe.step.program"}),
])
def test_every_way_to_import_is_seen(text: str, expected: set[str]) -> None:
    assert expected <= set(imports_in(ast.parse(text), "torchcaffe.step.capture", False))


def test_there_are_no_circles() -> None:
    assert circles(graph()) == []


def test_torchcaffe_knows_nothing_of_hintkd() -> None:
    assert [(name, other) for name, others in graph().items() if name.split(".")[0] == "torchcaffe"
            for other in others if other.split(".")[0] == "hintkd"] == []


def test_hintkd_reaches_torchcaffe_through_its_backend_alone() -> None:
    past = {name for name, others in graph().items() if name.split(".")[0] == "hintkd" and name != "hintkd.backend"
            if any(other.split(".")[0] == "torchcaffe" for other in others)}
    assert past == set()


def outside_of_torch_forms(tree: ast.Module) -> ast.Module:
    """What is left of a layer's module without its torch forms, and without the functions that only these call."""
    forms = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in TORCH_FORMS]
    inside = {id(node) for form in forms for node in ast.walk(form)}
    called = {node.id for form in forms for node in ast.walk(form) if isinstance(node, ast.Name)}
    elsewhere = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in inside}
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.Module)):
            node.body = [each for each in node.body if getattr(each, "name", "") not in {*TORCH_FORMS, *(called - elsewhere)}]
    return tree


def test_hintkd_has_torch_in_its_layers_torch_forms_alone() -> None:
    past = []
    for name, path in modules().items():
        if name.split(".")[0] == "hintkd" and name != "hintkd.backend":
            tree = ast.parse(path.read_text())
            looked_at = outside_of_torch_forms(tree) if room(name) == "layers" else tree
            past += [name for imported in imports_in(looked_at, name, False) if imported.split(".")[0] == "torch"]
    assert past == []


@pytest.mark.parametrize(("text", "is_past"), [
    ("class A:\n    def forward_torch(self, b):\n        import torch\n        return helper(b)\ndef helper(b):\n    import torch", False),
    ("def helper(b):\n    import torch\nclass A:\n    def forward(self, b):\n        helper(b)", True), ("import torch", True)])
def test_torch_past_the_torch_forms_is_seen(text: str, is_past: bool) -> None:
    assert ("torch" in set(imports_in(outside_of_torch_forms(ast.parse(text)), "hintkd.layers.x", False))) is is_past


def test_arrows_of_hintkd_lead_downwards() -> None:
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    names = [name for name in modules() if name.split(".")[0] == "hintkd" and name != "hintkd"]
    assert {room(name) for name in names} == set(floor), "a room or a module at the top has no floor yet"
    assert [(name, other) for name in names for other in sorted(graph()[name])
            if other not in ("hintkd",) and other.split(".")[0] == "hintkd" and floor[room(other)] > floor[room(name)]] == []


def test_arrows_of_torchcaffe_lead_downwards() -> None:
    assert [(name, other) for name, others in graph().items() if name.split(".")[0] == "torchcaffe"
            for other in sorted(others) if room(other) in FORBIDDEN.get(room(name), ())] == []


def test_what_runs_in_a_real_caffes_interpreter_stands_on_numpy_alone() -> None:
    """Its modules of hintkd are these few, so that nothing else has to run there."""
    inside = {name for name in modules() if name.startswith(("hintkd.stage.", "hintkd.layers."))}
    reached = {other for name in inside for other in graph()[name]} - inside
    assert {room(other) for other in reached} <= {"", "errors", "files", "backend", "layers", "stage"}
