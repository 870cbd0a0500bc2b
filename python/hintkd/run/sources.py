"""The code that a Python module runs, as a digest: comments, docstrings and layout do not change it, and nothing is imported for it.

A module counts with the modules that it imports from its own package, or, where it is in none, from its own folder, and these with
theirs; a package counts with all that is in it.  Other packages have versions, which a stage's environment records.
"""
from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import NamedTuple

from hintkd.errors import UserError

_SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class _File(NamedTuple):
    """What counts of a source file: a digest of its code, and the names after each `import`, with the leading dots of relative ones."""
    digest: str
    imports: tuple[str, ...]


def code_digest(module: str) -> str:
    """Hexadecimal SHA-256 of the code of a module or package and of all that it imports from its own package.

    module     its name, or a path that ends in .py
    Raises UserError if it is not on the path or not Python.
    """
    if module.endswith(".py"):
        folder: str | None = os.path.dirname(os.path.abspath(module))
        module = os.path.basename(module).removesuffix(".py")
        _read(os.path.join(folder or "", module + ".py"))
    else:
        folder = None
    find = partial(_find, path=folder and [folder])
    spec = find(module)
    if spec is None:
        raise UserError(f"the Python layer module {module} is not on the path: put its folder on PYTHONPATH")
    found: dict[str, str] = {}
    waiting = [module, *(_submodules(module, spec.submodule_search_locations) if spec.submodule_search_locations else ())]
    while waiting:
        name = waiting.pop()
        spec = find(name)
        if name in found or spec is None or not _belongs(spec, find(module.partition(".")[0])):
            continue
        file = _read(spec.origin) if spec.has_location and spec.origin else _File("", ())
        found[name] = file.digest
        package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        for imported in (name, *file.imports):
            waiting += _prefixes(_absolute(imported, package))
    return hashlib.sha256("\n".join(f"{name} {found[name]}" for name in sorted(found)).encode()).hexdigest()


def _absolute(imported: str, package: str) -> str:
    """A relative name as it is called in full; one that leads nowhere stays what it is."""
    up = len(imported) - len(imported.lstrip("."))
    parts = package.split(".") if package else []
    return ".".join([*parts[:len(parts) - up + 1], imported[up:]]) if up and len(parts) >= up else imported


def _prefixes(name: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c: importing the last runs them all."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _belongs(spec: ModuleSpec, root: ModuleSpec | None) -> bool:
    """Whether a module is of the package `root`, or lies beside it where that is a module."""
    if root is None or spec.name.partition(".")[0] == root.name:
        return root is not None
    return bool(root.submodule_search_locations is None and spec.submodule_search_locations is None and root.origin and spec.has_location
                and spec.origin and os.path.dirname(root.origin) == os.path.dirname(spec.origin))


def _find(name: str, path: Sequence[str] | None = None) -> ModuleSpec | None:
    """The spec of a module in one of the folders `path`, found without importing its packages; None if it is in none of them.

    Where no path is given it is sys.path, and the workspace, where stages run.
    """
    first, *rest = _prefixes(name)
    spec = PathFinder.find_spec(first, [*sys.path, os.getcwd()] if path is None else path) or (_elsewhere(first) if path is None else None)
    for inner in rest:
        spec = PathFinder.find_spec(inner, spec.submodule_search_locations) if spec and spec.submodule_search_locations else None
    return spec


def _elsewhere(name: str) -> ModuleSpec | None:
    """The spec of a top-level module that is not found on sys.path, such as that of an editable installation."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _submodules(package: str, folders: Sequence[str]) -> Iterator[str]:
    for found in pkgutil.iter_modules(list(folders)):
        name = f"{package}.{found.name}"
        yield name
        if found.ispkg:
            yield from _submodules(name, [os.path.join(folder, found.name) for folder in folders])


# ------------------------------------------------------------------------------------------------------------- one file

def _read(path: str) -> _File:
    try:
        status = os.stat(path)
        return _parsed(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that can be read") from None


@lru_cache(maxsize=1024)
def _parsed(path: str, size: int, changed_ns: int) -> _File:
    content = Path(path).read_bytes()
    if not path.endswith(".py"):                             # a compiled module
        return _File(hashlib.sha256(content).hexdigest(), ())
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        where = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{path}{where}: not Python {sys.version_info.major}.{sys.version_info.minor} ({error.args[0]})") from None
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, _SCOPES) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        elif isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            imports += [start + ("." * bool(node.module)) + alias.name for alias in node.names]
    return _File(hashlib.sha256(_written(tree).encode()).hexdigest(), tuple(imports))


def _written(node: object) -> str:
    """A syntax tree as text that is the same for all versions of Python, unlike ast.dump's: fields that are not set are left out."""
    if isinstance(node, list):
        return f"[{','.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={_written(value)}" for name, value in ast.iter_fields(node) if value not in (None, []) and name != "kind"]
    return f"{type(node).__name__}({','.join(fields)})"
