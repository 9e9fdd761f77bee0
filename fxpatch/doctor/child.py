"""What a forked process does for one request, and what it says. `zygote` forks it, and minds how it ends.

Kinds of request: `facts`: what the process looks like once it is made ready, or the typed error why it cannot be;
`probe`: one probe, with or without `fxpatch.install()`; `pictures`: see `pictures`. Making ready is the same for all:
the vendor's modules, then the simulated device, or what `import torch` would have loaded by itself.
"""

from __future__ import annotations

import importlib
import os
import platform
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from fxpatch import __version__
from fxpatch.doctor.model import factory
from fxpatch.doctor.probe import Broken, NotApplicable, Probe, State, Subject
from fxpatch.doctor.zygote import AUTOLOAD
from fxpatch.errors import FxPatchError, UnknownDeviceError, VendorModuleError
from fxpatch.privateuse1 import private_name
from fxpatch.probe import read_facts, vendor_package
from fxpatch.versions import imported_versions

_TRACEBACK_LINES = 16
_TEXT = 4000


def answer(request: Mapping[str, Any], probes: Mapping[str, Probe], ready: Callable[[], object]) -> dict[str, Any]:
    """Does what is asked.

    Args:
        request: `kind`, `subject`, `autoload` (what the doctor itself was started with), and for a probe `probe`,
            `install`.
        probes: by their names.
        ready: to be called once the vendor's modules are there, or the device is simulated: the time limit begins.
    """
    subject = Subject(**{**request["subject"], "imports": tuple(request["subject"]["imports"])})
    if request["kind"] == "facts":
        return _facts(subject, request["autoload"], ready)
    if request["kind"] == "pictures":
        _make_ready(subject, request["autoload"])
        ready()
        from fxpatch.doctor.pictures import measure

        return _asked(lambda: measure(subject), subject, install=True)
    try:
        _make_ready(subject, request["autoload"])
    except Exception as error:  # it went well when the facts were read, so this is the device's doing
        return {"state": State.BROKEN.value, **_diagnosis(error)}
    ready()
    probe = probes[request["probe"]]
    return _asked(lambda: probe.run(subject), subject, install=request["install"])


def _asked(run: Callable[[], Any], subject: Subject, *, install: bool) -> dict[str, Any]:
    """What became of a probe: its state, and what it found or how it failed."""
    said: dict[str, Any] = {"state": State.OK.value}
    try:
        if install:
            _install(subject.device)
        said["found"] = run()
        if install:
            said["applied"] = _applied()
    except NotApplicable as reason:
        said = {"state": State.NOT_APPLICABLE.value, "found": str(reason)}
    except BaseException as error:  # SystemExit too: it is what there is to be told
        said = {"state": State.BROKEN.value, **_diagnosis(error)}
    return said


def _install(device: str) -> None:
    from fxpatch.installer import install  # here, so that a process without it is a process without fxpatch

    try:
        install(device)
    except Exception as error:
        todo = error.hint if isinstance(error, FxPatchError) else ""
        raise Broken(f"fxpatch.install({device!r}) fails: {_text(error)}", todo=todo) from error


def _applied() -> list[str]:
    from fxpatch.report import status

    return [row.name for row in status().rows if row.state == "applied"]


def _diagnosis(error: BaseException) -> dict[str, Any]:
    """What is wrong, and where: of a diagnosis, where its cause was raised."""
    if isinstance(error, Broken):
        known, trace = {"error": error.what, "why": error.why, "todo": error.todo}, None
        if error.__cause__ is not None:
            trace = error.__cause__.__traceback__
    else:
        known, trace = {"error": _text(error)}, error.__traceback__
        if isinstance(error, FxPatchError):
            known["todo"] = error.hint
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next  # how we came to the probe is not what is wrong
    lines = "".join(traceback.format_tb(trace)).splitlines()
    return {**known, "traceback": lines[-_TRACEBACK_LINES:]}


def _text(error: BaseException) -> str:
    """`NameError: name 'device' is not defined`, also for errors that cannot even say what they are."""
    name = type(error).__name__
    try:
        words = str(error).strip()
    except Exception as another:
        words = f"(its text cannot be had: {type(another).__name__})"
    return f"{name}: {words}"[:_TEXT] if words else name


def _make_ready(subject: Subject, autoload: str | None) -> None:
    """The process as the user's own would be, before the first line that is about the model.

    Raises:
        VendorModuleError: a module cannot be imported, or torch's loader of backends fails.
        UnknownDeviceError, DeviceNameTakenError: the device cannot be simulated.
    """
    if autoload is None:
        os.environ.pop(AUTOLOAD, None)
    else:
        os.environ[AUTOLOAD] = autoload
    for name in subject.imports:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise VendorModuleError(
                f"{name!r} cannot be imported.",
                seen=_text(error),
                expected=f"import {name} to succeed, in the directory and environment of this command",
                hint=f"run `python -c 'import {name}'`, and mend what it reports",
            ) from error
    if subject.simulated:
        from fxpatch.simulator.registration import simulate

        simulate(subject.device)
    elif autoload != "0":
        from fake_kernels.audit.adapter import load_device_backends

        try:
            load_device_backends()
        except Exception as error:
            raise VendorModuleError(
                "torch cannot load the backends that are installed here.",
                seen=_text(error.__cause__ or error),
                expected="`import torch` to succeed",
                hint=f"mend or remove the package that it names; {AUTOLOAD}=0 leaves all of them out",
            ) from error


def _facts(subject: Subject, autoload: str | None, ready: Callable[[], object]) -> dict[str, Any]:
    """The device and the versions; `error` instead where the request cannot be met."""
    try:
        _make_ready(subject, autoload)
        ready()
        facts = read_facts(subject.device or None)
        if subject.model:
            factory(subject.model)
    except UnknownDeviceError as error:
        return {"error": {**_fields(error), "hint": f"{error.hint}; here: --import MODULE, or --simulate"}}
    except FxPatchError as error:
        return {"error": _fields(error)}
    packages = [name.partition(".")[0] for name in subject.imports] + [vendor_package(facts.device)]
    return {
        "device": facts.device,
        "accelerator": private_name() or "",
        "versions": {
            "python": platform.python_version(),
            "torch": facts.torch_version,
            "fxpatch": __version__,
            **imported_versions(dict.fromkeys(packages)),
        },
    }


def _fields(error: FxPatchError) -> dict[str, str]:
    named = {name: getattr(error, name) for name in ("what", "seen", "expected", "hint")}
    return {"type": type(error).__name__, **named}
