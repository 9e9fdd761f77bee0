"""The model as it was: buffers, attributes, parameters, gradients, hooks and modes are put back bit for bit, after each
run, so that every run starts from the same, and at the end, so that nobody notices.

A plain function has no state of its own; the modules and tensors in its closure, its defaults, its `__self__`, and in
the globals that its code names count as its state, and so do the attributes of an object that is called. What other
functions reach, that it calls, does not.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxpatch.native.state import State, tensors_of
from fxpatch.piecewise.bits import same_bits
from fxpatch.verification.objects import Objects


class Held:
    """A model's state when this is made.

    Args:
        model: a module, or a function.

    Attributes:
        parameters: by name, live.
        tensors: buffers and other tensors that are no parameters, by name, live.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._states: list[State] = []
        self._modules: list[tuple[str, nn.Module]] = []
        self._objects: list[Objects] = []
        self._loose: list[tuple[torch.Tensor, torch.Tensor]] = []
        for prefix, part in _parts(model):
            if isinstance(part, nn.Module):
                state = State(part)
                self._states.append(state)
                self._modules.append((prefix, part))
                self._objects.append(Objects(part))
                self.tensors.update({prefix + name: tensor for name, tensor in state.tensors.items()})
                self.parameters.update({prefix + name: each for name, each in part.named_parameters()})
            else:
                self.tensors[prefix] = part
                self._loose.append((part, part.detach().clone()))
        self._values = {name: each.detach().clone() for name, each in self.parameters.items()}
        self._grads = [
            (each, each.grad, None if each.grad is None else each.grad.detach().clone(), each.requires_grad)
            for each in self.parameters.values()
        ]

    @property
    def devices(self) -> set[torch.device]:
        """Where the model is."""
        return {each.device for each in (*self.parameters.values(), *self.tensors.values())}

    def now(self) -> dict[str, torch.Tensor]:
        """As `tensors`, of the present: a forward may put another tensor in the place of a buffer; and the parameters
        that have been written to."""
        found = {name: each for name, each in self.tensors.items() if any(each is one for one, _ in self._loose)}
        for prefix, module in self._modules:
            found.update({prefix + name: each for name, each in tensors_of(module)})
        known = {id(each) for each in found.values()}
        hidden = (each for objects in self._objects for each in objects.tensors if id(each) not in known)
        found.update({f"tensor {i} in its objects": each for i, each in enumerate(hidden)})
        return {**found, **self.changed_parameters()}

    def changed_parameters(self) -> dict[str, torch.Tensor]:
        """The parameters that a run has written to, by name, copied."""
        return {
            name: each.detach().clone()
            for name, each in self.parameters.items()
            if same_bits(each, self._values[name]) is False
        }

    def restore(self) -> None:
        """Puts everything back."""
        with torch.no_grad():
            for name in self.changed_parameters():
                self.parameters[name].copy_(self._values[name])
            for tensor, value in self._loose:
                tensor.copy_(value)
            for state in self._states:
                state.restore()
            for each in self._objects:
                each.restore()
            for parameter, grad, saved, requires in self._grads:
                if parameter.requires_grad is not requires:
                    parameter.requires_grad_(requires)
                parameter.grad = grad
                if grad is not None and saved is not None:
                    grad.copy_(saved)


def _parts(model: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """The modules and tensors that belong to a function, with a prefix for their names."""
    if isinstance(model, nn.Module):
        yield "", model
        return
    if isinstance(model, functools.partial):
        yield from _found("partial", (model.args, model.keywords))
        yield from _parts(model.func)
        return
    owner = getattr(model, "__self__", None)
    if isinstance(owner, (nn.Module, torch.Tensor)):
        yield "self.", owner
    elif not isinstance(owner, (type, types.ModuleType)):
        yield from _found("self", dict(getattr(owner, "__dict__", {})))
    function = getattr(model, "__func__", model)
    if not isinstance(function, (type, types.FunctionType)):
        yield from _found("self", dict(getattr(function, "__dict__", {})))
        function = inspect.getattr_static(type(function), "__call__", function)
    code = getattr(function, "__code__", None)
    reached = getattr(function, "__globals__", {})
    for name in getattr(code, "co_names", ()):
        yield from _found(name, reached.get(name))
    names = getattr(code, "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        yield from _found(name, content)
    yield from _found("defaults", (getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)))


def _found(name: str, content: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in pytree.tree_flatten_with_path(content)[0]:
        if isinstance(leaf, nn.Module):
            yield f"{name}{pytree.keystr(path)}.", leaf
        elif isinstance(leaf, torch.Tensor):
            yield f"{name}{pytree.keystr(path)}", leaf
