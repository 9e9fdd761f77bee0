"""Fake kernels: what an operator's result looks like, for operators whose vendor did not say, or said it wrong.

`register_fake_if_exists` is for kernels of your own, `library` has those that come with fxpatch, `conformance.check`
proves one, `shadow` is for operators whose schema lies, `audit` looks at what a vendor ships. Knows torch only.
"""

from fake_kernels.kernel import FakeKernel, fake_kernel
from fake_kernels.outcomes import (
    AlreadyHad,
    Deferred,
    Outcome,
    RefusedHidden,
    Registered,
    SchemaDiffers,
    Shadowed,
    Skipped,
)
from fake_kernels.registry import Registry
from fake_kernels.shadow import Shadow, shadow
from fake_kernels.user import UserFake, register_fake_if_exists

__all__ = [
    "AlreadyHad",
    "Deferred",
    "FakeKernel",
    "Outcome",
    "RefusedHidden",
    "Registered",
    "Registry",
    "SchemaDiffers",
    "Shadow",
    "Shadowed",
    "Skipped",
    "UserFake",
    "fake_kernel",
    "register_fake_if_exists",
    "shadow",
]
