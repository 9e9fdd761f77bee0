"""Standard streams as commands find them: closed from the beginning (`>&-`), or given up by who reads (`| head`).

Neither is a finding, and the exit status 1 means one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def open_missing() -> None:
    """Gives a process whose stdin, stdout or stderr is closed the null device there, before another file gets its
    number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", errors="replace", closefd=False))


@contextmanager
def written(stream: TextIO) -> Iterator[None]:
    """Around what is written to a standard stream: on its way when this ends. A reader that has gone has had what it
    wanted.

    Raises:
        OSError: it cannot be written, for another reason. What is left of it goes nowhere.
    """
    try:
        yield
        stream.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)  # or Python tries once more at its end, and exits with status 120
        os.dup2(null, stream.fileno())
        os.close(null)
        if not isinstance(error, BrokenPipeError):
            raise
