"""The ways in which a model can be run, from Dynamo's graph interpreted to captured device graphs.

Each is a function in the place of the model. All but the last are backends of `torch.compile`, around which graphs are
counted: where Dynamo gives up and runs the function as it is, nothing would have been verified, and that is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from fxpatch.native.forwards import marked

Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]

INTERPRETER, CODEGEN, AOT_EAGER, INDUCTOR, CAPTURED = "interpreter", "codegen", "aot_eager", "inductor", "captured"
_number = itertools.count()
STAGES = (INTERPRETER, CODEGEN, AOT_EAGER, INDUCTOR, CAPTURED)


@dataclass
class Compiled:
    """A function compiled by one backend.

    Attributes:
        call: in the place of the function.
        graphs: those that Dynamo has handed to the backend, so far.
    """

    call: Callable[..., Any]
    graphs: list[GraphModule] = field(default_factory=list)


def compiled(function: Callable[..., Any], backend: Backend, name: str, dynamic: bool | None = None) -> Compiled:
    """A function for Dynamo and a backend.

    Args:
        function: what is compiled, under code of its own: nothing that was compiled before is found again.
        backend: of `torch.compile`.
        name: for messages.
        dynamic: of `torch.compile`.
    """
    made = Compiled(function)

    def counted(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        made.graphs.append(gm)
        return backend(gm, example_inputs)

    own = marked(function, f"<fxpatch verify {name} {next(_number)}>")  # Dynamo remembers sizes by file and line
    run = torch.compile(own, backend=counted, dynamic=dynamic)

    def call(*args: Any, **kwargs: Any) -> Any:
        with settings():
            return run(*args, **kwargs)

    made.call = call
    return made


@contextmanager
def settings() -> Iterator[None]:
    """Dynamo is on, whatever stance the caller has; it compiles as often as it is asked to, where it would give up
    after eight times and run the function as it is; and Inductor draws eager's random numbers instead of its own."""
    import torch._dynamo
    import torch._inductor.config

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("default"))
        stack.enter_context(torch._dynamo.config.patch(disable=False, suppress_errors=False, recompile_limit=1024))
        stack.enter_context(torch._inductor.config.patch(fallback_random=True))
        yield


def interpreted(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend: the graph, node by node, without its generated code."""
    return lambda *args: Interpreter(gm).run(*args)


def generated(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend: the graph's generated code."""
    return gm.forward


def backends(more: Mapping[str, Backend | str]) -> dict[str, Backend]:
    """All backends by the name of their stage.

    Args:
        more: the caller's own; a string is looked up among those that Dynamo knows.
    """
    import torch._dynamo.backends.registry as registry

    named: dict[str, Backend | str] = {
        INTERPRETER: interpreted,
        CODEGEN: generated,
        AOT_EAGER: "aot_eager",
        INDUCTOR: "inductor",
        **more,
    }
    found: dict[str, Any] = {}
    for name, each in named.items():
        found[name] = registry.lookup_backend(each) if isinstance(each, str) else each
    return found
