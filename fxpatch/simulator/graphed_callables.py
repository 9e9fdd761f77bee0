"""`make_graphed_callables`: functions and modules whose forward and backward are one replay each.

The problem: a graph reads and writes fixed memory, autograd hands over new tensors. The rule: each call copies its
inputs (and each backward its gradients) to where the graphs expect them; parameters stay where they are. All graphs
share a pool, so they are captured in the order in which they will run: forwards in turn, backwards in reverse.

The contract is that of torch.cuda.make_graphed_callables (torch/cuda/graphs.py, torch 2.11 to 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.privateuse1 import private_type
from fxpatch.simulator.graph import Graph, graph, graph_pool_handle
from fxpatch.simulator.pools import PoolId
from fxpatch.simulator.streams import Stream, stream

_Tensors = tuple[torch.Tensor, ...]


def make_graphed_callables(
    callables: Any,
    sample_args: Any,
    num_warmup_iters: int = 3,
    allow_unused_input: bool = False,
    pool: PoolId | None = None,
) -> Any:
    """Graphed versions of one callable, or of a tuple of them, which run in the order given.

    Args:
        callables: functions or modules over tensors; a module is changed in place, and runs its graphs in the mode
            (training or not) in which it was captured.
        sample_args: for each, a tuple of tensors with the shapes, strides and `requires_grad` of all later calls.
        num_warmup_iters: eager runs before the capture.
        allow_unused_input: whether an input may have no gradient.
        pool: which pool to use; None: a new one.

    Raises:
        RuntimeError: autocast is on with its cache (the cached casts would outlive the capture), a module has hooks,
            a buffer wants a gradient, or an argument is not a tensor.
    """
    if torch.is_autocast_enabled(private_type()) and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "make_graphed_callables does not support the autocast cache: use autocast(cache_enabled=False)"
        )
    alone = not isinstance(callables, tuple)
    functions, samples = ((callables,), (sample_args,)) if alone else (callables, sample_args)
    calls = [_Call(f, args, allow_unused_input) for f, args in zip(functions, samples, strict=True)]
    side = Stream()
    with stream(side):
        for call in calls:
            for _ in range(num_warmup_iters):
                call.warm_up()
    shared = graph_pool_handle() if pool is None else pool
    for call in calls:
        call.capture_forward(shared)
    for call in reversed(calls):
        call.capture_backward(shared)
    graphed = tuple(call.replacement() for call in calls)
    return graphed[0] if alone else graphed


class _Call:
    """One callable, its two graphs, and the tensors they read and write."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], allow_unused: bool) -> None:
        self._function, self._args, self._allow_unused = function, args, allow_unused
        inputs, self._args_spec = pytree.tree_flatten(args)
        _check(function, inputs)
        parameters = tuple(function.parameters()) if isinstance(function, torch.nn.Module) else ()
        self._user_inputs: _Tensors = tuple(inputs)
        self._inputs: _Tensors = (*inputs, *parameters)
        self._forward, self._backward = Graph(), Graph()
        self._outputs: _Tensors = ()
        self._grad_outputs: tuple[torch.Tensor | None, ...] = ()
        self._grad_inputs: tuple[torch.Tensor | None, ...] = ()

    def warm_up(self) -> None:
        outputs = pytree.tree_leaves(self._function(*self._args))
        self._gradients(outputs, [torch.empty_like(o) if o.requires_grad else None for o in outputs])

    def capture_forward(self, pool: PoolId) -> None:
        with graph(self._forward, pool=pool):
            result = self._function(*self._args)
        outputs, self._result_spec = pytree.tree_flatten(result)
        self._outputs = tuple(outputs)

    def capture_backward(self, pool: PoolId) -> None:
        self._grad_outputs = tuple(torch.empty_like(o) if o.requires_grad else None for o in self._outputs)
        self._grad_inputs = (None,) * len(self._inputs)
        if any(o.requires_grad for o in self._outputs):
            with graph(self._backward, pool=pool):
                self._grad_inputs = self._gradients(self._outputs, self._grad_outputs)

    def replacement(self) -> Any:
        """The graphed callable; for a module, the module."""
        graphed = self._run
        module = self._function
        if not isinstance(module, torch.nn.Module):
            return graphed
        eager, captured_in_training = module.forward, module.training

        @functools.wraps(eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            run = graphed if module.training == captured_in_training else eager
            return run(*args, **kwargs)

        module.forward = forward
        return module

    def _run(self, *args: Any) -> Any:
        inputs, spec = pytree.tree_flatten(args)
        if spec != self._args_spec:
            raise RuntimeError(
                f"a graphed callable takes the arguments it was captured with: {self._args_spec}, not {spec}"
            )
        outputs = self._autograd.apply(*inputs, *self._inputs[len(inputs) :])
        return pytree.tree_unflatten(list(outputs), self._result_spec)

    @functools.cached_property
    def _autograd(self) -> Any:
        call = self

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(_ctx: Any, *inputs: torch.Tensor) -> _Tensors:
                for static, given in zip(call._user_inputs, inputs, strict=False):
                    _put(static, given)
                call._forward.replay()
                return tuple(output.detach() for output in call._outputs)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(_ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
                for static, given in zip(call._grad_outputs, gradients, strict=True):
                    if static is not None:
                        _put(static, given)
                call._backward.replay()
                return tuple(None if gradient is None else gradient.detach() for gradient in call._grad_inputs)

        return Graphed

    def _gradients(self, outputs: Any, grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """The gradient of each input, None where it wants none."""
        wanting = [x for x in self._inputs if x.requires_grad]
        differentiable = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None]
        if not wanting or not differentiable:
            return (None,) * len(self._inputs)
        gradients = iter(
            torch.autograd.grad(
                [o for o, _ in differentiable],
                wanting,
                [g for _, g in differentiable],
                allow_unused=self._allow_unused,
            )
        )
        return tuple(next(gradients) if x.requires_grad else None for x in self._inputs)


def _put(static: torch.Tensor, given: torch.Tensor) -> None:
    if static.data_ptr() != given.data_ptr():
        with torch.no_grad():
            static.copy_(given)


def _check(function: Callable[..., Any], inputs: list[Any]) -> None:
    if not all(isinstance(x, torch.Tensor) for x in inputs):
        raise RuntimeError("every argument of a graphed callable is a tensor; close over the others")
    if isinstance(function, torch.nn.Module):
        if function._forward_hooks or function._forward_pre_hooks or function._backward_hooks:
            raise RuntimeError(
                "a module is graphed before hooks are registered on it: remove them, and register them after"
            )
        if any(buffer.requires_grad for buffer in function.buffers()):
            raise RuntimeError("only parameters of a graphed module may want a gradient, and a buffer does")
