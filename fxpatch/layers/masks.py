"""Boolean attention masks of decoders: causal, sliding-window and padding, combined by logic.

The problem: models build additive float masks, 0 and -inf. They cost more kernels, and have to match the query's dtype
(Ascend: "Expected attn_mask dtype to be bool or to match query dtype"). The rule: a mask is bool, True where a query
may look, `[queries, keys]`, or `[batch, 1, queries, keys]` once there is padding; it is what
`scaled_dot_product_attention` takes on every device. (An attention that adds its mask to the scores, such as
transformers' eager one, would take True for 1 without a word: never give it a boolean mask.)

A causal mask is two kernels and a sliding window three (ones, tril, triu), where the float versions take four and
eight; padding adds one, and two there. Nothing here reads a value: no graph break, and lengths may be dynamic.

Rows that see nothing (a padded query on the left of its sequence) stay all False, as in transformers: torch's own
attention gives zeros for them, and finite gradients. A softmax written by hand over -inf gives NaN, and so may a
vendor's kernel; the next layer's values are then NaN, and weight 0 times NaN reaches the real tokens. For these,
`sees_itself=True` lets every query look at itself: rows of real queries do not change, since they did so before.

Source: SGLang #24798 (gemma2.py), and transformers' masking_utils, which is right where that is not: its window has
`dist = key - query; dist > window`, which only excludes keys that the causal mask has excluded already. A window of w
is a query itself and the w - 1 keys before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxpatch.errors import LayerError

Position = int | Tensor


def causal_mask(
    queries: int,
    keys: int | None = None,
    *,
    first_query: Position = 0,
    first_key: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """`[queries, keys]`: True where the key is not behind the query.

    Args:
        queries: number of tokens that look.
        keys: number of tokens that are looked at; those of the queries if None.
        first_query: position of the first query in its sequence. With a KV cache, the tokens before it. An int64 tensor
            without dimensions (a static cache counts on the device) costs two kernels more, and no synchronisation.
        first_key: position of the first key: a cache that slides has dropped those before it.
        device: of the mask; that of a tensor `first_query`, or torch's default device if None.

    Raises:
        LayerError: no queries or keys; a query whose own key is not among the keys.
    """
    return _band(queries, keys, None, first_query, first_key, device)


def sliding_window_mask(
    queries: int,
    window: int,
    keys: int | None = None,
    *,
    first_query: Position = 0,
    first_key: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """`[queries, keys]`: True for the query itself and the `window - 1` keys before it; see `causal_mask`.

    Args:
        queries, keys, first_query, first_key, device: as of `causal_mask`.
        window: keys that a query sees, itself included.

    Raises:
        LayerError: a window that is not an int of at least 1; what `causal_mask` refuses.
    """
    _check_window(window)
    return _band(queries, keys, window, first_query, first_key, device)


def padding_mask(padding: Tensor, keys: int | None = None) -> Tensor:
    """`[batch, 1, 1, keys]`, a view: True for real tokens.

    Args:
        padding: `[batch, keys]`, bool, or integers of which those that are not 0 are real (tokenizers' 0 and 1).
        keys: how many there have to be.

    Raises:
        LayerError: another rank, a float dtype (0 may be "real" there), no sequence, another number of keys.
    """
    if padding.dim() != 2:
        raise LayerError(
            "A padding mask has one row per sequence and one column per key.",
            seen=f"shape {_shape(padding)}",
            expected="[batch, keys]",
            hint="a mask per query is no padding mask: combine it with & yourself",
        )
    if padding.is_floating_point() or padding.is_complex():
        raise LayerError(
            "A padding mask is True, or not 0, for real tokens.",
            seen=f"{padding.dtype}",
            expected="torch.bool, or an integer dtype",
            hint="is it additive, 0 for real tokens and -inf for padding? then pass `mask == 0`; otherwise `mask != 0`",
        )
    if padding.shape[0] == 0:
        raise LayerError(
            "There is no mask for an empty batch.",
            seen=f"shape {_shape(padding)}",
            expected="at least one sequence",
            hint="leave the call out",
        )
    if keys is not None and padding.shape[1] != keys:
        raise LayerError(
            "The padding mask has to tell of every key.",
            seen=f"{padding.shape[1]} columns",
            expected=f"{keys}, of position 0 to the last key's",
            hint="with a KV cache it covers the cached tokens and the new ones; what a static cache has not written "
            "yet is False: torch.nn.functional.pad(padding, (0, missing))",
        )
    real = padding if padding.dtype is torch.bool else padding != 0
    return real[:, None, None, :]


def decoder_mask(
    queries: int,
    keys: int | None = None,
    *,
    window: int | None = None,
    padding: Tensor | None = None,
    first_query: Position = 0,
    first_key: int = 0,
    sees_itself: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of a decoder's layer: causal, within a window if there is one, and of real tokens if padding is given.

    Args:
        queries, keys, first_query, first_key: see `causal_mask`.
        window: see `sliding_window_mask`; None for a layer with full attention.
        padding: `[batch, first_key + keys]`: see `padding_mask`. It counts from position 0.
        sees_itself: a query looks at itself even where it is padding, so that no row is all False (two kernels more).
        device: of the mask; padding's if None.

    Returns:
        bool `[queries, keys]`, or with padding `[batch, 1, queries, keys]`; True where a query may look.

    Raises:
        LayerError: what `causal_mask`, `sliding_window_mask` and `padding_mask` refuse; two devices.
    """
    if window is not None:
        _check_window(window)
    keys = queries if keys is None else keys
    if padding is not None:
        real = padding_mask(padding, first_key + keys)[..., first_key:]
        if device is not None and torch.empty(0, device=device).device != padding.device:
            raise LayerError(
                "The padding mask is not where the attention mask is to be.",
                seen=f"padding on {padding.device}, device={device}",
                expected="one device",
                hint="move the padding mask there, or leave device out",
            )
        device = padding.device
    band = _band(queries, keys, window, first_query, first_key, device)
    if padding is None:
        return band
    if sees_itself:  # a window of one key is the diagonal
        real = real | _band(queries, keys, 1, first_query, first_key, device)
    return band & real


def check_padding_side(padding: Tensor, side: str) -> None:
    """Refuses padding that is not all on one side. It reads values: call it before compiled code, not in it.

    Args:
        padding: `[batch, keys]`, as in `padding_mask`.
        side: where padding may be: "left" or "right".

    Raises:
        LayerError: padding elsewhere, with the first such row; an unknown side; what `padding_mask` refuses.
    """
    if side not in ("left", "right"):
        raise LayerError(
            "Padding is on one of two sides.", seen=repr(side), expected="'left' or 'right'", hint="name one of them"
        )
    real = padding_mask(padding)[:, 0, 0]
    step = real[:, :-1].int() - real[:, 1:].int()  # 1 where padding follows, -1 where a real token follows
    wrong = (step > 0 if side == "left" else step < 0).any(1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise LayerError(
            f"Padding has to be on the {side}.",
            seen=f"row {row}: {''.join('x' if each else '.' for each in real[row, :64].tolist())} (x is a real token)",
            expected="padding ......xx" if side == "left" else "xx...... padding",
            hint=f"tokenize with padding_side={side!r}, or give the attention a full mask",
        )


def _band(
    queries: int,
    keys: int | None,
    window: int | None,
    first_query: Position,
    first_key: int,
    device: torch.device | str | None,
) -> Tensor:
    keys = queries if keys is None else keys
    _check_lengths(queries, keys, first_query, first_key)
    if isinstance(first_query, Tensor):
        device = first_query.device if device is None else device
        ahead = torch.arange(first_key, first_key + keys, device=device)
        ahead = ahead - (torch.arange(queries, device=device)[:, None] + first_query)
        visible = ahead <= 0
        return visible if window is None else visible & (ahead > -window)
    shift = first_query - first_key
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(shift)
    return visible if window is None else visible.triu(shift - window + 1)


def _check_window(window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)) or window < 1:
        raise LayerError(
            "A sliding window is a number of keys, and a query always sees itself.",
            seen=f"window={window!r}",
            expected="an int of at least 1",
            hint="window=None is full attention; a configuration's 0 or -1 often means that",
        )


def _check_lengths(queries: int, keys: int, first_query: Position, first_key: int) -> None:
    if queries < 1 or keys < 1:
        raise LayerError(
            "There is no mask for no tokens.",
            seen=f"{queries} queries, {keys} keys",
            expected="at least one of each",
            hint="leave the call out",
        )
    if isinstance(first_query, Tensor) and first_key >= 0:
        if first_query.dim() != 0 or first_query.dtype not in (torch.int64, torch.int32):
            raise LayerError(
                "The first query's position is one integer, the same for all sequences.",
                seen=f"{first_query.dtype} of shape {_shape(first_query)}",
                expected="an int, or an int64 tensor without dimensions",
                hint="sequences that are not equally long are padded on the left: say it with padding",
            )
    elif first_key < 0 or first_query < first_key or first_query + queries > first_key + keys:
        raise LayerError(
            "Each query's own key has to be among the keys.",
            seen=f"queries at {first_query} to {first_query + queries - 1}, "
            f"keys at {first_key} to {first_key + keys - 1}",
            expected="0 <= first_key <= first_query, and no query behind the last key",
            hint="with a KV cache: keys = cached tokens + queries, first_query = cached tokens",
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
