"""The programs beside `caffe` in Caffe's tools folder, and what torchcaffe adds to them; each module is a subcommand or a few.

A module has `register(add)`: it calls add(name, run), which gives an argparse parser for the flags, and `run` gets what was parsed.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int | None]
Add = Callable[[str, Run], argparse.ArgumentParser]


def names(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add_state(parser: argparse.ArgumentParser) -> None:
    """The flags that say in which state a net is built: --phase, --level, --stage."""
    parser.add_argument("--phase", choices=("TRAIN", "TEST"), default="TRAIN", help="phase of the net (default: %(default)s)")
    parser.add_argument("--level", type=int, default=0, metavar="N", help="level of the net's state")
    parser.add_argument("--stage", type=names, default=[], metavar="A,B", help="stages of the net's state")
