"""`install()`: probe the process, match a compile profile, apply what the probes say is needed, hand back the undo.

One installation per process. Everything is checked before anything is changed, and an error on the way takes back
what was done; so torch is either as found or repaired, never in between.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from types import TracebackType
from typing import Any

import compile_configs
from compile_configs import DeviceProfile, Matched, builtin_names, builtin_profiles, load_profile, match
from fake_kernels.outcomes import Outcome as FakeOutcome
from fxpatch import codegen
from fxpatch.errors import AlreadyInstalledError, FxPatchWarning, NoProfileError, ProfileError
from fxpatch.fakes import Fakes
from fxpatch.patching import Ledger, Outcome, Patch
from fxpatch.probe import Facts, check_vendor, read_facts
from fxpatch.repair import patches
from fxpatch.settings import settings_patch
from fxpatch.versions import imported_versions

log = logging.getLogger("fxpatch")
_lock = threading.RLock()
_current: Installation | None = None


class Installation:
    """What `install()` has done, and the way back. Use as a context manager, or call `uninstall()`.

    Attributes:
        facts: what was read from the process.
        profile: the compile profile in force.
        trace: how the profile was chosen, in words.
        installs: how often `install()` has been called for it; only the first call changed anything.
        automatic: whether it came from the `torch.backends` entry point, and nobody has called `install()` since.
        left: after `uninstall()`, what somebody else had changed meanwhile and was therefore left as it is, in words.
    """

    def __init__(
        self, facts: Facts, profile: DeviceProfile, trace: tuple[str, ...], ledger: Ledger, fakes: Fakes
    ) -> None:
        self.facts, self.profile, self.trace = facts, profile, trace
        self.installs = 1
        self.automatic = False
        self.left: tuple[str, ...] = ()
        self._exits = 0
        self._ledger, self._fakes = ledger, fakes

    @property
    def active(self) -> bool:
        """Whether it is in force."""
        return _current is self

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """What became of each patch, by its name."""
        return dict(self._ledger.outcomes)

    @property
    def fakes(self) -> dict[str, FakeOutcome]:
        """What became of each fake kernel, by its operator."""
        return self._fakes.outcomes

    @property
    def patches(self) -> tuple[Patch[Any], ...]:
        """The records behind `outcomes`: what is wrong without each, and until when."""
        return self._ledger.patches

    def settle(self) -> dict[str, Outcome]:
        """Probes again and applies what has become needed since (a vendor shim that came late). Happens by itself at
        the start of every compilation. Returns `outcomes`."""
        self._ledger.settle()
        return self.outcomes

    def uninstall(self) -> None:
        """Takes every patch and setting back. Calling it again does nothing, but for one case: torch's settings belong
        to the thread that called `install()`. From another they cannot be reached, `left` says so, and calling it again
        in that thread takes them back."""
        global _current
        with _lock:
            if _current is self:
                _current = None
            elif _current is not None or not self._ledger.holds:
                return
            self.left = tuple(self._ledger.undo())
        for note in self.left:
            log.warning("fxpatch.uninstall: %s", note)

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Uninstalls at the end of the outermost `with` block: an inner `with install():` is a no-op to its end."""
        self._exits += 1
        if self._exits >= self.installs:
            self.uninstall()

    def __repr__(self) -> str:
        state = "active" if self.active else "uninstalled"
        return f"<fxpatch.Installation device={self.facts.device!r} profile={self.profile.origin!r} {state}>"


