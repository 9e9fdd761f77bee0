"""What a runner is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compile_configs import DeviceProfile
from fxpatch.errors import OptionError, SizesError
from fxpatch.piecewise.buckets import LEAST, Buckets
from fxpatch.piecewise.progress import Progress

if TYPE_CHECKING:  # it needs the compiler, and options are made without
    from fxpatch.piecewise.build import Compiler

_CHOICES = {
    "inputs": ("copy", "static"),
    "graphs": ("device", "recorder", "none"),
    "front_end": ("trace", "break"),
    "native": ("promote", "any_speed", "keep"),
    "on_error": ("fallback", "raise"),
}


@dataclass(frozen=True)
class Options:
    """What a runner was asked for; see `PiecewiseRunner`.

    Raises:
        OptionError: a choice that there is not.
    """

    model: Callable[..., Any]
    dynamic: Mapping[str, Any]
    split: tuple[Any, ...]
    sizes: Sequence[int] | Buckets | str
    compiler: str | Compiler | None
    inputs: str
    graphs: str
    front_end: str
    native: str
    on_error: str
    agree: Callable[[bool], bool] | None
    profile: DeviceProfile | None
    clone_outputs: bool
    weak: bool
    progress: Progress | bool | None
    compile_sizes: tuple[int, ...]
    cache: str | os.PathLike[str] | None
    shadow: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(
                    f"A runner cannot have {name}={getattr(self, name)!r}.",
                    seen=repr(getattr(self, name)),
                    expected=f"one of {', '.join(map(repr, choices))}",
                    hint="see PiecewiseRunner",
                )
        if type(self.shadow) is not int or self.shadow < 0:
            raise OptionError(
                f"A runner cannot have shadow={self.shadow!r}.",
                seen=repr(self.shadow),
                expected="how many calls are also run eagerly and compared: 0 or more",
                hint="see PiecewiseRunner",
            )
        if self.shadow and self.front_end == "break" and not isinstance(self.model, torch.nn.Module):
            raise OptionError(
                "A function that is not traced cannot be shadowed.",
                seen="shadow with front_end='break' and a plain function",
                expected="front_end='trace', or a module: what a function writes to is not known otherwise, and would "
                "be written twice",
                hint="put what the function writes to into a module's buffers",
            )
        wrong = [each for each in self.compile_sizes if type(each) is not int or each < LEAST]
        if wrong or len(set(self.compile_sizes)) != len(self.compile_sizes):
            raise SizesError(
                "These sizes cannot be compiled for.",
                seen=f"compile_sizes={list(self.compile_sizes)}",
                expected=f"different integers, each at least {LEAST}",
                hint="give those of `sizes` that most calls have",
            )
