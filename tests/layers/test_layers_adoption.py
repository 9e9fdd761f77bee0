"""`optimize`: real models, the same parameters, the same results, a reason for everything, and all of it undone."""

from __future__ import annotations

import copy
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.normalization import FP32LayerNorm as TheirFP32LayerNorm
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fake_kernels.declare import declare
from fake_kernels.library import find
from fxpatch.errors import FxPatchWarning, LayerError
from fxpatch.layers.adopted import GatedMLP, ProjectedGEGLU
from fxpatch.layers.adoption import Adoption, Left, Replaced, optimize
from fxpatch.layers.norm import FP32LayerNorm, RMSNorm
from fxpatch.layers.platform_op import look_again

FUSED = ("aten::_fused_swiglu_forward", "aten::_fused_rmsnorm_forward")
TOLERANCE = 2e-5  # float32 logits of order 1, another order of additions
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def vendor(musa: str) -> Iterator[Counter[str]]:
    """torch_musa's two operators on the simulated device; their calls are counted."""
    calls: Counter[str] = Counter()

    def counted(record: Any) -> Callable[..., Any]:
        return lambda *a: calls.update([record.op]) or record.reference(*a)

    records = [find(name) for name in FUSED]
    with declare([r.schema for r in records], {r.op: counted(r) for r in records}):
        yield calls
    look_again()
    torch._dynamo.reset()


def randomised(model: nn.Module) -> nn.Module:
    """Norm weights that are not all one: multiplied in the wrong place, they show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    return model.eval().requires_grad_(False)


def language_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TEXT)
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config))


def diffusion_transformer() -> nn.Module:
    torch.manual_seed(0)
    return randomised(
        diffusers.Transformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, norm_num_groups=2,
            activation_fn="geglu", cross_attention_dim=16,
        )
    )  # fmt: skip


def wan() -> nn.Module:
    torch.manual_seed(0)
    return randomised(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        )
    )  # fmt: skip


LANGUAGE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2")
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, device: str = "cpu") -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(device), use_cache=False).logits.cpu()


def parameters(model: nn.Module) -> dict[str, int]:
    return {name: id(each) for name, each in model.named_parameters(remove_duplicate=False)}


def modules(model: nn.Module) -> dict[str, int]:
    return {name: id(each) for name, each in model.named_modules(remove_duplicate=False)}


CASES = [(name, torch.bfloat16) for name in LANGUAGE] + [(name, torch.float32) for name in ("Llama", "Gemma2")]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_language_models(name: str, dtype: torch.dtype, vendor: Counter[str], musa: str) -> None:
    model = language_model(name).to(dtype)
    before, expected, state = modules(model), logits(model), list(model.state_dict())
    was = parameters(model)
    with optimize(model, musa) as handle:
        now = Counter(type(each).__name__ for each in model.modules())
        assert parameters(model) == was, "the same objects under the same names"
        assert list(model.state_dict()) == state
        assert torch.equal(logits(model), expected), "on the CPU bit for bit"
        kinds = Counter(row.now.partition("(")[0] for row in handle.report.replaced)
        gemma = name.startswith("Gemma")
        assert kinds["GatedMLP"] == now["GatedMLP"] == (0 if gemma else 2), "musa has a kernel for silu only"
        norms = {"Qwen3": 9, "Gemma2": 9}.get(name, 5)
        assert kinds["RMSNorm"] == now["RMSNorm"] == (norms if not gemma or dtype == torch.float32 else 0)
        model.to(musa)
        vendor.clear()
        seen = logits(model, musa)
        assert vendor == Counter({FUSED[0]: kinds["GatedMLP"], FUSED[1]: kinds["RMSNorm"]}) - Counter()
        limit = TOLERANCE if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(seen, expected, rtol=limit, atol=limit * float(expected.abs().max()))
        model.to("cpu")
    assert modules(model) == before
    assert torch.equal(logits(model), expected)
    assert not handle.report.replaced or handle.report.replaced[0].names[0].startswith("model.")


def test_what_gemma_is_left_with_is_said(vendor: Counter[str], musa: str) -> None:
    report = optimize(language_model("Gemma2").bfloat16(), musa).report
    reasons = {row.kind: row.reason for row in report.left}
    assert reasons["Gemma2MLP"] == "there is no kernel for musa"
    assert reasons["Gemma2RMSNorm"] == (
        "1 + weight is added in float32, and its kernel takes a weight of torch.bfloat16"
    )


def test_diffusers_fp32_layer_norm_on_any_device() -> None:
    """No vendor's kernel is needed: what it saves is the conversion."""
    model = wan().bfloat16()
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4).bfloat16(),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 16).bfloat16(),
    }
    before = modules(model)
    with torch.no_grad():
        expected = model(**inputs).sample
        with optimize(model, "cpu") as handle:
            assert {row.was for row in handle.report.replaced} == {"FP32LayerNorm"}
            ours = [each for each in model.modules() if isinstance(each, FP32LayerNorm)]
            assert len(ours) == len(handle.report.replaced) == 7
            for _ in range(2):
                assert torch.equal(model(**inputs).sample, expected)
            assert any(len(each.fp32_parameters) for each in ours)
            assert not [each for each in model.modules() if type(each) is TheirFP32LayerNorm]
        assert torch.equal(model(**inputs).sample, expected)
    assert modules(model) == before


