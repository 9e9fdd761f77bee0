"""A cache for transformers' models in which each sequence of a batch has a row, and rows that only fill a captured size
up do no harm: what they would write, the first row writes again.

Imported only where transformers is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class RowLayer(CacheLayerMixin):
    """One layer's, for one step of one token per row.

    Args:
        keys, values: `[rows, heads, length, size]`, written to.
        length: how many tokens each row holds, a number on the device, `[]` int64; one more after the step.
        stored: for each of the n rows of the batch the row whose token it stores, `[n]` int64.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, stored: torch.Tensor) -> None:
        super().__init__()
        self.all_keys, self.all_values, self.length, self.stored = keys, values, length, stored
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to be made."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores `[n, heads, 1, size]` and returns the first n rows."""
        place = self.length.expand(self.stored.shape[0])
        self.all_keys[self.stored, :, place] = key_states[self.stored, :, 0]
        self.all_values[self.stored, :, place] = value_states[self.stored, :, 0]
        self.length.add_(1)
        n = key_states.shape[0]
        return self.all_keys[:n], self.all_values[:n]

    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]
        """How many tokens there are, on the device, as of transformers' own static layers."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is attended to."""
        return self.all_keys.shape[2], 0

    def get_max_length(self) -> int:
        """Of a sequence."""
        return self.all_keys.shape[2]


def row_cache(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], lengths: Sequence[torch.Tensor], stored: torch.Tensor
) -> Cache:
    """A cache of such layers."""
    return Cache(layers=[RowLayer(*each, stored) for each in zip(keys, values, lengths, strict=True)])


class RowStep(torch.nn.Module):
    """One token of each of n sequences, to their logits `[n, 1, vocabulary]`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        real: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        lengths: list[torch.Tensor],
    ) -> torch.Tensor:
        """
        Args:
            input_ids, position_ids: `[n, 1]` int64.
            mask: `[n, 1, 1, length]`, bool or added to the scores.
            real: `[n]` bool, False for rows that only fill a size up.
            keys, values, lengths: of each layer, as of `RowLayer`; written to.
        """
        stored = torch.where(real, torch.arange(real.shape[0], device=real.device), 0)
        cache = row_cache(keys, values, lengths, stored)
        out = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return out.logits  # type: ignore[no-any-return]
