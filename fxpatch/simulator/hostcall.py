"""One call of an operator, any operator. The problem: an operator may resize its outputs, draw random numbers, return
what it was given, and a capture must know its results without computing them. The rule: it gets CPU tensors over the
memory of its device tensors, and hands back the very storages it was given wherever the CPU kernel did (views stay
views, `out=` stays `out`); it accepts no mixture of devices that a real device refuses.

`dispatch` has a shorter way for the operators that only compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.errors import SimulatorError
from fxpatch.privateuse1 import private_type
from fxpatch.simulator import capture, rng
from fxpatch.simulator.graph import Graph
from fxpatch.simulator.storage import (
    CPU,
    alias_of,
    check_index,
    check_sole_user,
    device_view,
    grow,
    host_view,
    on_device,
    point,
    take_over,
    the_device,
    to_device,
)
from fxpatch.simulator.traits import traits


class HostCall:
    """One call of an operator, with CPU tensors over the same memory in place of device tensors.

    Args:
        fresh_outs: give `out=` arguments new, resizable memory instead of the device's.
    """

    def __init__(
        self, op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], fresh_outs: bool = False
    ) -> None:
        self.op, self.traits = op, traits(op)
        self._device_args, self._device_kwargs, self._fresh_outs = args, kwargs, fresh_outs
        self._drawn_elsewhere = False
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id of host tensor -> (host, device)
        # StorageImpl address on the host -> device storage, and whether what owns it are inference tensors
        self._storages: dict[int, tuple[torch.UntypedStorage, bool]] = {}
        self._written: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.args = [self._to_host(arg, place) for place, arg in enumerate(args)]
        self.kwargs = {name: self._to_host(arg, name) for name, arg in kwargs.items()}
        if self.traits.draws and not self._drawn_elsewhere:
            self._name_the_generator()

    def execute(self) -> Any:
        """Calls the CPU kernel now."""
        try:
            result = self.run()
        except RuntimeError as error:
            # an out= argument that is too small: the kernel asked for more memory before it computed anything
            if self._fresh_outs or not self.traits.outs or "not resizable" not in str(error):
                raise
            return HostCall(self.op, self._device_args, self._device_kwargs, fresh_outs=True).execute()
        self._follow_geometry()
        return self.to_device(result)

    def record(self, graph: Graph) -> Any:
        """Makes outputs of the right geometry, and leaves the computing to `graph.replay()`."""
        if self.traits.synchronizes or (self.traits.takes_indices and self._counts_a_mask()):
            capture.refuse(self.op.name())
        if self.traits.outs or None in self.traits.results:
            result, call = self._allocate_results(graph)
        else:  # all results are arguments
            results = [self._argument(place) for place in self.traits.results if place is not None]
            result, call = (results[0] if len(results) == 1 else tuple(results) or None), self
        # host tensors, not device ones: a replay goes to the addresses of now, whatever the tensors become
        targets = [host_view(t, alias_of(t.untyped_storage())) for t in pytree.tree_leaves(result) if on_device(t)]

        def launch() -> None:
            computed = (t for t in pytree.tree_leaves(call.run()) if isinstance(t, torch.Tensor))
            for target, source in zip(targets, computed, strict=True):
                is_target = target.data_ptr() == source.data_ptr() and target.is_conj() == source.is_conj()
                if not is_target and self._was_computed(target, source):
                    target.copy_(source)

        places = (*enumerate(self._device_args), *self._device_kwargs.items())
        read = pytree.tree_leaves([x for place, x in places if place not in self.traits.outs])
        written = [device for _, device in self._written]
        graph.record(launch, self.op.name(), read, [*written, *pytree.tree_leaves(result)])
        self._forget_the_device()
        call._forget_the_device()
        return result

    def _forget_the_device(self) -> None:
        """A launch goes to addresses: it keeps no tensor of the device, whose memory the pool may hand out again."""
        self._device_args, self._device_kwargs = (), {}
        self._tensors, self._storages, self._written = {}, {}, []

    def run(self) -> Any:
        """The CPU kernel on the host tensors, with the device's random numbers."""
        op = self._overload()
        if self.traits.draws and not self._drawn_elsewhere:
            with rng.drawing():
                return op(*self.args, **self.kwargs)
        return op(*self.args, **self.kwargs)

    def _overload(self) -> Callable[..., Any]:
        """The dispatcher hands over a wrapped number as a Python one, which the Tensor overload may not take back."""
        a_number = any(isinstance(self.args[place], Number) for place in self.traits.tensors if place < len(self.args))
        return self.op.overloadpacket if a_number else self.op

    def _name_the_generator(self) -> None:
        """The device's, instead of the CPU's default one, where the operator can be told."""
        place = self.traits.generator
        if isinstance(place, int) and place < len(self.args):
            self.args[place] = rng.default_generator
        elif place is not None:
            self.kwargs["generator"] = rng.default_generator
        self._drawn_elsewhere = place is not None

    # -- to the host ------------------------------------------------------------------------------

    def _to_host(self, x: Any, place: int | str) -> Any:
        if isinstance(x, torch.Tensor):
            return self._tensor_to_host(x, place)
        if isinstance(x, (list, tuple)):
            return [self._to_host(item, place) for item in x]
        if isinstance(x, torch.device) and x.type == private_type():
            check_index(x)
            return CPU
        if isinstance(x, torch.UntypedStorage) and x.device.type == private_type():
            alias = alias_of(x)
            self._storages[alias._cdata] = (x, torch.is_inference_mode_enabled())
            return alias
        if isinstance(x, torch.Generator):
            rng.check(x)
            self._drawn_elsewhere = True
        return x

    def _tensor_to_host(self, x: torch.Tensor, place: int | str) -> torch.Tensor:
        written = place in self.traits.writes
        if not on_device(x):
            self._check_may_stay(x, place, written)
            return x if capture.here() is None else x.clone()  # a graph bakes in the value that a CPU scalar has now
        storage = x.untyped_storage()
        if written and place in self.traits.outs and self._fresh_outs:
            host = torch.empty(0, dtype=x.dtype, device=CPU)
        elif written and storage.nbytes() == 0:
            host = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CPU)  # can be resized
        else:
            alias = alias_of(storage)
            host = host_view(x, alias)
            self._storages[alias._cdata] = (storage, x.is_inference())
        self._tensors[id(host)] = (host, x)
        if written:
            self._written.append((host, x))
        return host

    def _check_may_stay(self, x: torch.Tensor, place: int | str, written: bool) -> None:
        is_index = self.traits.takes_indices and place == 1
        if written or not (x.dim() == 0 or (is_index and capture.here() is None)):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{the_device()} and {x.device}! ({self.op.name()})"
            )

    # -- and back ---------------------------------------------------------------------------------

    def to_device(self, result: Any) -> Any:
        """What the CPU kernel returned, as the device returns it."""
        if isinstance(result, torch.Tensor):
            return self._tensor_to_device(result)
        if isinstance(result, (tuple, list)):
            return type(result)(self.to_device(item) for item in result)
        return result

    def _tensor_to_device(self, x: torch.Tensor) -> torch.Tensor:
        if id(x) in self._tensors:
            return self._tensors[id(x)][1]
        if x.device != CPU:
            return x
        if x.layout is not torch.strided:
            return device_view(x, torch.UntypedStorage())  # raises
        address = x.untyped_storage()._cdata
        if address not in self._storages:
            tensor = take_over(x)
            if tensor is None:  # another result is a view of it
                tensor = to_device(x)
                self._storages[address] = (tensor.untyped_storage(), torch.is_inference_mode_enabled())
            return tensor
        storage, inference = self._storages[address]
        if inference == torch.is_inference_mode_enabled():
            return device_view(x, storage)
        with torch.inference_mode(inference):  # a view of a normal tensor is a normal tensor, also in that mode
            return device_view(x, storage)

    def _follow_geometry(self) -> None:
        """Where the kernel gave a host tensor another shape or storage, the device tensor gets it too."""
        for host, tensor in self._written:
            storage, _ = self._storages.get(host.untyped_storage()._cdata, (None, False))
            if storage is None and host.untyped_storage().nbytes() > 0:
                grow(tensor, host)
            elif host.shape != tensor.shape or host.stride() != tensor.stride() or storage is not None:
                point(tensor, storage or tensor.untyped_storage(), like=host)

    # -- capture ----------------------------------------------------------------------------------

    def _was_computed(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """False where the CPU kernel leaves an auxiliary output empty for which the meta kernel names a size (batch
        norm in eval mode). It stays NaN; an index that stayed poison could send a later kernel anywhere."""
        if target.shape == source.shape or (source.numel() == 0 and target.is_floating_point()):
            return target.shape == source.shape
        raise SimulatorError(
            f"{self.op.name()} cannot be replayed.",
            seen=f"the CPU kernel returns shape {tuple(source.shape)}, the meta kernel said {tuple(target.shape)}",
            expected="the same shape from both",
            hint="run it outside the graph",
        )

    def _counts_a_mask(self) -> bool:
        """Indexing by a mask waits for the number of true elements, except where one value is put at all of them."""
        _, indices, *values = self._device_args
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        return masks and not (values and values[0].numel() == 1)

    def _argument(self, place: int | str) -> Any:
        return self._device_args[place] if isinstance(place, int) else self._device_kwargs[place]

    def _allocate_results(self, graph: Graph) -> tuple[Any, HostCall]:
        """Results with the geometry that the meta kernel names, and the call to be made at replay."""
        described = self._described()
        grown, results = False, []
        # an argument that is a result is told by its place: meta kernels do not always hand back what they were given
        returned = (described,) if len(self.traits.results) == 1 else described or ()
        for place, meta in zip(self.traits.results, returned, strict=True):
            if place is None:
                results.append(pytree.tree_map_only(torch.Tensor, graph.new_tensor, meta))
                continue
            tensor = self._argument(place)
            if meta.shape != tensor.shape:
                grown = True
                check_sole_user(tensor, meta.shape)
                new = graph.new_tensor(meta)
                point(tensor, new.untyped_storage(), like=new)
            results.append(tensor)
        result = results[0] if len(results) == 1 else tuple(results)
        return result, HostCall(self.op, self._device_args, self._device_kwargs) if grown else self

    def _described(self) -> Any:
        """What the operator returns, as meta tensors."""

        def to_meta(host: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="meta")

        args, kwargs = pytree.tree_map_only(torch.Tensor, to_meta, (self.args, self.kwargs))
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), (args, kwargs))
        args, kwargs = pytree.tree_map_only(torch.Generator, lambda _: None, (args, kwargs))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what there is to say, the CPU kernel says at replay
                return self._overload()(*args, **kwargs)
        except NotImplementedError as error:
            raise SimulatorError(
                f"{self.op.name()} cannot be captured.",
                seen=str(error).splitlines()[0],
                expected="an operator with a meta kernel: a capture must know shapes without computing",
                hint="run it outside the graph, or register a fake kernel for it (torch.library.register_fake)",
            ) from error
