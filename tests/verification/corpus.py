"""Programs that torch 2.13 compiles to wrong results without a word, on plain CPU tensors and with nothing of ours
installed, and for each a twin that does nearly the same and is right. All were run here; those that torch's issues
report, and that give right results here (136662, 153389, 182012, 180164, 185702), are not among them.

Operators that are wrong about themselves (S1, S3 and S9 of the facts on out-of-tree devices) are here too: nothing in
torch checks a schema or a fake kernel against its kernel, so every compiler believes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LIBRARY = torch.library.Library("miscompiled", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator of this file's own, for the CPU and the simulated device."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "PrivateUse1"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"miscompiled::{name}", fake, lib=LIBRARY)


def _double(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 2)


def _reverse(source: torch.Tensor, to: torch.Tensor) -> None:
    for row in range(len(source)):
        to[len(source) - 1 - row] = source[row]


def _nothing(*tensors: torch.Tensor) -> None: ...


define("double(Tensor x, Tensor(a!) out) -> ()", _double, _nothing)
define("reverse(Tensor source, Tensor(a!) to) -> ()", _reverse, _nothing)
define("hidden(Tensor x, Tensor out) -> ()", _double, _nothing)
define("seeded(Tensor x) -> (Tensor, int)", lambda x: (x * 2, 7), lambda x: (torch.empty_like(x), 0))
define("seeded_right(Tensor x) -> (Tensor, int)", lambda x: (x * 2, 7), lambda x: (torch.empty_like(x), 7))
define("half(Tensor x) -> Tensor", lambda x: x.half(), torch.empty_like)
define("half_right(Tensor x) -> Tensor", lambda x: x.half(), lambda x: x.new_empty(x.shape, dtype=torch.float16))
define("turned(Tensor x) -> Tensor", lambda x: (x * 2).t().contiguous().t(), torch.empty_like)
define("turned_right(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like)
ops = torch.ops.miscompiled


@dataclass(frozen=True)
class Case:
    """One program.

    Args:
        source: where it is known from.
        wrong: the program.
        right: its twin.
        inputs: makes the arguments.
        stages: those that are run and have to find it; "fakes" is run always.
        operator: what has to be named, as the first wrong operator or among those that write to what it reads.
    """

    source: str
    wrong: Callable[..., Any]
    right: Callable[..., Any]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    stages: tuple[str, ...]
    operator: str


def read_past_a_mutation(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    ops.double(x, out)
    y = out + 1
    ops.double(y, out)
    return y + out


def read_past_a_mutation_right(x: torch.Tensor) -> torch.Tensor:
    out, other = torch.zeros_like(x), torch.zeros_like(x)
    ops.double(x, out)
    y = out + 1
    ops.double(y, other)
    return y + other


def clone_of_what_is_written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    ops.reverse(y, x)
    return x * 2


def clone_of_what_is_written_right(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    ops.reverse(y, x)
    return x * 2


def copy_before_a_mutation(to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    to[0:, :] = source[0:, :]
    source.add_(1)
    return source


def copy_before_a_mutation_right(to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    to[0:, :] = source[0:, :] * 2
    source.add_(1)
    return source


def overlapping_copy(x: torch.Tensor) -> torch.Tensor:
    x[1:] = x[:-1].clone()
    return x * 1


def overlapping_copy_right(x: torch.Tensor) -> torch.Tensor:
    x[1:] = x[1:].clone()
    return x * 1


def dtype_view_before_a_mutation(x: torch.Tensor) -> torch.Tensor:
    y = x.view(torch.int32) * 2
    y.sub_(-4)
    x[:, 2:5] = 2
    return y.view(torch.int64)


def dtype_view_before_a_mutation_right(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.sub_(-4)
    x[:, 2:5] = 2
    return y


def int64_range_in_32_bits(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, 11, dtype=torch.int64) * torch.tensor([int(1e9)]) + x


def int64_range_in_32_bits_right(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, 11, dtype=torch.int64) * torch.tensor([int(1e3)]) + x


def undeclared_write(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    ops.hidden(x, out)
    return out + 0


def undeclared_write_right(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    ops.double(x, out)
    return out + 0


def number_made_constant(x: torch.Tensor) -> torch.Tensor:
    y, seed = ops.seeded(x)
    return y + seed


def number_made_constant_right(x: torch.Tensor) -> torch.Tensor:
    y, seed = ops.seeded_right(x)
    return y + seed


ISSUES = "https://github.com/pytorch/pytorch/issues/"
FACTS = "facts/out_of_tree.md, "

CASES = (
    Case(
        FACTS + "S1, note: the pointwise value is inlined past the second write",
        read_past_a_mutation,
        read_past_a_mutation_right,
        lambda: (torch.ones(4),),
        ("inductor",),
        "miscompiled::double",
    ),
    Case(
        ISSUES + "198031",
        clone_of_what_is_written,
        clone_of_what_is_written_right,
        lambda: (torch.arange(8.0),),
        ("inductor",),
        "miscompiled::reverse",
    ),
    Case(
        ISSUES + "198131",
        copy_before_a_mutation,
        copy_before_a_mutation_right,
        lambda: (torch.zeros(3, 4), torch.arange(12.0).view(3, 4)),
        ("inductor",),
        "add_",
    ),
    Case(
        ISSUES + "197829",
        overlapping_copy,
        overlapping_copy_right,
        lambda: (torch.arange(64.0).view(16, 4),),
        ("inductor",),
        "setitem",
    ),
    Case(
        ISSUES + "198101",
        dtype_view_before_a_mutation,
        dtype_view_before_a_mutation_right,
        lambda: (torch.arange(-12, 12).reshape(4, 6),),
        ("inductor",),
        "setitem",
    ),
    Case(
        ISSUES + "175966",
        int64_range_in_32_bits,
        int64_range_in_32_bits_right,
        lambda: (torch.zeros(1, dtype=torch.int64),),
        ("inductor",),
        "mul",
    ),
    Case(
        FACTS + "S1: a schema that does not declare what it writes",
        undeclared_write,
        undeclared_write_right,
        lambda: (torch.ones(4),),
        ("fakes", "aot_eager"),
        "miscompiled::hidden",
    ),
    Case(
        FACTS + "S3: a number that the fake kernel makes up is a constant",
        number_made_constant,
        number_made_constant_right,
        lambda: (torch.ones(4),),
        ("fakes", "interpreter", "aot_eager"),
        "miscompiled::seeded",
    ),
    Case(
        FACTS + "S9: a fake kernel with another dtype",
        lambda x: ops.half(x) + 1,
        lambda x: ops.half_right(x) + 1,
        lambda: (torch.ones(3, 4),),
        ("fakes",),
        "miscompiled::half",
    ),
    Case(
        FACTS + "S9: a fake kernel with other strides",
        lambda x: ops.turned(x) + 1,
        lambda x: ops.turned_right(x) + 1,
        lambda: (torch.ones(3, 4),),
        ("fakes",),
        "miscompiled::turned",
    ),
)
