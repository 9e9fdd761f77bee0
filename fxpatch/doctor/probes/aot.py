"""Does AOTAutograd give what eager gives: forward, backward, with mutation and views, with checkpointed dropout?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import Differs, expect, expect_close, run_all
from fxpatch.doctor.probes.presence import needs_accelerator, needs_device

_BACKEND = "aot_eager"


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))


def _trained(model: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> dict[str, Any]:
    """The output of one step, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = run(x)
    out.square().sum().backward()
    return {"output": out, "input's gradient": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def _forward_backward(subject: Subject) -> str:
    needs_device(subject)
    model = _model()
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    host = _trained(model, model, x)
    there = copy.deepcopy(model).to(subject.device)
    y = x.to(subject.device)
    eager = _trained(there, there, y)
    compiled = _trained(there, torch.compile(there, backend=_BACKEND, fullgraph=True), y)

    def against(want: dict[str, Any], whose: str) -> None:
        for name, value in want.items():
            expect_close(compiled[name], value, f"{name}, against {whose},")

    def eager_is_right() -> None:
        for name, value in host.items():
            expect_close(eager[name], value, f"{name} in eager, against the CPU,")

    return run_all(
        {
            "eager as the CPU": eager_is_right,
            "compiled as eager": lambda: against(eager, "eager"),
            "compiled as the CPU": lambda: against(host, "the CPU"),
        }
    )


def _in_place_on_view(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[1:].mul_(10)
    y.t()[0].add_(1)
    return y


def _input_is_written(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    x[0].copy_(x[1] * 2)
    return x * 3


def _read_after_write(x: torch.Tensor) -> Any:
    view, before = x.view(-1), x * 2
    view.mul_(2)
    after = x + 1
    view[::2].zero_()
    return before, after, x + after


def _indexed_write(x: torch.Tensor) -> torch.Tensor:
    x.index_put_((torch.tensor([0, 2], device=x.device),), torch.full((2, 4), 7.0, device=x.device))
    return x.index_add(0, torch.tensor([1], device=x.device), torch.ones(1, 4, device=x.device))


def _returns_its_input(x: torch.Tensor) -> torch.Tensor:
    x.relu_()
    return x.t()


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place on a view": _in_place_on_view,
    "an input is written": _input_is_written,
    "read before and after a write": _read_after_write,
    "indexed writes": _indexed_write,
    "returns a view of its input": _returns_its_input,
}


def _functionalisation(subject: Subject) -> str:
    needs_device(subject)

    def check(function: Callable[[torch.Tensor], Any]) -> None:
        torch.compiler.reset()
        host = torch.linspace(-2, 2, 12).reshape(3, 4)
        there = host.to(subject.device, copy=True)
        want = function(host)
        got = torch.compile(function, backend=_BACKEND, fullgraph=True)(there)
        expect_close(got, want, "the result, against the CPU,")
        expect_close(there, host, "the input afterwards, against the CPU,")
        if isinstance(want, torch.Tensor):
            shared = want.untyped_storage().data_ptr() == host.untyped_storage().data_ptr()
            mine = got.untyped_storage().data_ptr() == there.untyped_storage().data_ptr()
            expect(mine, shared, "whether the result is the input's memory")

    return run_all({name: partial(check, f) for name, f in FUNCTIONS.items()})


def _checkpoint(subject: Subject) -> str:
    needs_accelerator(subject)

    def region(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x.sin(), 0.5)

    def function(x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(region, x, use_reentrant=False)

    def check(run: Callable[[torch.Tensor], Any]) -> None:
        torch.manual_seed(0)
        x = torch.linspace(0.5, 1, 256).to(subject.device).requires_grad_()
        out = run(x)
        out.sum().backward()
        assert x.grad is not None
        kept, trained = (out.detach() != 0).cpu(), (x.grad != 0).cpu()
        if bool(kept.all()) or not bool(kept.any()):
            raise Broken(f"dropout of one half keeps {int(kept.sum())} of 256 values")
        if not torch.equal(kept, trained):
            raise Differs("the backward draws another dropout mask than the forward: wrong gradients, silently")

    return run_all(
        {
            "eager": lambda: check(function),
            "compiled": lambda: check(torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)),
        }
    )


PROBES = (
    Probe(
        name="aot-backward",
        stage="aot",
        title="forward and backward",
        run=_forward_backward,
        why="AOTAutograd traces the backward with fake tensors and decompositions: where a vendor overrides an "
        "operator's autograd, compiled gradients can differ from eager's",
        todo="find the operator: run each layer alone with backend='aot_eager' against eager",
        limit_s=40.0,
    ),
    Probe(
        name="aot-functionalisation",
        stage="aot",
        title="mutation and views",
        run=_functionalisation,
        why="AOTAutograd makes code free of mutation and writes results back at the end: views that do not share "
        "memory, or kernels that write beside their schema, give wrong results silently (out-of-tree catalogue S1, "
        "S2)",
        todo="check that the device's views share storage (as_strided, view, slice), and audit its operators: fxpatch "
        "audit",
        limit_s=40.0,
    ),
    Probe(
        name="aot-checkpoint",
        stage="aot",
        title="checkpointed dropout",
        run=_checkpoint,
        why="torch keeps a list of devices with random state: 'Backend not supported for musa' when a checkpointed "
        "region with dropout is compiled (out-of-tree catalogue A7; torch/_prims/rng_prims.py)",
        todo="fxpatch.install(); vendor: get_rng_state and set_rng_state in the device module",
        limit_s=40.0,
    ),
)
