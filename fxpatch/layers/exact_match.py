"""Which modules of transformers and diffusers compute exactly what a platform operator does. The problem: names repeat
(every model has an `RMSNorm`), orders of rounding differ between models of one family, and libraries change. The rule:
a class is known by its full name, and then proven: original and replacement compute the same bits natively, here, with
random weights: a norm in every dtype, another class over small linears of its own. What is not known or not proven is
left alone.

Nothing here imports transformers or diffusers: classes are told by name. As in transformers 5.23, diffusers 0.42.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
from torch import nn

from fxpatch.layers.adopted import HOOKED, GatedMLP, ProjectedGEGLU, hooked
from fxpatch.layers.norm import FP32LayerNorm, RMSNorm
from fxpatch.layers.platform_op import FLOATS, PlatformOp, absent
from fxpatch.layers.shared_state import FORWARD_HOOKS, share

_LLAMA = ("Llama", "Mistral", "Qwen2", "Qwen3")
_GEMMA = ("Gemma", "Gemma2", "Gemma3")
_SILU, _GELU, _TANH = ("SiLU", "SiLUActivation"), ("GELUActivation",), ("GELUTanh", "PytorchGELUTanh")
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
_MIGHT = re.compile(r"(RMSNorm|MLP|GEGLU|SwiGLU|SwishGLU|FP32LayerNorm)$")


def candidate(module: nn.Module) -> bool:
    """Whether a module looks as if there were an operator for it, or is one of a known class's subclasses."""
    return bool(_MIGHT.search(type(module).__name__)) or any(_builder(base) for base in type(module).__mro__)


def replacement(module: nn.Module, device: str) -> nn.Module | str:
    """The operator that computes what `module` does, over the same parameters; or why there is none, in words.

    Args:
        device: the type of the device that it will run on.
    """
    if isinstance(module, PlatformOp | FP32LayerNorm):
        return "it is one already"
    build = _builder(type(module))
    if build is None:
        known = next((base.__name__ for base in type(module).__mro__ if _builder(base)), None)
        of = f"a subclass of {known}, which may compute something else" if known else "no class that is known to match"
        return f"{type(module).__module__}.{type(module).__qualname__} is {of}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(vars(module)[kind] for kind in vars(module) if kind.endswith("_hooks")):
        return "it has hooks"
    if vars(module).get("_compiled_call_impl") is not None:
        return "it is compiled: optimize first, then compile"
    if "parametrizations" in module._modules:
        return "it is parametrized"
    made = build(module)
    if isinstance(made, str):
        return made
    _share(module, made)
    if isinstance(made, PlatformOp):
        tensors = [*module.parameters()]
        dtype = tensors[0].dtype if tensors else torch.float32
        kernels = made.kernels(device)
        if all(absent((name,), device, False) for name in kernels):
            return absent(kernels, device, False)
        if unfit := made.unfit(device, torch.empty(1, _width(module), dtype=dtype, device="meta")):
            return unfit
    return _differs(module, made) or made


def _builder(kind: type) -> Callable[[nn.Module], nn.Module | str] | None:
    library, _, path = kind.__module__.partition(".")
    if library == "transformers" and path.startswith("models."):
        for family in (*_LLAMA, *_GEMMA):
            if path == f"models.{family.lower()}.modeling_{family.lower()}":
                if kind.__qualname__ == f"{family}MLP":
                    return _mlp
                if kind.__qualname__ == f"{family}RMSNorm":
                    return _llama_norm if family in _LLAMA else _gemma_norm
    if library == "diffusers":
        return _DIFFUSERS.get((path, kind.__qualname__))
    return None


def _llama_norm(module: nn.Module) -> nn.Module | str:
    eps: float = getattr(module, "variance_epsilon")  # noqa: B009
    return RMSNorm(_width(module), eps, cast_first=True, device="meta")


def _gemma_norm(module: nn.Module) -> nn.Module | str:
    eps: float = getattr(module, "eps")  # noqa: B009
    return RMSNorm(_width(module), eps, one_plus=True, device="meta")


