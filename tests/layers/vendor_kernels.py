"""A vendor's operator on the simulated device, with the library's reference as its kernel, and its calls counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fake_kernels.declare import declare
from fake_kernels.library import find
from fxpatch.layers.platform_op import look_again


@contextmanager
def declared(name: str) -> Iterator[Counter[str]]:
    calls: Counter[str] = Counter()
    record = find(name)

    def counted(*args: Any) -> Any:
        calls[name] += 1
        return record.reference(*args)

    with declare([record.schema], {name: counted}):
        look_again()
        yield calls
    torch._dynamo.reset()
