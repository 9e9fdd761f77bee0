"""Comparing compiled code on a device with the CPU. The rule: the reference is the same Python on CPU tensors, run
eagerly, and everything that a caller can see is compared: results, their dtypes and strides, what was written into the
arguments and buffers, and the gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from fxpatch.testing.layout import relocated, significant_strides


class Compiled:
    """A function or module compiled for a device.

    Args:
        target: a function of tensors, or a module on the CPU (it is copied, and stays as it is).
        device: the device type to compile for.
        backend: of `torch.compile`.
        options: for `torch.compile`; `fullgraph=True` unless they say otherwise.
    """

    def __init__(self, target: Callable[..., Any], *, device: str, backend: str, **options: Any) -> None:
        self.device, self.backend = device, backend
        self._reference, self._target = target, target
        if isinstance(target, torch.nn.Module):
            self._reference, self._target = copy.deepcopy(target), copy.deepcopy(target).to(device)
        self._call = torch.compile(self._target, backend=backend, **{"fullgraph": True, **options})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it on tensors of the device."""
        return self._call(*args, **kwargs)

    def check(
        self, *args: Any, rtol: float | None = None, atol: float | None = None, strides: bool = True, **kwargs: Any
    ) -> Any:
        """Runs it on copies of CPU tensors, once on the device and once on the CPU, and compares; returns the device's
        result. Where the result requires grad, a backward pass with the same random cotangents is compared as well.

        Args:
            rtol, atol: as of `torch.testing.assert_close`; None for its defaults.
            strides: compare the strides of results; False where the device's kernels choose others than the CPU's.
            args, kwargs: of one call; tensors on the CPU.
        """
        tolerances = Tolerances(rtol, atol)
        cpu, there = relocated((args, kwargs), "cpu"), relocated((args, kwargs), self.device)
        want, got = self._reference(*cpu[0], **cpu[1]), self._call(*there[0], **there[1])
        assert_same("result", got, want, self.device, tolerances, strides)
        assert_same("argument, after the call,", there, cpu, self.device, tolerances)
        if isinstance(self._target, torch.nn.Module) and isinstance(self._reference, torch.nn.Module):
            buffers = dict(self._target.named_buffers()), dict(self._reference.named_buffers())
            assert_same("buffer", *buffers, self.device, tolerances)
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(want)):
            gradients = _gradients(got, there, self._target), _gradients(want, cpu, self._reference)
            # a gradient lies as the backward kernel likes it, and each device has its own
            assert_same("gradient", *gradients, self.device, tolerances, strides=False)
        return got


class Tolerances(NamedTuple):
    """As of `torch.testing.assert_close`; None for its defaults."""

    rtol: float | None = None
    atol: float | None = None


EXACT = Tolerances(0.0, 0.0)


def assert_same(
    what: str, got: Any, want: Any, device: str, tolerances: Tolerances = EXACT, strides: bool = True
) -> None:
    """Compares two trees of tensors and values: `got` on `device`, `want` on the CPU."""
    given, wanted = (pytree.tree_flatten_with_path(tree) for tree in (got, want))
    if given[1] != wanted[1]:
        raise AssertionError(f"the {what} on {device} is a {given[1]}, and on the CPU a {wanted[1]}")
    for (path, mine), (_, theirs) in zip(given[0], wanted[0], strict=True):
        where = f"{what}{pytree.keystr(path)}"
        if isinstance(theirs, torch.Tensor) and isinstance(mine, torch.Tensor):
            _assert_same_tensor(where, mine, theirs, device, tolerances, strides)
        elif mine != theirs and not (mine != mine and theirs != theirs):  # nan is nan
            raise AssertionError(f"{where} is {mine!r} on {device}, and {theirs!r} on the CPU")


def _assert_same_tensor(
    where: str, got: torch.Tensor, want: torch.Tensor, device: str, tolerances: Tolerances, strides: bool
) -> None:
    facts: dict[str, tuple[Any, Any]] = {
        "device": (got.device.type, device),
        "shape": (tuple(got.shape), tuple(want.shape)),
        "dtype": (got.dtype, want.dtype),
        "requires_grad": (got.requires_grad, want.requires_grad),
    }
    if strides:
        facts["strides"] = significant_strides(got), significant_strides(want)
    for fact, (mine, theirs) in facts.items():
        if mine != theirs:
            raise AssertionError(f"{where} on {device}: {fact} is {mine}, and should be {theirs}")
    torch.testing.assert_close(
        got.detach().cpu(),
        want.detach(),
        equal_nan=True,
        msg=lambda m: f"{where} on {device}: {m}",
        **tolerances._asdict(),
    )


def _gradients(results: Any, arguments: Any, target: Any) -> dict[str, torch.Tensor | None]:
    """The gradients of all inputs and parameters, for cotangents that are the same on every device."""
    inputs = {
        pytree.keystr(path): leaf
        for path, leaf in pytree.tree_flatten_with_path(arguments)[0]
        if isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad
    }
    if isinstance(target, torch.nn.Module):
        inputs.update({name: p for name, p in target.named_parameters() if p.requires_grad})
    outputs = [t for t in pytree.tree_leaves(results) if isinstance(t, torch.Tensor) and t.requires_grad]
    random = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(t.shape, generator=random).to(t.device, t.dtype) for t in outputs]
    found = torch.autograd.grad(outputs, list(inputs.values()), cotangents, allow_unused=True)
    return dict(zip(inputs, found, strict=True))
