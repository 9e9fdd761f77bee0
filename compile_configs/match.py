"""Which profile is for this device and this torch, and why each of the others is not.

`match` is pure: what was found on the machine comes in as arguments, so that every device can be decided about on a
laptop. It raises nothing and decides nothing silently; every profile it looked at leaves a reason in the outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from compile_configs.profile import DeviceProfile
from compile_configs.version import VersionKey, version_key


class Reason(NamedTuple):
    """What was decided about one profile (or, if there was none, about the question itself), and why."""

    profile: str
    accepted: bool
    text: str

    def __str__(self) -> str:
        return f"{self.profile}: {'taken' if self.accepted else 'not taken'}, {self.text}"


class Matched(NamedTuple):
    """The profile to use. `trace` has the reason of every profile that was looked at, the one taken included."""

    profile: DeviceProfile
    trace: tuple[Reason, ...]


class Rejected(NamedTuple):
    """No profile is right; `reasons` is never empty."""

    reasons: tuple[Reason, ...]


def match(
    device: str,
    torch_version: str,
    profiles: Iterable[DeviceProfile],
    *,
    vendor_packages: Mapping[str, str] = MappingProxyType({}),
) -> Matched | Rejected:
    """Chooses among the profiles for `device` the one that asks for the newest torch this torch satisfies.

    Of two that ask for the same torch the first wins, so a caller puts its own before the built-in ones.

    Args:
        device: what `torch.device(...).type` says.
        torch_version: `torch.__version__`.
        profiles: what to choose from, in order of preference.
        vendor_packages: version by module name of what is installed. It decides nothing (a simulated device has none
            of its vendor's packages) and is told in the trace.
    """
    running = version_key(torch_version)
    if running is None:
        return Rejected((Reason("every profile", False, f"torch calls itself '{torch_version}', which is no version"),))
    verdicts = [(profile, _fault(profile, device, torch_version, running)) for profile in profiles]
    if not verdicts:
        return Rejected((Reason("no profile", False, "there was none to choose from"),))
    fit = [profile for profile, fault in verdicts if not fault]
    if not fit:
        return Rejected(tuple(Reason(profile.origin, False, fault) for profile, fault in verdicts))
    best = max(fit, key=_asks_for)  # max keeps the first of equals
    taken = f"device '{device}', torch {torch_version} is at least {best.min_torch}{_vendor(best, vendor_packages)}"
    beaten = f"{best.origin} comes first: it asks for torch {best.min_torch}"
    return Matched(
        best,
        tuple(
            Reason(profile.origin, profile is best, taken if profile is best else fault or beaten)
            for profile, fault in verdicts
        ),
    )


def _asks_for(profile: DeviceProfile) -> VersionKey:
    least = version_key(profile.min_torch)
    assert least is not None, "checked when the profile was built"
    return least


def _fault(profile: DeviceProfile, device: str, torch_version: str, running: VersionKey) -> str:
    """Why `profile` is not for this device and torch; empty if it is."""
    if profile.device != device:
        return f"it is for device '{profile.device}', and this is '{device}'"
    if running < _asks_for(profile):
        return f"it is for torch {profile.min_torch} and later, and this is {torch_version}"
    return ""


def _vendor(profile: DeviceProfile, installed: Mapping[str, str]) -> str:
    """What the trace says about the vendor's packages."""
    if not profile.packages:
        return ""
    found = [f"{name} {installed[name]}" for name in profile.packages if name in installed]
    return f", with {' and '.join(found)}" if found else f", without {' or '.join(profile.packages)}"
