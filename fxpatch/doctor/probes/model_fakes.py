"""The operators that a model calls: has each a fake kernel, and does it say what the kernel then does?

The model runs eagerly on the device. Each new kind of call (operator, dtypes, ranks, which dimensions are dense) is
first made with fake tensors, and then compared with the real one. The name of each operator outside aten is written to
stderr before its fake kernel runs: a fake kernel that computes ends the process, and the last name is the culprit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fake_kernels.adapter import how_traced, overload_of, own_fake, registered, side_effects
from fake_kernels.agreement import bytes_of, result_disagreements, sharing, storage, tensors_in, written_as_declared
from fake_kernels.shadow import shadow_of
from fxpatch.doctor.model import example
from fxpatch.doctor.probe import Broken, NotApplicable, Probe, Subject
from fxpatch.doctor.probes.checks import in_words, listed
from fxpatch.doctor.probes.presence import needs_device, not_the_cpu

_TORCHS = frozenset((
    "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_inductor_test", "_native", "_nativert",
    "_quantized", "_test", "aten", "aoti_torch_cuda", "bucketing", "c10d", "c10d_functional", "debug_mode_ops",
    "debugprims", "export", "flex_lib", "fsdp", "image", "inductor", "inductor_prims", "mkl", "mkldnn",
    "mkldnn_prepacked", "nnpack", "nvprims", "onednn", "onnx", "onnx_symbolic", "prim", "prims", "profiler",
    "quantization", "quantized", "quantized_decomposed", "rngprims", "shadow", "sparse", "static_runtime",
    "streams", "symm_mem", "tensorexpr", "torch_attn", "torchaudio", "torchvision", "xnnpack",
))  # fmt: skip
"""Namespaces that come with torch; no vendor's operators."""


class Calls(TorchDispatchMode):
    """Looks at each new kind of call on the device as it is made.

    Args:
        device: the device type.
        look: (operator, args, kwargs) -> a function that is given the result, or None.
    """

    def __init__(self, device: str, look: Callable[[Any, Any, Any], Callable[[Any], None] | None]) -> None:
        super().__init__()
        self.device, self._look = device, look
        self.seen: dict[Any, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        given = kwargs.get("device")
        here = any(t.device.type == self.device for t in tensors) or (
            given is not None and torch._C.device(given).type == self.device
        )
        key = func, tuple((t.dtype, t.dim(), t.is_contiguous()) for t in tensors)
        if not here or key in self.seen:
            return func(*args, **kwargs)
        self.seen[key] = None
        then = self._look(func, args, kwargs)
        result = func(*args, **kwargs)
        if then is not None:
            then(result)
        return result


@contextmanager
def _model_on_the_device(subject: Subject) -> Iterator[Callable[[], Any]]:
    """The subject's model and its example call, on the device, as a function without arguments.

    Raises:
        NotApplicable: no model was named, or there is no device.
    """
    if not subject.model:
        raise NotApplicable("no model was named: --model module:function")
    needs_device(subject)
    model, args, kwargs = example(subject.model)
    if isinstance(model, torch.nn.Module):
        model.to(subject.device)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(subject.device), (args, kwargs))
    with torch.no_grad():
        yield lambda: model(*args, **kwargs)


def _fakes(subject: Subject) -> str:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    wrong: dict[str, None] = {}

    def look(op: Any, args: Any, kwargs: Any) -> Callable[[Any], None] | None:
        if op.namespace not in _TORCHS:
            print(f"fake kernel of {op.name()}", file=sys.stderr, flush=True)  # noqa: T201
        if how_traced(op) is None and op.namespace not in _TORCHS:
            wrong[f"{op.name()} has no fake kernel"] = None
            return None
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = pytree.tree_map_only(
            torch.Tensor, lambda t: mode.from_tensor(t.detach(), static_shapes=True), (args, kwargs)
        )
        try:
            with mode:
                told = op(*inputs[0], **inputs[1])
        except Exception as error:  # whatever a fake kernel raises where the kernel does not is a finding
            wrong[f"{op.name()}: its fake kernel raises {in_words(error)}"] = None
            return None

        def compare(found: Any) -> None:
            for what in result_disagreements(told, found):
                wrong[f"{op.name()}: {what}"] = None

        return compare

    with _model_on_the_device(subject) as run:
        with Calls(subject.device, look) as calls:
            run()
    return _verdict(calls, wrong, "has a fake kernel that agrees with the kernel")


