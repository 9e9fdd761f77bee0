"""Every error fxpatch raises on purpose: what was seen, what was expected, and what to do.

A subclass exists only where a caller would act differently on it. Outcomes that are not errors (a patch that is
not needed, or waits for a module) are small types in `fxpatch.patching`, and end in `fxpatch.status()`.
"""

from __future__ import annotations


class FxPatchError(Exception):
    """Base class. `str(error)` is one readable paragraph made of the four parts.

    Args:
        what: one sentence: which request could not be met.
        seen: what was found.
        expected: what would have been accepted.
        hint: what to do now.
    """

    def __init__(self, what: str, *, seen: str, expected: str, hint: str) -> None:
        self.what, self.seen, self.expected, self.hint = what, seen, expected, hint
        super().__init__(f"{what}\n  seen: {seen}\n  expected: {expected}\n  to do: {hint}")


class UnknownDeviceError(FxPatchError):
    """The name is no device of this torch, nor the name of its PrivateUse1 backend."""


class NoProfileError(FxPatchError):
    """The device is known to torch, and no compile profile matches it."""


class ProfileError(FxPatchError):
    """A compile profile has a wrong key, type or value."""


class TorchTooOldError(FxPatchError):
    """This torch lacks what the request needs."""


class VendorModuleError(FxPatchError):
    """The vendor's package is only half imported, or its device module is missing."""


class DeviceNameTakenError(FxPatchError):
    """PrivateUse1 already has another name; it can be renamed once per process."""


class TargetMovedError(FxPatchError):
    """A private torch name that a patch touches is gone or has another signature."""


class AlreadyInstalledError(FxPatchError):
    """`install()` was asked for something other than what is installed now."""


class SimulatorError(FxPatchError):
    """The simulated device was asked for what pure Python cannot give it."""


class InputError(FxPatchError):
    """A call of a prepared model is not the one that was prepared, or an example does not fit what is said of it."""


class TraceError(FxPatchError):
    """A model cannot be traced whole, or its graph does not tell where its outputs come from."""


class SplitError(FxPatchError):
    """Something that is to split a graph is no operator, name, tag or function."""


class NotCapturableError(FxPatchError):
    """A model does something that no device graph can hold, and that its caller has not named as a splitting point."""


class CompileError(FxPatchError):
    """A piece of a graph cannot be compiled, or the compiler that was asked for is unknown."""


class CaptureFailedError(FxPatchError):
    """A call could not be captured into a device graph; the device can be used.

    Attributes:
        out_of_graphs: the device has no room for another graph, so fewer may work.
    """

    def __init__(self, what: str, *, seen: str, expected: str, hint: str, out_of_graphs: bool = False) -> None:
        super().__init__(what, seen=seen, expected=expected, hint=hint)
        self.out_of_graphs = out_of_graphs


class SizesError(FxPatchError):
    """The sizes to be captured make no sense."""


class BudgetError(SizesError):
    """The sizes make sense, and the device has not room for the graphs of even one."""


class NotPreparedError(FxPatchError):
    """A runner was asked for what only a prepared one can do."""


class BreakChangedError(FxPatchError):
    """Code that runs between captures returned something that what follows it was not captured with."""


class BusyError(FxPatchError):
    """A runner was called by two threads at once."""


class OptionError(FxPatchError):
    """An option has a value that there is not."""


class LayerError(FxPatchError, ValueError):
    """A layer was made or called with what it is not made for: a shape, a dtype, a mode, a layout."""


class DoctorError(FxPatchError):
    """`fxpatch doctor` cannot begin: its processes do not start, or do not come to the point where a probe could."""


class ArtifactError(FxPatchError):
    """A saved artifact cannot be written or read: it is damaged, of another kind, or holds what has no such form."""


class UntrustedArtifactError(ArtifactError):
    """Loading it could run code, and nothing shows that this user wrote it; `trust=` says that it may."""


class MissingHereError(ArtifactError):
    """A saved artifact needs a device, an operator, a function or a torch that this process has not: get it, or ask for
    another device."""


class WrongResultError(FxPatchError):
    """Compiled code does not compute what the model does; raised by a verification's `raise_if_wrong()`."""


class FxPatchWarning(UserWarning):
    """Something was refused while no caller was there to receive an error."""
