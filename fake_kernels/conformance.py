"""Is a fake kernel right? Its record against its reference, on as many calls as you like.

    from fake_kernels.conformance import check
    print(check("npu::npu_swiglu"))

The reference computes real numbers; the fake has to have told the number, shapes, strides, dtypes and devices of its
results, which of them are an argument's memory, and what is written; at the sizes of the call, and as expressions that
stay right at other sizes with no guard that a valid call breaks. Where the fake refuses a call, so must the reference.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fake_kernels.agreement import bytes_of, result_disagreements, sharing, storage, tensors_in, written_as_declared
from fake_kernels.drawing import Draw, RandomDraw
from fake_kernels.errors import ConformanceError
from fake_kernels.kernel import Call, FakeKernel, number_of_results, parse
from fake_kernels.symbolic import trace


@dataclass(frozen=True)
class Conforms:
    """How much was compared: calls with their sizes as numbers, pairs of calls with them as symbols, refused calls.

    Args:
        operator: its name.
        calls: calls with sizes as numbers.
        symbolic: pairs of calls with sizes as symbols.
        refused: calls that fake and reference both refused.
    """

    operator: str
    calls: int
    symbolic: int
    refused: int


def check(op: str | FakeKernel, *, device: str = "cpu", calls: int = 40, seed: int = 0) -> Conforms:
    """Checks a fake kernel against its reference.

    Args:
        op: a record, or the name of an operator of the library: `"npu::npu_swiglu"`.
        device: where the reference computes: a device type.
        calls: how many calls are drawn, and how many pairs of calls for the symbolic check.
        seed: other seeds draw other calls.

    Raises:
        UnknownOperatorError: the library has no such operator.
        ConformanceError: they disagree; the text has the call and every disagreement.
    """
    kernel = op if isinstance(op, FakeKernel) else _find(op)
    for number in range(calls):
        check_call(kernel, kernel.arguments(RandomDraw(seed + number, device)))
        check_symbolic(kernel, RandomDraw(seed + number, device, smallest=2))
    refused = 0
    for words in kernel.refuses:
        for number in range(min(calls, 5)):
            check_refused(kernel, words, kernel.refuses[words](RandomDraw(seed + number, device)))
            refused += 1
    return Conforms(kernel.op, calls, calls, refused)


def check_call(kernel: FakeKernel, call: Call) -> None:
    """One call: results, aliasing and mutation. The reference may write to the arguments.

    Args:
        kernel: the record.
        call: its positional and keyword arguments, real tensors.

    Raises:
        ConformanceError: fake and reference disagree.
    """
    args, kwargs = call
    schema = parse(kernel.schema)
    told, fake_inputs = _fake(kernel, call)
    before = [bytes_of(tensor) for tensor in tensors_in(call)]
    found = kernel.reference(*args, **kwargs)
    wrong = result_disagreements(told, found)
    if not wrong:
        told_sharing, found_sharing = sharing(told, fake_inputs), sharing(found, call)
        if told_sharing != found_sharing:
            wrong.append(
                f"results are the memory of arguments {found_sharing}, and in the fake kernel of {told_sharing}"
            )
        declared = any(each.alias_info is not None for each in schema.returns) or kernel.returns_arguments
        if any(found_sharing) and not declared:
            wrong.append("a result is an argument's memory, and neither schema nor `returns_arguments` says so")
    allowed = written_as_declared(schema, args, kwargs, besides=kernel.writes)
    for number, (tensor, then) in enumerate(zip(tensors_in(call), before, strict=True)):
        if not torch.equal(bytes_of(tensor), then) and storage(tensor) not in allowed:
            wrong.append(f"tensor argument {number} is written, and neither schema nor `writes` says so")
    if number_of_results(schema, found) != len(schema.returns):
        wrong.append(f"the reference returns {number_of_results(schema, found)} values, and {schema} has others")
    _raise(kernel, call, wrong)


def check_symbolic(kernel: FakeKernel, draw: Draw) -> None:
    """Two calls that differ in their sizes only: traced at the first, what the fake says has to hold at the second.

    Args:
        kernel: the record.
        draw: draws the first call; its `smallest` has to be 2, since graphs are specialised for sizes of 0 and 1.

    Raises:
        ConformanceError: it does not.
    """
    first = kernel.arguments(draw)
    second = kernel.arguments(draw.again(len(draw.decisions)))
    traced = trace(kernel, first)
    clone = pytree.tree_map_only(torch.Tensor, _clone, second)
    _raise(kernel, second, traced.disagreements(second, kernel.reference(*clone[0], **clone[1])))


def check_refused(kernel: FakeKernel, words: str, call: Call) -> None:
    """A call that fake and reference both refuse; the fake with `words` in its message.

    Args:
        kernel: the record.
        call: its positional and keyword arguments, real tensors.

    Raises:
        ConformanceError: one of them accepts it, or the fake says something else.
    """
    wrong = []
    try:
        _fake(kernel, call)
        wrong.append(f"the fake kernel accepts it; expected an error with {words!r}")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if words not in str(error):
            wrong.append(f"the fake kernel refuses it with {str(error)!r}; expected {words!r} in that")
    try:
        kernel.reference(*call[0], **call[1])
        wrong.append("the reference accepts it, and the fake kernel does not")
    except (RuntimeError, ValueError, TypeError, IndexError):
        pass  # as expected: in words of its own, since it is not the fake
    _raise(kernel, call, wrong)


def _fake(kernel: FakeKernel, call: Call) -> tuple[Any, Any]:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        convert = functools.partial(mode.from_tensor, static_shapes=True)
        inputs = pytree.tree_map_only(torch.Tensor, convert, call)
        return kernel.fn(*inputs[0], **inputs[1]), inputs


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    """With the same strides, which `clone` keeps only where they are dense."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    memory = tensor.untyped_storage().clone()
    whole.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
    return whole.requires_grad_(tensor.requires_grad)


def _raise(kernel: FakeKernel, call: Call, wrong: list[str]) -> None:
    if wrong:
        raise ConformanceError(
            f"The fake kernel of {kernel.op} is wrong, or its reference is.",
            seen="; ".join(wrong),
            expected=f"agreement for {_spelt(call)}",
            hint=f"read the vendor's kernel again ({kernel.source}) and correct the one that differs from it",
        )


def _spelt(call: Call) -> str:
    def spell(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype)[6:]}{list(value.shape)} strides {list(value.stride())}"
        return repr(value)

    args, kwargs = call
    leaves = [pytree.tree_map(spell, value) for value in args]
    return f"({', '.join(map(str, leaves))}{''.join(f', {k}={pytree.tree_map(spell, v)}' for k, v in kwargs.items())})"


def _find(op: str) -> FakeKernel:
    from fake_kernels.library import find

    return find(op)
