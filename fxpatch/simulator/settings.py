"""What `simulate()` can be told about the device. The rule: all of it is checked before any of it is in force."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn, TypedDict

from fxpatch.errors import SimulatorError
from fxpatch.simulator.graph import limits
from fxpatch.simulator.memory import ledger

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Settings(TypedDict, total=False):
    """Keyword arguments of `simulate()`; those left out stay as they are."""

    memory: int | str | None
    max_live_graphs: int | None
    strict: bool


@dataclass(frozen=True)
class Checked:
    """Settings that make sense."""

    values: dict[str, Any]

    def apply(self) -> None:
        """From here on, the device is so."""
        if "memory" in self.values:
            ledger.limit = self.values["memory"]
            ledger.empty_cache()
        for name in ("max_live_graphs", "strict"):
            if name in self.values:
                setattr(limits, name, self.values[name])


def check(settings: Settings) -> Checked:
    """The settings, with sizes in bytes.

    Raises:
        SimulatorError: an unknown name, or a value that makes no sense.
    """
    unknown = sorted(set(settings) - set(Settings.__annotations__))
    if unknown:
        _refuse(f"simulate() has no setting {', '.join(unknown)}", ", ".join(Settings.__annotations__))
    values: dict[str, Any] = dict(settings)
    if values.get("memory") is not None:
        values["memory"] = _bytes(values["memory"])
        if values["memory"] < ledger.in_use:
            seen = f"memory={settings['memory']!r} while tensors and graph pools hold {ledger.in_use} bytes"
            _refuse(seen, "at least what is in use")
    graphs = values.get("max_live_graphs")
    if graphs is not None and not (type(graphs) is int and graphs > 0):
        _refuse(f"max_live_graphs={graphs!r}", "a positive number of graphs, or None for any number")
    if type(values.get("strict", False)) is not bool:
        _refuse(f"strict={values['strict']!r}", "True or False")
    return Checked(values)


def _bytes(memory: object) -> int:
    if type(memory) is int and memory > 0:
        return memory
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", memory) if isinstance(memory, str) else None
    nbytes = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2], 0))
    if nbytes <= 0:
        _refuse(f"memory={memory!r}", f"a positive number of bytes, or a text like '2 GiB' ({', '.join(_UNITS)})")
    return nbytes


def _refuse(seen: str, expected: str) -> NoReturn:
    raise SimulatorError(
        "The device cannot be simulated so.", seen=seen, expected=expected, hint="correct the arguments of simulate()"
    )
