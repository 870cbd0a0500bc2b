"""The digest of a module's code: what changes it and what does not."""
from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from hintkd.errors import UserError
from hintkd.run.sources import code_digest

LOSS = '''"""A loss."""
from . import tools

class Loss:
    """It is one."""
    weight = 2.0

    def forward(self, bottom, top):
        """Forward."""
        return tools.double(bottom)
'''
FILES = {"__init__.py": "", "loss.py": LOSS, "tools.py": "from mine.deep import rows\n\ndef double(x):\n    return 2 * rows(x)\n",
         "deep/__init__.py": "def rows(x):\n    return x\n", "other.py": "import caffe\n"}


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package `mine`, which is on the path and cannot be imported here, as it needs a caffe."""
    for name, text in FILES.items():
        (tmp_path / "mine" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "mine" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "mine"


@pytest.mark.parametrize("text", [
    "# a comment\n" + LOSS,
    LOSS.replace("A loss.", "A better sentence."),
    LOSS.replace('        """Forward."""\n', "").replace('    """It is one."""\n', "").replace('"""A loss."""\n', ""),
    LOSS.replace("return tools.double(bottom)", "return (\n            tools.double(bottom,))").replace(",)", ")"),
])
def test_comments_docstrings_and_layout_do_not_count(package: Path, text: str) -> None:
    before = code_digest("mine.loss")
    assert text != LOSS
    (package / "loss.py").write_text(text)
    assert code_digest("mine.loss") == before


@pytest.mark.parametrize(("old", "new"), [("2.0", "2.5"), ("2.0", "2"), ("forward", "backward"), ("Loss:", "Loss(object):")])
def test_code_counts(package: Path, old: str, new: str) -> None:
    before = code_digest("mine.loss")
    (package / "loss.py").write_text(LOSS.replace(old, new))
    assert code_digest("mine.loss") != before


def test_a_text_that_is_no_docstring_counts(package: Path) -> None:
    texts = ['def f():\n    x = 1\n    "one"\n', 'def f():\n    x = 1\n    "two"\n']
    digests = set()
    for text in texts:
        (package / "loss.py").write_text(text)
        digests.add(code_digest("mine.loss"))
    assert len(digests) == 2


def test_what_a_module_imports_of_its_package_counts_and_so_on(package: Path) -> None:
    before = code_digest("mine.loss"), code_digest("mine.tools"), code_digest("mine.other"), code_digest("mine")
    (package / "deep/__init__.py").write_text("def rows(x):\n    return x[::2]\n")
    after = code_digest("mine.loss"), code_digest("mine.tools"), code_digest("mine.other"), code_digest("mine")
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True, False]


def test_a_package_counts_with_all_that_is_in_it(package: Path) -> None:
    before = code_digest("mine"), code_digest("mine.loss")
    (package / "other.py").write_text("import caffe\nx = 1\n")
    assert code_digest("mine") != before[0] and code_digest("mine.loss") == before[1]


def test_a_module_outside_packages_counts_with_those_beside_it(package: Path) -> None:
    folder = package.parent
    for name, text in {"alone": "import numpy, helper\n", "helper": "x = 1\n"}.items():
        (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    before = code_digest("alone")
    assert code_digest(str(folder / "alone.py")) == before
    (folder / "helper.py").write_text("x = 22\n")
    assert code_digest("alone") == code_digest(str(folder / "alone.py")) != before
    with pytest.raises(UserError, match=r"gone\.py: No such file"):
        code_digest(str(folder / "gone.py"))


def test_the_digests_of_hintkds_losses_hold_what_they_import() -> None:
    """Runs under an earlier definition of the key are found by these; whoever changes what a loss computes writes them anew."""
    from hintkd.run import earlier
    assert {module: code_digest(module) for module in earlier._CODE_NOW} == earlier._CODE_NOW


def test_what_is_no_python_is_a_sentence_with_its_line(package: Path) -> None:
    (package / "loss.py").write_text("x = 1\ny = (\n")
    with pytest.raises(UserError, match=r"mine/loss\.py:2: not Python 3"):
        code_digest("mine.loss")
    with pytest.raises(UserError, match=r"mine\.nothing is not on the path"):
        code_digest("mine.nothing")
