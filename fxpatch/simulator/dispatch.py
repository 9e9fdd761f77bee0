"""Operators. The problem: a device without kernels of its own has to run all of ATen. The rule: every operator runs the
CPU's kernel, on CPU tensors that share the device's memory.

Three ways lead there. Operators that only compute, and those that only write their arguments, have a kernel
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
from fxpatch.simulator.storage import Block, block_of, host_view, point, take_over
from fxpatch.simulator.traits import Traits, traits
from fxpatch.simulator.untraced import untraced

Kernel = Callable[..., Any]
View = Callable[[Block, torch.Tensor], torch.Tensor]  # a CPU tensor of what a device tensor holds
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
    if facts.only_writes:
        return _writing_kernel(op, facts)
    return lambda *args, **kwargs: fallback(op, *args, **kwargs)


def _view_kernel(op: torch._ops.OpOverload) -> Kernel:
    """The CPU's kernel makes a tensor over the same storage with the same keys, whatever device that is."""
    redispatch = op.redispatch

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return redispatch(_CPU_KEYS, *args, **kwargs)

    return kernel


def _computing_kernel(op: torch._ops.OpOverload, facts: Traits) -> Kernel:
    """For operators that read tensors and return new ones."""
    to_hosts, call = _reader(facts, Block.read), op._op

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if capture.active() is not None:
            return fallback(op, *args, **kwargs)
        hosts = to_hosts(args)
        if hosts is None:
            return fallback(op, *args, **kwargs)
        try:
            return _moved(call(*hosts, **kwargs))
        except _SharedMemory:  # once more: it hands back an argument, which its schema does not say
            return fallback(op, *args, **kwargs)

    return kernel


class _SharedMemory(Exception):
    """A result uses memory that something else uses too."""


def _moved(result: Any) -> Any:
    """The results of a CPU kernel as the device's."""
    if type(result) is torch.Tensor:
        tensor = take_over(result)
        if tensor is None:
            raise _SharedMemory
        return tensor
    if type(result) is tuple or type(result) is list:
        return type(result)([_moved(x) for x in result])
    return result


def _writing_kernel(op: torch._ops.OpOverload, facts: Traits) -> Kernel:
    """For operators whose results are arguments that they write: in place, or `out=`."""
    to_hosts, call = _reader(facts, _aliased), op._op
    written, outs = sorted(facts.writes, key=str), facts.outs
    returned = [place for place in facts.results if place is not None]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        hosts = None if capture.active() is not None else to_hosts(args)
        if hosts is None:
            return fallback(op, *args, **kwargs)
        named = dict(kwargs)
        targets = []
        for place in written:
            tensor = args[place] if isinstance(place, int) else kwargs[place]
            block = None if tensor.is_cpu else block_of(tensor.untyped_storage())
            if block is None or not block.nbytes:
                return fallback(op, *args, **kwargs)
            host = _aliased(block, tensor)
            if isinstance(place, int):
                hosts[place] = host
            else:
                named[place] = host
            if place in outs:
                targets.append((tensor, host))
        try:
            call(*hosts, **named)
        except RuntimeError as error:
            # an out= argument that is too small: the kernel asked for more memory before it computed anything
            if targets and "not resizable" in str(error):
                return fallback(op, *args, **kwargs)
            raise
        for tensor, host in targets:
            if tensor.shape != host.shape or tensor.stride() != host.stride():
                point(tensor, tensor.untyped_storage(), like=host)
        results = [args[place] if isinstance(place, int) else kwargs[place] for place in returned]
        return results[0] if len(results) == 1 else tuple(results)

    return kernel


def _reader(facts: Traits, view: View) -> Callable[[tuple[Any, ...]], list[Any] | None]:
    """Returns what replaces the device tensors to be read, among positional arguments, by CPU tensors over the same
    memory, as `view` gives them; it returns None where one is not what a kernel is usually given."""
    read = (facts.wide_tensors | facts.tensor_lists) - facts.writes
    places = [(place, place in facts.tensor_lists) for place in sorted(read)]

    def to_hosts(args: tuple[Any, ...]) -> list[Any] | None:
        hosts = list(args)
        count = len(hosts)
        for place, is_list in places:
            if place >= count:
                break
            x = hosts[place]
            if x is None:
                continue
            host = [_host(item, view) for item in x] if is_list else _host(x, view)
            if host is None or (is_list and any(item is None for item in host)):
                return None
            hosts[place] = host
        return hosts

    return to_hosts


def _host(x: Any, view: View) -> torch.Tensor | None:
    if not isinstance(x, torch.Tensor):
        return None  # a number in place of a tensor, or an absent one in a list
    if x.is_cpu:
        return x if x.dim() == 0 else None
    block = block_of(x.untyped_storage())
    return None if block is None else view(block, x)


def _aliased(block: Block, tensor: torch.Tensor) -> torch.Tensor:
    """Under the same storage as what is written: so the kernel sees where the two overlap, and refuses."""
    return host_view(tensor, block.alias)
