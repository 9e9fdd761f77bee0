"""The fake kernels of one device, as a record of the ledger: which are wanted, and when to ask again.

`fake_kernels` knows torch only. What it does not know is here: the profile, which says which families of operators the
device has and which of the vendor's own fakes are wrong; and the moments at which an operator may have come: the end of
the import of the library that brings it, and the start of every compilation. The records of a library are loaded when
its first operator is there.
"""

from __future__ import annotations

from compile_configs import DeviceProfile
from fake_kernels import library
from fake_kernels.adapter import registered
from fake_kernels.outcomes import Deferred, Outcome
from fake_kernels.registry import Registry
from fake_kernels.user import USERS
from fxpatch.patching import Edits, Needed, NotNeeded, Patch, watch


class Fakes:
    """The fake kernels of one installation.

    Args:
        profile: its families, packages and wrong fakes.
    """

    def __init__(self, profile: DeviceProfile) -> None:
        self.registry = Registry(override=[op for wrong in profile.wrong_fakes for op in wrong.operators])
        self._waiting = dict(library.modules(profile.families, profile.packages))

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """What became of each by operator; those that the user has registered come first, and keep ours out."""
        waiting = {
            f"{namespace}::*": Deferred(
                f"{namespace}::*",
                vendor.libraries[0],
                f"nothing of {namespace} is registered: waits for {vendor.libraries[0]}, and asks at each compilation",
            )
            for vendor in dict.fromkeys(self._waiting.values())
            for namespace in vendor.namespaces
        }
        return {**waiting, **self.registry.outcomes, **USERS.outcomes}

    def settle(self) -> None:
        """Registers what can be registered by now, and sees to it that this happens again when a library comes."""
        names = registered()
        there = {name.partition("::")[0] for name in names}
        for module, vendor in list(self._waiting.items()):
            if there.isdisjoint(vendor.namespaces):
                for each in vendor.libraries:
                    watch(each)
            else:
                self.registry.add(library.records_of(module))
                del self._waiting[module]
        for registry in (USERS, self.registry):
            for outcome in registry.settle(names).values():
                if isinstance(outcome, Deferred):
                    watch(outcome.module)

    def patch(self) -> Patch[None]:
        """The record that registers them at `install()`, and takes them back. The user's own stay."""

        def apply(_device: str, _facts: None, edits: Edits) -> str:
            edits.on_undo(self.registry.undo)
            self.settle()
            return "each with its outcome below"

        families = len(self._waiting)
        return Patch(
            name="fake-kernels",
            why="torch.compile stops at an operator without a fake kernel, and silently miscompiles with a wrong one",
            upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/library.py",
            until="the vendors' libraries bring fake kernels that are right",
            seen_in=("2.11.0", "2.13.0", "2.15.0"),
            targets=(),  # fake_kernels.adapter has the private names, and checks them
            probe=lambda _device: None,
            decide=lambda _: (
                Needed("operators of the profile's families may need one")
                if families
                else NotNeeded("the profile has no families of operators")
            ),
            apply=apply,
            refresh=self.settle,
        )
