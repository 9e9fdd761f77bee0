"""fxpatch together with the real torch_npu: its repairs and ours do not get in each other's way.

No NPU is needed. `make npu` makes an environment with torch_npu and stubs of CANN's libraries, in which these tests
run; without one they are skipped (conftest.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

Npu = Callable[..., Any]


# -- what status() says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_what_torch_npu_repairs_by_itself_is_left_to_it(npu: Npu, autoload: str) -> None:
    """Whether torch loads it by its entry point or the user imports it. Nobody registers Inductor before it is used."""
    states = npu(
        """
        import torch, torch_npu, fxpatch
        import torch._inductor.compile_fx, torch.nn.attention.flex_attention
        fxpatch.install()
        result = {row.name: row.state for row in fxpatch.status().rows}
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD=autoload,
    )
    assert {name for name, state in states.items() if state == "applied"} == {
        "codegen",
        "fake-kernels",  # for the operators that it gives no fake kernel, or a wrong one
        "cache-key-tag",
        "module-to-in-place",  # torch_npu does not register aten::_has_compatible_shallow_copy_type
        "checkpoint-rng",  # for tracing only, which torch_npu's own registration does not reach
        "settle-before-compile",
        "repro-scripts",  # torch_npu leaves them as torch writes them
    }
    assert {name for name, state in states.items() if state != "applied" and state != "not needed"} == {
        "inductor-backend"
    }


def test_tracing_reaches_torch_npus_random_state(npu: Npu) -> None:
    """torch_npu selects the device in the operator it runs, and leaves the selection that tracing asks as it was."""
    alone, repaired = npu("""
        import torch, torch_npu, fxpatch
        from torch._prims.rng_prims import run_and_save_rng_state
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        torch_npu.npu.get_rng_state = lambda *_: torch.empty(16, dtype=torch.uint8, device="cpu")
        def traced():
            with FakeTensorMode() as mode:
                x = torch.empty(4, device="npu:0")
                f = lambda x: run_and_save_rng_state(torch.ops.aten.rand_like.default, x)[1]
                try:
                    return [str(node.target) for node in make_fx(f)(x).graph.nodes]
                except AssertionError as error:
                    return str(error)
        alone = traced()
        with fxpatch.install():
            result = [alone, traced()]
    """)
    assert alone == "Backend not supported for npu"
    assert "run_and_save_rng_state" in repaired


def test_the_report_names_the_vendors_version(npu: Npu) -> None:
    text, version = npu("""
        import torch, torch_npu, fxpatch
        from importlib.metadata import version
        fxpatch.install()
        result = [str(fxpatch.status()), version("torch_npu")]
    """)
    assert f"with torch_npu {version}" in text


def test_torch_npus_own_check_of_flex_attention_stays(npu: Npu) -> None:
    """It accepts an NPU and refuses tensors on two of them; ours would let both through."""
    verdicts = npu("""
        import torch, torch_npu, fxpatch
        from torch._subclasses import FakeTensorMode
        from torch.nn.attention import flex_attention
        with FakeTensorMode():
            here, there = (torch.empty(1, 1, 16, 16, device=f"npu:{i}") for i in (0, 1))
        def verdict(*tensors):
            try:
                flex_attention._validate_device(*tensors)
            except ValueError as error:
                return str(error)
        def verdicts():
            return [verdict(here, here, here), verdict(here, there, here)]
        before = verdicts()
        with fxpatch.install():
            result = [before, verdicts()]
    """)
    assert verdicts[1] == verdicts[0]
    assert verdicts[0][0] is None
    assert "to have the same device" in verdicts[0][1]


def test_an_npu_nobody_uses_yet_is_not_initialized(npu: Npu) -> None:
    """A process with an initialized NPU cannot fork workers that want one; importing Inductor must not be enough."""
    calls = npu("""
        import torch, torch_npu, fxpatch
        calls = []
        torch_npu.npu.is_available = lambda: True
        torch_npu.npu.device_count = lambda: 8
        torch_npu.npu._lazy_init = lambda: calls.append("initialized")
        fxpatch.install()
        import torch._inductor.codecache
        fxpatch.status()
        result = calls
    """)
    assert calls == []


# -- what is repaired ------------------------------------------------------------------------------------------------

