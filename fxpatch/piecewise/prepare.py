"""From a request and an example to compiled pieces: what is checked first, and what is done in which order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from compile_configs import DeviceProfile, builtin_names, load_profile
from fxpatch.errors import CaptureFailedError, InputError, NoProfileError, OptionError, SizesError, TraceError
from fxpatch.native import Decisions, assert_native_absent
from fxpatch.piecewise.arguments import Arguments, Input
from fxpatch.piecewise.artifacts import Artifacts, Warm
from fxpatch.piecewise.broken_model import BrokenModel
from fxpatch.piecewise.buckets import Buckets, buckets
from fxpatch.piecewise.build import Built, Compiler, build, compiler_of
from fxpatch.piecewise.graph_device import GraphDevice
from fxpatch.piecewise.graph_recorder import Recorder
from fxpatch.piecewise.graphs import graph_device
from fxpatch.piecewise.lint import Rule, lint
from fxpatch.piecewise.prepared import Prepared
from fxpatch.piecewise.promotion import promoted
from fxpatch.piecewise.recipe import Forms
from fxpatch.piecewise.request import Request
from fxpatch.piecewise.snapshot import Snapshot
from fxpatch.piecewise.split import Split, rules_of, split
from fxpatch.piecewise.statics import Statics
from fxpatch.piecewise.trace import LEAST, Traced, trace
from fxpatch.piecewise.traced_model import TracedModel

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
    profile: DeviceProfile | None
    compile_sizes: tuple[int, ...] = ()
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(
                    f"A runner cannot have {name}={getattr(self, name)!r}.",
                    seen=repr(getattr(self, name)),
                    expected=f"one of {', '.join(map(repr, choices))}",
                    hint="see PiecewiseRunner",
                )
        wrong = [each for each in self.compile_sizes if type(each) is not int or each < LEAST]
        if wrong or len(set(self.compile_sizes)) != len(self.compile_sizes):
            raise SizesError(
                "These sizes cannot be compiled for.",
                seen=f"compile_sizes={list(self.compile_sizes)}",
                expected=f"different integers, each at least {LEAST}",
                hint="give those of `sizes` that most calls have",
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


def compiled(
    options: Options, begun: Start, written: Snapshot, agreement: Agreement, decisions: Decisions | None = None
) -> Prepared:
    """Promotes, traces, splits and compiles.

    Args:
        decisions: of an earlier time, about native fallbacks; None to try.
        written: taken of all that the model might write to, before this.
        agreement: asked whenever the model is traced, before it runs: ranks that cannot trace it run no collective.

    Raises:
        TraceError, CompileError: it cannot be.
        CaptureFailedError: another rank could not trace it.
    """
    if options.front_end == "break":
        return _broken(options, begun, written)
    found_rules = lint(begun.device.type, registers_generator=begun.device.registers_generator or not begun.graphs)
    rules = (*begun.rules, *found_rules)

    artifacts = _artifacts(options, begun, agreement) if decisions is None else None
    if artifacts is not None:
        warm = artifacts.load(written)
        # a rank that traces runs the model's collectives: all do, or none
        if agreement.everywhere(warm is not None) and warm is not None:
            return _model(options, begun, warm, None, artifacts)
        if warm is not None:
            artifacts.refuse()

    def before(tensors: Sequence[torch.Tensor]) -> None:
        agreement.require()
        written.add(tensors)

    def traced_now() -> Traced:
        look = (lambda gm: None) if artifacts is None else artifacts.watch.look
        return trace(options.model, begun.args, begun.kwargs, options.dynamic, begun.largest, before, look)

    if decisions is None and options.native != "keep":
        decisions = promoted(
            options.model,
            begun.args,
            begun.kwargs,
            begun.device,
            begun.graphs,
            rules,
            traced_now,
            slower=options.native == "any_speed",
        )
    with nullcontext() if decisions is None else decisions.apply():
        traced = traced_now()
    if decisions is not None:
        assert_native_absent(traced.gm, decisions)
    found = {id(tensor) for tensor in written.written()}
    inputs = begun.arguments.inputs
    leaves_written = {each.leaf for each in inputs if id(begun.leaves[each.leaf]) in found}
    pieces = split(traced.gm, rules)
    forms = _forms(options, begun, pieces, artifacts)
    if artifacts is not None:
        artifacts.save(traced, pieces, forms, written, leaves_written)
    return _model(options, begun, Warm(traced, pieces, forms, leaves_written), decisions, artifacts)


def _forms(options: Options, begun: Start, pieces: Split, artifacts: Artifacts | None) -> Forms:
    """What each piece is compiled to: for every size (None), and for single ones."""
    done: dict[str, Built] = {}
    with nullcontext(lambda key: nullcontext()) if artifacts is None else artifacts.compiling() as around:
        return {
            size: build(pieces.pieces, begun.compiler, size, around, done) for size in (None, *options.compile_sizes)
        }


def _model(
    options: Options, begun: Start, made: Warm, decisions: Decisions | None, artifacts: Artifacts | None
) -> TracedModel:
    owned, statics = _memory(options, begun, made.written)
    exact = {size: built for size, built in made.forms.items() if size is not None}
    built = made.forms[None]
    model = TracedModel(made.traced, made.split, built, statics, owned, made.written, decisions, exact)
    model.notes += [] if artifacts is None else artifacts.notes
    for size, static in exact.items():
        seconds = sum(each.seconds for each in static)
        model.notes.append(f"size {size} has compiled forms of its own, made in {seconds:.1f} s")
    return model


def _artifacts(options: Options, begun: Start, agreement: Agreement) -> Artifacts | None:
    """The entry of this request, where there is a cache."""
    if options.cache is None:
        return None
    request = Request(
        options.model,
        options.dynamic,
        options.split,
        options.inputs,
        begun.compiler,
        options.compile_sizes,
        begun.arguments,
        begun.args,
        begun.kwargs,
        begun.leaves,
        begun.largest,
        begun.profile,
        begun.device,
        begun.graphs,
        options.native,
        agreement.alone,
    )
    return Artifacts(options.cache, request)


def _broken(options: Options, begun: Start, written: Snapshot) -> Prepared:
    options.model(*begun.args, **begun.kwargs)
    found = {id(tensor) for tensor in written.written()}
    leaves_written = {each.leaf for each in begun.arguments.inputs if id(begun.leaves[each.leaf]) in found}
    owned, statics = _memory(options, begun, leaves_written)
    return BrokenModel(options.model, begun.arguments, begun.leaves, begun.n, statics, owned, leaves_written)


def _memory(options: Options, begun: Start, written: set[int]) -> tuple[list[Input], Statics]:
    """Which inputs are used where the caller has them, and the buffers of the others."""
    inputs = begun.arguments.inputs
    if options.inputs == "copy":
        _check_apart([each for each in inputs if each.leaf in written], inputs, begun.leaves)
    owned = [each for each in inputs if options.inputs == "static" or (each.leaf in written and not each.dims)]
    copied = [each for each in inputs if each not in owned] if begun.graphs else []
    return owned, Statics(copied, begun.sizes.largest)


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


def _check_apart(written: Sequence[Input], inputs: Sequence[Input], leaves: Sequence[Any]) -> None:
    """Copies of tensors that share memory share it no more: what is written to one would not be read in the other."""
    for one in written:
        storage = leaves[one.leaf].untyped_storage().data_ptr()
        for other in inputs:
            if other is one or leaves[other.leaf].untyped_storage().data_ptr() != storage:
                continue
            if one.dims or other.dims or other not in written:
                raise TraceError(
                    "The model writes to an input whose memory another input shares.",
                    seen=f"{one.name} is written to, and {other.name} is in the same storage",
                    expected="inputs that are copied to be apart from those that are written to",
                    hint="pass one of them only, pass a copy, or take inputs='static'",
                )


class Agreement:
    """Whether all ranks got as far, asked as often on each of them.

    Args:
        agree: takes whether this rank succeeded, returns whether all did.
        alone: nobody else is asked, whatever other ranks there are.
    """

    def __init__(self, agree: Callable[[bool], bool], *, alone: bool = False) -> None:
        self._agree, self.alone = agree, alone
        self._refused = False

    def require(self) -> None:
        """Says that this rank succeeded.

        Raises:
            CaptureFailedError: another one did not.
        """
        if not self._agree(True):
            self._refused = True
            raise disagreement()

    def everywhere(self, ok: bool) -> bool:
        """Whether something that is no failure, `ok` on this rank, holds on all of them."""
        return self._agree(ok)

    def close(self, ok: bool) -> bool:
        """Whether all ranks are through; `ok` for this one. No one is asked again where all know of a failure."""
        return False if self._refused else self._agree(ok)


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
