"""YAML as a person writes it: read with its place in what is said of a mistake.  What is in it is the business of others."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hintkd.errors import UserError

LONGEST = 1_000_000                         # bytes: a table takes some thousands


class _Loader(yaml.SafeLoader):
    """Refuses a field that is given twice, of which YAML itself takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the field {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.  Raises UserError with file, line and column."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file; name a table's YAML file")
        if path.exists() and path.stat().st_size > LONGEST:
            raise UserError(f"{path} is too large for a table: it has {path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{path} cannot be read: {why}; name a table's YAML file") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """What a text says in YAML.  Raises UserError with `where` it stands, line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}{place}: not YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{where}: lists within lists within lists; a table needs three of them") from None
    except (ValueError, TypeError, OverflowError) as error:           # a date that does not exist, a number of thousands of digits
        raise UserError(f"{where}: a value in it cannot be read: {error}") from None