CHECKS = """
import pickle, sys
import torch, torch_npu, fxpatch
from fxpatch.simulator.shim import load_shim
from torch._subclasses import FakeTensorMode
REAL = torch._C.device

def literal(device):
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"), device, graph.placeholder("device")))
    return torch.fx.GraphModule({}, graph)

def traced(x):
    '''The graph of a function that reads and makes devices, and what it returns: nothing of it runs on the device.'''
    import torch._dynamo
    torch._dynamo.reset()
    def f(x):
        y = x * 2 + torch.ones(2, device=x.device)
        return y, x.device, isinstance(x.device, torch.device), torch.get_device_module("npu").is_available()
    return torch.compile(f, backend="eager", fullgraph=True)(x)

def failures():
    failed = []
    for device in (REAL("npu", 0), REAL("cuda", 1), REAL("cpu"), REAL("meta")):
        module = literal(device)
        for each in (module, pickle.loads(pickle.dumps(module))):
            if each(0, "an argument")[1] != device:
                failed.append(f"literal {device}")
        if b"torch\\x94\\x8c\\x06device" not in pickle.dumps(device):
            failed.append(f"pickle {device}")
    with FakeTensorMode():
        on_npu = torch.empty(2, device="npu:0")
        for x in (torch.empty(2), on_npu):
            y, device, is_device, available = traced(x)
            if (y.device, device, is_device, available) != (x.device, x.device, True, torch.npu.is_available()):
                failed.append(f"tracing on {x.device}")
    return failed
"""


SHIMMED = ["shim install", "install shim", "dynamo shim install", "install dynamo shim"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "form"), [("install", ""), *itertools.product(SHIMMED, ["factory", "local", "equal"])]
)
def test_devices_are_exact_and_trace(npu: Npu, steps: str, form: str) -> None:
    """Literals, pickles and full graphs on CPU and on fake NPU tensors, with and without a shim on top."""
    play = f"""
for step in {steps.split()!r}:
    if step == "shim":
        load_shim("npu", {form!r})
    elif step == "dynamo":
        import torch._dynamo
    else:
        fxpatch.install()
result = failures()
"""
    assert npu(CHECKS + play) == []


# -- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compilers", ["", "import torch._inductor.compile_fx"])
def test_uninstall_leaves_torch_as_found(npu: Npu, compilers: str) -> None:
    changed = npu(f"""
        import sys; sys.path.insert(0, "install")
        import torch, torch_npu, fxpatch
        from zygote import snapshot
        {compilers}
        snapshot()  # reading Inductor's settings for the first time makes torch_npu add its own
        before = snapshot()
        installation = fxpatch.install()
        fxpatch.status()
        installation.uninstall()
        after = snapshot()
        result = [list(installation.left), [place for place in before if before[place] != after.get(place)]]
    """)
    assert changed == [[], []]


# -- the entry points of both ----------------------------------------------------------------------------------------

ENTRY_POINTS = """
import importlib.metadata as metadata, sys
original = metadata.entry_points
def entry(name, target):
    return metadata.EntryPoint(name, target, "torch.backends")
ours = [entry("fxpatch", "fxpatch.autoload:autoload"), entry("torch_npu", "torch_npu:_autoload")]
def entry_points(group=None, **rest):
    return ours[::ORDER] if group == "torch.backends" else original(group=group, **rest)
metadata.entry_points = entry_points
"""


@pytest.mark.parametrize(
    ("first", "autoload", "installed"),
    [
        ("torch", "1", True),
        # torch_npu turns torch's autoloading off for as long as it imports torch: no entry point runs but its own
        ("torch_npu", "1", False),
        ("torch", "0", False),
    ],
)
@pytest.mark.parametrize("order", ["1", "-1"])
def test_entry_points_in_both_orders(npu: Npu, first: str, autoload: str, installed: bool, order: str) -> None:
    """Installed when Dynamo is imported, and no compiler imported before, unless torch is told to autoload nothing."""
    code = f"""
import {first}
import torch, torch_npu
early = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
import torch._dynamo, fxpatch
result = [early, fxpatch.status().installed]
"""
    done = npu(
        ENTRY_POINTS.replace("ORDER", order) + code, FXPATCH_AUTOLOAD="1", TORCH_DEVICE_BACKEND_AUTOLOAD=autoload
    )
    assert done == [[], installed]
