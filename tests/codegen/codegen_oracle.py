"""What the rewrite ought to do, worked out from the syntax tree and the symbol table instead of the text.

(That the result runs as `fx.Interpreter` does is `fxpatch.testing.device_literals.assert_runs_as_interpreted`.)
"""

from __future__ import annotations

import ast
import io
import symtable
import tokenize
from typing import Any

import torch


def assert_rewritten(before: str, after: str, custom: str = "musa") -> None:
    """`after` differs from `before` in the places the rules name, and nowhere else."""
    assert before.count("\n") == after.count("\n")
    assert _comments(before) == _comments(after)
    if before == after:
        torch_name = "torch"
    else:
        aliases = {name for name in _names(after) - _names(before) if name.startswith("_fxpatch_torch")}
        torch_name = aliases.pop() if "torch" in _locals(before) else "torch"
        assert not aliases
    expected = _Expected(custom, "device" in _locals(before), torch_name).visit(ast.parse(before))
    assert ast.dump(ast.parse(after)) == ast.dump(expected), after


class _Expected(ast.NodeTransformer):
    def __init__(self, custom: str, every: bool, torch_name: str) -> None:
        self.custom, self.every, self.torch_name = custom, every, torch_name

    def visit_Call(self, call: ast.Call) -> Any:
        self.generic_visit(call)
        if not (isinstance(call.func, ast.Name) and call.func.id == "device") or call.args:
            return call
        device = torch._C.device(**{k.arg: ast.literal_eval(k.value) for k in call.keywords})
        if device.type == self.custom:
            owner = self.torch_name
        elif self.every:
            owner = f"{self.torch_name}._C"
        else:
            return call
        return ast.parse(f"{owner}.device{tuple(ast.literal_eval(k.value) for k in call.keywords)}", mode="eval").body


def _comments(src: str) -> list[str]:
    return [t.string for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type == tokenize.COMMENT]


def _names(src: str) -> set[str]:
    return {t.string for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type == tokenize.NAME}


def _locals(src: str) -> set[str]:
    (function,) = symtable.symtable(src, "generated", "exec").get_children()
    return {s.get_name() for s in function.get_symbols() if s.is_local()}
