"""The rewrite of generated source, for any source, device name and globals.

* It raises nothing.
* The result can be tokenized where the source can, and nowhere else.
* Strings and comments are what they were; only device literals have changed, each into an expression that gives the
  same device, or raises the same error.
* Doing it twice is doing it once.
* In source of the form that FX gives it, no literal is left that the function's own names could break, and the name
  that stands for torch is torch there.
"""

from __future__ import annotations

import ast
import io
import symtable
import tokenize
from itertools import pairwise
from typing import Any

import torch

from fxpatch.codegen import Rewritten, rewrite

DEVICES = ("musa", "npu", "privateuseone", "cuda", "_1", "größe")
GLOBALS: tuple[dict[str, object], ...] = (
    {},
    {"torch": torch, "device": torch.device},
    {"torch": "another"},
    {"torch": "another", "_fxpatch_torch": 1, "_fxpatch_torch_1": 2},
    {"torch": "another", "_fxpatch_torch": torch},
)

# what a byte of 128 and more stands for: pieces of source that chance alone does not write
_PIECES = (
    *("device(type='musa', index=0)", "device(type='musa')", "device(type='npu')", "device(type='cuda', index=1)"),
    *("device(type='", "musa", "')", "', index=", "device", "torch", "_fxpatch_torch", "torch.device('musa', 0)"),
    *('"""', "'''", "'", '"', "\\", "\\\n", "\n", "#", "b'", 'r"', "f'", "rb'''", "\r\n", "\\'", '\\"', "\\\\"),
    *("\n    ", "    ", ";  ", ", ", " = ", "(", ")", "[", "]", "{", "}", ":", "=", "==", "*", "."),
    *("lambda ", "return "),
    *("\x1b[34m", "\x1b[0m", "\t", "\f", "\r", "\0", "é", "ä", "\u0301", "\u2028", "٣", "😀", "\ud800", "\xa0"),
    *("\n\n\ndef forward(self, device):\n    return ", "\n\n\ndef forward(self, x):\n    return "),
)  # fmt: skip

_PARAMETERS = (
    *("x", "device", "torch", "_fxpatch_torch", "device_1", "x : device", "*device", "**torch", "y = 1", "device = 3"),
    *("torch : torch.device = None", "y = 'device, torch='"),
)  # fmt: skip
_STATEMENTS = (
    "y = f(device(type='musa', index=0), 'device(type=')",
    "z = [device(type='musa'), device(type='cuda', index=1)];  y = None",
    "y = g(x, device = device(type='npu'), torch = 1)",
    "device = next(it)",
    "x, device, y, = fx_pytree.tree_flatten_spec([x], self._in_spec)",
    "torch = x",
    "torch, = leaves(x)",
    "device : int = 1",
    "s = 'it is \\'device(type=\\'musa\\')\\''  # it's device(type='musa')",
    "'''\n    device(type='musa')\n    it's '''",
    '"""\n    x: device(type=\'musa\')  """',
    "b = b\"device(type='musa')\", \"\\\"\", device(type='musa')",
    'c = "a\\\n    device(type=\'musa\')"',
    "m = x.device(type='musa')",
    "k = {device(type='musa'): \"device(type='cpu')\", 'x': slice(device(type='cpu'), None, None)}",
    "if x:\n        torch = device(type='musa')",
)  # fmt: skip

_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def check(data: bytes) -> None:
    """All properties of one input."""
    custom, globals_, shaped, rest = *_header(data[:3]), data[3:]
    src = _generated(rest) if shaped else _text(rest)
    found = rewrite(src, globals_, custom)
    if found is not None:
        _assert_only_literals_changed(src, globals_, custom, found)
    if shaped:
        _assert_stands_by_itself(src, custom, found)


def _header(data: bytes) -> tuple[str, dict[str, object], bool]:
    first, second, third = (*data, 0, 0, 0)[:3]
    return DEVICES[first % len(DEVICES)], GLOBALS[second % len(GLOBALS)], third % 2 == 1


def _text(data: bytes) -> str:
    """Any text: each byte below 128 is itself, and each other one is a piece of source."""
    return "".join(chr(byte) if byte < 128 else _PIECES[byte % 128 % len(_PIECES)] for byte in data)


def _generated(data: bytes) -> str:
    """One function, as FX lays it out: four bytes for its parameters, the others are statements."""
    drawn = {_name(each): each for each in (_PARAMETERS[byte % len(_PARAMETERS)] for byte in data[:4])}
    parameters = sorted(drawn.values(), key=lambda p: (p.startswith("**"), p.startswith("*"), "=" in p))
    lines = [f"    {_STATEMENTS[byte % len(_STATEMENTS)]}" for byte in data[4:36]]
    return f"\n\n\ndef forward({', '.join(['self', *parameters])}):\n" + "\n".join([*lines, "    return x\n"])


def _name(parameter: str) -> str:
    return parameter.lstrip("*").partition(" ")[0]


def _tokens(src: str) -> list[str] | None:
    """Names, operators, strings and comments in their order; None where Python's tokenizer does not get through."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(src).readline))
        src.encode()
    except (tokenize.TokenError, SyntaxError, UnicodeEncodeError):
        return None
    if any(token.type == tokenize.ERRORTOKEN for token in tokens):
        return None
    return [token.string for token in tokens if token.type not in _LAYOUT]


def _elsewhere(tokens: list[str]) -> bool:
    """Whether `device(` stands where FX never writes it, and is no call of that name: `x. device(`, `def device(`."""
    return any(b == "device" and a in (".", "def", "class") for a, b in pairwise(tokens))


def _assert_only_literals_changed(src: str, globals_: dict[str, object], custom: str, found: Rewritten) -> None:
    assert found.src != src
    assert found.src.count("\n") == src.count("\n")
    assert globals_.get(found.torch_name, torch) is torch, "a global of another meaning is used as torch"
    assert rewrite(found.src, {**globals_, found.torch_name: torch}, custom) is None, "twice is not once"
    before, after = _tokens(src), _tokens(found.src)
    assert (before is None) == (after is None), "one can be tokenized and the other cannot"
    if before is None or after is None or _elsewhere(before):
        return
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == after[j]:
            i, j = i + 1, j + 1
            continue
        assert (before[i], after[j]) == ("device", found.torch_name), (before[i : i + 8], after[j : j + 8])
        i_end, j_end = before.index(")", i) + 1, after.index(")", j) + 1
        was = _outcome("".join(before[i:i_end]), {"device": torch._C.device})
        now = _outcome("".join(after[j:j_end]), {found.torch_name: torch})
        assert was == now, (was, now)
        i, j = i_end, j_end
    assert (i, j) == (len(before), len(after))


def _outcome(expression: str, scope: dict[str, Any]) -> tuple[str, str]:
    try:
        return "device", repr(eval(expression, scope))
    except (RuntimeError, TypeError, SyntaxError, ValueError, OverflowError) as error:
        return type(error).__name__, str(error).partition("\n")[0] if isinstance(error, RuntimeError) else ""


def _assert_stands_by_itself(src: str, custom: str, found: Rewritten | None) -> None:
    after = src if found is None else found.src
    (function,) = symtable.symtable(src, "generated", "exec").get_children()
    local = {symbol.get_name() for symbol in function.get_symbols() if symbol.is_local()}
    assert found is None or found.torch_name not in local
    for node in ast.walk(ast.parse(after)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "device"
            and node.keywords
        ):
            kind = ast.literal_eval(node.keywords[0].value)
            assert kind != custom, f"{ast.unparse(node)} is left"
            assert "device" not in local, f"{ast.unparse(node)} is left where `device` is an argument"
