"""What several layers use: rows of a blob, a softmax that never overflows, and param_str as JSON."""
from __future__ import annotations

import json
from typing import Any

import numpy as np


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Of each row of x (N, C); never overflows."""
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def rows(blob: Any) -> np.ndarray:
    """A blob's data as (N, everything else)."""
    return blob.data.reshape(blob.data.shape[0], -1)


def parse(param_str: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in param_str over the defaults.  Raises ValueError on bad JSON and on unknown names and types."""
    try:
        given = json.loads(param_str) if param_str else {}
    except ValueError as error:
        raise ValueError(f"param_str is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f'param_str must be a JSON object such as {{"tau": 3}}, not {param_str}')
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"param_str has an unknown entry '{name}'; known are {', '.join(sorted(defaults))}")
        wanted = (int, float) if isinstance(defaults[name], float) else type(defaults[name])
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(defaults[name], bool):
            raise ValueError(f"param_str: '{name}' cannot be {json.dumps(value)}")
    return dict(defaults, **given)