def test_geglu_is_left_where_there_is_no_kernel(vendor: Counter[str], musa: str) -> None:
    report = optimize(diffusion_transformer(), musa).report
    assert {(row.kind, row.reason) for row in report.left} == {("GEGLU", "there is no kernel for musa")}


def test_on_npu(fresh: Callable[..., str]) -> None:
    """Another device needs another process: GEGLU, and Gemma with its own kernels."""
    out = fresh("""
        import sys, torch, fxpatch
        sys.path.insert(0, "layers")
        from fake_kernels.declare import declare
        from fake_kernels.library import find
        from fxpatch.layers.adoption import optimize
        import test_layers_adoption as here
        fxpatch.simulate("npu")
        records = [find(f"npu::npu_{name}") for name in ("swiglu", "geglu", "rms_norm", "gemma_rms_norm")]
        calls = []
        def counted(record):
            return lambda *a, **k: calls.append(record.op) or record.reference(*a, **k)
        declare([r.schema for r in records], {r.op: counted(r) for r in records})

        model = here.diffusion_transformer()
        x, text = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 16)
        with torch.no_grad():
            expected = model(x, encoder_hidden_states=text).sample
            handle = optimize(model, "npu")
            print(sorted({row.was for row in handle.report.replaced}), len(handle.report.replaced))
            assert torch.equal(model(x, encoder_hidden_states=text).sample, expected)
            model.to("npu")
            seen = model(x.to("npu"), encoder_hidden_states=text.to("npu")).sample.cpu()
        torch.testing.assert_close(seen, expected, rtol=2e-5, atol=2e-5)
        print(sorted(set(calls)), len(calls))
        for name in ("Llama", "Gemma2"):
            for dtype in (torch.float32, torch.bfloat16):
                calls.clear()
                model = here.language_model(name).to(dtype)
                expected = here.logits(model)
                handle = optimize(model, "npu")
                assert torch.equal(here.logits(model), expected)
                limit = 2e-5 if dtype == torch.float32 else 4e-2
                seen = here.logits(model.to("npu"), "npu")
                torch.testing.assert_close(seen, expected, rtol=limit, atol=limit * float(expected.abs().max()))
                counts = sorted((call[9:], calls.count(call)) for call in set(calls))
                print(name, dtype, counts, len(handle.report.left))
    """)
    assert out.splitlines() == [
        "['GEGLU'] 2",
        "['npu::npu_geglu'] 2",
        "Llama torch.float32 [('rms_norm', 5), ('swiglu', 2)] 0",
        "Llama torch.bfloat16 [('rms_norm', 5), ('swiglu', 2)] 0",
        "Gemma2 torch.float32 [('geglu', 2), ('gemma_rms_norm', 9)] 0",
        "Gemma2 torch.bfloat16 [('geglu', 2), ('gemma_rms_norm', 9)] 0",
    ]


def test_without_the_vendors_operators_nothing_changes(musa: str) -> None:
    model = language_model("Llama")
    before = modules(model)
    report = optimize(model, musa).report
    assert modules(model) == before
    assert not report.replaced
    assert {row.kind: row.reason for row in report.left} == {
        "LlamaMLP": (
            "aten::_fused_swiglu_forward is not registered; aten::swish_glu is not registered; there is no nn.SwishGLU"
        ),
        "LlamaRMSNorm": (
            "aten::_fused_rmsnorm_forward is not registered; aten::_fused_rms_norm has no kernel for musa"
        ),
    }


