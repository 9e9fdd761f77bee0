"""Options that several commands have."""

from __future__ import annotations

import argparse

STDOUT = "-"


def add_import(parser: argparse.ArgumentParser, brings: str) -> None:
    """`--import MODULE`: as `imports`, a list; `brings`: what the module is imported for."""
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help=f"a module that brings the {brings}, e.g. torch_npu; may be repeated",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json [FILE]`: as `json`, a path, `STDOUT` or None."""
    parser.add_argument("--json", metavar="FILE", nargs="?", const=STDOUT, help="write JSON; to stdout without a FILE")


def seconds(text: str) -> float:
    """A time limit, for argparse."""
    given = float(text)
    if not given > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time limit: a number of seconds above 0 is expected")
    return given
