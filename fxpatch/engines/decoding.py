"""transformers' `generate` with a static cache, its decoding captured per batch size, in two lines:

    fxpatch.install()
    capture_decoding(model, sizes=[2, 8])
    model.generate(**inputs, cache_implementation="static")

`generate` calls the model once with the prompts, then once per token. The first of these goes to the model as it is.
The others are one graph per batch size, over a cache of as many rows as the largest size has: the static cache that
`generate` has made is moved there (`cache_rows`). A second cache that comes while the first is in use pushes that one
out, into memory of its own.

What is not such a call (another cache, attentions asked for, a batch above the largest size) goes to the model as it
is, and is counted in `calls`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxpatch.engines.attached import Attached
from fxpatch.engines.cache_rows import Rows
from fxpatch.errors import InputError, SizesError
from fxpatch.piecewise.buckets import LEAST
from fxpatch.piecewise.runner import PiecewiseRunner

log = logging.getLogger("fxpatch")
_KNOWN = {
    "input_ids",
    "past_key_values",
    "position_ids",
    "attention_mask",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}


_RECORDED = ("output_attentions", "output_hidden_states")


def capture_decoding(model: Any, *, sizes: Sequence[int], max_length: int = 0, **options: Any) -> CapturedDecoding:
    """From now on, decoding with a static cache is captured.

    Args:
        model: a decoder of transformers' with `generate`, whose layers all attend to the whole sequence.
        sizes: batch sizes to capture, each at least 2; a smaller batch is padded.
        max_length: tokens that a cache has room for at least; one that has more is prepared for anew.
        options: of `PiecewiseRunner`.

    Raises:
        AlreadyInstalledError: it is already.
        InputError: no decoder of that kind. SizesError: a size below 2.
    """
    config = getattr(getattr(model, "config", None), "get_text_config", lambda **_: None)(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if not getattr(config, "layer_types", None) else None
    if config is None or not hasattr(model, "generate") or kinds != {"full_attention"} or window is not None:
        raise InputError(
            f"Decoding of {type(model).__name__} cannot be captured.",
            seen=f"layers of {', '.join(sorted(kinds))}" if config is not None else "no config of transformers'",
            expected="a decoder of transformers' whose layers all attend to the whole sequence",
            hint="capture its layers with fxpatch.PiecewiseRunner (examples/piecewise_llama.py shows how)",
        )
    if not sizes or min(sizes) < LEAST:
        raise SizesError(
            "These batch sizes cannot be captured.",
            seen=f"sizes={list(sizes)}",
            expected=f"at least one, each at least {LEAST}",
            hint="a batch of 1 is padded to 2",
        )
    return CapturedDecoding(model, sorted(sizes), max_length, options)


class CapturedDecoding(Attached):
    """See `capture_decoding`.

    Attributes:
        calls: "captured decoding", and what went to the model as it is, by the reason.
        runner: of the rows; None until the first step of decoding.
    """

    def __init__(self, model: Any, sizes: list[int], max_length: int, options: Mapping[str, Any]) -> None:
        self._sizes, self._length, self._options = sizes, max_length, dict(options)
        self._model = model
        self._rows: Rows | None = None
        super().__init__(model, self._forward)
        self._compiled = model.generation_config.disable_compile
        model.generation_config.disable_compile = True  # or generate would compile what is captured

    def undo(self) -> None:
        """See `Attached`."""
        self._model.generation_config.disable_compile = self._compiled
        super().undo()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        why = "positional arguments" if args else self._why_not(kwargs)
        if why is not None:
            self.calls[why] += 1
            return self.plain(*args, **kwargs)
        self.calls["captured decoding"] += 1
        return self._step(**kwargs)

    def _why_not(self, kwargs: Mapping[str, Any]) -> str | None:
        """Why a call is no step of decoding with a static cache."""
        from transformers.cache_utils import StaticCache, StaticLayer

        ids, cache, mask = kwargs.get("input_ids"), kwargs.get("past_key_values"), kwargs.get("attention_mask")
        layers = [layer for layer in getattr(cache, "layers", ()) if type(layer) is StaticLayer]
        if type(cache) is not StaticCache or len(layers) != len(cache.layers) or cache.offloading:
            return "no static cache"
        if not all(layer.is_initialized for layer in layers) or ids is None or ids.shape[1] != 1:
            return "prompts"
        if ids.shape[0] > self._sizes[-1]:
            return f"a batch above {self._sizes[-1]}"
        mask = _of_all_layers(mask)
        if mask is None or mask.dim() != 4 or mask.shape[:3] != (ids.shape[0], 1, 1):
            return "no mask for each row"
        if kwargs.get("position_ids") is None or kwargs["position_ids"].shape != ids.shape:
            return "no positions for each row"
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        given |= {name for name in _RECORDED if getattr(self._model.config, name, False)}
        others = sorted(given - _KNOWN)
        if others or kwargs.get("return_dict") is False or kwargs.get("use_cache") is False:
            return f"asked for {', '.join(others) or 'another form of result'}"
        return None if self.runner is None else self.changed()

    def _step(
        self,
        *,
        input_ids: torch.Tensor,
        past_key_values: Any,
        position_ids: torch.Tensor,
        attention_mask: Any,
        **_: Any,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        mask = _of_all_layers(attention_mask)
        assert mask is not None
        if self._rows is None or not self._rows.fit(past_key_values, mask):
            self._prepare_for(past_key_values, mask, position_ids, input_ids)
        rows = self._rows
        assert rows is not None
        assert self.runner is not None
        rows.adopt(past_key_values)
        given = rows.given(input_ids, position_ids, mask)
        return CausalLMOutputWithPast(logits=self.runner(**given), past_key_values=past_key_values)

    def _prepare_for(self, cache: Any, mask: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> None:
        from fxpatch.engines.row_cache import RowStep

        length = max(cache.layers[0].max_cache_len, self._length)
        if self._rows is not None:
            log.info(
                "decoding is prepared anew, for a cache of %d tokens: it was prepared for %d, or for another form",
                *(length, self._rows.length),
            )
            self._rows.leave()
        if self.runner is not None:
            self.runner.release()
        rows = max(self._sizes[-1], LEAST + 1)  # of two, a batch of two would be all: no example of a size that changes
        self._rows = Rows(cache, mask, rows, length)
        dynamic = dict.fromkeys(("input_ids", "position_ids", "mask", "real"), 0)
        options = {"clone_outputs": True, **self._options}
        self.runner = PiecewiseRunner(RowStep(self._plain), dynamic=dynamic, sizes=self._sizes, **options)
        two = [torch.cat([each, each])[: max(LEAST, each.shape[0])] for each in (ids, positions, mask)]
        self._plain.training = self._model.training
        self.runner.prepare(**self._rows.given(*two))
        self.snapshot()


def _of_all_layers(mask: Any) -> torch.Tensor | None:
    """The one mask; models that may have several kinds of layers (Qwen2) get one by the kind."""
    if isinstance(mask, Mapping):
        mask = mask["full_attention"] if set(mask) == {"full_attention"} else None
    return mask if isinstance(mask, torch.Tensor) else None
