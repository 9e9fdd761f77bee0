"""`simulate()`: what it refuses, that a refusal leaves nothing behind, and that it is light and repeatable."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from fxpatch.errors import DeviceNameTakenError, FxPatchError, UnknownDeviceError
from fxpatch.simulator import simulate


def test_the_same_name_gives_the_same_module(musa: str) -> None:
    assert simulate(musa) is simulate(musa) is torch.musa is sys.modules["torch.musa"] is torch.get_device_module(musa)


def test_a_second_name_is_refused(musa: str) -> None:
    with pytest.raises(DeviceNameTakenError, match="PrivateUse1 is 'musa', simulated by fxpatch") as caught:
        simulate("npu")
    assert caught.value.hint == "use 'musa'"


UNUSABLE = [
    "",
    "Musa",
    "my device",
    "npu2",
    "class",
    "cuda",
    "cpu",
    "xpu",
    "meta",
    "nn",
    "item",
    "half",
    "privateuseone",
]


def test_an_unusable_name_is_refused_and_changes_nothing(fresh: Callable[..., str]) -> None:
    fresh(f"""
        import torch
        from fxpatch.errors import UnknownDeviceError
        from fxpatch.simulator import simulate
        def members():
            return set(dir(torch)), set(dir(torch.Tensor)), set(dir(torch.nn.Module)), torch.UntypedStorage.__new__
        before = members()
        for name in {UNUSABLE!r}:
            try:
                simulate(name)
            except UnknownDeviceError as error:
                assert repr(name) in str(error)
            else:
                raise AssertionError(name)
            assert torch._C._get_privateuse1_backend_name() == "privateuseone"
        assert members() == before
        assert simulate("npu").__name__ == "torch.npu"
        assert torch.npu.NPUGraph.__name__ == "NPUGraph"
        assert torch.ones(2, device="npu").sum().item() == 2
    """)


def test_a_real_device_keeps_its_name(fresh: Callable[..., str]) -> None:
    fresh("""
        import torch
        from fxpatch.errors import DeviceNameTakenError
        from fxpatch.simulator import simulate
        torch.utils.rename_privateuse1_backend("musa")
        for name in ("musa", "npu"):
            try:
                simulate(name)
            except DeviceNameTakenError as error:
                assert "registered by somebody else" in error.seen
            else:
                raise AssertionError(name)
        assert not hasattr(torch, "musa")
    """)


def test_a_torch_without_the_hooks_is_refused(fresh: Callable[..., str]) -> None:
    fresh("""
        import torch
        from torch.utils import backend_registration
        from fxpatch.errors import TorchTooOldError
        from fxpatch.simulator import simulate
        del backend_registration._setup_privateuseone_for_python_backend
        try:
            simulate("musa")
        except TorchTooOldError as error:
            assert "_setup_privateuseone_for_python_backend" in error.seen
        else:
            raise AssertionError
        assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    """)


def test_importing_changes_nothing_and_simulating_imports_no_compiler(fresh: Callable[..., str]) -> None:
    fresh("""
        import sys, torch
        new = torch.UntypedStorage.__new__
        import fxpatch.simulator
        assert torch._C._get_privateuse1_backend_name() == "privateuseone" and torch.UntypedStorage.__new__ is new
        fxpatch.simulator.simulate("musa")
        late = [m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor", "sympy", "numpy.testing"))]
        assert not late, late
    """)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch._dynamo", "torch._inductor", "torch._inductor.compile_fx", "nothing"])
def test_inductor_is_registered_however_late_it_comes(fresh: Callable[..., str], first: str) -> None:
    fresh(f"""
        import torch
        {"pass" if first == "nothing" else f"import {first}"}
        from fxpatch.simulator import simulate
        simulate("musa")
        import torch._inductor.compile_fx
        from torch._dynamo.device_interface import get_interface_for_device
        from torch._inductor.codegen.common import get_scheduling_for_device, get_wrapper_codegen_for_device
        assert get_scheduling_for_device("musa").__module__ == "fxpatch.simulator.inductor"
        assert get_wrapper_codegen_for_device("musa").__module__ == "fxpatch.simulator.inductor"
        assert get_interface_for_device("musa").is_available()
        from torch._inductor.codegen.common import get_custom_backend_pass_for_device
        assert len(get_custom_backend_pass_for_device("musa").uuid()) == 64
    """)


def test_errors_say_what_to_do(musa: str) -> None:
    with pytest.raises(FxPatchError) as caught:
        simulate("npu")
    for part in ("seen:", "expected:", "to do:"):
        assert part in str(caught.value)
    assert issubclass(UnknownDeviceError, FxPatchError)