def install(
    device: str | None = None, *, profile: DeviceProfile | str | os.PathLike[str] | None = None, strict: bool = False
) -> Installation:
    """Repairs torch for one device. Call it before `torch.compile`; before or after the vendor's package makes no
    difference to the result.

    Args:
        device: device type, e.g. `"musa"`; None for the one this process has.
        profile: a `compile_configs.DeviceProfile`, the name of a built-in one or the path of a TOML file; None to
            match one to the device.
        strict: raise where a private torch name has moved, or the profile has a setting that torch has not, instead of
            leaving that one patch out with a warning. What shows later (in a module yet to be imported) is a warning.

    Returns:
        The installation. A second call changes nothing and returns the same one (`status()` and the log say so).

    Raises:
        TorchTooOldError, UnknownDeviceError: see `fxpatch.probe.read_facts`.
        VendorModuleError: the device has a name and no module, or its vendor's import is under way.
        NoProfileError: no compile profile matches.
        ProfileError: the profile has a wrong key, type or value; with `strict`, names a setting torch does not have.
        AlreadyInstalledError: another device or profile is installed.
        TargetMovedError: with `strict`, torch has moved a private name that a needed patch touches.
    """
    global _current
    with _lock:
        facts = read_facts(device)
        chosen, trace = _choose(facts, profile)
        if facts.private:
            check_vendor(facts.device, chosen.packages)
        if _current is not None and _current.automatic and not _is_for(_current, facts, chosen):
            _current.uninstall()  # nobody asked for it in this form; this call does for another
        if _current is not None:
            return _again(_current, facts, chosen)
        fakes = Fakes(chosen)
        ledger = Ledger((codegen.PATCH, fakes.patch(), *patches(chosen), *_settings(chosen)), facts.device)
        try:
            ledger.settle()
            errors = ledger.new_errors()
            if strict and errors:
                raise errors[0]
            for error in errors:
                warnings.warn(f"{error}", FxPatchWarning, stacklevel=2)
        except BaseException:  # a warning that is an error included
            ledger.undo()
            raise
        _current = Installation(facts, chosen, trace, ledger, fakes)
        return _current


def current() -> Installation | None:
    """The installation in force."""
    return _current


def _settings(profile: DeviceProfile) -> tuple[Patch[Any], ...]:
    tables = {"dynamo": profile.dynamo, "inductor": profile.inductor}
    return tuple(settings_patch(table, {each.name: each.value for each in wanted}) for table, wanted in tables.items())


def _choose(
    facts: Facts, profile: DeviceProfile | str | os.PathLike[str] | None
) -> tuple[DeviceProfile, tuple[str, ...]]:
    try:
        candidates = _candidates(facts.device, profile)
        vendor = imported_versions(dict.fromkeys(name for each in candidates for name in each.packages))
        found = match(facts.device, facts.torch_version, candidates, vendor_packages=vendor)
    except compile_configs.ProfileError as error:
        raise ProfileError(error.what, seen=error.seen, expected=error.expected, hint=error.hint) from error
    if isinstance(found, Matched):
        return found.profile, tuple(str(reason) for reason in found.trace)
    raise NoProfileError(
        f"No compile profile matches device {facts.device!r}.",
        seen="; ".join(str(reason) for reason in found.reasons),
        expected=f"a profile whose device is {facts.device!r}",
        hint="write one (compile_configs/example.toml shows how) and pass install(profile='path/to/it.toml')",
    )


def _candidates(device: str, profile: DeviceProfile | str | os.PathLike[str] | None) -> list[DeviceProfile]:
    if isinstance(profile, DeviceProfile):
        return [profile]
    if profile is not None:
        return [load_profile(profile)]
    # one file where one will do: reading all takes longer than everything else in install()
    return [load_profile(device)] if device in builtin_names() else list(builtin_profiles().values())


def install_automatically(device: str) -> Installation:
    """`install()` for the `torch.backends` entry point: what somebody then asks for takes its place."""
    with _lock:
        fresh = _current is None
        installation = install(device)
        installation.automatic = fresh
        return installation


def _is_for(installation: Installation, facts: Facts, profile: DeviceProfile) -> bool:
    return (installation.facts.device, installation.profile) == (facts.device, profile)


def _again(before: Installation, facts: Facts, profile: DeviceProfile) -> Installation:
    if not _is_for(before, facts, profile):
        raise AlreadyInstalledError(
            "fxpatch is installed for something else.",
            seen=f"installed: {before!r}",
            expected=f"device={facts.device!r} profile={profile.origin!r}, or nothing installed",
            hint="uninstall() the first one before installing another",
        )
    before.installs += 1
    before.automatic = False
    before.settle()
    log.info("fxpatch.install: already installed for %s; nothing to do", facts.device)
    return before