def _schemas(subject: Subject) -> str:
    wrong: dict[str, None] = {}

    def look(op: Any, args: Any, kwargs: Any) -> Callable[[Any], None] | None:
        if op.namespace in _TORCHS - {"shadow"}:
            return None
        call = (args, kwargs)
        before = [bytes_of(tensor) for tensor in tensors_in(call)]
        allowed = written_as_declared(op._schema, args, kwargs)

        def compare(found: Any) -> None:
            for number, (tensor, then) in enumerate(zip(tensors_in(call), before, strict=True)):
                if not torch.equal(bytes_of(tensor), then) and storage(tensor) not in allowed:
                    wrong[f"{op.name()} writes its tensor argument {number}, and its schema hides it"] = None
            declared = any(result.alias_info is not None for result in op._schema.returns)
            if not declared and any(sharing(found, call)):
                wrong[f"{op.name()} returns an argument's memory, and its schema hides it"] = None

        return compare

    with _model_on_the_device(subject) as run:
        with Calls(subject.device, look) as calls:
            run()
    return _verdict(calls, wrong, "of other namespaces than torch's writes what its schema says")


def _verdict(calls: Calls, wrong: dict[str, None], right: str) -> str:
    if wrong:
        raise Broken(listed(list(wrong)))
    operators = {key[0] for key in calls.seen}
    if not operators:
        raise Broken(f"the model calls no operator on {calls.device}")
    others = sorted({op.name() for op in operators if op.namespace not in _TORCHS})
    return f"each of {len(operators)} operators {right}" + (f"; the vendor's: {', '.join(others)}" if others else "")


def _hidden(subject: Subject) -> str:
    """Operators that return nothing, declare no write, and have a fake kernel: each call of one may be deleted."""
    not_the_cpu(subject, "the CPU has torch's own operators only")
    deleted: list[str] = []
    kept: list[str] = []
    loud: list[str] = []
    for name in sorted(registered()):
        op = None if name.partition("::")[0] in _TORCHS else overload_of(name)
        if op is None or op._schema.returns or op._schema.is_mutable or not _takes_tensors(op):
            continue
        if own_fake(op) is None:
            loud.append(name)
        elif shadow_of(op.name(), subject.device) is None:
            (kept if op in side_effects() else deleted).append(name)
    if deleted:
        raise Broken(f"compiled code leaves out every call of {listed(deleted, ', ')}")
    said = [f"compiled code keeps, and may reorder, {listed(kept, ', ')}: audit them"] if kept else []
    said += [f"torch refuses to trace {listed(loud, ', ')}, and says so"] if loud else []
    return "; ".join(said) or "none"


def _takes_tensors(op: Any) -> bool:
    return any("Tensor" in str(argument.type) for argument in op._schema.arguments)


PROBES = (
    Probe(
        name="hidden-writes",
        stage="fakes",
        title="operators that hide their writes",
        run=_hidden,
        why="an operator that returns nothing and does not declare what it writes is deleted from compiled code as "
        "soon as somebody gives it a fake kernel (out-of-tree catalogue S1)",
        todo="fxpatch.install() shadows those it knows; others: fake_kernels.shadow(operator, mutates_args=[...]), or "
        "leave them without a fake kernel",
    ),
    Probe(
        name="model-fakes",
        stage="fakes",
        title="fakes of the model's operators",
        run=_fakes,
        why="an operator without a fake kernel stops torch.compile; one with a wrong fake gives wrong strides or "
        "dtypes silently (out-of-tree catalogue A4, S9)",
        todo="fxpatch.install() has fakes for many vendors' operators; others: fake_kernels.register_fake_if_exists, "
        "checked by fake_kernels.conformance",
    ),
    Probe(
        name="model-schemas",
        stage="fakes",
        title="writes of the model's operators",
        run=_schemas,
        why="a kernel that writes an argument, or returns one, beside its schema is reordered, folded or deleted in "
        "compiled code (out-of-tree catalogue S1, S2)",
        todo="fake_kernels.shadow(operator, mutates_args=[...]) makes its calls honest; vendor: Tensor(a!) in the "
        "schema",
    ),
)
