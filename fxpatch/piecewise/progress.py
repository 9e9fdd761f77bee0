"""What `prepare()` shows while it captures: which size, how many graphs it takes, and the memory that is reserved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """Before each capture, and once at the end.

    Args:
        done, of: sizes.
        size: the one that comes; 0 at the end.
        graphs: how many it takes.
        reserved: bytes that the device's allocator holds; None where nobody counts.
    """

    done: int
    of: int
    size: int
    graphs: int
    reserved: int | None


Progress = Callable[[Step], object]


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """Where steps go: to a function, to a bar on stderr (True; None: where that is a terminal), or nowhere (False).

    Args:
        progress: as of `PiecewiseRunner`.
    """
    if callable(progress):
        yield from _own(progress)
    elif progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda step: None
    else:
        with _bar() as show:
            yield show


def _own(progress: Progress) -> Iterator[Progress]:
    """A function of the caller's. What it raises comes when all is captured: other ranks, which decide with this one
    about every size, would wait for it."""
    raised: list[Exception] = []

    def show(step: Step) -> None:
        if raised:
            return
        try:
            progress(step)
        except Exception as error:
            raised.append(error)

    yield show
    if raised:
        raise raised[0]


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("capturing", total=None)
        yield lambda step: bar.update(task, completed=step.done, total=step.of, description=words(step))


def words(step: Step) -> str:
    """A step in words: `size 128, 33 graphs, 1.2 GiB reserved`.

    Args:
        step: where capturing is.
    """
    told = [f"size {step.size}", f"{step.graphs} graphs"] if step.size else ["captured"]
    if step.reserved is not None:
        told.append(f"{step.reserved / 2**30:.2f} GiB reserved")
    return ", ".join(told)
