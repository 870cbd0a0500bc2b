"""Stages that were trained under an earlier definition of a key stay what they are: found again, resumed, and not trained twice.

A stage folder's key.json holds its key and the key's parts.  Here the parts of the folders in a workspace are written as today's definition
has them; where their hash is not the folder's key, the folder is kept for the stage of that hash.  So the folders themselves are the table
of old and new keys, and nothing in them is changed or moved, whoever else is at work there.

Until the first definition ended, a key held when a stage is tested on the way, and a Python layer's module counted by its file.
"""
from __future__ import annotations

from pathlib import Path

from hintkd.errors import Damaged
from hintkd.files import read_sealed
from hintkd.run.keys import Parts, decides, digest

_HINT, _KD = "hintkd.layers.hint_loss", "hintkd.layers.softened_cross_entropy"
_MODULES = {"HintLoss": _HINT, "SoftenedCrossEntropy": _KD}      # once both in hintkd.layers
_CODE = {                                                        # of a file with this digest, which was the part
    _HINT: {"4264bdc1a88135b02a93f39752e9fa775e1a196817e9882fe2866128300198db",
            "06b0f4a511f4c826ebedf41f5ef13d2203064dca12a51bc5192bf988abdee07c"},
    _KD: {"4264bdc1a88135b02a93f39752e9fa775e1a196817e9882fe2866128300198db",
          "b5e72a4702ba74fa12e96e8e84c5b15b30760d35a67b3ef00890384270be693f"}}
_CODE_NOW = {_HINT: "fd3ec520471fe48b92d513276dd97947ec8b37c135e4d16ec9c539b301f86bcb",
             _KD: "9c444f4fd10e4deda06143f3752e49cafe80914c7f7c9879ae4bfeaf9b88c001"}


def kept(stages: Path) -> dict[str, str]:
    """The keys under which the folder `stages` keeps stages, by the hashes of their parts, where the two differ.

    Where there are several folders for a stage, a finished one goes before others.
    """
    known: dict[str, Parts] = {}
    finished = set()
    for path in sorted(stages.glob("*/key.json")):
        found = read_key(path.parent)
        if found:
            known[found[0]] = found[1]
            if (path.parent / "result.json").exists():
                finished.add(found[0])
    today: dict[str, str] = {}
    for key in known:
        _today(key, known, today)
    result: dict[str, str] = {}
    for key in sorted(known, key=lambda key: (key not in finished, key != today[key])):
        result.setdefault(today[key], key)
    return {new: old for new, old in result.items() if new != old}


def _today(key: str, known: dict[str, Parts], today: dict[str, str]) -> str:
    """The hash, as of today's definition, of the stage that is known under `key`, and of those that it starts from."""
    if key not in today:
        parts = translated(known[key]) if key in known else None
        for name, value in (parts or {}).items():
            if parts and name.startswith("weights["):
                parts[name] = [_today(value[0], known, today), *value[1:]]
        today[key] = digest(parts) if parts else key
    return today[key]


def translated(parts: Parts) -> Parts:
    """The parts of a key, of whatever definition, as today's has them; its weights still named by their keys."""
    made: Parts = {}
    modules: dict[str, str] = {}
    for name, value in parts.items():
        if name.startswith("source of "):
            modules[name.removeprefix("source of ")] = value
        elif name.endswith(".python_param.module"):
            made[name] = _MODULES.get(parts.get(name.removesuffix("module") + "layer", ""), value) if value == "hintkd.layers" else value
        elif decides(name):
            made[name] = value
    used = {value for name, value in made.items() if name.endswith(".python_param.module")}
    for module in sorted(used):
        file = modules.get(module, modules.get("hintkd.layers"))
        made[f"source of {module}"] = _CODE_NOW[module] if file in _CODE.get(module, ()) else file
    return made


def read_key(folder: Path) -> tuple[str, Parts] | None:
    """The key that a stage folder was made for and the key's parts; None if it does not say."""
    try:
        content = read_sealed(folder / "key.json", "key", "parts")
    except Damaged:
        return None
    return content["key"], content["parts"]
