"""The models that the simulated device is judged by. The problem: a device that passes its own tests may still fail on
what people run. The rule: the classes are transformers' and diffusers' own, unchanged; only the configs are tiny, with
every kind of block a model has, and without dropout, since a device's random numbers are not the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import diffusers
import torch
import transformers

Inputs = Mapping[str, torch.Tensor]

VOCABULARY = 96
SPREAD = 0.2  # of initial weights; with the usual 0.02 so narrow a model computes next to nothing


@dataclass(frozen=True)
class Model:
    """One architecture.

    Args:
        build: makes it with random weights, and as many layers as asked where that can be told.
        inputs: what goes to `forward`, by name.
        output: the field of the result that is compared.
        labels: for a model that computes its own loss. Else the loss is the mean square distance from noise.
        generates: it has a `generate`, which takes those inputs that are not the decoder's.
    """

    name: str
    build: Callable[[int], torch.nn.Module]
    inputs: Callable[[], Inputs]
    output: str
    labels: Callable[[], torch.Tensor] | None = None
    generates: bool = False

    def __str__(self) -> str:
        return self.name


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids, none of them special."""
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def _text() -> Inputs:
    """Two sequences, one of them shorter and padded on the left: no plain causal mask will do."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": _ids(2, 12), "attention_mask": mask}


def _next_tokens() -> torch.Tensor:
    return _ids(2, 12).masked_fill(_text()["attention_mask"] == 0, -100)


# -- decoders: causal masks, rotary embeddings, grouped heads, windows, experts ---------------------

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": SPREAD, **_SPECIAL,
}  # fmt: skip


def _llama(layers: int) -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER, num_hidden_layers=layers))


def _qwen3(layers: int) -> torch.nn.Module:
    """With tied embeddings, as in its small sizes."""
    config = transformers.Qwen3Config(**_DECODER, num_hidden_layers=layers, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config)


def _gemma2(layers: int) -> torch.nn.Module:
    """Layers with a window shorter than the input alternate with layers that see it all; soft caps; tied embeddings."""
    config = transformers.Gemma2Config(**_DECODER, num_hidden_layers=layers, sliding_window=4, query_pre_attn_scalar=8)
    return transformers.Gemma2ForCausalLM(config)


def _mixtral(layers: int) -> torch.nn.Module:
    config = transformers.MixtralConfig(
        **_DECODER, num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def _gpt2(layers: int) -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=64, initializer_range=SPREAD,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **_SPECIAL,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its default, of which it warns; and a warning breaks the graph on any device
    return model


# -- encoders, and encoders with decoders -----------------------------------------------------------


def _bert(layers: int) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0, initializer_range=SPREAD,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def _vit(layers: int) -> torch.nn.Module:
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_labels=5, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        initializer_range=SPREAD,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _whisper(layers: int) -> torch.nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=16, max_target_positions=32, dropout=0, init_std=SPREAD, decoder_start_token_id=3,
        begin_suppress_tokens=None, tie_word_embeddings=False, **_SPECIAL,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _t5(layers: int) -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4, dropout_rate=0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    # its own, as T5 1.1 has; with the embeddings for a head, each token predicts itself, whatever attention says
    model.lm_head = torch.nn.Linear(config.d_model, VOCABULARY, bias=False)
    return model


def _spoken() -> Inputs:
    return {"input_features": noise(2, 8, 32), "decoder_input_ids": _ids(2, 6)}


def _translated() -> Inputs:
    return {**_text(), "decoder_input_ids": _ids(2, 6)}


# -- diffusion: convolutions in two and three dimensions, group norms, linear and cross attention ---


def _sana(layers: int) -> torch.nn.Module:
    return diffusers.SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=layers, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8,
    )  # fmt: skip


def _wan(_layers: int) -> torch.nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def _unet(_layers: int) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def _noisy(sample: str) -> Inputs:
    return {
        sample: noise(2, 4, 8, 8),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": noise(2, 5, 8, seed=1),
    }


MODELS = (
    Model("Llama", _llama, _text, "logits", _next_tokens, generates=True),
    Model("Qwen3", _qwen3, _text, "logits", _next_tokens, generates=True),
    Model("Gemma 2", _gemma2, _text, "logits", _next_tokens, generates=True),
    Model("Mixtral", _mixtral, _text, "logits", _next_tokens, generates=True),
    Model("GPT-2", _gpt2, _text, "logits", _next_tokens, generates=True),
    Model("BERT", _bert, _text, "logits", _next_tokens),
    Model("ViT", _vit, lambda: {"pixel_values": noise(2, 3, 16, 16)}, "logits", lambda: torch.tensor([1, 3])),
    Model("Whisper", _whisper, _spoken, "logits", lambda: _ids(2, 6, seed=1), generates=True),
    Model("T5", _t5, _translated, "logits", lambda: _ids(2, 6, seed=1), generates=True),
    Model("SanaTransformer2DModel", _sana, lambda: _noisy("hidden_states"), "sample"),
    Model("AutoencoderKLWan", _wan, lambda: {"sample": noise(1, 3, 5, 8, 8)}, "sample"),
    Model("UNet2DConditionModel", _unet, lambda: _noisy("sample"), "sample"),
)
