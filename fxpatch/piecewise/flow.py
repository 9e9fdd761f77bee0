"""The compiled pieces without graphs: one function that calls them in order, at the size that is asked for.

It is generated, because a loop over pieces with a table of values costs more per piece than a call does: values are
local variables, which are deleted after their last use, and parameters are bound in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxpatch.piecewise.build import Built
from fxpatch.piecewise.split import Split, Value


def flow(split: Split, built: Sequence[Built], feed: Sequence[Any]) -> Callable[..., list[Any]]:
    """A function of what changes from call to call; it returns the graph's results.

    Args:
        split, built: the pieces, and what each was compiled to.
        feed: for each placeholder of the graph the bound tensor, or None where the value is an argument, in this order.
    """
    names = {number: f"v{number}" for number in range(split.count)}
    known: dict[str, Any] = {}
    arguments = []
    for number, value in zip(split.feed, feed, strict=True):
        if isinstance(value, torch.Tensor):
            known[names[number]] = value
        else:
            arguments.append(names[number])
    last: dict[int, int] = {}
    for piece in split.pieces:
        last.update(dict.fromkeys((*piece.inputs, *piece.outputs), piece.index))
    needed = {each.number for each in split.results if isinstance(each, Value)} | {
        number for number in split.feed if names[number] in known
    }
    lines = [f"def run({', '.join(arguments)}):"]
    for piece, compiled in zip(split.pieces, built, strict=True):
        known[f"p{piece.index}"] = compiled.call
        targets = "".join(f"{names[number]}, " for number in piece.outputs)
        call = f"p{piece.index}({', '.join(names[number] for number in piece.inputs)})"
        lines.append(f"    {targets and targets + '= '}{call}")
        gone = [names[n] for n in (*piece.inputs, *piece.outputs) if last[n] == piece.index and n not in needed]
        if gone:
            lines.append(f"    del {', '.join(dict.fromkeys(gone))}")
    results = []
    for place, each in enumerate(split.results):
        known[f"c{place}"] = each
        results.append(names[each.number] if isinstance(each, Value) else f"c{place}")
    lines.append(f"    return [{', '.join(results)}]")
    namespace = dict(known)
    exec(compile("\n".join(lines), "<fxpatch.piecewise.flow>", "exec"), namespace)
    return namespace["run"]  # type: ignore[no-any-return]
