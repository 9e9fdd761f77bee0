"""Measures the library's fake kernels in a process with the real torch_npu, before, during and after `install()`.

    python measure_npu_fakes.py [CALLS]         prints one line of JSON for each operator, then one for all

It runs in torch_npu's environment, where there is neither hardware nor pytest; the tests read what it prints. Arguments
are fake tensors on device npu, drawn as `fake_kernels.conformance` draws them, so the same in every run.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
import torch_npu  # noqa: F401
import torch_npu.op_plugin.meta._meta_registrations as theirs
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

import fxpatch
from fake_kernels import FakeKernel
from fake_kernels.adapter import below_autograd, decomposes, how_traced, overload_of
from fake_kernels.agreement import result_disagreements, sharing
from fake_kernels.drawing import RandomDraw
from fake_kernels.honest import declared_aliases
from fake_kernels.kernel import Call, parse
from fake_kernels.library import load
from fake_kernels.same_schema import same_schema
from fake_kernels.symbolic import trace

Measured = dict[str, Any]
NO_HARDWARE = ("Failed to find function", "No NPUs are available")


def main(calls: int) -> None:
    faulthandler.enable()  # without a device some of torch_npu's C++ ends the process: then this says where
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL + 1)  # errors are what is measured
    records = [record for record in load() if record.library == "torch_npu"]
    measured: dict[str, Measured] = {record.op: before(record, calls) for record in records}
    installation = fxpatch.install("npu")
    for record in records:
        measured[record.op] |= during(record, calls, installation.fakes[record.op], "traced" in measured[record.op])
    installation.uninstall()
    for record in records:
        one = measured[record.op]
        one |= after(record, calls, one.pop("dispatch"), "traced" in one)
        print(json.dumps({record.op: one}), flush=True)
    print(json.dumps({"": {"version": version("torch_npu"), "left": list(installation.left), "calls": calls}}))


def before(record: FakeKernel, calls: int) -> Measured:
    op = overload_of(record.op)
    if op is None:
        raise LookupError(f"torch_npu {version('torch_npu')} has no {record.op}")
    watched = record.hidden or bool(declared_aliases(op._schema)[1]) or has(op) == "nothing"
    return {
        "schema": str(op._schema),
        "same_schema": same_schema(op._schema, parse(record.schema)),
        "has": has(op),
        "differs": differs(record, op, calls),
        **({"traced": traced(record, op), "compiled": compiled(record, op)} if watched else {}),
        "dispatch": dispatch(op),
    }


def during(record: FakeKernel, calls: int, outcome: Any, watched: bool) -> Measured:
    op = overload_of(record.op)
    return {
        "outcome": type(outcome).__name__,
        "replaced": bool(getattr(outcome, "replaced", "")),
        "reason": outcome.reason,
        "differs_installed": differs(record, op, calls),
        **({"traced_installed": traced(record, op), "compiled_installed": compiled(record, op)} if watched else {}),
    }


def after(record: FakeKernel, calls: int, dispatch_before: str, watched: bool) -> Measured:
    op = overload_of(record.op)
    return {
        "has_after": has(op),
        "differs_after": differs(record, op, calls),
        **({"traced_after": traced(record, op)} if watched else {}),
        "same_dispatch": dispatch(op) == dispatch_before,
    }


def has(op: Any) -> str:
    """What traces the operator: a fake kernel of its own, torch's, or nothing."""
    name = op.name()
    if decomposes(op):
        return "decomposes"
    if torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None:
        return "register_fake"
    for key in ("Meta", "CompositeExplicitAutograd"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            return key
    return "trivial" if how_traced(op) else "nothing"


def dispatch(op: Any) -> str:
    """All kernels of the operator as the dispatcher has them, those of its autograd keys included."""
    return str(torch._C._dispatch_dump(op.name()))


# -- ours against what is registered ---------------------------------------------------------------------------------


def differs(record: FakeKernel, op: Any, calls: int) -> dict[str, str]:
    """Kind of disagreement -> an example. Both are fakes; below autograd, whose kernels in C++ want a device."""
    if has(op) in ("nothing", "decomposes"):
        return {}
    theirs._npu_fusion_attention_warning_printed = False
    found: dict[str, str] = {}
    for number in range(calls):
        for kind, example in disagreements(record, op, record.arguments(RandomDraw(number))).items():
            found.setdefault(kind, f"call {number}: {example}")
    for number in range(calls // 8):
        for kind, example in symbolic_disagreements(record, op, RandomDraw(number, smallest=2)).items():
            result = kind.partition(": ")[0]
            if not (result.startswith("result ") and any(known.startswith(f"{result}:") for known in found)):
                found.setdefault(kind, f"pair {number}: {example}")
    return dict(sorted(found.items()))


def disagreements(record: FakeKernel, op: Any, call: Call) -> dict[str, str]:
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        args, kwargs = fakes_on_npu(call)
        ours = record.fn(*args, **kwargs)
        other_args, other_kwargs = fakes_on_npu(call)
        wrong: dict[str, str] = {}
        try:
            with below_autograd():
                told = op(*other_args, **other_kwargs)
        except Exception as error:  # of any class: it is what is measured
            text = str(error).strip().splitlines()[0]
            if not any(words in text for words in NO_HARDWARE):
                return {f"refuses: {type(error).__name__}": text}
            wrong["initialises the hardware"] = text
            theirs._npu_fusion_attention_warning_printed = True  # it wants to know whether to warn, once
            with below_autograd():
                told = op(*other_args, **other_kwargs)
        for each in result_disagreements(told, ours):
            where = re.match(r"result \d+: \w+", each)
            wrong[where[0] if where else "number of results"] = each.replace("the fake kernel", "torch_npu's fake")
        given = sharing(ours, (args, kwargs)), sharing(told, (other_args, other_kwargs))
        if len(given[0]) == len(given[1]) and given[0] != given[1]:
            wrong["memory of arguments"] = f"ours says {given[0]}, torch_npu's fake {given[1]}"
    return wrong


def symbolic_disagreements(record: FakeKernel, op: Any, draw: RandomDraw) -> dict[str, str]:
    """What goes wrong with theirs and not with ours when it is traced at one call's sizes and read at another's."""
    first = record.arguments(draw)
    second = record.arguments(draw.again(len(draw.decisions)))
    found = record.reference(*second[0], **second[1])
    kinds: list[dict[str, str]] = []
    for fn in (record.fn, op):
        one: Any = SimpleNamespace(schema=record.schema, fn=fn)
        try:
            wrong = trace(one, first).disagreements(second, found)
        except Exception as error:  # of any class: it is what is measured
            text = str(error).strip().splitlines()[0]
            wrong = [f"raises {type(error).__name__}: {text}"]
        guards = [each for each in wrong if each.startswith("assumes ")]  # then the results are of those sizes alone
        kinds.append({symbolic_kind(each): each for each in guards or wrong})
    return {kind: example for kind, example in kinds[1].items() if kind and kind not in kinds[0]}


def symbolic_kind(disagreement: str) -> str:
    """`""` for those that show without symbols, too: another number of results, errors for every call."""
    if disagreement.startswith("assumes "):
        return "symbolic sizes: surplus guard"
    if "is computed with floats" in disagreement:
        return "symbolic sizes: computed with floats"
    if disagreement.startswith("result "):
        return " ".join(disagreement.split()[:3])
    return ""


def fakes_on_npu(call: Call) -> Any:
    """The call with fake tensors on device npu: the same sizes, strides, offsets, and the same sharing of memory."""
    memory: dict[int, torch.Tensor] = {}

    def place(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in memory:
            memory[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8, device="npu:0")
        whole = memory[storage._cdata].untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype, device="npu:0")
        return empty.set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())

    return pytree.tree_map_only(torch.Tensor, place, call)


# -- tracing ---------------------------------------------------------------------------------------------------------


def traced(record: FakeKernel, op: Any) -> list[str] | str:
    """The operators in the graph of a call with symbolic sizes, or why there is none."""

    def graph() -> list[str]:
        with FakeTensorMode(shape_env=ShapeEnv(duck_shape=False)) as mode, torch.no_grad():
            args, kwargs = symbols_on_npu(mode, call_of(record))
            tensors, function = function_of(op, args, kwargs)
            nodes = make_fx(function)(*tensors).graph.nodes
            return [str(node.target) for node in nodes if node.op == "call_function"]

    return attempt(graph)


def compiled(record: FakeKernel, op: Any) -> str:
    """`"whole"` where `torch.compile` makes one graph of a call and runs it on fake tensors, or why not. Operators that
    write are left to `traced`: AOTAutograd copies what was written, and `copy_` wants a device."""
    if op._schema.is_mutable or record.hidden:
        return "not tried"
    torch._dynamo.reset()

    def run() -> str:
        with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
            args, kwargs = fakes_on_npu(call_of(record))
            tensors, function = function_of(op, args, kwargs)
            torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
        return "whole"

    return str(attempt(run))


def call_of(record: FakeKernel) -> Call:
    return record.arguments(RandomDraw(3, smallest=2))


def function_of(op: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], Callable[..., Any]]:
    """The call as a function of its tensors alone."""
    leaves, spec = pytree.tree_flatten((args, kwargs))

    def function(*tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        given, named = pytree.tree_unflatten([next(rest) if isinstance(x, torch.Tensor) else x for x in leaves], spec)
        return op(*given, **named)

    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], function


def symbols_on_npu(mode: FakeTensorMode, call: Call) -> Any:
    """The call with fake tensors on device npu whose sizes are symbols."""
    count = 0

    def place(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        context = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim(), constraint_sizes=[None] * tensor.dim()
        )
        here = mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"input{count}"))
        return torch.empty_strided(here.shape, here.stride(), dtype=tensor.dtype, device="npu:0")

    return pytree.tree_map_only(torch.Tensor, place, call)


def attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # of any class: it is what is measured
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
