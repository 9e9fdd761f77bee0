"""Compiled code in a file: torch's caches, and functions compiled ahead of time. It runs where it was compiled for.

Two things can be saved: what `torch.compiler.save_cache_artifacts()` returns (after loading it, the same compilations
hit), and what `torch.compile(f, fullgraph=True).aot_compile(((args), {kwargs}))` returns (called without Dynamo and
without compiling). Both are pickles and machine code inside: `_dynamo/aot_compile.py` of torch 2.13 pickles code; what
is in a cache is unpickled when it hits, or at once where Triton bundles kernels (`codecache._emit_triton_bundle`). They
are loaded only when they are trusted.

Kernels cannot be moved. torch compares Python, torch and the names of CUDA and XPU devices, and nothing of a device on
PrivateUse1 nor of the processor, with whose instructions a kernel for another one ends the process: so all of that is
compared here first, and what differs is named.
"""

from __future__ import annotations

import io
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch

from fxpatch.drivers import asked_driver, driver_versions, in_use, model, vendor_packages
from fxpatch.errors import ArtifactError, MissingHereError
from fxpatch.patching.record import Target
from fxpatch.privateuse1 import private_name
from fxpatch.versions import imported_versions

_ASKED, _NOT_ASKED = ("model", "driver in use"), "not in use"  # of a device: asking it may initialize it
_MODULE = "torch._dynamo.aot_compile"  # seen in torch 2.11, 2.13 and 2.15
_SERIALIZE = Target(_MODULE, "AOTCompiledFunction.serialize", "fn, ...")
_LOAD = Target("torch.compiler", "load_compiled_function", "file, f_globals, ...")


def is_caches(what: Any) -> bool:
    """Whether it is what `torch.compiler.save_cache_artifacts` returns."""
    return isinstance(what, tuple) and len(what) == 2 and isinstance(what[0], bytes) and hasattr(what[1], "artifacts")


def is_function(what: Any) -> bool:
    """Whether it is what `aot_compile` returns."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(what, module.AOTCompiledFunction)


def system(device: str | None) -> dict[str, Any]:
    """What compiled code depends on, by name; all of it text.

    Args:
        device: the accelerator that it is for, or None where it is for the CPU.
    """
    told: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "machine": f"{sys.platform} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": device or "cpu",
        "PrivateUse1": private_name() or "without a name",  # guards and code for the CPU name the accelerator, too
    }
    if device is not None:
        asked = (model(device), asked_driver(device) or "unknown") if in_use(device) else (_NOT_ASKED, _NOT_ASKED)
        vendor = [f"{name}={each}" for name, each in imported_versions(vendor_packages(device)).items()]
        told.update({**dict(zip(_ASKED, asked, strict=True)), "vendor": vendor})
        told["driver"] = list(driver_versions(device, ask=False))
    return told


def device_of(what: Any) -> str | None:
    """The accelerator that compiled code is for: of a function, what torch noted; of caches, this process's."""
    if is_function(what):
        kind = str(what._artifacts.device_type)
        return None if kind == "cpu" else kind
    return private_name() or ("cuda" if torch.cuda.is_available() else None)


def payload(what: Any) -> bytes:
    """The bytes that torch makes of it.

    Raises:
        ArtifactError: torch cannot write the function.
        TargetMovedError: torch has moved what this needs.
    """
    if is_caches(what):
        return bytes(what[0])
    serialize = _SERIALIZE.resolve()
    try:
        return bytes(serialize(what).serialized_data)
    except Exception as error:  # of any class: it pickles what the function closes over, which is the user's
        raise ArtifactError(
            "This compiled function cannot be saved.",
            seen=f"{type(error).__name__}: {str(error)[:300]}",
            expected="a function that uses nothing but its arguments, torch, and what can be pickled",
            hint="give it as arguments what it closes over",
        ) from error


def check(saved: Mapping[str, Any]) -> None:
    """`MissingHereError` where compiled code is for something else than this process."""
    device = saved.get("device")
    here: dict[str, Any] = {}
    if device != "cpu" and not (isinstance(device, str) and hasattr(torch, device) and _exists(device)):
        differing = ["device"]
        here["device"] = f"none of that name (PrivateUse1 is {private_name() or 'without a name'})"
    else:
        here = system(None if device == "cpu" else device)
        differing = [name for name in sorted({*saved, *here}) if saved.get(name) != here.get(name)]
        unasked = {name for name in _ASKED if _NOT_ASKED in (saved.get(name), here.get(name))}
        differing = [name for name in differing if name not in unasked]  # the cache key is compared when it hits
    if differing:
        raise MissingHereError(
            "This code was compiled for something else.",
            seen="; ".join(
                f"{name}: {saved.get(name)!s:.120} there, {here.get(name)!s:.120} here" for name in differing
            ),
            expected="the same Python, torch, processor, device, driver and vendor package",
            hint="compile it again here; save the GraphModule or ExportedProgram to have something that can be moved",
        )


def load_caches(content: bytes) -> Any:
    """Puts the entries into torch's caches, and gives what torch says of them (`CacheInfo`)."""
    found = torch.compiler.load_cache_artifacts(content)
    if found is None:
        raise ArtifactError(
            "torch cannot read these cache artifacts.",
            seen=f"{len(content)} bytes of which torch {torch.__version__} made nothing; its log says why",
            expected="what torch.compiler.save_cache_artifacts() returned",
            hint="compile again, and save anew",
        )
    return found


def load_function(content: bytes, names: dict[str, object] | None) -> Any:
    """The compiled function.

    Args:
        names: the globals of the function, where it uses any.
    """
    load = _LOAD.resolve()
    return load(io.BytesIO(content), f_globals=names)


def _exists(device: str) -> bool:
    try:
        torch._C.device(device)
    except RuntimeError:
        return False
    return True
