"""What is to be run. The rule: a case is small and names its OpInfo by a string, so that it can be sent to a worker,
named in the list of exceptions, and blamed for a crash.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}

# the order of the table
STAGES = ("forward", "variants", "backward", "aot_eager", "aot_eager_backward", "inductor", "inductor_backward")
COMPILED = frozenset(stage for stage in STAGES if stage.startswith(("aot_eager", "inductor")))


@dataclass(frozen=True, order=True)
class Case:
    """One OpInfo or ModuleInfo, in one dtype, at one stage.

    Args:
        suite: "op" or "module".
        name: of the info, with its variant (`sum_to_size`, `linalg.norm:subgradients_at_zero`).
        stage: one of `STAGES`.
        dtype: one of `DTYPES`.
        samples: at most so many of its samples, evenly spaced over all; 0 for all.
    """

    suite: str
    name: str
    stage: str
    dtype: str
    samples: int = 0

    def __str__(self) -> str:
        return f"{self.suite} {self.name} {self.stage} {self.dtype}"


@functools.cache
def infos(suite: str) -> dict[str, Any]:
    """All infos of a suite, by name."""
    if suite == "module":
        from torch.testing._internal.common_modules import module_db

        return {info.name: info for info in module_db}
    from torch.testing._internal.common_methods_invocations import op_db

    return {name_of(info): info for info in op_db}


def name_of(info: Any) -> str:
    """The name of an OpInfo: unique in `op_db`."""
    return f"{info.name}:{info.variant_test_name}" if info.variant_test_name else str(info.name)


def applies(suite: str, info: Any, stage: str, dtype: torch.dtype) -> bool:
    """Whether the info claims the stage and dtype for the CPU."""
    differentiates = dtype.is_floating_point and (suite == "module" or info.supports_autograd)
    return dtype in info.supported_dtypes("cpu") and {
        "variants": suite == "op" and (info.inplace_variant is not None or info.supports_out),
        "backward": differentiates,
        "aot_eager_backward": differentiates,
        "inductor_backward": differentiates,
    }.get(stage, True)


def cases(suite: str, stage: str, dtype: str, samples: int = 0) -> Iterator[Case]:
    """Every case of a suite at one stage in one dtype, in the suite's order."""
    for name, info in infos(suite).items():
        if applies(suite, info, stage, DTYPES[dtype]):
            yield Case(suite, name, stage, dtype, samples)


def chosen(total: int, limit: int) -> set[int]:
    """Which of `total` samples are taken: evenly spaced, the first and the last among them."""
    if limit == 0 or total <= limit:
        return set(range(total))
    return {0} if limit == 1 else {i * (total - 1) // (limit - 1) for i in range(limit)}
