"""What a replaced module and the one in its place have in common: the same dicts, so that what one gets (loading with
`assign`, `to`, a hook) the other has, after undoing too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def share(original: nn.Module, made: nn.Module, names: Iterable[str]) -> None:
    """Gives `made` these dicts of `original`'s."""
    for name in names:
        made.__dict__[name] = original.__dict__[name]
