"""`import caffe` gives torchcaffe: for scripts and Python layers that were written for pycaffe.

A name below caffe (caffe.io, caffe.proto.caffe_pb2) is the module of that name below torchcaffe, the same object.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from torchcaffe.errors import CaffeError


class _Alias(MetaPathFinder, Loader):
    """Finds caffe.x in torchcaffe.x."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        found = importlib.util.find_spec(f"torch{fullname}") if fullname.partition(".")[0] == "caffe" else None
        return found and ModuleSpec(fullname, self, loader_state=found)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(spec.loader_state.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which importing it by another name has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


_alias = _Alias()


def install() -> None:
    """From now on `import caffe` and `from caffe... import ...` give torchcaffe.

    Raises CaffeError where another caffe is imported already.
    """
    ours = sys.modules["torchcaffe"]
    if sys.modules.setdefault("caffe", ours) is not ours:
        raise CaffeError("another caffe is imported in this process already; call torchcaffe.install() before, or use a process of its own")
    if _alias not in sys.meta_path:
        sys.meta_path.insert(0, _alias)


@contextmanager
def installed() -> Iterator[None]:
    """install() for the block only, unless it was called before."""
    before = _alias in sys.meta_path
    names = set(sys.modules)
    install()
    try:
        yield
    finally:
        if not before:
            sys.meta_path.remove(_alias)
            for name in {"caffe", *(name for name in sys.modules if name.startswith("caffe."))} - names:
                del sys.modules[name]
