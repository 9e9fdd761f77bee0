"""What `sana.py` is made of: a small SanaPipeline with random weights, a watch over its stages, and a transformer that
calls a `PiecewiseRunner`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

told_before = transformers.logging.get_verbosity()
transformers.logging.set_verbosity_error()  # it tells at this import which image processors want torchvision
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel  # noqa: E402

transformers.logging.set_verbosity(told_before)

import fxpatch  # noqa: E402
from fake_kernels.declare import Declared, declare  # noqa: E402
from fake_kernels.library import find  # noqa: E402
from fxpatch.layers.platform_op import look_again  # noqa: E402

SIMULATED = "simulated-"
VENDOR_PACKAGES = {"npu": "torch_npu", "musa": "torch_musa"}

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [*SPECIAL, "a", "the", "in", "of", "and", "small", "red", "panda", "snow", "forest", "painting", "photo"]
LATENT_CHANNELS, TEXT = 8, 32

VENDOR_OPERATORS = {  # those that Gemma 2 has a use for
    "npu": ["npu::npu_gemma_rms_norm", "npu::npu_geglu"],
    "musa": ["aten::_fused_rmsnorm_forward"],
}
MASKS_SEEN: set[tuple[str, torch.dtype]] = set()  # (device type, dtype), of every mask that attention was called with


def boolean_mask_attention(module, query, key, value, mask, **options):
    """transformers' attention through torch's operator, and a note of the mask's dtype. Gemma 2 refuses it under the
    name "sdpa", because of the soft cap, which that operator has not; with a soft cap this raises, too."""
    if mask is not None:  # which is causal attention, without a mask
        MASKS_SEEN.add((mask.device.type, mask.dtype))
    return sdpa_attention_forward(module, query, key, value, mask, **options)


transformers.AttentionInterface.register("boolean_mask", boolean_mask_attention)
AttentionMaskInterface.register("boolean_mask", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words to ids, and a first token that is always there, as Gemma's has."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build_text_encoder(attention: str) -> transformers.Gemma2Model:
    """Layers with a window of 4 tokens, shorter than the prompt, alternate with layers that see it all."""
    config = transformers.Gemma2Config(
        vocab_size=len(WORDS), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=4, query_pre_attn_scalar=8,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_logit_softcapping=50.0 if attention == "eager" else None,
        attn_implementation="eager" if attention == "eager" else "boolean_mask",
    )  # fmt: skip
    return transformers.Gemma2Model(config).eval()


def build_pipeline(layers: int, attention: str, algorithm: str) -> SanaPipeline:
    """The same weights at every call. Schedule and scaling factor are SANA's."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=layers,
        num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=TEXT,
    )  # fmt: skip
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    channels, one_each, scales = (16, 16, 32, 32), (1, 1, 1, 1), ((), (), (5,), (5,))
    vae = AutoencoderDC(
        latent_channels=LATENT_CHANNELS, attention_head_dim=8, scaling_factor=0.41407,
        encoder_block_types=blocks, encoder_block_out_channels=channels, encoder_layers_per_block=one_each,
        encoder_qkv_multiscales=scales, decoder_block_types=blocks, decoder_block_out_channels=channels,
        decoder_layers_per_block=one_each, decoder_qkv_multiscales=scales,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = SanaPipeline(build_tokenizer(), build_text_encoder(attention), vae.eval(), transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def declare_vendor_operators(device: str, calls: Counter[str]) -> Declared:
    """The vendor's operators on the simulated device: schemas of the real ones, computed by the references that fake
    kernels are tested with. `calls` counts how often."""
    records = [find(name) for name in VENDOR_OPERATORS[device]]

    def counted(operator: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[operator] += 1
            return kernel(*args, **kwargs)

        return call

    return declare([each.schema for each in records], {each.op: counted(each.op, each.reference) for each in records})


def keep_fp32(device: str) -> None:
    """No rounding of inputs, to TF32 or HF32, which cuDNN's and Ascend's convolutions do by default."""
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    elif device == "musa":
        torch.backends.mudnn.allow_tf32 = False
    elif device == "npu":
        torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = False


def prepare_device(wanted: str, stack: contextlib.ExitStack, kernel_calls: Counter[str]) -> torch.device:
    """Brings the device up, simulated (with the vendor's operators, whose calls are counted) or real."""
    if wanted.startswith(SIMULATED):
        wanted = wanted.removeprefix(SIMULATED)
        fxpatch.simulate(wanted, strict=True)
        stack.enter_context(declare_vendor_operators(wanted, kernel_calls))
        look_again()
        return torch.device(wanted)
    if wanted in VENDOR_PACKAGES:
        importlib.import_module(VENDOR_PACKAGES[wanted])
    keep_fp32(wanted)
    return torch.device(wanted, 0) if wanted != "cpu" else torch.device("cpu")


@dataclass
class Call:
    """One call of one stage: what it returned, on the CPU, and seconds until the device had it."""

    stage: str
    output: torch.Tensor
    seconds: float


@dataclass
class Watch:
    """Watches the stages of a pipeline. `told` is called before each call of a stage, with its name."""

    device: torch.device
    told: Callable[[str], object]
    calls: list[Call] = field(default_factory=list)

    def over(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, watched; its signature stays, which pipelines ask schedulers for."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.told(stage)
            self.wait()
            begun = time.perf_counter()
            returned = function(*args, **kwargs)
            self.wait()
            seconds = time.perf_counter() - begun
            self.calls.append(Call(stage, returned[0].detach().to("cpu", copy=True), seconds))
            return returned

        return watched

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device.type).synchronize()

    def pipeline(self, pipeline: SanaPipeline) -> None:
        """All but the transformer, of which there may be two."""
        pipeline.text_encoder.forward = self.over("text encoder", pipeline.text_encoder.forward)
        pipeline.scheduler.step = self.over("scheduler", pipeline.scheduler.step)
        pipeline.vae.decode = self.over("decoder", pipeline.vae.decode)


class ThroughRunner:
    """A pipeline's transformer: calls go through a runner, which the first one prepares; `config`, `dtype` and whatever
    else the pipeline asks for are the model's."""

    def __init__(self, model: SanaTransformer2DModel, runner: fxpatch.PiecewiseRunner, watch: Watch) -> None:
        self._model, self._runner = model, runner
        self._watched = watch.over("transformer", runner)
        self._prepared = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._prepared:
            self._runner.prepare(*args, **kwargs)
            self._prepared = True
        return self._watched(*args, **kwargs)
