"""Platform operators for models that exist: `optimize(model, device)`. The problem: engines rewrite models to use their
own operators, and everybody else's models stay as they are. The rule: a module is replaced only where the device has a
kernel for it and the match is proven (`exact_match`), over the very same parameters under the very same names; each
module that was looked at is in the report, with the reason where it was left; and all of it is taken back exactly.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import nn

from fxpatch.errors import FxPatchWarning, LayerError
from fxpatch.layers.exact_match import candidate, replacement
from fxpatch.layers.platform_op import look_again

_MODEL = "(model)"


@dataclass(frozen=True)
class Replaced:
    """A module that was replaced: its qualified names, its class, and what is there now.

    Args:
        names: more than one where the model has the module in several places.
        was: its class.
        now: the class that took its place.
    """

    names: tuple[str, ...]
    was: str
    now: str


@dataclass(frozen=True)
class Left:
    """A module that was left as it is, and why.

    Args:
        names: its qualified names.
        kind: its class.
        reason: what kept it from being replaced.
    """

    names: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class Adoption:
    """What `optimize` did to a model for a device. As text: one line per class and reason.

    Args:
        device: device type.
        replaced: what was replaced.
        left: what could have been, and was not.
    """

    device: str
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"platform operators for {self.device}: {len(self.replaced)} replaced, {len(self.left)} left"]
        rows = [(row.names, f"{row.was} -> {row.now}") for row in self.replaced]
        rows += [(row.names, f"{row.kind} left: {row.reason}") for row in self.left]
        grouped: dict[str, list[str]] = {}
        for names, text in rows:
            grouped.setdefault(text, []).extend(names)
        for text, all_names in grouped.items():
            more = f" and {len(all_names) - 3} more" if len(all_names) > 3 else ""
            lines.append(f"  {text}\n      {', '.join(all_names[:3])}{more}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a module is held."""

    parent: nn.Module
    name: str
    path: str
    original: nn.Module
    made: nn.Module


class Optimized:
    """A model's platform operators, until `undo()` or the end of a `with` block.

    Attributes:
        report: what was replaced, what was left, and why.
    """

    def __init__(self, report: Adoption, places: list[_Place]) -> None:
        self.report = report
        self._places = places
        self._lock = threading.Lock()

    def undo(self) -> None:
        """Puts every original module back. What somebody else has put there meanwhile stays, with a warning. Calling
        it again does nothing."""
        with self._lock:
            places, self._places = self._places, []
        for place in reversed(places):
            there = place.parent._modules.get(place.name)
            if there is place.original:  # one parent under two names is one place
                continue
            if there is not place.made:
                warnings.warn(
                    f"{place.path} was changed by somebody else meanwhile: left as it is", FxPatchWarning, stacklevel=2
                )
                continue
            place.original.training = place.made.training
            place.parent._modules[place.name] = place.original

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        return str(self.report)


def optimize(model: nn.Module, device: str | torch.device) -> Optimized:
    """Replaces, within `model`, what a platform operator computes exactly: transformers' MLPs and RMS norms of the
    Llama, Mistral, Qwen and Gemma families, diffusers' GEGLU and FP32LayerNorm.

    On another device than `device`, and wherever the kernel is not for a call, the results are bit for bit those of
    before; from the kernel they are within the rounding of the dtype. Parameters are the same objects under the same
    names, so state dicts, optimizers and tied weights do not notice; the modules' classes and `forward`s change. What
    is compiled already has to be compiled anew.

    Args:
        model: changed in place; its parameters loaded (they are compared with).
        device: that it will run on; it may still be elsewhere.

    Raises:
        LayerError: this process has no such device, or `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise LayerError(
            "Only a module has modules that can be replaced.",
            seen=type(model).__name__,
            expected="a torch.nn.Module",
            hint="of a pipeline, optimize each part: optimize(pipe.transformer, device)",
        )
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise LayerError(
            "This process has no such device.",
            seen=repr(device),
            expected="a device of torch's, or the one that a vendor's package has brought",
            hint="import the vendor's package first (torch_npu, torch_musa), or fxpatch.simulate(...) it",
        ) from error
    look_again()
    replaced: list[Replaced] = []
    left: list[Left] = []
    places: list[_Place] = []
    for module, held in _candidates(model):
        names = tuple(path for _, _, path in held)
        name = type(module).__name__
        made = _reason_to_leave(held) or replacement(module, kind)
        if isinstance(made, str):
            left.append(Left(names, name, made))
            continue
        replaced.append(Replaced(names, name, repr(made).partition("\n")[0].removesuffix("(")))
        places += [_Place(parent, key, path, module, made) for parent, key, path in held if parent is not None]
    for place in places:  # all is decided before anything is changed
        place.parent._modules[place.name] = place.made
    return Optimized(Adoption(kind, tuple(replaced), tuple(left)), places)


_Held = list[tuple[nn.Module | None, str, str]]  # who holds it, under which name, and the whole path


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, _Held]]:
    """Each distinct module that could be replaced, with all places that hold it."""
    found: dict[int, tuple[nn.Module, _Held]] = {}
    if candidate(model):
        found[id(model)] = model, [(None, "", _MODEL)]
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for name, child in parent._modules.items():
            if child is not None and candidate(child):
                path = f"{prefix}.{name}" if prefix else name
                found.setdefault(id(child), (child, []))[1].append((parent, name, path))
    yield from found.values()


def _reason_to_leave(held: _Held) -> str | None:
    if any(parent is None for parent, _, _ in held):
        return "it is the model itself: nothing holds it"
    if any(type(parent).__name__ == "OptimizedModule" for parent, _, _ in held):
        return "it is compiled: optimize first, then compile"
    return None
