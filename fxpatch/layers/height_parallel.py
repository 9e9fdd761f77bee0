"""The height of an image split over ranks: each has a band of rows, and asks its neighbours for those a kernel needs.

What the ranks compute together equals what one process computes. Three rules make it so:

- The height is never padded to make it divisible. Zero rows behind the last one do not stay zero: the first bias or
  normalization fills them, the next kernel and every attention read them. (sglang's `split_for_parallel_decode` pads so
  and trims at the end: seed 002; its lower rows differ from one process's.) A world size that does not divide the
  height is an error, or, if asked for, gives ranks bands of different heights. Only a collective is padded.
- Every rank knows every rank's height, so all refuse the same call; a rank that raises alone leaves the others waiting.
- Halos travel by one all_to_all with sizes, which sends to neighbours only, cannot deadlock by its order, has a
  gradient, and is traced without a graph break.

On the CPU the result is the same bit for bit, as far as the convolution's own is: for fp32 it is a matrix product there
(`slow_conv3d`, `thnn_conv2d`), which may add in another order when it has another size. It was seen to (1e-6 in a
decoded video) where a band has fewer than 16 output elements per channel and frame, and in a stride of 2 where bands
are not the same height. Numbers whose sums are exact, such as small integers, are the same always.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

from fxpatch.errors import LayerError
from fxpatch.layers.memory_format import contiguous_for_collective

# Renamed in torch 2.13, where the old name warns; without a gradient before, so it has one of its own name.
_ALL_GATHER = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd


class HeightParallel:
    """How one height is split: which rank has which rows, at every scale of the model.

    Args:
        group: the ranks, in the order of their bands from top to bottom; all of them if None.
        unit: bands are whole multiples of so many rows: 2 to the number of downsamplings that follow.
        uneven: let the upper ranks have a unit more where the world size does not divide the height.
        via: where tensors are brought to be communicated: "cpu", if the group has gloo and the tensors are on a device
            that gloo does not serve. By default they are communicated from where they are.

    Attributes:
        rows: of each rank, at the scale of the last split. Empty before.

    Raises:
        LayerError: torch.distributed is not initialized, or a setting makes no sense.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        unit: int = 1,
        uneven: bool = False,
        via: torch.device | str | None = None,
    ) -> None:
        if isinstance(unit, bool) or not isinstance(unit, int) or unit < 1:
            raise LayerError(
                "Bands are made of whole units of rows.",
                seen=f"unit={unit!r}",
                expected="a number of rows, 1 or more",
                hint="pass 2 to the number of downsamplings that follow the split",
            )
        self.group = _group(group)
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.unit, self.uneven, self.via = unit, uneven, via
        self.rows: tuple[int, ...] = ()

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """The band of this rank out of the whole `[..., H, W]`; later calls of the others refer to this height.

        Args:
            x: the whole, the same on every rank.

        Raises:
            LayerError: on every rank, the world size does not divide the height.
        """
        self.rows = rows_of_ranks(x.shape[-2], self.world, unit=self.unit, uneven=self.uneven)
        return self.own(x)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The band of this rank out of a whole `[..., H', W']`, H' being the height of the last split at any scale.

        Args:
            x: the whole, the same on every rank.

        Raises:
            LayerError: H' is at no scale of the height that was split.
        """
        rows = self._scaled(x.shape[-2], sum(self.rows))
        return x.narrow(-2, sum(rows[: self.rank]), rows[self.rank])

    def rows_at(self, local: int) -> tuple[int, ...]:
        """The rows of each rank at the scale at which this one has `local` of them."""
        return self._scaled(local, self.rows[self.rank] if self.rows else 0)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The whole `[..., H', W']` out of the bands of all ranks, on every rank.

        Args:
            x: this rank's band.
        """
        return gather_and_trim_height(x, self.rows_at(x.shape[-2]), self.group, via=self.via)

    def _scaled(self, size: int, base: int) -> tuple[int, ...]:
        if not base or any(rows * size % base for rows in self.rows):
            raise LayerError(
                "A height is at no scale of the one that was split.",
                seen=f"{size} rows, where the ranks' bands began with {list(self.rows) or 'no split'}",
                expected="a multiple or a fraction of it that is whole on every rank",
                hint="split the input with the same HeightParallel first, with unit=2 to the number of downsamplings",
            )
        return tuple(rows * size // base for rows in self.rows)


def rows_of_ranks(height: int, world: int, *, unit: int = 1, uneven: bool = False) -> tuple[int, ...]:
    """How many rows each rank has.

    Args:
        height: all rows.
        world: how many ranks.
        unit, uneven: as of `HeightParallel`.

    Raises:
        LayerError: the world size does not divide the height into whole units, or with `uneven`, there are fewer units
            than ranks.
    """
    units, rest = height // unit, height % unit  # Dynamo has no divmod of a dynamic height
    if rest or units < world or (units % world and not uneven):
        if rest:
            hint = (
                f"make the height a multiple of {unit}: each rank has whole units, which the model shrinks to one row"
            )
        elif units < world:
            hint = "use fewer ranks"
        else:
            hint = "use HeightParallel(uneven=True), which gives the upper ranks more rows, or another number of ranks"
        raise LayerError(
            "A world size that does not divide the height cannot share it.",
            seen=f"height {height}, {world} ranks" + (f", units of {unit} rows" if unit > 1 else ""),
            expected=f"a multiple of {unit}, {world * unit} at least" if uneven else f"a multiple of {world * unit}",
            hint=hint,
        )
    each, more = units // world, units % world
    return tuple((each + (rank < more)) * unit for rank in range(world))


def gather_and_trim_height(
    x: torch.Tensor,
    rows: Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    via: torch.device | str | None = None,
) -> torch.Tensor:
    """The whole height out of the bands of all ranks, on every rank.

    Bands that are lower than the highest one are padded for the collective, and trimmed behind it. The tensor is made
    contiguous once, for the collective.

    Args:
        x: `[..., rows[rank], W]`.
        rows: of each rank.
        group: all ranks if None.
        via: as in `HeightParallel`.

    Returns:
        `[..., sum(rows), W]`, contiguous.

    Raises:
        LayerError: `rows` says something else of this rank's band, or of the number of ranks. (On this rank only:
            `HeightParallel.gather` knows the rows of all.)
    """
    group = _group(group)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(rows) != world or x.shape[-2] != rows[rank]:
        raise LayerError(
            "The bands of the ranks do not make up the height.",
            seen=f"{x.shape[-2]} rows on rank {rank} of {world}, rows {list(rows)}",
            expected=f"one number for each rank, {x.shape[-2]} for rank {rank}",
            hint="give the rows of each rank at this point of the model: HeightParallel.gather does",
        )
    if world == 1:
        return x
    highest = max(rows)
    if rows[rank] != highest:
        x = nn.functional.pad(x, (0, 0, 0, highest - rows[rank]))
    sent = contiguous_for_collective(x.unsqueeze(0))
    bands = funcol.wait_tensor(_ALL_GATHER(sent.to(via or x.device), 0, group)).to(x.device)
    return torch.cat([bands[i].narrow(-2, 0, each) for i, each in enumerate(rows)], dim=-2)


def exchange_halo(
    x: torch.Tensor,
    above: int,
    below: int,
    group: dist.ProcessGroup,
    *,
    via: torch.device | str | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The last `above` rows of the rank before, and the first `below` rows of the rank after; None at the borders.

    Args:
        x: `[..., H, W]`, H at least `above` and `below` on every rank, all other sizes the same on all.
        via: as in `HeightParallel`.
        above, below: rows, 0 or more, the same on all ranks.
        group: the ranks, from top to bottom.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    first, last = rank == 0, rank == world - 1
    send, receive = [0] * world, [0] * world
    parts = []
    if not first:
        send[rank - 1], receive[rank - 1] = below, above
        parts.append(x.narrow(-2, 0, below))
    if not last:
        send[rank + 1], receive[rank + 1] = above, below
        parts.append(x.narrow(-2, x.shape[-2] - above, above))
    sent = contiguous_for_collective(torch.cat(parts, dim=-2).movedim(-2, 0))
    # waited for here, since a rank that receives nothing would never use it, and torch would keep it for ever
    got = funcol.wait_tensor(funcol.all_to_all_single_autograd(sent.to(via or x.device), receive, send, group))
    got = got.to(x.device).movedim(0, -2)
    upper, lower = (0 if first else above), (0 if last else below)
    return (
        got.narrow(-2, 0, upper) if upper else None,
        got.narrow(-2, upper, lower) if lower else None,
    )


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """All ranks if None."""
    if not dist.is_initialized():
        raise LayerError(
            "There are no ranks to split a height over.",
            seen="torch.distributed is not initialized",
            expected="a process group",
            hint="call torch.distributed.init_process_group first, or start the program with torchrun",
        )
    chosen = dist.group.WORLD if group is None else group
    assert chosen is not None
    return chosen
