"""The first calls of a prepared runner, run eagerly as well, and compared: `PiecewiseRunner(shadow=N)`.

A replay can be wrong in ways that no check of `prepare()` sees: a compiler's mistake at one size, a kernel that keeps
what it saw when it was captured. So the first N calls run twice, the fast way and with the original function, from the
same values of all that is written to (caches, buffers, arguments) and with the same random numbers. Where they differ,
the call returns what the original function does and leaves what that writes; and its size takes the next way down the
ladder: the compiled pieces, if they agree with eager on this very call, else the original function.

What a run has written is found by its bits, in all tensors that the model is known to hold or is given, and put back
before the next run: a token is in a cache once. Where ranks decide together, each of them asks and is asked as often.

Nothing is left of this after the N calls: it stands in the place of the runner's ladder, and has itself taken away.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxpatch.difference import Difference, compare
from fxpatch.errors import FxPatchWarning
from fxpatch.native.copies import Saved
from fxpatch.piecewise.bits import same_bits
from fxpatch.piecewise.buckets import LEAST
from fxpatch.piecewise.outputs import flat
from fxpatch.piecewise.reasons import Reason
from fxpatch.piecewise.report import SizeRow
from fxpatch.piecewise.roundings import roundings
from fxpatch.tolerance import Roundings

if TYPE_CHECKING:
    from fxpatch.piecewise.ladder import Ladder

AGREES = "shadowed: agrees with eager"
DIFFERS = "shadowed: differs from eager"
RANDOM = "shadowed: differs from eager, and draws random numbers: nothing follows"


class Shadow:
    """Stands in the place of `Ladder.run`.

    Args:
        ladder: of a runner that is prepared.
        calls: how many are compared.
        done: called when they have been.
    """

    def __init__(self, ladder: Ladder, calls: int, done: Callable[[], None]) -> None:
        self._ladder, self._left, self._done = ladder, calls, done
        self._everywhere: Callable[[bool], bool] = ladder.options.agree or (lambda ok: ok)
        traced: Any = getattr(ladder.made.prepared, "traced", None)  # of the FX front end; the other compiles nothing
        self._roundings: Roundings = 1
        if traced is not None:
            self._roundings = roundings([traced.gm], backward=False, decided=False)  # eager is all there is
        self._warned = False

    def __call__(self, leaves: list[Any], n: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One call, both ways where the fast one is not the original function anyway."""
        ladder = self._ladder
        begun = ladder.made.start
        assert begun is not None
        if begun.device.is_capturing():
            return ladder.run(leaves, n, args, kwargs)
        world = _World(ladder, leaves, begun.device.device)
        before = ladder.counts.copy()
        fast = world.run(lambda: ladder.run(leaves, n, args, kwargs))
        way = next((way for way, count in ladder.counts.items() if count != before[way]), "")
        if not self._everywhere(not way.startswith("original")):  # a model's collectives run on all ranks, or on none
            return fast.value()
        self._left -= 1
        if not self._left:
            self._done()
        world.restore()
        right = world.run(lambda: ladder.model(*args, **kwargs))
        if right.error is not None and ladder.options.agree is None:
            raise right.error
        difference = self._difference(fast, right)
        if difference is not None and world.random and right.error is None and fast.error is None:
            ladder.counts[RANDOM] += 1
            difference = None
        elif difference is None:
            ladder.counts[AGREES] += 1
        if self._everywhere(difference is None):
            return fast.value()
        ladder.counts[DIFFERS] += difference is not None
        pieces = self._pieces_agree(leaves, n, world, right, way)
        self._step_down(n, Reason.REPLAY_DIFFERS if pieces else Reason.PIECES_DIFFER, way, difference)
        world.leave(right)
        return right.value()

    def _difference(self, seen: _Ran, expected: _Ran) -> Difference | str | None:
        """How two runs differ: in what they return, and in what they leave written."""
        if seen.error is not None or expected.error is not None:
            return f"it raises {seen.error!r}, and eager {expected.error!r}"
        # a padded result is narrowed, and lies otherwise than one that was computed at its size
        found = compare(seen.returned, expected.returned, strides=False, roundings=self._roundings)
        if found is not None:
            return found
        for name in {**seen.written, **expected.written}:
            one, other = (ran.written.get(name, ran.before[name]) for ran in (seen, expected))
            found = compare(one, other, strides=False, roundings=self._roundings)
            if found is not None:
                return dataclasses.replace(found, where=f"what is written to {name}{found.where}")
        return None

    def _pieces_agree(self, leaves: list[Any], n: int, world: _World, right: _Ran, way: str) -> bool:
        """Whether the next way down is right, on this call; on all ranks."""
        prepared = self._ladder.made.prepared
        assert prepared is not None
        if way != "captured" and self._ladder.options.agree is None:
            return False
        world.restore()
        pieces = world.run(lambda: prepared.flow(leaves, n, max(n, LEAST)))
        return self._everywhere(self._difference(pieces, right) is None)

    def _step_down(self, n: int, reason: Reason, way: str, difference: Difference | str | None) -> None:
        made = self._ladder.made
        size = made.sizes.of(n) if made.sizes is not None else None
        words = f"{reason.value}: {difference or 'on another rank'} (n = {n}, {way})"
        if size is None:
            made.beyond = reason
        else:
            made.why[size] = reason
            to = "compiled" if reason is Reason.REPLAY_DIFFERS else "original"
            row = made.rows.get(size, SizeRow(size, to, 0, 0.0, ""))
            made.rows[size] = dataclasses.replace(row, way=to, graphs=0, reason=words)
            if made.prepared is not None and size in made.prepared.captured:
                made.prepared.captured.pop(size).plan.release()
        made.notes.append(f"shadow: {'what is above all sizes' if size is None else f'size {size}'}: {words}")
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"A piecewise runner gave other results than the model itself: {words}. The call has returned the "
                "model's own results, and its size takes a slower way from now on; runner.report tells of more such.",
                FxPatchWarning,
                stacklevel=4,
            )


