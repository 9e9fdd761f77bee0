"""Compiling pieces: each distinct one once, however often it occurs.

The layers of a model give the same piece again and again: parameters are inputs of a piece, not part of it. So the key
of a piece is what its graph says, and what is known of its inputs: dtypes, devices, shapes and strides, with every size
that depends on n named `n`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxpatch.errors import CompileError
from fxpatch.piecewise.of_n import of_n
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


def build(
    pieces: Iterable[Piece],
    compiler: str | Compiler,
    size: int | None = None,
    around: Callable[[str], AbstractContextManager[object]] = lambda key: nullcontext(),
    done: dict[str, Built] | None = None,
) -> list[Built]:
    """Compiles the graph pieces; the others run as they were traced.

    Args:
        pieces: in order.
        compiler: `"inductor"`, `"aot_eager"`, `"eager"`, or a function of a graph module and its fake inputs.
        size: None: for every size; otherwise for exactly this one. A piece without n is compiled as for every size.
        around: of a key, a context to compile it in.
        done: what has been compiled for other sizes, by key; what is compiled now is added.

    Raises:
        CompileError: a piece cannot be compiled, or `compiler` is unknown.
    """
    compile_piece = compiler_of(compiler)
    done = {} if done is None else done
    built = []
    for piece in pieces:
        if piece.kind != "graph":
            built.append(Built(piece.gm.forward, "", 0.0))
            continue
        inputs = [_known(node) for node in _placeholders(piece.gm)]
        key = key_of(piece.gm)
        if size is not None and any(map(_has_n, inputs)):
            key, inputs = f"{key}-{size}", _at(inputs, size)
        if key in done:
            built.append(Built(done[key].call, key, 0.0))
            continue
        start = time.perf_counter()
        try:
            with torch.no_grad(), around(key):
                call = compile_piece(piece.gm, inputs)
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
    shared = _shared([_known(node) for node in _placeholders(gm)])

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
            what = f"{describe(_known(node))} {next(shared)}"
        elif node.op == "get_attr":
            what = f"get_attr {id(_attribute(gm, str(node.target)))}"  # a constant: shared only where it is the same
        else:
            what = f"{node.op} {_target(node.target)} {spell(node.args)} {spell(node.kwargs)}"
        numbers[node] = len(numbers)
        lines.append(what)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _shared(values: Sequence[Any]) -> Iterator[str]:
    """For each input, which earlier one it shares memory with, and where in that it is. A compiler is told of it, and a
    piece that was compiled for inputs that are apart may read one before it has written the other."""
    owners: dict[int, int] = {}
    tensors = [value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None for value in values]
    for number, (value, storage) in enumerate(zip(values, tensors, strict=True)):
        if storage is None or tensors.count(storage) == 1:
            yield ""
        else:
            yield f"in {owners.setdefault(storage, number)} at {_in_n([value.storage_offset()])}"


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


def _has_n(value: Any) -> bool:
    """Whether an input's form depends on n."""
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(each, torch.SymInt) for each in sizes)


def _at(inputs: Sequence[Any], size: int) -> list[Any]:
    """Fake inputs of one size: no memory is taken for them."""

    def number(value: Any) -> Any:
        return of_n(value)(size) if isinstance(value, torch.SymInt) else value

    def fixed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return number(value)
        shape, strides = [list(map(number, each)) for each in (value.shape, value.stride())]
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    with FakeTensorMode(shape_env=ShapeEnv()):
        return list(map(fixed, inputs))


def _eager(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    return gm.forward


def _aot_eager(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend("aot_eager")(gm, inputs)


def _inductor(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    import torch._inductor

    if any(map(_has_n, inputs)) or not any(_has_n(_known(node)) for node in _placeholders(gm)):
        return torch._inductor.standalone_compile(gm, inputs, dynamic_shapes="from_graph")
    mode = next((each.fake_mode for each in inputs if isinstance(each, FakeTensor)), None)
    return torch._inductor.standalone_compile(gm, inputs, dynamic_shapes="from_example_inputs", fake_mode=mode)


_COMPILERS: dict[str, Compiler] = {"inductor": _inductor, "aot_eager": _aot_eager, "eager": _eager}
