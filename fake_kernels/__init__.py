"""Fake kernels: what an operator's result looks like, for operators whose vendor did not say. Knows torch only."""

from fake_kernels.registry import (
    Absent,
    AlreadyHad,
    Outcome,
    RefusedHidden,
    Registered,
    register_fake_if_exists,
    unregister,
)

__all__ = [
    "Absent",
    "AlreadyHad",
    "Outcome",
    "RefusedHidden",
    "Registered",
    "register_fake_if_exists",
    "unregister",
]
