"""Drawing the arguments of a call: one description of an operator's valid calls, many ways to choose among them.

A record of a fake kernel has one function, `arguments(draw)`. Every free decision in it is made by `draw.choice`, so
the same function gives random calls (`RandomDraw`), Hypothesis' calls that shrink (`fxpatch.testing`), and the same
call once more with other sizes (`Draw.again`), which is how a fake kernel is checked under symbolic sizes.

Two kinds of decision are told apart: what is a size (`size`, and so may be a symbol in a graph), and everything else
(ranks, flags, dtypes, layouts, integers in a schema), which a graph has as constants.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
_SIZES = (3, 4, 2, 5, 1, 0, 7, 8)
_LAYOUTS = ("contiguous", "transposed", "strided", "offset")


class Draw(ABC):
    """Chooses.

    Args:
        device: where tensors are made.
        smallest: no size, and no number of groups in one, is below it; 2 keeps away from 0 and 1, for which graphs are
            specialised.
    """

    def __init__(self, device: str = "cpu", smallest: int = 0) -> None:
        self.device, self.smallest = device, smallest
        self.decisions: list[Any] = []  # what was chosen that is not a size, in order
        self._values = torch.Generator().manual_seed(0)

    @abstractmethod
    def _choose(self, options: Sequence[T]) -> T: ...

    def again(self, seed: int) -> Draw:
        """A draw that decides as this one has, apart from the sizes.

        Args:
            seed: of the sizes and values.
        """
        return _Again(seed, self)

    def choice(self, *options: T) -> T:
        """One of `options`; put the plainest first. For whatever a graph would have as a constant."""
        chosen = self._choose(options)
        self.decisions.append(chosen)
        return chosen

    def flag(self) -> bool:
        """False or True."""
        return self.choice(False, True)

    def size(self, *, least: int = 0, most: int = 8, times: int = 1) -> int:
        """A size between `least` and `most` (often 0 or 1, odd, even), times `times`."""
        least = max(least, min(self.smallest, most))
        options = [size for size in _SIZES if least <= size <= most]
        return times * self._choose(options or range(least, most + 1))

    def sizes(self, count: int, **limits: int) -> tuple[int, ...]:
        """So many sizes.

        Args:
            count: how many.
            limits: as of `size`.
        """
        return tuple(self.size(**limits) for _ in range(count))

    def shape(self, least: int = 1, most: int = 4) -> tuple[int, ...]:
        """Between `least` and `most` sizes."""
        return self.sizes(self.choice(*range(least, most + 1)))

    def floats(self, *shape: int, dtype: torch.dtype, layout: str | None = None, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed values times `scale`; in a drawn layout, unless the kernel demands one.

        Args:
            shape: of the tensor.
            dtype: a floating one.
            layout: `"contiguous"` where the kernel demands it; None to draw one.
        """
        values = torch.randn(shape, generator=self._values) * scale
        return self.placed(values.to(dtype), layout)

    def integers(
        self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64, layout: str | None = None
    ) -> torch.Tensor:
        """Integers from `low` to below `high`.

        Args:
            shape: of the tensor.
            dtype: an integral one.
            layout: as of `floats`.
        """
        values = torch.randint(low, max(high, low + 1), shape, generator=self._values)
        return self.placed(values.to(dtype), layout)

    def permutation(self, count: int, *, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """The numbers below `count` in some order.

        Args:
            dtype: an integral one.
        """
        return torch.randperm(count, generator=self._values).to(dtype).to(self.device)

    def there(self, values: torch.Tensor) -> torch.Tensor:
        """`values` on the device, as they lie in memory; `.to` keeps strides only where nothing is left out."""
        memory = values.untyped_storage()
        whole = torch.empty(0, dtype=values.dtype).set_(memory, 0, (memory.nbytes() // values.element_size(),), (1,))
        return whole.to(self.device).as_strided(values.shape, values.stride(), int(values.storage_offset()))

    def placed(self, values: torch.Tensor, layout: str | None = None) -> torch.Tensor:
        """`values` on the device, in `layout` or a drawn one: contiguous, transposed (the last two dimensions lie the
        other way round), strided (every other element of the last dimension), or offset (not at the beginning)."""
        options = (
            _LAYOUTS if values.dim() > 1 else ("contiguous", "strided", "offset") if values.dim() else ("contiguous",)
        )
        layout = layout or self.choice(*options)
        values = values.to(self.device)
        if layout == "transposed":
            return values.transpose(-2, -1).contiguous().transpose(-2, -1)
        if layout == "contiguous":
            return values.contiguous()
        if layout == "strided":
            part = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1]))[..., ::2]
        else:
            part = values.new_zeros(values.numel() + 1)[1:].view(values.shape)
        return part.copy_(values)


class RandomDraw(Draw):
    """Chooses by a seed.

    Args:
        seed: of all choices.
        device, smallest: as of `Draw`.
    """

    def __init__(self, seed: int, device: str = "cpu", smallest: int = 0) -> None:
        super().__init__(device, smallest)
        self._random = random.Random(seed)

    def _choose(self, options: Sequence[T]) -> T:
        return self._random.choice(options)


class _Again(RandomDraw):
    def __init__(self, seed: int, first: Draw) -> None:
        super().__init__(seed, first.device, first.smallest)
        self._rest = list(reversed(first.decisions))

    def choice(self, *options: T) -> T:
        if not self._rest:
            raise TypeError("arguments(draw) decides more often for other sizes: draw decisions before sizes")
        chosen: T = self._rest.pop()
        self.decisions.append(chosen)
        return chosen
