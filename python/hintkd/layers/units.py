"""Rows brought to length 1, and the way back for gradients."""
from __future__ import annotations

import numpy as np


def unit_rows(x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows of x (..., D) divided by their length or by eps, whichever is larger, and what they were divided by, (..., 1)."""
    length = np.maximum(np.sqrt(np.square(x).sum(-1, keepdims=True)), eps)
    return x / length, length


def through_unit_rows(du: np.ndarray, u: np.ndarray, length: np.ndarray, eps: float) -> np.ndarray:
    """The gradient for x, given that for u, with u and length as unit_rows(x, eps) gave them."""
    along = np.where(length > eps, (du * u).sum(-1, keepdims=True), 0)      # a row that is divided by eps is no longer turned
    return (du - u * along) / length
