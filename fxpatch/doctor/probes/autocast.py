"""Autocast: do operators run inside it, and does it cast anything?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import expect, run_all
from fxpatch.doctor.probes.presence import needs_device


def _tensors(subject: Subject) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    host = torch.linspace(-1, 1, 32)
    x, w, b = host.reshape(4, 8), host.flip(0).reshape(4, 8), host[:4].clone()
    return x.to(subject.device), w.to(subject.device).requires_grad_(), b.to(subject.device)


OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "linear": torch.nn.functional.linear,
    "matmul": lambda x, w, _: x @ w.t(),
    "add": lambda x, w, _: x + w,
    "layer_norm": lambda x, w, _: torch.nn.functional.layer_norm(x, (8,)),
    "softmax": lambda x, w, _: x.softmax(-1),
    "attention": lambda x, w, _: torch.nn.functional.scaled_dot_product_attention(x[None], w[None], x[None]),
}


def _runs(subject: Subject) -> str:
    needs_device(subject)
    x, w, b = _tensors(subject)

    def check(operator: Callable[..., Any]) -> None:
        want = operator(x, w, b)
        with torch.autocast(subject.device, dtype=torch.bfloat16):
            got = operator(x, w, b)
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)

    def backward() -> None:
        with torch.autocast(subject.device, dtype=torch.bfloat16):
            loss = torch.nn.functional.linear(x, w, b).float().sum()
        loss.backward()
        assert w.grad is not None
        expect(w.grad.dtype, torch.float32, "the dtype of a float32 weight's gradient")

    checks: dict[str, Callable[[], object]] = {name: partial(check, f) for name, f in OPERATORS.items()}
    return run_all({**checks, "backward": backward})


def _casts(subject: Subject) -> str:
    needs_device(subject)
    x, w, _ = _tensors(subject)
    with torch.autocast(subject.device, dtype=torch.bfloat16):
        product, exponential = x @ w.t(), (x @ w.t()).softmax(-1)
        with torch.autocast(subject.device, enabled=False):
            outside = x @ w.t()
    if product.dtype is torch.float32:
        raise Broken(
            f"a matmul under torch.autocast({subject.device!r}, torch.bfloat16) gives float32: nothing is cast"
        )
    expect(product.dtype, torch.bfloat16, "the dtype of a matmul under autocast to bfloat16")
    expect(outside.dtype, torch.float32, "the dtype of a matmul where autocast is disabled again")
    return f"a matmul gives bfloat16, a softmax {str(exponential.dtype).removeprefix('torch.')}"


PROBES = (
    Probe(
        name="autocast",
        stage="numerics",
        title="operators run in autocast",
        run=_runs,
        why="without a kernel or a fallthrough at AutocastPrivateUse1 every operator in the region fails: Could not "
        "run 'aten::t' with arguments from the 'Autocastmusa' backend (out-of-tree catalogue A6)",
        todo="fxpatch.install() lets operators through uncast; vendor: register autocast "
        "(aten/src/ATen/autocast_mode.h)",
    ),
    Probe(
        name="autocast-casts",
        stage="numerics",
        title="autocast casts",
        run=_casts,
        why="where a vendor registers a fallthrough only, autocast regions run in float32: slower and larger than "
        "meant, and nothing says so (out-of-tree catalogue A6)",
        todo="cast the model itself, model.to(torch.bfloat16); vendor: register torch's lists of casts",
    ),
)