def test_the_report_as_text_and_as_values(vendor: Counter[str], musa: str) -> None:
    model = language_model("Llama")
    report = optimize(model, musa).report
    assert str(report) == (
        "platform operators for musa: 7 replaced, 0 left\n"
        "  LlamaRMSNorm -> RMSNorm(32, eps=1e-06, cast_first=True, one_plus=False)\n"
        "      model.norm, model.layers.0.input_layernorm, model.layers.0.post_attention_layernorm and 2 more\n"
        "  LlamaMLP -> GatedMLP\n"
        "      model.layers.0.mlp, model.layers.1.mlp"
    )
    with pytest.raises(FrozenInstanceError):
        report.device = "npu"
    assert isinstance(report, Adoption)
    assert all(isinstance(row, Replaced) for row in report.replaced)


class Changed(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 2


def mlp(act: str = "silu") -> LlamaMLP:
    return LlamaMLP(transformers.LlamaConfig(**{**TEXT, "hidden_act": act}))


def hooked() -> nn.Module:
    norm = LlamaRMSNorm(8)
    norm.register_forward_hook(lambda *_: None)
    return norm


def with_its_own_forward() -> nn.Module:
    norm = LlamaRMSNorm(8)
    norm.forward = lambda x: x
    return norm


def parametrized() -> nn.Module:
    return nn.utils.parametrize.register_parametrization(LlamaRMSNorm(8), "weight", nn.Identity())


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (lambda: Changed(8), "a subclass of LlamaRMSNorm, which may compute something else"),
    "torch's own": (lambda: nn.RMSNorm(8), "torch.nn.modules.normalization.RMSNorm is no class that is known to match"),
    "hooks": (hooked, "it has hooks"),
    "a forward of its own": (with_its_own_forward, "its forward was replaced on the instance"),
    "meta": (lambda: LlamaRMSNorm(8).to("meta"), "its parameters are on meta"),
    "double": (lambda: LlamaRMSNorm(8).double(), "its kernel does not take torch.float64"),
    "another activation": (lambda: mlp("relu"), "there is no kernel for its activation, ReLU"),
    "the other half": (lambda: SwiGLU(8, 8), "it activates the second half, and the kernels the first"),
    "parametrized": (parametrized, "a subclass of LlamaRMSNorm"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name: str, vendor: Counter[str], musa: str) -> None:
    make, reason = LEFT[name]
    model = nn.ModuleDict({"it": make()})
    report = optimize(model, musa).report
    assert not report.replaced
    (row,) = report.left
    assert reason in row.reason
    assert row.names == ("it",)


def test_a_library_that_changed_is_noticed(vendor: Counter[str], musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by name, and proven: here the next version of transformers rounds in another place."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * wide).to(x.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    (row,) = optimize(nn.Sequential(LlamaRMSNorm(8)), musa).report.left
    assert row.reason.endswith("it computes something else than RMSNorm"), "in half precision; float32 is the same"
    assert "float16" in row.reason or "bfloat16" in row.reason


def test_the_model_itself_and_what_is_compiled(vendor: Counter[str], musa: str) -> None:
    assert optimize(LlamaRMSNorm(8), musa).report.left == (
        Left(("(model)",), "LlamaRMSNorm", "it is the model itself: nothing holds it"),
    )
    report = optimize(nn.Sequential(torch.compile(LlamaRMSNorm(8))), musa).report
    assert report.left == (Left(("0._orig_mod",), "LlamaRMSNorm", "it is compiled: optimize first, then compile"),)


def test_twice_and_back(vendor: Counter[str], musa: str) -> None:
    model = language_model("Llama")
    before = modules(model)
    first = optimize(model, musa)
    second = optimize(model, musa)
    assert {row.reason for row in second.report.left} == {"it is one already"}
    assert not second.report.replaced
    second.undo()
    assert modules(model) != before
    first.undo()
    first.undo()
    assert modules(model) == before


def test_a_module_under_two_names_is_one(vendor: Counter[str], musa: str) -> None:
    norm, inner = LlamaRMSNorm(8), nn.Sequential(LlamaRMSNorm(8))
    model = nn.ModuleDict({"a": norm, "b": norm, "c": inner, "d": inner})
    before = modules(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimize(model, musa) as handle:
            assert [row.names for row in handle.report.replaced] == [("a", "b"), ("c.0", "d.0")]
            assert model["a"] is model["b"]
            assert isinstance(model["c"][0], RMSNorm)
    assert modules(model) == before


def test_what_changed_meanwhile_is_kept(vendor: Counter[str], musa: str) -> None:
    """New parameters, other submodules and the mode are the original's afterwards; a module somebody else put there
    stays."""
    model = nn.ModuleDict({"mlp": mlp(), "norm": LlamaRMSNorm(32), "other": LlamaRMSNorm(32)}).train()
    handle = optimize(model, musa)
    weight = nn.Parameter(torch.full((32,), 3.0))
    model["norm"].weight = weight
    linear = nn.Linear(32, 48)
    model["mlp"].up_proj = linear
    model.eval()
    model["other"] = nn.Identity()
    with pytest.warns(FxPatchWarning, match="other was changed by somebody else meanwhile: left as it is"):
        handle.undo()
    assert type(model["norm"]) is LlamaRMSNorm
    assert type(model["mlp"]) is LlamaMLP
    assert model["norm"].weight is weight
    assert model["mlp"].up_proj is linear
    assert not model["mlp"].training
    assert not model["norm"].training
    assert type(model["other"]) is nn.Identity


def test_an_exception_undoes_it(vendor: Counter[str], musa: str) -> None:
    model = language_model("Llama")
    before = modules(model)
    with pytest.raises(ZeroDivisionError), optimize(model, musa):
        raise ZeroDivisionError
    assert modules(model) == before


def test_training_is_unchanged(vendor: Counter[str], musa: str) -> None:
    """The kernels declared here have no gradient, so training runs natively, on the device, too."""
    model = language_model("Qwen3").requires_grad_()
    reference = copy.deepcopy(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimize(reference, musa)
    reference(input_ids=IDS, labels=IDS).loss.backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    on_device = reference.to(musa)
    on_device.zero_grad()
    vendor.clear()
    on_device(input_ids=IDS.to(musa), labels=IDS.to(musa)).loss.backward()
    assert not vendor
    for a, b in zip(model.parameters(), on_device.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=1e-4, atol=1e-6)


def test_copies_and_pickles(vendor: Counter[str], musa: str) -> None:
    model = nn.Sequential(mlp(), LlamaRMSNorm(32), Gemma2RMSNorm(32), TheirFP32LayerNorm(32)).requires_grad_(False)
    optimize(model, musa)
    assert [type(each) for each in model] == [GatedMLP, RMSNorm, RMSNorm, FP32LayerNorm]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(2, 32)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
        assert other[1].weight is not model[1].weight


def test_bad_input() -> None:
    with pytest.raises(LayerError, match="Only a module has modules that can be replaced") as error:
        optimize(object(), "cpu")  # type: ignore[arg-type]
    assert "seen: object" in str(error.value)
    assert "optimize(pipe.transformer, device)" in str(error.value)
    with pytest.raises(LayerError, match="This process has no such device") as error:
        optimize(nn.Identity(), "toaster:0")
    assert "seen: 'toaster:0'" in str(error.value)
    assert "import the vendor's package first" in str(error.value)


def test_geglu_is_diffusers() -> None:
    theirs, ours = GEGLU(8, 6), ProjectedGEGLU()
    ours.proj = theirs.proj
    x = torch.randn(2, 8)
    assert torch.equal(ours(x), theirs(x))


def _llama_mlp() -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))


def test_the_proof_changes_nothing() -> None:
    """It does not run the model's own linears: they may observe, keep statistics, draw random numbers."""
    seen: list[torch.Tensor] = []
    model = nn.ModuleDict({"mlp": _llama_mlp()})
    model["mlp"].gate_proj.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    random = torch.get_rng_state()
    with optimize(model, "musa"):
        assert seen == []
        assert torch.equal(torch.get_rng_state(), random)


def test_a_hook_that_comes_later_stays() -> None:
    model, x = nn.ModuleDict({"mlp": _llama_mlp()}), torch.randn(2, 8)
    handle = optimize(model, "cpu")
    model["mlp"].register_forward_hook(lambda module, args, result: result * 0)
    handle.undo()
    assert not model["mlp"](x).any()
