"""The programs beside `caffe` in Caffe's tools folder, and what torchcaffe adds to them; each module is a subcommand or two.

A module has `register(add)`: it calls add(name, run), which gives an argparse parser for the flags, and `run` gets what was parsed.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int | None]
Add = Callable[[str, Run], argparse.ArgumentParser]
