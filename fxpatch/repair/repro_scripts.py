"""Scripts that torch writes to reproduce a failure, and that do not run on a device torch does not know.

The minifier and `fx_graph_runnable` (TORCH_COMPILE_DEBUG, TORCH_TRACE, `repro_after`) write the device into the script
and import torch alone: in a new process, `Expected one of cpu, cuda, ... device type at start of device string: musa`.
torch has a place for further imports (`extra_imports`, which it fills only inside Meta); the vendor's package goes
there, or the call that simulates the device, and `fxpatch.install`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from compile_configs import DeviceProfile, builtin_names
from fxpatch.drivers import origin, vendor_packages
from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Target
from fxpatch.privateuse1 import is_private

_MODULE = "torch._dynamo.debug_utils"
# They copy the name when they are imported, before or after this patch.
_WRITERS = tuple(f"torch._dynamo.repro.{name}" for name in ("after_dynamo", "after_aot", "aoti"))
_SIMULATOR = "fxpatch.simulator"


@dataclass(frozen=True)
class Script:
    """What scripts begin with besides torch, and what they would need; lines of Python."""

    seen_by_torch: bool
    now: str
    wanted: str


def _probe(device: str, profile: DeviceProfile | None = None) -> Script:
    now = str(sys.modules[_MODULE].__dict__.get("extra_imports", ""))
    return Script(not is_private(device), now, _lines(device, profile))


def _lines(device: str, profile: DeviceProfile | None = None) -> str:
    """The statements that make the device: packages in the order in which they were imported here."""
    lines = []
    if origin(device).startswith(_SIMULATOR):
        lines += ["import fxpatch", f"fxpatch.simulate({device!r})"]
    wanted = {*vendor_packages(device), *(() if profile is None else profile.packages)}
    lines += [f"import {name}" for name in sys.modules if name in wanted]
    return "\n".join((*lines, "import fxpatch", f"fxpatch.install({device!r}{_own(profile)})"))


def _own(profile: DeviceProfile | None) -> str:
    """The argument for a profile from a file of the user's; nothing for one of this package's, or one built by hand."""
    if profile is None or (profile.device in builtin_names() and profile.origin.startswith("compile_configs/")):
        return ""
    file = Path(profile.origin)
    return f", profile={str(file.resolve())!r}" if file.is_file() else ""


def _decide(script: Script) -> Needed | NotNeeded:
    if script.seen_by_torch:
        return NotNeeded("torch knows this device by itself")
    if script.wanted in script.now:
        return NotNeeded("scripts import the device's package already")
    return Needed("scripts that reproduce a failure would not know the device", version=script.wanted)


def _apply(_device: str, script: Script, edits: Edits) -> str:
    before, ours = script.now, "\n".join(filter(None, (script.now, script.wanted)))

    def restore() -> None:
        for name in (_MODULE, *_WRITERS):
            module = sys.modules.get(name)
            if module is not None and getattr(module, "extra_imports", None) == ours:
                module.__dict__["extra_imports"] = before

    edits.on_undo(restore)
    for name in (_MODULE, *_WRITERS):
        if getattr(sys.modules.get(name), "extra_imports", None) == before:
            sys.modules[name].__dict__["extra_imports"] = ours
    return f"they begin with {'; '.join(script.wanted.splitlines())}"


def patch(profile: DeviceProfile | None = None) -> Patch[Script]:
    """The record; scripts import a profile's packages too, and name the file that it was read from."""
    return Patch[Script](
        name="repro-scripts",
        why="what the minifier and fx_graph_runnable write imports torch alone, and fails on a device that a vendor's "
        "package makes: Expected one of cpu, cuda, ... at start of device string: musa",
        upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/debug_utils.py",
        until="torch writes the imports of the device's backend into the scripts",
        seen_in=("2.11.0", "2.13.0", "2.15.0"),
        targets=(Target(_MODULE, "extra_imports"),),
        probe=lambda device: _probe(device, profile),
        decide=_decide,
        apply=_apply,
        waits_for=(_MODULE,),
    )
