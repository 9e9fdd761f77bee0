"""Run as a script: `shim_probes.py FORM STEP ...` plays the steps in their order, then tries everything a replaced
`torch.device` breaks, and prints the results as one line of JSON: true, or what came instead.

FORM is a key of `fxpatch.simulator.shim.FORMS`, or `torchada`, the vendor's package, told that it runs on MUSA. The
steps are `shim`, `dynamo` (the import) and `settle` (apply the repairs).
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch

from fxpatch import codegen
from fxpatch.patching import Ledger
from fxpatch.repair import patches
from fxpatch.simulator import simulate
from fxpatch.simulator.shim import load_shim

REAL = torch._C.device
X = torch.ones(2)


def shim(form: str) -> None:
    if form == "torchada":
        from vendor.musa_stand_in import load_torchada

        load_torchada()
        assert torch.device is not REAL
    else:
        load_shim("musa", form)


def compiled(f: Callable[..., Any]) -> Any:
    import torch._dynamo

    torch._dynamo.reset()
    return torch.compile(f, backend="eager", fullgraph=True)(X)


def literal(device: Any) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"), device))
    return torch.fx.GraphModule({}, graph)


def repickled(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    return pickle.loads(pickle.dumps(module))  # type: ignore[no-any-return]


def isinstance_in_a_graph() -> bool:
    def f(x: torch.Tensor) -> Any:
        return x + 1, isinstance(x.device, torch.device)

    return compiled(f)[1] is f(X)[1]


def schema() -> str:
    def operator(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return x.clone()

    operator.__annotations__ = {"x": torch.Tensor, "device": torch.device, "return": torch.Tensor}
    return torch.library.infer_schema(operator, mutates_args=())


def saved_and_loaded() -> Any:
    buffer = io.BytesIO()
    torch.save(REAL("cpu"), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


CHECKS: dict[str, Callable[[], bool]] = {
    "fx literal of another device is exact": lambda: literal(REAL("cuda", 1))(X)[1] == REAL("cuda", 1),
    "fx literal of the device": lambda: literal(REAL("musa", 0))(X)[1] == REAL("musa", 0),
    "fx pickle is exact": lambda: repickled(literal(REAL("cuda", 1)))(X)[1] == REAL("cuda", 1),
    "x.device in a graph": lambda: compiled(lambda x: x + torch.ones(2, device=x.device)).tolist() == [2, 2],
    "torch.device() in a graph": lambda: compiled(lambda x: x.to(torch.device("cpu")) + 1).tolist() == [2, 2],
    "the real class in a graph": lambda: compiled(lambda x: x.to(REAL("cpu")) + 1).tolist() == [2, 2],
    "isinstance in a graph as in eager": isinstance_in_a_graph,
    "schema of an operator": lambda: schema() == "(Tensor x, Device device) -> Tensor",
    "pickle is torch's own": lambda: b"torch\x94\x8c\x06device" in pickle.dumps(REAL("cpu")),
    "weights_only": lambda: saved_and_loaded() == REAL("cpu"),
}


def result(check: Callable[[], bool]) -> bool | str:
    try:
        return bool(check())
    except Exception as error:  # whatever a broken torch raises is the result
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


def main(form: str, *steps: str) -> None:
    simulate("musa")
    ledger = Ledger((codegen.PATCH, *patches()), "musa")
    for step in steps:
        if step == "shim":
            shim(form)
        elif step == "dynamo":
            __import__("torch._dynamo")
        else:
            ledger.settle()
    print("RESULT", json.dumps({name: result(check) for name, check in CHECKS.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
