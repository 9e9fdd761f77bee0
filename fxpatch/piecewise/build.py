"""Compiling pieces: each distinct one once, however often it occurs.

The layers of a model give the same piece again and again: parameters are inputs of a piece, not part of it. So the key
of a piece is what its graph says, and what is known of its inputs: dtypes, devices, shapes and strides, with every size
that depends on n named `n`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fxpatch.errors import CompileError
from fxpatch.piecewise.split import Piece

Compiler = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Built:
    """A compiled piece.

    Args:
        call: takes the piece's inputs, returns a tuple or list of its outputs.
        key: the same for pieces that are the same.
        seconds: spent compiling; 0 where it was compiled for another piece.
    """

    call: Callable[..., Any]
    key: str
    seconds: float


def build(pieces: Iterable[Piece], compiler: str | Compiler) -> list[Built]:
    """Compiles the graph pieces; the others run as they were traced.

    Args:
        pieces: in order.
        compiler: `"inductor"`, `"aot_eager"`, `"eager"`, or a function of a graph module and its fake inputs.

    Raises:
        CompileError: a piece cannot be compiled, or `compiler` is unknown.
    """
    compile_piece = compiler_of(compiler)
    done: dict[str, Built] = {}
    built = []
    for piece in pieces:
        if piece.kind != "graph":
            built.append(Built(piece.gm.forward, "", 0.0))
            continue
        key = key_of(piece.gm)
        if key in done:
            built.append(Built(done[key].call, key, 0.0))
            continue
        start = time.perf_counter()
        try:
            with torch.no_grad():
                call = compile_piece(piece.gm, [_known(node) for node in _placeholders(piece.gm)])
        except Exception as error:
            raise CompileError(
                f"Piece {piece.index} cannot be compiled with {compiler!r}.",
                seen=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                expected="a compiler that takes the operators of this piece",
                hint="pass compiler='aot_eager' or 'eager', or split at the operator in question",
            ) from error
        done[key] = Built(call, key, time.perf_counter() - start)
        built.append(done[key])
    return built


def compiler_of(compiler: str | Compiler) -> Compiler:
    """The function behind a name.

    Raises:
        CompileError: there is none.
    """
    if callable(compiler):
        return compiler
    if compiler not in _COMPILERS:
        raise CompileError(
            "This is no compiler of pieces.",
            seen=repr(compiler),
            expected=f"one of {', '.join(map(repr, _COMPILERS))}, or a function of a graph module and its inputs",
            hint="the device's compile profile says which one works there",
        )
    return _COMPILERS[compiler]


def key_of(gm: torch.fx.GraphModule) -> str:
    """The same for two pieces exactly if one compiled form serves both."""
    numbers: dict[torch.fx.Node, int] = {}
    lines = []

    def spell(value: Any) -> str:
        if isinstance(value, torch.fx.Node):
            return f"%{numbers[value]}"
        if isinstance(value, (tuple, list)):
            return f"{type(value).__name__}({', '.join(map(spell, value))})"
        if isinstance(value, dict):
            return f"dict({', '.join(f'{k!r}: {spell(v)}' for k, v in value.items())})"
        if isinstance(value, slice):
            return f"slice({spell(value.start)}, {spell(value.stop)}, {spell(value.step)})"
        return repr(value)

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            what = describe(_known(node))
        elif node.op == "get_attr":
            what = f"get_attr {id(_attribute(gm, str(node.target)))}"  # a constant: shared only where it is the same
        else:
            what = f"{node.op} {_target(node.target)} {spell(node.args)} {spell(node.kwargs)}"
        numbers[node] = len(numbers)
        lines.append(what)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe(value: Any) -> str:
    """What is known of an input, in words that are the same for every name of n."""
    if isinstance(value, torch.Tensor):
        shape, strides = map(_in_n, (value.shape, value.stride()))
        return f"{value.dtype} {value.device} {shape} {strides} {type(value).__name__} {value.requires_grad}"
    return f"{type(value).__name__} {_in_n([value])}"


def _in_n(sizes: Iterable[Any]) -> str:
    import sympy  # type: ignore[import-untyped]

    n = sympy.Symbol("n", integer=True, positive=True)

    def spell(size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        return str(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, n)))

    return ", ".join(map(spell, sizes))


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
    return name if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) else f"{name} {id(target)}"


def _attribute(gm: torch.fx.GraphModule, path: str) -> Any:
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _placeholders(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _known(node: torch.fx.Node) -> Any:
    return node.meta["example_value"]


def _eager(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    return gm.forward


def _aot_eager(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend("aot_eager")(gm, inputs)


def _inductor(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    import torch._inductor

    return torch._inductor.standalone_compile(gm, inputs, dynamic_shapes="from_graph")


_COMPILERS: dict[str, Compiler] = {"inductor": _inductor, "aot_eager": _aot_eager, "eager": _eager}
