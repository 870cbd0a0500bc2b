"""Records that were taken back: which, when and why, from results/measured/history.yaml, so that a report says what it replaces."""
from __future__ import annotations

from datetime import date
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from hintkd.errors import UserError

FILE = "history.yaml"


class Retired(BaseModel):
    """Some records that no longer count."""
    model_config = ConfigDict(extra="forbid", frozen=True)

    retired: date
    records: str
    why: str


def read_history(measured: Path) -> list[Retired]:
    """What was retired in a folder of records, the newest first; nothing if it has no history.  Raises UserError if the file is wrong."""
    path = measured / FILE
    if not path.exists():
        return []
    try:
        entries = TypeAdapter(list[Retired]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error).splitlines()[0]}
        raise UserError(f"{path}: {'.'.join(map(str, what['loc']))}: {what['msg']}; write a list of entries with retired (a date), records "
                        "and why") from None
    return sorted(entries, key=lambda entry: entry.retired, reverse=True)
