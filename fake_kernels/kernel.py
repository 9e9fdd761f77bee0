"""The record of one fake kernel: what is promised about a vendor's operator, and what proves it.

A fake kernel that is wrong miscompiles silently, and nobody sees a fake being wrong by reading it. So a record holds
three things that check one another: the schema exactly as the vendor declares it, the fake, and a reference in plain
torch that computes real numbers. `fake_kernels.conformance.check` runs the last two against each other on the calls
that `arguments` draws; the simulated device runs the reference as its kernel.

A record is checked when it is made: the fake has to repeat every name and every default of the schema, because the
dispatcher drops arguments that equal their default before it calls a Python kernel.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from fake_kernels.errors import OperatorNameError, SchemaError, SignatureError

if TYPE_CHECKING:
    from fake_kernels.drawing import Draw

Call = tuple[tuple[Any, ...], dict[str, Any]]
_NAME = re.compile(r"(?P<namespace>[A-Za-z_]\w*)::(?P<name>[A-Za-z_]\w*)(\.(?P<overload>[A-Za-z_]\w*))?", re.ASCII)


@dataclass(frozen=True)
class FakeKernel:
    """What is known of one operator.

    Args:
        schema: with namespace, as the vendor registers it: `"npu::npu_swiglu(Tensor input, int dim=-1) -> Tensor"`.
        fn: the fake kernel: fake tensors in, fake tensors out; touches no hardware and reads no data.
        reference: the same operator in plain torch, on real tensors of any device: results, aliasing and mutation as
            the vendor's kernel has them.
        source: where the vendor says so: file of its source, or document.
        library: the importable module that brings the operator, `"torch_npu"`.
        arguments: draws the arguments of one call that the kernel accepts.
        refuses: words of the error -> draws a call that the kernel refuses with them.
        writes: arguments that the kernel writes to although the schema does not say so. No fake kernel can be right
            then, so it gets none: `fake_kernels.shadow` is for it.
        returns_arguments: number of a result -> the argument that it is, where the schema does not say so.

    Raises:
        SchemaError: `schema` cannot be parsed, or has no namespace.
        SignatureError: `fn` does not repeat the names, kinds and defaults of the schema.
    """

    schema: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    source: str
    library: str
    arguments: Callable[[Draw], Call]
    refuses: Mapping[str, Callable[[Draw], Call]] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    returns_arguments: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parsed = parse(self.schema)
        check_signature(self.op, parsed, self.fn)
        names = {argument.name for argument in parsed.arguments}
        unknown = [name for name in (*self.writes, *self.returns_arguments.values()) if name not in names]
        if unknown:
            raise SignatureError(
                f"The record of {self.op} names arguments that the operator does not have.",
                seen=", ".join(unknown),
                expected=f"some of {', '.join(sorted(names))}",
                hint="correct `writes` and `returns_arguments`",
            )

    @property
    def op(self) -> str:
        """`"namespace::name"`, or `"namespace::name.overload"`."""
        return self.schema.partition("(")[0]

    @property
    def hidden(self) -> bool:
        """Whether the schema keeps quiet about what the kernel writes or returns."""
        return bool(self.writes or self.returns_arguments)


def fake_kernel(
    schema: str,
    *,
    reference: Callable[..., Any],
    source: str,
    library: str,
    arguments: Callable[[Draw], Call],
    refuses: Mapping[str, Callable[[Draw], Call]] | None = None,
    writes: Sequence[str] = (),
    returns_arguments: Mapping[int, str] | None = None,
) -> Callable[[Callable[..., Any]], FakeKernel]:
    """Decorator: the record whose `fn` is the decorated function. Arguments and errors as of `FakeKernel`.

    Args:
        schema, reference, source, library, arguments, refuses, writes, returns_arguments: as of `FakeKernel`.
    """

    def record(fn: Callable[..., Any]) -> FakeKernel:
        return FakeKernel(
            schema, fn, reference, source, library, arguments, refuses or {}, tuple(writes), returns_arguments or {}
        )

    return record


def split_name(operator: str) -> tuple[str, str, str]:
    """Namespace, name and overload (`""` for the default one) of `"namespace::name[.overload]"`.

    Raises:
        OperatorNameError: it is not of that form.
    """
    match = _NAME.fullmatch(operator)
    if match is None:
        raise OperatorNameError(
            f"No operator can be called {operator!r}.",
            seen=repr(operator),
            expected="'namespace::name' or 'namespace::name.overload'",
            hint="write it as torch.ops.namespace.name._schemas does, without 'torch.ops'",
        )
    overload = match["overload"] or ""
    return match["namespace"], match["name"], "" if overload == "default" else overload


def parse(schema: str) -> torch.FunctionSchema:
    """The parsed form of a schema with a namespace.

    Raises:
        SchemaError: it cannot be parsed, or has no namespace.
    """
    try:
        parsed = torch._C.parse_schema(schema)
    except RuntimeError as error:
        raise SchemaError(
            "This schema cannot be parsed.",
            seen=f"{schema!r}: {str(error).strip().splitlines()[0]}",
            expected="'namespace::name(Tensor input, int dim=-1) -> Tensor', as in torch's native_functions",
            hint="copy it from str(torch.ops.namespace.name.default._schema) where the operator is registered",
        ) from error
    if "::" not in parsed.name:
        raise SchemaError(
            "This schema has no namespace.",
            seen=repr(schema),
            expected="'namespace::name(...) -> ...'",
            hint="write the namespace of the vendor's TORCH_LIBRARY in front of the name",
        )
    return parsed


def type_of(type: Any) -> str:
    """The type of an argument as a schema has it: `"SymInt[]?"`. torch prints `int` for a `SymInt`."""
    kind = type.kind()
    if kind in ("OptionalType", "ListType"):
        return type_of(type.getElementType()) + ("?" if kind == "OptionalType" else "[]")
    return str(kind).removesuffix("Type")


def number_of_results(schema: torch.FunctionSchema, results: Any) -> int:
    """How many results a kernel has returned, as `schema` counts: a list of tensors may be one, and None may be too."""
    if len(schema.returns) == 1:
        return len(results) if isinstance(results, tuple) else 1
    return 0 if results is None else len(results) if isinstance(results, (tuple, list)) else 1


def check_signature(op: str, schema: torch.FunctionSchema, fn: Callable[..., Any]) -> None:
    """`SignatureError` where `fn` cannot be called as torch calls a kernel of `schema`."""
    expected = [(a.name, a.kwarg_only, a.default_value if a.has_default_value() else _NONE) for a in schema.arguments]
    seen, others = _parameters(fn)
    if others or not (len(seen) == len(expected) and all(map(_same, seen, expected))):
        raise SignatureError(
            f"The fake kernel of {op} does not repeat its schema.",
            seen=f"{getattr(fn, '__name__', fn)}({', '.join(map(_spelt, seen)) or 'nothing'})",
            expected=f"({', '.join(map(_spelt, expected))})",
            hint="give it these names and defaults: the dispatcher drops arguments that equal the schema's default",
        )


class _Nothing:
    def __repr__(self) -> str:
        return ""


_NONE = _Nothing()
_Parameter = tuple[str, bool, Any]


def _parameters(fn: Callable[..., Any]) -> tuple[list[_Parameter], bool]:
    """A function's parameters, and whether it has `*args` or `**kwargs` besides. Of a plain function they are read off
    its code, a tenth of what `inspect.signature` takes: a library has many records."""
    if isinstance(fn, FunctionType) and not hasattr(fn, "__wrapped__"):
        code, keyword_defaults = fn.__code__, fn.__kwdefaults__ or {}
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        defaults = [_NONE] * (code.co_argcount - len(fn.__defaults__ or ())) + list(fn.__defaults__ or ())
        defaults += [keyword_defaults.get(name, _NONE) for name in names[code.co_argcount :]]
        found = [
            (name, place >= code.co_argcount, default)
            for place, (name, default) in enumerate(zip(names, defaults, strict=True))
        ]
        return found, bool(code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS))
    parameters = list(inspect.signature(fn).parameters.values())
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = [(p.name, p.kind is p.KEYWORD_ONLY, _NONE if p.default is p.empty else p.default) for p in named]
    return found, len(named) != len(parameters)


def _same(seen: _Parameter, expected: _Parameter) -> bool:
    default, wanted = seen[2], expected[2]
    if isinstance(default, (tuple, list)) and isinstance(wanted, (tuple, list)):
        default, wanted = list(default), list(wanted)
    if isinstance(default, torch.dtype) or isinstance(wanted, torch.dtype):
        return seen[:2] == expected[:2]  # a schema keeps dtypes as numbers, which torch gives no way to translate
    return seen[:2] == expected[:2] and type(default) is type(wanted) and default == wanted


def _spelt(parameter: _Parameter) -> str:
    name, keyword_only, default = parameter
    return f"{'*, ' if keyword_only else ''}{name}{'' if default is _NONE else f'={default!r}'}"
