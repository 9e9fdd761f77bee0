"""`install()` brings the fake kernels of the device's profile, asks again when a library comes, and takes them back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpatch
from compile_configs import DeviceProfile, load_profile
from fake_kernels import register_fake_if_exists

SWIGLU = "_fused_swiglu_forward(Tensor input) -> Tensor"


def swiglu(input: torch.Tensor) -> torch.Tensor:
    gate, up = input.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


@pytest.fixture
def vendor(musa: str) -> Iterator[torch.library.Library]:
    """What torch_musa adds to torch, as far as these tests go. Its operators are in `aten`: without a fake kernel, and
    with sizes that are numbers, torch runs them on zeros, on the device, while it traces; with symbols it gives up."""
    library = torch.library.Library("aten", "FRAGMENT")
    library.define(SWIGLU)
    library.impl("_fused_swiglu_forward", swiglu, "PrivateUse1")
    yield library
    library._destroy()
    torch._dynamo.reset()


def mlp(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._fused_swiglu_forward(x) * 2


def test_a_vendors_operator_traces_while_installed(vendor: Any) -> None:
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(4, 8, device="musa")
    with pytest.raises(Exception, match="_fused_swiglu_forward"):
        compiled(x)
    torch._dynamo.reset()
    with fxpatch.install("musa"):
        torch.testing.assert_close(compiled(x), mlp(x))
        row = {row.operator: row for row in fxpatch.status().fakes}["aten::_fused_swiglu_forward"]
        assert row.state == "registered"
        assert "it had no fake kernel; this one is after MooreThreads/torch_musa" in row.reason
        assert row.reason in str(fxpatch.status())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="_fused_swiglu_forward"):
        compiled(x)


def test_an_operator_that_comes_after_install_is_there_at_the_next_compilation(musa: str) -> None:
    with fxpatch.install("musa"):
        states = {row.operator: row.state for row in fxpatch.status().fakes}
        assert states["aten::_fused_swiglu_forward"] == "deferred"
        assert "aten" in str(fxpatch.status()).rpartition("operators of ")[2]
        library = torch.library.Library("aten", "FRAGMENT")
        library.define(SWIGLU)
        library.impl("_fused_swiglu_forward", swiglu, "PrivateUse1")
        x = torch.randn(4, 8, device="musa")
        compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), mlp(x))
    library._destroy()
    torch._dynamo.reset()


def test_the_import_of_a_library_registers_what_waited_for_it(
    musa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_vendor.py").write_text(
        "import torch\nlibrary = torch.library.Library('late_vendor', 'DEF')\n"
        "library.define('halve(Tensor x) -> Tensor')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fake = register_fake_if_exists("late_vendor::halve")(lambda x: x.new_empty(x.shape[0] // 2))
    with fxpatch.install("musa"):
        assert type(fake.outcome).__name__ == "Deferred"
        import late_vendor  # type: ignore[import-not-found]

        assert type(fake.outcome).__name__ == "Registered"
        assert torch.ops.late_vendor.halve(torch.empty(4, device="meta")).shape == (2,)
    assert type(fake.outcome).__name__ == "Registered", "it is the user's, not the installation's"
    fake.remove()
    late_vendor.library._destroy()
    del sys.modules["late_vendor"]


def test_a_user_s_own_fake_keeps_ours_out(vendor: Any) -> None:
    fake = register_fake_if_exists("aten::_fused_swiglu_forward")(lambda input: input.new_empty(7))
    with fxpatch.install("musa") as installation:
        assert "Registered" in repr(installation.fakes["aten::_fused_swiglu_forward"])
        assert torch.ops.aten._fused_swiglu_forward(torch.empty(4, device="meta")).shape == (7,)
    fake.remove()


def test_a_fake_that_the_profile_calls_wrong_is_replaced_and_comes_back(vendor: Any) -> None:
    vendor.impl("_fused_swiglu_forward", lambda input: input.new_empty(7), "Meta")
    wrong = {"operators": ["aten::_fused_swiglu_forward"], "reason": "a test", "source": "a test"}

    def shape() -> tuple[int, ...]:
        with torch._subclasses.FakeTensorMode():
            return tuple(torch.ops.aten._fused_swiglu_forward(torch.empty(2, 4, device="musa")).shape)

    with fxpatch.install("musa") as installation:
        assert "AlreadyHad" in repr(installation.fakes["aten::_fused_swiglu_forward"])
        assert shape() == (7,)
    with fxpatch.install("musa", profile=with_wrong_fakes(load_profile("musa"), wrong)) as installation:
        assert "has a kernel for Meta" in repr(installation.fakes["aten::_fused_swiglu_forward"])
        assert shape() == (2, 2)
    assert shape() == (7,)


def with_wrong_fakes(profile: DeviceProfile, *tables: dict[str, Any]) -> DeviceProfile:
    import dataclasses

    from compile_configs.profile import WrongFakes

    return dataclasses.replace(profile, wrong_fakes=tuple(WrongFakes(**table) for table in tables))


def test_a_graph_traced_with_another_fake_kernel_is_not_taken_from_the_cache(vendor: Any) -> None:
    """torch's cache keys know an operator's name, not its fake kernel nor its shadow."""
    with fxpatch.install("musa"):
        ours = torch.compiler.config.cache_key_tag
    fake = register_fake_if_exists("aten::_fused_swiglu_forward")(lambda input: input.new_empty(7))
    with fxpatch.install("musa"):
        users = torch.compiler.config.cache_key_tag
    fake.remove()
    other = register_fake_if_exists("aten::_fused_swiglu_forward")(lambda input: input.new_empty(8))
    with fxpatch.install("musa"):
        others = torch.compiler.config.cache_key_tag
    other.remove()
    with fxpatch.install("musa"):
        assert torch.compiler.config.cache_key_tag == ours
    assert len({ours, users, others}) == 3


@pytest.mark.slow
def test_no_vendors_package_is_imported(fresh: Any) -> None:
    out = fresh(
        """
        import sys, fxpatch
        fxpatch.simulate("npu")
        before = set(sys.modules)
        fxpatch.install()
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new & {"torch_npu", "torch_musa", "vllm", "sgl_kernel", "torchada", "sympy"}))
        print(any("Inductor" in name or "_inductor" in name for name in new))
        """
    )
    assert out.splitlines() == ["[]", "False"]
