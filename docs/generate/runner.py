"""The picture of the piecewise runner: what `prepare()` does once, what a call does, and the modules that do it."""

from __future__ import annotations

from generate.svg import AMBER, BLUE, GREEN, GREY, SOFT, Box, Picture

WIDTH, STEP = 1000, 157
# step of prepare() -> (what it makes, the modules in fxpatch/piecewise and fxpatch/native that do it)
PREPARE: dict[str, tuple[str, tuple[str, ...]]] = {
    "trace": ("one graph, no guards", ("piecewise.trace", "piecewise.alike")),
    "promote": ("optimized forwards", ("native.promote", "native.trial")),
    "lint": ("what no graph can hold", ("piecewise.lint", "piecewise.rules")),
    "split": ("pieces", ("piecewise.split", "piecewise.regions")),
    "compile": ("each distinct piece once", ("piecewise.build", "piecewise.warm_start")),
    "capture": ("a plan per size", ("piecewise.plan", "piecewise.graph_recorder")),
}
# the ways of a call, the fastest first -> what it costs
CALL: dict[str, str] = {
    "captured size": "pad, copy, replay one flat tuple of calls, slice",
    "compiled pieces": "at the call's own size, without graphs",
    "original function": "as if there were no runner",
}


def draw() -> str:
    """The picture as SVG."""
    picture = Picture(WIDTH, 330, "What the piecewise runner does in prepare() and in a call")
    picture.words(20, 28, "prepare(), once", bold=True, anchor="start")
    for number, (step, (what, names)) in enumerate(PREPARE.items()):
        box = Box(20 + number * (STEP + 3), 40, STEP - 14, 84)
        picture.box(box, step, (what, *names), colours=BLUE)
        if number:
            picture.across(box.x - 15, 82, box.x - 2)
    heading = "a call: the fastest way that is right for it; each step down is counted with its reason"
    picture.words(20, 168, heading, bold=True, anchor="start")
    width = 306
    for number, ((way, cost), colours) in enumerate(zip(CALL.items(), (GREEN, AMBER, GREY), strict=True)):
        box = Box(20 + number * (width + 21), 182, width, 60)
        picture.box(box, way, (cost,), colours=colours)
        if number:
            picture.across(box.x - 20, 212, box.x - 2)
    for number, part in enumerate(("graph", "attention", "graph", "attention", "graph", "attention", "graph")):
        box = Box(20 + number * 137, 272, 130, 34)
        picture.box(box, part, colours=GREEN if part == "graph" else GREY, size=12)
    plan = "a plan: graphs are replayed, what splits them runs between"
    picture.words(20, 264, plan, anchor="start", colour=SOFT)
    return str(picture)
