"""What README.md, docs/ and the package's own files say is what the code does."""
from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import common
import memory
import remembered
import scaling
import step
import zoo
from hintkd import cli
from hintkd.methods import generate
from hintkd.study.table import load_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def block(language: str) -> str:
    """The README's only block of code in this language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return text


def test_generated_parts_are_up_to_date():
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs/render.py")
    assert spec and spec.loader
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    assert render.filled(README) == README, "run `make docs`"


@pytest.mark.parametrize("program", [step, scaling, memory, remembered, zoo])
def test_the_page_on_speed_shows_what_was_measured(program):
    name = program.__name__
    page, measured = (ROOT / "docs/performance.md").read_text(), ROOT / f"benchmarks/{name}.json"
    if not measured.exists():
        pytest.skip("the benchmark was not run")
    shown = common.rendered(page, name, program.markdown(json.loads(measured.read_text())))
    assert shown == page, f"run `python benchmarks/{name}.py --render`"


def test_links_lead_somewhere():
    missing = [f"{page.name}: {target}" for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "tests/golden/README.md"]
               for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()) if not (page.parent / target).exists()]
    if not (ROOT / "results/measured").exists():
        missing = [link for link in missing if not link.endswith("results/report.md")]
    assert not missing


COMMANDS = sorted({line.split("#")[0].split("hintkd ", 1)[1].strip() for line in README.splitlines()
                   if re.match(r"    (docker run .*)?hintkd [a-z]", line)})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_their_flags(command):
    name, *arguments = shlex.split(command)
    group = typer.main.get_group(cli.app)
    group.commands[name].make_context(name, arguments)           # raises on unknown flags and wrong types


def test_the_method_of_the_readme_is_one(tmp_path):
    """It trains, too, where hintkd is installed: test_wheel.py."""
    (tmp_path / "my_methods.py").write_text(block("python"))
    (tmp_path / "my-table.yaml").write_text(block("yaml"))
    table = load_table(tmp_path / "my-table.yaml")
    files = [path for name in ("top-hint", "lambda-falling") for path in generate.generate(table.experiment(name), tmp_path)]
    nets = [path for path in files if "prototxt" in path.parts]
    assert [path.name for path in nets if path.parent.name == "top-hint"] == ["1-hint.prototxt", "2-kd.prototxt"]
    hint = next(path for path in nets if path.parent.name == "top-hint")
    assert '"teacher/group2_block3_sum"' in hint.read_text()
    falling = next(path for path in nets if (path.parent.name, path.name) == ("lambda-falling", "2-kd.prototxt"))
    assert '\\"schedule\\": \\"linear\\"' in falling.read_text()


def test_all_packages_are_installed():
    folders = {path.parent.relative_to(root) for root in (ROOT / "python", ROOT) for package in ("torchcaffe", "hintkd", "data_prep")
               for path in (root / package).rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"hintkd.paper"}


def test_all_files_beside_the_code_are_installed():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    found = [path for path in (ROOT / "python/hintkd").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert found
    for path in found:
        package = ".".join(path.parent.relative_to(ROOT / "python").parts)
        assert any(path.match(pattern) for pattern in data.get(package, ())), path


def test_every_dependency_is_pinned():
    pinned = {canonicalize_name(Requirement(line).name) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    wanted = PROJECT["project"]["dependencies"] + [r for rs in PROJECT["project"]["optional-dependencies"].values() for r in rs]
    assert {canonicalize_name(Requirement(text).name) for text in wanted} - {"hintkd"} <= pinned