def _mlp(module: nn.Module) -> nn.Module | str:
    act = module.get_submodule("act_fn")
    name = type(act).__name__
    kind = next((k for k, of in zip(_FUNCTIONS, (_SILU, _GELU, _TANH), strict=True) if name in of), None)
    if hooked(act):
        return HOOKED
    points = torch.linspace(-8, 8, 257, device="cpu")
    if kind is None or not torch.allclose(act(points), _FUNCTIONS[kind](points), rtol=1e-6, atol=1e-6):
        return f"there is no kernel for its activation, {name}"
    made = GatedMLP(kind)
    made.__dict__["_act"] = act  # no submodule
    return made


def _geglu(module: nn.Module) -> nn.Module | str:
    return ProjectedGEGLU()


def _swiglu(module: nn.Module) -> nn.Module | str:
    return "it activates the second half, and the kernels the first"


def _layer_norm(module: nn.Module) -> nn.Module | str:
    assert isinstance(module, nn.LayerNorm)
    affine, bias = module.elementwise_affine, module.bias is not None
    return FP32LayerNorm(module.normalized_shape, module.eps, affine, bias, device="meta")


_DIFFUSERS = {
    ("models.activations", "GEGLU"): _geglu,
    ("models.activations", "SwiGLU"): _swiglu,
    ("models.normalization", "FP32LayerNorm"): _layer_norm,
}


def _width(module: nn.Module) -> int:
    """Of the last dimension of its input."""
    for name in ("gate_proj", "proj"):
        if name in module._modules:
            return int(getattr(module._modules[name], "in_features"))  # noqa: B009
    shape = getattr(module, "normalized_shape", None) or getattr(module, "weight").shape  # noqa: B009
    return int(shape[-1])


_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def _share(original: nn.Module, made: nn.Module) -> None:
    """Both have the same parameters, buffers and submodules from now on: the same dicts, so that what one gets
    (`to`, a quantised or a LoRA layer instead of a linear one) is the other's, too. Other attributes are carried over
    where ours has none of the name."""
    share(original, made, (*_STATE, *FORWARD_HOOKS, *_BACKWARD_HOOKS))
    for name, value in vars(original).items():
        made.__dict__.setdefault(name, value)
    made.training = original.training


def _small(original: nn.Module) -> nn.Module:
    """The same class over small linears of its own: the model's may observe what they see, draw random numbers, keep
    statistics, or be large. Other submodules stay."""
    small, width, generator = copy.copy(original), 8, torch.Generator().manual_seed(2)
    small.__dict__["_modules"] = dict(original._modules)
    for name in ("gate_proj", "up_proj", "down_proj", "proj"):
        if name in original._modules:
            linear = nn.Linear(width, 2 * width if name == "proj" else width, device="meta").to_empty(device="cpu")
            with torch.no_grad():
                for each in linear.parameters():
                    each.copy_(torch.randn(each.shape, generator=generator, device="cpu"))
            small._modules[name] = linear
    return small


def _differs(original: nn.Module, made: nn.Module) -> str | None:
    """What is different between the two, natively, in words; None where every bit is the same."""
    tensors = [*original.parameters()]
    if any(each.is_meta for each in tensors):
        return "its parameters are on meta: nothing can be compared before they are loaded"
    pairs = [(original, made)]
    if original._modules:
        small, twin = _small(original), copy.copy(made)
        twin.__dict__["_modules"] = small._modules
        pairs = [(small, twin)]
    else:  # small: in each dtype, with weights that show where they are multiplied
        for dtype in FLOATS:
            theirs, ours = copy.deepcopy(original).to(dtype), copy.deepcopy(made)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
            _share(theirs, ours)
            pairs.append((theirs, ours))
    for theirs, ours in pairs:
        sample = next(theirs.parameters(), torch.empty(0))
        shape = getattr(theirs, "normalized_shape", None) or (_width(theirs),)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, *shape, generator=generator, device="cpu").to(sample.device, sample.dtype)
        native = ours.forward_native if isinstance(ours, PlatformOp) else ours
        try:
            with torch.no_grad():
                a, b = theirs(x), native(x)
        except Exception as error:
            return (
                f"it could not be compared: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            return f"in {sample.dtype} it computes something else than {type(ours).__name__}"
    return None
