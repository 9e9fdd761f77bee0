"""The memory of captured decoding: a static cache of transformers' is moved into it, and out of it again.

While a cache is here its layers are views of this memory, so that whoever reads or writes them, the model's own code
included, reads and writes what the graphs do. One cache at a time is here.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch


class Rows:
    """The memory that graphs read and write: for each layer keys and values `[rows, heads, length, size]`, and how many
    tokens there are.

    Args:
        cache: an initialized static cache, of the same layers.
        mask: of a step, of the same dtype.
        rows, length: how many.
    """

    def __init__(self, cache: Any, mask: torch.Tensor, rows: int, length: int) -> None:
        def empty(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(rows, like.shape[1], length, like.shape[3])

        self.length = length
        self._mask = mask.dtype
        with torch.inference_mode(False):  # graphs write to it in any mode
            self.keys = [empty(layer.keys) for layer in cache.layers]
            self.values = [empty(layer.values) for layer in cache.layers]
            self.lengths = [layer.cumulative_length.new_zeros(()) for layer in cache.layers]
            self._real = torch.ones(rows, dtype=torch.bool, device=self.keys[0].device)
        self._cache: weakref.ref[Any] | None = None

    def fit(self, cache: Any, mask: torch.Tensor) -> bool:
        """Whether a cache can be moved here, and its steps be those of the graphs: other attention, other masks."""
        return mask.dtype == self._mask and bool(cache.layers[0].max_cache_len <= self.length)

    def given(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """The arguments of a step."""
        missing = self.length - mask.shape[3]
        if missing:
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = torch.nn.functional.pad(mask, (0, missing), value=hidden)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "mask": mask,
            "real": self._real[: ids.shape[0]],
            "keys": self.keys,
            "values": self.values,
            "lengths": self.lengths,
        }

    def adopt(self, cache: Any) -> None:
        """Moves a cache here, unless it is here. Who has reordered his cache, has it elsewhere again."""
        if self._cache is not None and self._cache() is not cache:
            self.leave()
        for layer, keys, values, length in zip(cache.layers, self.keys, self.values, self.lengths, strict=True):
            if layer.keys.data_ptr() == keys.data_ptr() and layer.cumulative_length is length:
                continue
            n, tokens = layer.keys.shape[0], layer.keys.shape[2]
            for own, theirs in ((keys, layer.keys), (values, layer.values)):
                own[:n, :, :tokens].copy_(theirs)
            layer.keys, layer.values = keys[:n, :, :tokens], values[:n, :, :tokens]
            layer.cumulative_length = length.copy_(layer.cumulative_length)
        self._cache = weakref.ref(cache)

    def leave(self) -> None:
        """Gives the cache that is here memory of its own."""
        cache = None if self._cache is None else self._cache()
        layers = () if cache is None else cache.layers
        for layer, keys in zip(layers, self.keys, strict=False):
            if layer.keys.data_ptr() == keys.data_ptr():
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
                layer.cumulative_length = layer.cumulative_length.clone()
        self._cache = None
