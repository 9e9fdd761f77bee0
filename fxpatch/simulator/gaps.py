"""What vendors leave out. The problem: a repair can only be tested on a device that needs it, and the simulated device
has everything. The rule: `simulate(name, without=("autocast",))` makes one that lacks what some real device lacks.

Two gaps need no switch, since nothing a vendor registers can fill them: the random state of compiled checkpointing, and
FlexAttention's list of devices. Every simulated device has them, as every real one has.
"""

from __future__ import annotations

from collections.abc import Iterable

from fxpatch.errors import SimulatorError

GAPS = {
    "autocast": "nothing at the dispatch key AutocastPrivateUse1: operators inside torch.autocast raise",
    "module_to": "Module.to makes new parameters instead of moving them: ties and optimizers are lost, silently",
    "inductor": "no code generator: Inductor raises where it looks for one (early torch_musa, torch_npu by itself)",
}


def check(without: Iterable[str]) -> frozenset[str]:
    """The names of the gaps.

    Raises:
        SimulatorError: there is no gap of this name.
    """
    names = frozenset((without,) if isinstance(without, str) else without)
    unknown = sorted(names - set(GAPS))
    if unknown:
        raise SimulatorError(
            "The device cannot be simulated so.",
            seen=f"without={', '.join(unknown)}",
            expected=f"some of {', '.join(GAPS)}",
            hint="correct the arguments of simulate()",
        )
    return names


def check_same(name: str, asked: frozenset[str], has: frozenset[str]) -> None:
    """Refuses other gaps than those that the device has already: kernels cannot be taken back.

    Raises:
        SimulatorError: they differ.
    """
    if asked != has:
        raise SimulatorError(
            f"{name!r} is simulated already, and cannot be changed so.",
            seen=f"without={_listed(asked)}",
            expected=f"without={_listed(has)}, as the first time",
            hint="simulate the other device in a process of its own",
        )


def _listed(gaps: frozenset[str]) -> str:
    return f"({', '.join(sorted(gaps))})"
