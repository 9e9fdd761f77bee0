"""The mutants of a module: what cosmic-ray's operators make of its source, less those that are no other program.

Not counted are mutants that Python does not compile, and those that differ in annotations only: under
`from __future__ import annotations` nothing evaluates them. All others are, unless `equivalent.toml` names them and
says why no test can tell them from the original.
"""

from __future__ import annotations

import ast
import difflib
import re
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        operator: cosmic-ray's name of what was done, e.g. `core/NumberReplacer`.
        line: where, from 1.
        before, after: that line without its indentation.
        source: the whole module, changed.
    """

    operator: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.operator.removeprefix('core/')}\n    - {self.before}\n    + {self.after}"


@dataclass(frozen=True)
class Equivalent:
    """A mutant that does what the original does: a line of `module`, what it became, and why nothing can tell."""

    module: str
    before: str
    after: str
    reason: str


def equivalents() -> list[Equivalent]:
    """The list that is checked in."""
    with open(HERE / "equivalent.toml", "rb") as file:
        return [Equivalent(**entry) for entry in tomllib.load(file).get("equivalent", [])]


def mutants(source: str, leave_out: Sequence[str] = ()) -> Iterator[Mutant]:
    """The mutants of `source`, in an order that is always the same.

    Args:
        source: of a module.
        leave_out: regular expressions; operators whose name below `core/` is one of them are not applied.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    original, seen = _program(source), {source}
    for name in sorted(operator_names()):
        kind = get_operator(name)
        if kind.arguments():  # those that replace one variable by another have to be told which
            continue
        if any(re.fullmatch(pattern, name.removeprefix("core/")) for pattern in leave_out):
            continue
        places = sum(1 for node in ast_nodes(get_ast(source)) for _ in kind().mutation_positions(node))
        for place in range(places):
            changed = mutate_code(source, kind(), place)
            if changed is None or changed in seen:
                continue
            seen.add(changed)
            try:
                program = _program(changed)
            except SyntaxError:
                continue
            if program != original:
                yield Mutant(name, *_difference(source, changed), changed)


def _program(source: str) -> str:
    """What runs: the syntax tree without its annotations, as text. SyntaxError where Python would not compile it."""
    with warnings.catch_warnings(action="ignore"):  # SyntaxWarning: `is` with a literal
        compile(source, "<mutant>", "exec", dont_inherit=True)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
    return ast.dump(tree)


def _difference(source: str, changed: str) -> tuple[int, str, str]:
    """The number of the first line that differs, and how it reads in both."""
    old, new = source.splitlines(), changed.splitlines()
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            return i + 1, _joined(old[i:i_end]), _joined(new[j:j_end])
    raise AssertionError("the source was not changed")


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())
