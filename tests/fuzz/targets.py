"""What is fuzzed, by name, and what it is started with."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Target:
    """One function of bytes.

    Attributes:
        name: of the module here that has it as `check`, and of its folder of seeds.
        modules: whose lines atheris is to count: packages of the repository.
        seeds: files besides those in the folder seeds/NAME.
        longest: bytes of an input.
    """

    name: str
    modules: tuple[str, ...]
    seeds: tuple[str, ...] = ()
    longest: int = 2048

    def check(self) -> Callable[[bytes], None]:
        """The function; importing it imports what it tests."""
        found: Callable[[bytes], None] = self._module().check
        return found

    def inputs(self) -> list[bytes]:
        """The seeds, in an order that is always the same; those that `seeds` of the module makes come first."""
        made = getattr(self._module(), "seeds", list)()
        folder = (HERE / "seeds" / self.name).glob("*")
        files = [*sorted(folder), *(path for each in self.seeds for path in sorted(ROOT.glob(each)))]
        return [*made, *(path.read_bytes() for path in files)]

    def _module(self) -> Any:
        return importlib.import_module(f"fuzz.{self.name}")


TARGETS = {
    each.name: each
    for each in (
        Target("codegen", ("fxpatch.codegen",)),
        Target("profiles", ("compile_configs", "tomllib"), ("compile_configs/*.toml",), longest=8192),
        Target("artifacts", ("fxpatch.artifacts",), longest=8192),
    )
}


def changed(seeds: list[bytes], count: int, longest: int) -> Iterator[bytes]:
    """`count` inputs: seeds with some bytes replaced, removed, doubled or put between others; the same in each run."""
    draw = random.Random(0)
    for n in range(count):
        data = bytearray(seeds[n % len(seeds)])
        for _ in range(draw.choice((1, 2, 4, 16))):
            at, length = draw.randint(0, len(data)), draw.choice((1, 1, 2, 4, 32))
            match draw.randrange(4):
                case 0:
                    data[at : at + length] = draw.randbytes(length)
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = draw.choice(seeds)[at : at + length]
                case 3:
                    data[at:at] = draw.randbytes(length)
        yield bytes(data[:longest])
