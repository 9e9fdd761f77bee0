"""The rules: what can be wrong with a fake kernel, how bad it is, what it does to a user, and what to do.

Identifiers stay the same over releases: they end in SARIF, and in people's baselines.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How bad: an ERROR breaks tracing or changes results, a WARNING costs speed or generality, a NOTE is a
    question."""

    NOTE = 0
    WARNING = 1
    ERROR = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Rule:
    """One kind of mistake: `why` says what it does to a user, `fix` what to change.

    Args:
        id: its name in reports.
        level: how bad it is.
        title: the mistake, in a few words.
    """

    id: str
    level: Level
    title: str
    why: str
    fix: str


_E, _W, _N = Level.ERROR, Level.WARNING, Level.NOTE
_ALL = (
    Rule("missing-fake", _W, "operator without a fake kernel", "torch.compile stops at it", "register one"),
    Rule(
        "missing-fake-backward",
        _W,
        "backward operator without a fake kernel",
        "tracing a training step stops at it",
        "register one",
    ),
    Rule(
        "hidden-mutation",
        _E,
        "the schema hides a mutation",
        "compiled code may drop, repeat or reorder the call",
        "declare what is mutated: Tensor(a!)",
    ),
    Rule(
        "suspected-mutation",
        _W,
        "a later version of the operator declares a mutation that this one does not",
        "if this one mutates too, compiled code may drop, repeat or reorder the call",
        "declare what is mutated: Tensor(a!)",
    ),
    Rule(
        "undeclared-effect",
        _N,
        "returns nothing and declares no mutation; FX is told to keep the call",
        "if it writes an argument, Inductor may still read that argument too early or too late",
        "declare what is mutated: Tensor(a!), if anything is",
    ),
    Rule(
        "undeclared-alias",
        _E,
        "a result is an input, and the schema does not say so",
        "functionalization takes it for a fresh tensor",
        "declare the alias in the schema, or return a copy",
    ),
    Rule(
        "dropped-alias",
        _W,
        "the schema says that a result is an argument; the fake kernel gives a fresh tensor",
        "writes through the result are lost in compiled code",
        "return the argument itself",
    ),
    Rule(
        "missing-default",
        _E,
        "a schema default is not repeated",
        "the dispatcher drops arguments that equal the default, so the call fails while tracing",
        "give the parameter the schema's default",
    ),
    Rule(
        "differing-default",
        _W,
        "a default differs from the schema's",
        "the dispatcher drops arguments that equal the schema's default, so the fake kernel sees another value",
        "use the schema's default",
    ),
    Rule(
        "refused-argument",
        _E,
        "an argument of the schema is refused",
        "a call that the operator accepts fails while tracing",
        "accept it: by position where the schema is positional, by name where it is keyword-only",
    ),
    Rule(
        "swapped-arguments",
        _E,
        "positional parameters in another order than the schema's",
        "arguments are passed by position: the fake kernel sees one in place of the other",
        "use the schema's order",
    ),
    Rule(
        "undefined-name",
        _E,
        "a global name that does not exist",
        "a call that reaches the line fails with NameError",
        "define or import it",
    ),
    Rule("python-error", _W, "an internal error instead of a shape or a refusal", "tracing fails", "handle the case"),
    Rule(
        "result-count",
        _E,
        "another number of results than the schema's",
        "tracing fails, or a result is taken for another",
        "return what the schema says",
    ),
    Rule(
        "result-kind", _E, "a result of another kind than the schema's", "tracing fails", "return what the schema says"
    ),
    Rule(
        "constant-result",
        _W,
        "a result that is no Tensor becomes a constant in the graph",
        "compiled code uses what the fake kernel returned, not what the kernel computes",
        "return a Tensor",
    ),
    Rule(
        "float-size",
        _W,
        "a size computed in floating point",
        "FloorToInt, IntTrueDiv and their like stay in the graph: extra guards, weaker range analysis",
        "use // and integer arithmetic",
    ),
    Rule(
        "surplus-guard",
        _W,
        "a guard that a valid call violates, though the result's formula is the same",
        "recompilation for nothing",
        "leave out the comparison, or use torch._check",
    ),
    Rule(
        "specialised-size",
        _W,
        "a dynamic size becomes a constant",
        "one compilation for each size",
        "keep the size symbolic: no int(), no range() or float over it",
    ),
    Rule(
        "dynamic-shapes-fail",
        _E,
        "fails with symbolic sizes where it accepts the same call with plain ones",
        "torch.compile(dynamic=True) stops at it",
        "use operations that symbolic sizes support",
    ),
    Rule(
        "permuted-strides",
        _N,
        "a result keeps the permuted strides of an input",
        "if the kernel allocates a contiguous result, Inductor plans for strides that it does not have",
        "new_empty(x.shape) where the kernel's result is contiguous",
    ),
    Rule(
        "mixed-dtype",
        _N,
        "with inputs of different dtypes, a result takes the dtype of an argument other than the first",
        "if the kernel promotes otherwise, compiled code has the wrong dtype",
        "state the result's dtype as the kernel does",
    ),
    Rule(
        "touches-hardware",
        _W,
        "the fake kernel asks the device runtime",
        "tracing needs, or initialises, the hardware",
        "decide by arguments only",
    ),
    Rule("reads-data", _E, "the fake kernel reads the contents of a tensor", "tracing fails", "use shapes only"),
    Rule(
        "fake-tensor-fails",
        _E,
        "works on meta tensors, fails under FakeTensorMode",
        "torch.compile stops at it",
        "run it under FakeTensorMode in a test",
    ),
    Rule("backward-fails", _E, "tracing the backward fails", "a training step does not compile", "see the message"),
    Rule("crash", _E, "the process died", "tracing takes the process with it", "see the message"),
    Rule("hang", _E, "no answer within the time limit", "tracing hangs", "see the message"),
    Rule(
        "not-probed",
        _N,
        "no generated call was accepted",
        "only the rules that need no call were applied",
        "the last refusal is in the message",
    ),
)
RULES: dict[str, Rule] = {rule.id: rule for rule in _ALL}
