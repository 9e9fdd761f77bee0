"""Options that several commands have."""

from __future__ import annotations

import argparse

STDOUT = "-"
_DAY_S = 86_400.0


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
    if not 0 < given <= _DAY_S:
        raise argparse.ArgumentTypeError(f"{text} is no time limit: seconds are expected, above 0, a day at most")
    return given