@dataclasses.dataclass(frozen=True)
class _Ran:
    """One run: its result, copies of what it returned and wrote, by name; or its error. `before`: what was there."""

    result: Any
    returned: Any
    written: Mapping[str, torch.Tensor]
    before: Mapping[str, torch.Tensor]
    error: Exception | None = None

    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


class _World:
    """All that the model may write to, and the random numbers, as they were before a call.

    Args:
        ladder: of a runner that is prepared.
        leaves: of the call.
        device: whose random numbers the model may draw.

    Attributes:
        random: whether the last run has drawn.
    """

    def __init__(self, ladder: Ladder, leaves: list[Any], device: torch.device) -> None:
        prepared = ladder.made.prepared
        assert prepared is not None
        tensors: dict[int, tuple[str, torch.Tensor]] = {}
        named = [(f"argument {prepared.arguments.name_of(i)}", leaf) for i, leaf in enumerate(leaves)]
        bound = [(f"bound tensor {i}", each) for i, each in enumerate(prepared.bound)]
        for name, tensor in (*named, *_state(ladder.model), *bound):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter):
                tensors.setdefault(id(tensor), (name, tensor))
        self._tensors = dict(tensors.values())
        self._before = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._device = device
        self._numbers = self._generators()
        self.random = False

    def run(self, call: Callable[[], Any]) -> _Ran:
        """Runs, and copies what was returned and written."""
        try:
            result = call()
        except Exception as error:  # a way that fails is a way that differs
            return _Ran(None, None, {}, self._before, error)
        leaves, spec = flat(result)
        returned = pytree.tree_unflatten(Saved(leaves).fresh().leaves, spec)
        self.random = not all(map(torch.equal, self._generators(), self._numbers))
        return _Ran(result, returned, dict(self._changed(self._before)), self._before)

    def restore(self) -> None:
        """Everything as before the call."""
        for name, _ in self._changed(self._before):
            self._tensors[name].copy_(self._before[name])
        cpu, *others = self._numbers
        torch.random.set_rng_state(cpu)
        for state in others:
            torch.get_device_module(self._device).set_rng_state(state, self._device)

    def leave(self, ran: _Ran) -> None:
        """Leaves what a run has written."""
        wanted = {**self._before, **ran.written}
        for name, _ in self._changed(wanted):
            self._tensors[name].copy_(wanted[name])

    def _changed(self, before: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors.items():
            if same_bits(tensor, before[name]) is not True:
                yield name, tensor.detach().clone()

    def _generators(self) -> list[torch.Tensor]:
        cpu = torch.random.get_rng_state()
        if self._device.type == "cpu":
            return [cpu]
        return [cpu, torch.get_device_module(self._device).get_rng_state(self._device)]


def _state(model: Any) -> Iterable[tuple[str, Any]]:
    """A module's buffers and the tensors in its attributes; also in lists, tuples, dicts, and objects (a cache)."""
    if not isinstance(model, nn.Module):
        return
    for prefix, module in model.named_modules():
        held = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_modules")}
        yield from _tensors(prefix, held, set())


def _tensors(where: str, value: Any, seen: set[int]) -> Iterable[tuple[str, torch.Tensor]]:
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        if isinstance(leaf, torch.Tensor):
            yield f"{where}{pytree.keystr(path)}", leaf
        elif hasattr(leaf, "__dict__") and not callable(leaf) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _tensors(f"{where}{pytree.keystr(path)}", dict(vars(leaf)), seen)
