"""Where preparing begins: a request checked against its example, before anything is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from compile_configs import DeviceProfile, builtin_names, load_profile
from fxpatch.errors import InputError, NoProfileError
from fxpatch.piecewise.arguments import Arguments
from fxpatch.piecewise.buckets import LEAST, Buckets, buckets
from fxpatch.piecewise.build import Compiler, compiler_of
from fxpatch.piecewise.graph_device import GraphDevice
from fxpatch.piecewise.graph_recorder import Recorder
from fxpatch.piecewise.graphs import graph_device
from fxpatch.piecewise.lint import Rule
from fxpatch.piecewise.options import Options
from fxpatch.piecewise.rules import rules_of


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


def plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example with a tensor object for each place: one that is given twice would be traced as one, although later
    calls may bring two; and one that was made in inference mode does not say whether it is written to."""
    seen: set[int] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not torch.Tensor or (id(tensor) not in seen and not tensor.is_inference()):
            seen.add(id(tensor))
            return tensor
        same = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return same.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    return pytree.tree_map_only(torch.Tensor, own, (args, dict(kwargs)))  # type: ignore[no-any-return]


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
