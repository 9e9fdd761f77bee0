"""From a request and an example to compiled pieces: what is checked first, and what is done in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compile_configs import DeviceProfile, builtin_names, load_profile
from fxpatch.errors import CaptureFailedError, InputError, NoProfileError, OptionError
from fxpatch.piecewise.arguments import Arguments
from fxpatch.piecewise.buckets import Buckets, buckets
from fxpatch.piecewise.build import Compiler, build, compiler_of
from fxpatch.piecewise.graph_device import GraphDevice
from fxpatch.piecewise.graph_recorder import Recorder
from fxpatch.piecewise.graphs import graph_device
from fxpatch.piecewise.lint import Rule, lint
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.snapshot import Snapshot
from fxpatch.piecewise.split import rules_of, split
from fxpatch.piecewise.statics import Statics
from fxpatch.piecewise.trace import LEAST, trace

_CHOICES = {"inputs": ("copy", "static"), "graphs": ("device", "recorder", "none"), "on_error": ("fallback", "raise")}


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
    on_error: str
    profile: DeviceProfile | None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(
                    f"A runner cannot have {name}={getattr(self, name)!r}.",
                    seen=repr(getattr(self, name)),
                    expected=f"one of {', '.join(map(repr, choices))}",
                    hint="see PiecewiseRunner",
                )


@dataclass(frozen=True)
class Start:
    """A request that makes sense: the form of a call, an example, and what the device is.

    Attributes:
        args, kwargs, leaves, n: the example.
        sizes: as asked for; in static mode those that the example is long enough for.
        largest: no n is above it.
        graphs: whether sizes are captured.
    """

    arguments: Arguments
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaves: list[Any]
    n: int
    profile: DeviceProfile
    device: GraphDevice
    rules: tuple[Rule, ...]
    compiler: str | Compiler
    sizes: Buckets
    largest: int
    graphs: bool

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The example's tensors."""
        return [self.leaves[each.leaf] for each in self.arguments.inputs]


def start(options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Start:
    """Checks a request against its example.

    Raises:
        InputError, SplitError, SizesError, CompileError, NoProfileError: it makes no sense.
    """
    arguments = Arguments.of(options.model, args, kwargs, options.dynamic)
    leaves = arguments.leaves(args, kwargs)
    n = arguments.size(leaves)
    if n < LEAST:
        raise InputError(
            "The example is too short.",
            seen=f"n = {n}",
            expected=f"at least {LEAST} elements in the dynamic dimensions",
            hint="a size of 1 is traced as a constant; calls of 1 are padded later",
        )
    profile = options.profile or _profile_of(arguments)
    rules = rules_of(options.split, operators=profile.splitting_operators, tags=profile.capture.split_tags)
    compiler = options.compiler or profile.compiler
    compiler_of(compiler)
    sizes = buckets(options.sizes, profile_sizes=profile.capture.sizes)
    if options.inputs == "static" and sizes.largest > n:
        raise InputError(
            "The example is shorter than the largest size.",
            seen=f"n = {n}",
            expected=f"{sizes.largest}: with inputs='static' graphs read the example's own memory",
            hint="prepare with buffers of the largest size, or leave the larger sizes out",
        )
    where = next(each.device for each in arguments.inputs if each.device.type == profile.device)
    device = graph_device(where, profile)
    if options.graphs == "recorder":
        device = Recorder(where, "asked for")
    graphs = options.graphs == "recorder" or (options.graphs == "device" and device.captures)
    largest = max(sizes.largest, n)
    return Start(arguments, args, kwargs, leaves, n, profile, device, rules, compiler, sizes, largest, graphs)


def compiled(options: Options, begun: Start, written: Snapshot) -> Prepared:
    """Traces, splits and compiles.

    Args:
        written: taken of all that the model might write to, before this.

    Raises:
        TraceError, CompileError: it cannot be.
    """
    traced = trace(options.model, begun.args, begun.kwargs, options.dynamic, begun.largest)
    found = {id(tensor) for tensor in written.written()}
    inputs = begun.arguments.inputs
    leaves_written = {each.leaf for each in inputs if id(begun.leaves[each.leaf]) in found}
    found_rules = lint(begun.device.type, registers_generator=begun.device.registers_generator or not begun.graphs)
    pieces = split(traced.gm, (*begun.rules, *found_rules))
    built = build(pieces.pieces, begun.compiler)
    owned = [each for each in inputs if options.inputs == "static" or (each.leaf in leaves_written and not each.dims)]
    statics = Statics([each for each in inputs if each not in owned] if begun.graphs else [], begun.sizes.largest)
    return Prepared(traced, pieces, built, statics, owned, leaves_written)


def disagreement() -> CaptureFailedError:
    """What a rank raises where another one failed."""
    return CaptureFailedError(
        "Another rank could not prepare this.",
        seen="agree(True) returned False",
        expected="every rank succeeds",
        hint="look at the reports of the other ranks",
    )


def _profile_of(arguments: Arguments) -> DeviceProfile:
    types = dict.fromkeys(each.device.type for each in arguments.inputs)
    devices = [each for each in types if each != "cpu"] or list(types)
    if len(devices) == 1 and devices[0] in builtin_names():
        return load_profile(devices[0])
    raise NoProfileError(
        "The example does not say which compile profile is meant.",
        seen=f"tensors on {', '.join(devices) or 'no device'}",
        expected=f"tensors on one of {', '.join(builtin_names())}",
        hint="pass profile=compile_configs.load_profile(...)",
    )
