"""Operators. The problem: a device without kernels of its own has to run all of ATen. The rule: every operator runs the
CPU's kernel, on CPU tensors that share the device's memory.

Three ways lead there. Operators that only compute, and those that update their first argument in place, have a kernel
each that does no more than it must (an eager operator is to cost a few microseconds). Views take the CPU's kernel as it
is, since that only reads geometry. Everything else, every capture, and every case that the short ways do not know, goes
through `hostcall`, which is complete; the short ways never decide anything themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxpatch.simulator import capture, graph
from fxpatch.simulator.hostcall import HostCall
from fxpatch.simulator.storage import block_of, host_view, is_fresh, to_device
from fxpatch.simulator.traits import Traits, traits
from fxpatch.simulator.untraced import untraced

Kernel = Callable[..., Any]
_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def fallback(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Runs `op` on the device, or records it into the graph being captured."""
    call = HostCall(op, args, kwargs)
    current = graph.capturing()
    if current is None or call.traits.moves_no_data:
        return call.execute()
    return call.record(current)


def kernel_of(name: str) -> Kernel:
    """The device's kernel of an operator with a CPU kernel, e.g. `"aten::add.Tensor"`.

    It looks the operator up when it is first called: there are a thousand, and a program uses fifty.
    """
    made: Kernel | None = None

    def kernel(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if made is None:
            made = _make(_overload(name))
        return made(*args, **kwargs)

    return untraced(kernel)


def _overload(name: str) -> torch._ops.OpOverload:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    return found


def _make(op: torch._ops.OpOverload) -> Kernel:
    facts = traits(op)
    if facts.only_geometry:
        return _view_kernel(op)
    if facts.only_computes:
        return _computing_kernel(op, facts)
    if facts.updates_first:
        return _updating_kernel(op, facts)
    return lambda *args, **kwargs: fallback(op, *args, **kwargs)


def _view_kernel(op: torch._ops.OpOverload) -> Kernel:
    """The CPU's kernel makes a tensor over the same storage with the same keys, whatever device that is."""
    redispatch = op.redispatch

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return redispatch(_CPU_KEYS, *args, **kwargs)

    return kernel


def _computing_kernel(op: torch._ops.OpOverload, facts: Traits) -> Kernel:
    """For operators that read tensors and return new ones."""
    to_hosts, call = _reader(facts), op._op

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if capture.active() is not None:
            return fallback(op, *args, **kwargs)
        hosts = to_hosts(args)
        if hosts is None:
            return fallback(op, *args, **kwargs)
        result = call(*hosts, **kwargs)
        if type(result) is torch.Tensor:
            if _is_new(result):
                return to_device(result)
        elif type(result) is tuple or type(result) is list:
            if all(type(x) is torch.Tensor and _is_new(x) for x in result):
                return type(result)([to_device(x) for x in result])
        else:
            return result
        return fallback(op, *args, **kwargs)  # once more: it hands back an argument, which its schema does not say

    return kernel


def _updating_kernel(op: torch._ops.OpOverload, facts: Traits) -> Kernel:
    """For operators that write their first argument and return it."""
    to_hosts, call = _reader(facts, first=1), op._op

    def kernel(*args: Any, **kwargs: Any) -> Any:
        updated = args[0]
        if capture.active() is None and not updated.is_cpu:
            block = block_of(updated.untyped_storage())
            hosts = to_hosts(args)
            if block is not None and block.nbytes and hosts is not None:
                hosts[0] = host_view(updated, block.alias)
                call(*hosts, **kwargs)
                return updated
        return fallback(op, *args, **kwargs)

    return kernel


def _reader(facts: Traits, first: int = 0) -> Callable[[tuple[Any, ...]], list[Any] | None]:
    """Returns what replaces the device tensors among arguments, from position `first` on, by CPU tensors over the same
    memory; None where one is not what a kernel is usually given."""
    places = [(place, place in facts.tensor_lists) for place in sorted(facts.wide_tensors | facts.tensor_lists)]
    places = [(place, is_list) for place, is_list in places if place >= first]

    def to_hosts(args: tuple[Any, ...]) -> list[Any] | None:
        hosts = list(args)
        count = len(hosts)
        for place, is_list in places:
            if place >= count:
                break
            x = hosts[place]
            if x is None:
                continue
            host = [_host(item) for item in x] if is_list else _host(x)
            if host is None or (is_list and any(item is None for item in host)):
                return None
            hosts[place] = host
        return hosts

    return to_hosts


def _host(x: Any) -> torch.Tensor | None:
    if not isinstance(x, torch.Tensor):
        return None  # a number in place of a tensor, or an absent one in a list
    if x.is_cpu:
        return x if x.dim() == 0 else None
    block = block_of(x.untyped_storage())
    return None if block is None else block.read(x)


def _is_new(host: torch.Tensor) -> bool:
    return host.layout is torch.strided and is_fresh(host)
