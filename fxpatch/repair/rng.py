"""Random state in compiled checkpointing, for any device whose module has `get_rng_state` and `set_rng_state`.

When a random operator is recomputed in the backward, AOTAutograd wraps it in two higher-order operators, and torch
implements these for a fixed list of devices. The list sits in a dictionary local to a function which all other
implementations of the operator reach through one closure cell; so the cell and the dispatch table are what we edit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import DispatchKey
from torch._prims import rng_prims

from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Refused, Target
from fxpatch.privateuse1 import is_private

_SELECT = "impl_backend_select"


@dataclass(frozen=True)
class Rng:
    """Whether the device is PrivateUse1, and what there is for it.

    Args:
        registered: the operators have kernels for it (a vendor's).
        traced: tracing reaches the same device selection as running does; None where torch has another way of tracing.
        missing: functions the device module lacks.
    """

    private: bool
    registered: bool
    traced: bool | None
    missing: tuple[str, ...]


def _operators() -> tuple[Any, Any]:
    return rng_prims.run_and_save_rng_state, rng_prims.run_with_rng_state


def _probe(device: str) -> Rng:
    save, restore = _operators()
    module, cell = getattr(torch, device, None), _select_cell(save)
    return Rng(
        private=is_private(device),
        registered=DispatchKey.PrivateUse1 in save.py_kernels and DispatchKey.PrivateUse1 in restore.py_kernels,
        traced=None if cell is None else cell.cell_contents is save.py_kernels[DispatchKey.BackendSelect],
        missing=tuple(name for name in ("get_rng_state", "set_rng_state") if not hasattr(module, name)),
    )


def _decide(rng: Rng) -> Needed | NotNeeded | Refused:
    if not rng.private:
        return NotNeeded("torch implements the random state operators for this device")
    if rng.traced is None:
        return Refused(f"torch {torch.__version__} no longer traces the random state by {_SELECT}")
    if rng.registered:
        if rng.traced:
            return NotNeeded("the device has registered the random state operators")
        return Needed("the device has registered the random state operators, and tracing does not reach them")
    if rng.missing:
        return Refused(f"the device module has no {' and no '.join(rng.missing)}")
    return Needed("run_and_save_rng_state knows no such device")


def _apply(device: str, rng: Rng, edits: Edits) -> str:
    save, restore = _operators()
    if not rng.registered:
        _register(device, edits)
    for operator in (save, restore):
        cell = _select_cell(operator)
        if cell is not None:
            edits.set_attr(cell, "cell_contents", operator.py_kernels[DispatchKey.BackendSelect])
    if rng.registered:
        return "tracing selects the device as the vendor's operators do"
    return f"the random state operators use torch.{device}.get_rng_state and set_rng_state"


def _register(device: str, edits: Edits) -> None:
    """Kernels for the device, and a device selection that knows it."""
    save, restore = _operators()
    module = torch.get_device_module(device)

    def save_state(op: Any, *args: Any, **kwargs: Any) -> Any:
        return module.get_rng_state(), op(*args, **kwargs)

    def with_state(state: torch.Tensor, op: Any, *args: Any, **kwargs: Any) -> Any:
        current = module.get_rng_state()
        module.set_rng_state(state.cpu())
        try:
            return op(*args, **kwargs)
        finally:
            module.set_rng_state(current)

    for operator, implementation in ((save, save_state), (restore, with_state)):
        select = _selecting(device, implementation, operator.py_kernels[DispatchKey.BackendSelect])
        label = f"{operator}.py_kernels"
        edits.on_undo(operator._dispatch_cache.clear)
        edits.set_item(operator.py_kernels, DispatchKey.PrivateUse1, implementation, label)
        edits.set_item(operator.py_kernels, DispatchKey.BackendSelect, select, label)
        edits.set_attr(operator, "non_fallthrough_keys", operator.non_fallthrough_keys.add(DispatchKey.PrivateUse1))
        operator._dispatch_cache.clear()


def _selecting(device: str, ours: Callable[..., Any], torchs: Callable[..., Any]) -> Callable[..., Any]:
    def impl_backend_select(*args: Any, **kwargs: Any) -> Any:
        operands = args[args.index(next(a for a in args if callable(a))) + 1 :]
        return (ours if rng_prims.get_device(operands, kwargs) == device else torchs)(*args, **kwargs)

    return impl_backend_select


def _select_cell(operator: Any) -> Any:
    """The closure cell through which the tracing implementation reaches the list of devices; None where it has none."""
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

    traced = operator.python_key_table.get(ProxyTorchDispatchMode)
    names = getattr(getattr(traced, "__code__", None), "co_freevars", ())
    return traced.__closure__[names.index(_SELECT)] if _SELECT in names else None


PATCH = Patch[Rng](
    name="checkpoint-rng",
    why="compiling a checkpointed region with dropout fails: 'Backend not supported for <device>'",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_prims/rng_prims.py",
    until="torch selects the random state through the device module",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(
        Target("torch._prims.rng_prims", "run_and_save_rng_state.py_kernels"),
        Target("torch._prims.rng_prims", "run_and_save_rng_state._dispatch_cache"),
        Target("torch._prims.rng_prims", "run_and_save_rng_state.non_fallthrough_keys"),
        Target("torch._prims.rng_prims", "run_with_rng_state.py_kernels"),
        Target("torch._prims.rng_prims", "get_device", "args, kwargs"),
    ),
    probe=_probe,
    decide=_decide,
    apply=_apply,
)
