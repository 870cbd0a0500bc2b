"""Freed memory stays with the process.

glibc gives large blocks back to the system when they are freed, and every page of the next large tensor then costs a page fault.
One training iteration of a ResNet-8 at batch 128 had 15,000 of them, 30 of 160 ms.  Blocks of 32 MiB and more, as activations of
a ResNet-8 with 64 channels are, stay only where malloc is told never to use mmap: adding two takes 3 ms then, and 16 otherwise.
"""
from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                  # malloc.h


def keep_freed() -> bool:
    """Tell glibc's malloc to keep what is freed; whether it could be told.

    Nothing happens on other systems and C libraries, or where the user has set one of malloc's thresholds in the environment.
    """
    if not sys.platform.startswith("linux") or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"} & set(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
