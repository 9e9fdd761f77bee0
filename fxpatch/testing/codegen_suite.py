"""What a device has to be able to rely on where torch writes Python for it, with and without the vendor's shim.

    from fxpatch.testing import CodegenTests

    class TestCodegen(CodegenTests):
        pass

Every test runs under `fxpatch.install()`, in a process where `torch.device` is torch's, where a shim came before the
installation, and where it came after. For a shim of your own, override `vendor_shim`.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # before any shim: what its tables hold must not depend on which test came first
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx import Interpreter, Transformer
from torch.utils._pytree import tree_leaves

from fxpatch.installer import install
from fxpatch.simulator.shim import replaced_torch_device
from fxpatch.testing.compiled import assert_same
from fxpatch.testing.device_literals import POSITIONS, assert_runs_as_interpreted, constant, graph_module
from fxpatch.testing.fx_graphs import FxGraph, fx_graphs

Shim = Callable[[], AbstractContextManager[object]]


# unpickling and Transformer trace again; FX traces no bytes and no frozenset, and makes of `x.__eq__(d)` `x == d`
_NOT_TRACED_AGAIN = {"bytes", "frozenset", "method argument"}


class UsesLiterals(torch.nn.Module):
    """Names its device in every way that survives export."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.full((3,), 2.0, device=self.device) + torch.arange(3, device=self.device)
        return x.to(self.device) * made + torch.zeros_like(x, device=self.device)


class CodegenTests:
    """Generated code gives what the graph says, on the device and under the shim of a vendor."""

    @pytest.fixture
    def device(self, accelerator: str) -> str:
        """The device type under test."""
        return accelerator

    @pytest.fixture
    def vendor_shim(self, device: str) -> Shim:
        """Makes a context manager that replaces `torch.device` as the vendor's package does, and puts it back."""
        return lambda: replaced_torch_device(device)

    @pytest.fixture(params=["no shim", "shim, then install", "install, then shim"])
    def repaired(
        self, request: pytest.FixtureRequest, device: str, vendor_shim: Shim, compile_profile: Any
    ) -> Iterator[None]:
        """`fxpatch.install()`, in each order."""
        with contextlib.ExitStack() as stack:
            if request.param == "shim, then install":
                stack.enter_context(vendor_shim())
            stack.enter_context(install(device, profile=compile_profile))
            if request.param == "install, then shim":
                stack.enter_context(vendor_shim())
            yield

    @pytest.mark.parametrize("position", POSITIONS)
    def test_generated_code_gives_what_the_interpreter_gives(self, repaired: None, device: str, position: str) -> None:
        for names in (("x",), ("device",), ("x", "device", "torch")):
            for literal in _literals(device):
                assert_runs_as_interpreted(graph_module(position, literal, *names), *names)

    @pytest.mark.parametrize("position", POSITIONS)
    def test_copies_give_the_same(self, repaired: None, device: str, position: str) -> None:
        """Deep copies, pickles, transformed graphs and code generated again."""
        for name in ("x", "device"):
            gm = graph_module(position, _literals(device)[0], name)
            want = constant(Interpreter(gm).run("argument"))
            copies = {"deepcopy": copy.deepcopy(gm)}
            if position not in _NOT_TRACED_AGAIN:
                copies["Transformer"] = Transformer(gm).transform()
                copies["pickle"] = pickle.loads(pickle.dumps(gm))
            gm.recompile()
            for how, each in {**copies, "recompile": gm}.items():
                assert constant(each("argument")) == want, how

    def test_pickles_need_neither_shim_nor_vendor(self, device: str, vendor_shim: Shim, compile_profile: Any) -> None:
        """What is written under the shim can be read where there is none, and names no class of the vendor's."""
        literal = _literals(device)[0]
        with install(device, profile=compile_profile):
            with vendor_shim():
                gm = graph_module("positional", literal, "x")
                written = pickle.dumps((gm, literal))
                shim = torch.device
            read, again = pickle.loads(written)
            assert again == literal
            assert constant(read(1)) == constant(((1, literal), {}))
        if shim is not torch._C.device and shim.__module__ != "torch":
            assert shim.__module__.encode() not in written

    @pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, where it copies a TreeSpec
    def test_exported_programs_keep_their_devices(self, repaired: None, device: str, tmp_path: Path) -> None:
        """Through export, saving and loading, decomposition and retracing."""
        x = torch.arange(3.0, device=device)
        module = UsesLiterals(_literals(device)[0])
        want = module(x)
        program = torch.export.export(module, (x,))
        torch.export.save(program, tmp_path / "program.pt2")
        forms = {
            "export": program.module(),
            "load": torch.export.load(tmp_path / "program.pt2").module(),
            "run_decompositions": program.run_decompositions().module(),
            "symbolic_trace": torch.fx.symbolic_trace(module),
        }
        for how, form in forms.items():
            got = form(x)
            assert got.device == want.device, how
            torch.testing.assert_close(got, want, msg=f"{how} gives {got}, and not {want}")

    def test_compiled_code_knows_its_devices(self, repaired: None, device: str) -> None:
        """Comparing devices and asking for their class does not break the graph, and gives what eager gives."""

        def function(x: torch.Tensor) -> torch.Tensor:
            ours = x.device == torch.device(device, 0) and isinstance(x.device, torch.device)
            return torch.ones(2, device=x.device) * (1 if ours and x.device.type == device else -1)

        torch.compiler.reset()
        x = torch.zeros(2, device=device)
        got = torch.compile(function, backend="eager", fullgraph=True)(x)
        assert got.tolist() == function(x).tolist() == [1, 1]

    @settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.differing_executors,
        ],
    )
    @given(data=st.data())
    def test_random_graphs(self, repaired: None, device: str, data: st.DataObject) -> None:
        """Generated code, `Interpreter` and the same graph on the CPU agree, in results and in what they write to."""
        drawn: FxGraph = data.draw(fx_graphs(device))
        gm, cpu = drawn.build(), drawn.build("cpu")
        want, wanted_inputs = _run(cpu, drawn.inputs("cpu"))
        for run in (gm, Interpreter(gm).run):
            got, inputs = _run(run, drawn.inputs())
            assert_same("result", got, want, device)
            assert_same("input, after the call,", inputs, wanted_inputs, device)


def _run(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
    return tree_leaves(function(*inputs)), inputs  # `Interpreter` returns FX's own containers


def _literals(device: str) -> list[torch.device]:
    """With and without an index; and devices of torch's own, which a shim may map but must not change here."""
    own = [torch._C.device("cpu"), torch._C.device("cuda", 1), torch._C.device("meta")]
    return [torch._C.device(device, 0), torch._C.device(device), torch._C.device(device, 1), *own]
