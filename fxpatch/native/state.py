"""What a module holds besides its arguments, and putting it back. The problem: a forward may write buffers (a cache, a
counter), replace attributes, or create them when it first runs; trials must leave no trace of that, except that what an
operator created lazily in an ordinary run has to be there when it is traced (Dynamo cannot create a module).

The rule: attributes that were there get their objects back and their tensors their values; attributes that a trial
added go, unless the caller keeps them. Parameters are watched, not copied: they can be gigabytes, and no forward
writes them. Containers and objects that are changed in place are not undone, except for the tensors in lists, tuples
and dicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxpatch.native.copies import Saved

_UNTOUCHED = frozenset({"forward", "_parameters", "_buffers", "_modules"})  # the last three have a level of their own


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of a module and its submodules, and the tensors in their attributes, by name, as they are now."""
    for prefix, owner in module.named_modules():
        dot = prefix and prefix + "."
        held = {k: v for k, v in owner.__dict__.items() if k not in _UNTOUCHED} | dict(owner._buffers)
        for path, leaf in pytree.tree_flatten_with_path(held)[0]:
            if isinstance(leaf, torch.Tensor):
                yield dot + pytree.keystr(path), leaf


class State:
    """A module and its submodules as they are when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._versions: list[tuple[str, torch.Tensor, int]] = []
        for prefix, owner in module.named_modules():
            dot = prefix and prefix + "."
            for part in (owner.__dict__, owner._parameters, owner._buffers, owner._modules):
                self._dicts.append((part, dict(part)))
            for name, parameter in owner._parameters.items():
                if parameter is not None and not parameter.is_inference():
                    self._versions.append((dot + name, parameter, parameter._version))
        self._tensors = dict(tensors_of(module))
        self._saved = Saved(self._tensors)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The buffers and other tensors that are no parameters, by name; the live ones."""
        return self._tensors

    def changed_parameters(self) -> list[str]:
        """Parameters that have been written since, as far as torch counts writes."""
        return [name for name, parameter, version in self._versions if parameter._version != version]

    def restore(self, *, keep_new: bool = False) -> None:
        """Puts everything back; `keep_new` leaves attributes that have been added since."""
        for live, before in self._dicts:
            for name in [name for name in live if name not in before and name not in _UNTOUCHED]:
                if not keep_new:
                    del live[name]
            for name, value in before.items():
                if live.get(name) is not value and name not in _UNTOUCHED:
                    live[name] = value
        for live_tensor, value in zip(self._tensors.values(), self._saved.fresh().leaves, strict=True):
            live_tensor.detach().copy_(value)
