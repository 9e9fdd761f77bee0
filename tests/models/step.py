"""What a model computes on a device, in a form in which two devices can be compared: forward, one training step, text.

The rule: weights and inputs are made on the CPU from fixed seeds and moved as they are; everything comes back to the
CPU. What the CPU computes is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from zoo import Inputs, Model, noise

Call = Callable[[torch.nn.Module], Callable[..., object]]  # how a module is called: itself, or compiled


@dataclass(frozen=True)
class Step:
    """One training step: what forward gave, the loss, gradients by name, and parameters after the optimizer's step."""

    output: torch.Tensor
    loss: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    updated: Mapping[str, torch.Tensor]

    def distance(self, other: Step) -> Mapping[str, float]:
        """The largest absolute difference in each of the four; every parameter counts."""
        return {
            "output": distance(self.output, other.output),
            "loss": distance(self.loss, other.loss),
            "gradients": _largest(self.gradients, other.gradients),
            "updated": _largest(self.updated, other.updated),
        }


def build(model: Model, device: str, layers: int = 2, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model with its seed's weights, in training mode; parameters that are tied stay tied."""
    torch.manual_seed(0)
    net = model.build(layers).train()
    if dtype is not torch.float32:
        net = net.to(dtype)
    return net.to(device)


def inputs(model: Model, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """What `forward` takes."""
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in model.inputs().items()}


def uncompiled(net: torch.nn.Module) -> Callable[..., object]:
    """The module itself."""
    return net


def forward(
    model: Model, device: str, call: Call = uncompiled, layers: int = 2, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The output without autograd, on the CPU."""
    net = build(model, device, layers, dtype)
    with torch.no_grad():
        output: torch.Tensor = getattr(call(net)(**inputs(model, device, dtype)), model.output)
    assert output.device.type == device
    return output.cpu()


def train(model: Model, device: str, call: Call = uncompiled, layers: int = 2) -> Step:
    """One step of AdamW, on the CPU."""
    net = build(model, device, layers)
    # where a gradient is zero but for rounding, an epsilon as small as the default makes a step of full size of it
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3)
    if model.labels is None:
        output = getattr(call(net)(**inputs(model, device)), model.output)
        loss = torch.nn.functional.mse_loss(output, noise(*output.shape, seed=9).to(device))
    else:
        result = call(net)(**inputs(model, device), labels=model.labels().to(device))
        output, loss = getattr(result, model.output), result.loss
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}
    optimizer.step()
    updated = {name: p.detach().cpu() for name, p in net.named_parameters()}
    return Step(output.detach().cpu(), loss.detach().cpu(), gradients, updated)


def generate(model: Model, device: str, tokens: int = 6) -> list[list[int]]:
    """The tokens of greedy decoding, with the model's own cache."""
    net = build(model, device).eval()
    prompt = {name: x for name, x in inputs(model, device).items() if not name.startswith("decoder")}
    made = net.generate(**prompt, do_sample=False, max_new_tokens=tokens)
    assert made.device.type == device
    return made.tolist()


@functools.cache
def forward_on_cpu(model: Model, layers: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return forward(model, "cpu", layers=layers, dtype=dtype)


@functools.cache
def train_on_cpu(model: Model, layers: int = 2) -> Step:
    return train(model, "cpu", layers=layers)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; NaN where one has a NaN."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.shape} {a.dtype}, {b.shape} {b.dtype}"
    return (a - b).abs().max().item()


def _largest(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys(), f"in one only: {a.keys() ^ b.keys()}"
    distances = torch.tensor([distance(a[name], b[name]) for name in a])
    return distances.max().item()  # torch's max, which keeps a NaN; Python's may lose it
