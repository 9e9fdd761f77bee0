"""Ascend's fused step of latent attention: norm one part of `kv`, turn the other, write both to the caches.

`npu_kv_rmsnorm_rope_cache` writes both caches and returns them, and its schema says neither; `..._v2` is the same
kernel with an honest schema, and without the caches among its results. Prefer that one: the first can only be traced
through a shadow operator.

Given `v` with a last dimension of 128, op-plugin takes CANN's second version (kept apart: `kv` is the key of 192, all
of it normed, the first 64 then turned; `v` goes into the other cache as it is), if the installed CANN has it; these
fakes suppose that it has. Any other `v` is ignored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fake_kernels.drawing import HALVES, Draw
from fake_kernels.kernel import Call, fake_kernel

_SOURCE = (
    "Ascend/op-plugin op_plugin/ops/opapi/KvRmsNormRopeCacheNpuOpApi.cpp; "
    "CANN posembedding/kv_rms_norm_rope_cache/docs/aclnnKvRmsNormRopeCacheV2.md"
)
_DENSE = ("contiguous", "transposed", "offset")
_KEY, _VALUE, _TURNED = 192, 128, 64  # of CANN's second version


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even, odd), -1) * cos.float() + torch.cat((-odd, even), -1) * sin.float()


def _computed(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, v: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    if kv.dim() != 4 or gamma.dim() != 1 or cos.dim() != 4:
        raise ValueError(f"dimensions of {tuple(kv.shape)}, {tuple(gamma.shape)} or {tuple(cos.shape)}")
    normed, rest = kv.float().split([gamma.shape[0], kv.shape[-1] - gamma.shape[0]], -1)
    normed = normed * (normed.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gamma.float()
    if v is None or v.dim() != 4 or v.shape[-1] != _VALUE:
        return _turned(rest, cos, sin), normed
    turned = cos.shape[-1]
    return torch.cat((_turned(normed[..., :turned], cos, sin), normed[..., turned:]), -1), v.float()


def _store(
    cache: Tensor, values: Tensor, index: Tensor, mode: str, scale: Tensor | None, offset: Tensor | None
) -> None:
    """Writes `values` `[B, N, S, D]` where `index` says; -1 skips."""
    if scale is not None:
        values = values * scale[..., :, None, :] if scale.dim() == 2 else values * scale
        offset = offset[..., :, None, :] if offset is not None and offset.dim() == 2 else offset
        values = (values + (offset if offset is not None else 0)).round().clamp(-128, 127)
    rows = values.transpose(1, 2).to(cache.dtype)  # [B, S, N, D]
    at = index.reshape(rows.shape[:2])
    wanted = at >= 0
    if mode == "Norm":
        cache[wanted.nonzero()[:, 0], :, at[wanted]] = rows[wanted]
    elif mode in ("PA", "PA_BNSD"):
        cache[at[wanted] // cache.shape[1], at[wanted] % cache.shape[1]] = rows[wanted]
    else:
        raise NotImplementedError(f"the reference does not know how a cache of the mode {mode} lies in memory")


def _v2(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    k_rope, c_kv = _computed(kv, gamma, cos, sin, v, epsilon)
    _store(k_cache, k_rope, index, cache_mode, k_rope_scale, k_rope_offset)
    _store(ckv_cache, c_kv, index, cache_mode, c_kv_scale, c_kv_offset)
    written = 1.0 if is_output_kv else 0.0  # the kernel leaves them as allocated otherwise
    return (k_rope.to(kv.dtype) * written).contiguous(), (c_kv.to(kv.dtype) * written).contiguous()


def _v1(*args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k_rope, c_kv = _v2(*args, **kwargs)  # type: ignore[arg-type]
    return args[5], args[6], k_rope, c_kv


def _arguments(draw: Draw) -> Call:
    dtype, mode, apart = draw.choice(*HALVES), draw.choice("Norm", "PA_BNSD", "PA"), draw.flag()
    heads, quantised, is_output_kv = draw.choice(1, 2) if apart else 1, draw.flag(), draw.flag()
    per_token, v_ignored = draw.flag(), draw.flag()
    layouts = [draw.choice(*_DENSE) for _ in range(2)]
    b, s, spare = *draw.sizes(2, least=1), draw.size()
    normed, turned = (_KEY, _TURNED) if apart else (draw.size(least=1), draw.size(least=1, times=2))
    key, value = (_KEY, _VALUE) if apart else (turned, normed)
    if mode == "Norm":
        cache, index = (b + spare, heads, s + spare), torch.stack([draw.permutation(s + spare)[:s] for _ in range(b)])
    else:
        block = draw.size(least=1)
        cache, index = (b * s + spare, block, heads), draw.permutation((b * s + spare) * block)[: b * s]
    index[..., -1:] = -1  # one is not to be written
    stored = torch.int8 if quantised else dtype
    caches = [
        draw.placed(torch.zeros(*cache, width, dtype=stored), layout)
        for width, layout in zip((key, value), layouts, strict=True)
    ]
    angles = [draw.floats(b, 1, s if per_token else 1, turned, dtype=dtype) for _ in range(2)]
    kv = draw.floats(b, heads, s, _KEY if apart else normed + turned, dtype=dtype)
    kwargs: dict[str, object] = {"cache_mode": mode, "is_output_kv": is_output_kv}
    if quantised:
        kwargs["k_rope_scale"] = draw.floats(heads, key, dtype=torch.float32)
        kwargs["c_kv_scale"] = draw.floats(heads, value, dtype=torch.float32)
        kwargs["c_kv_offset"] = draw.floats(heads, value, dtype=torch.float32)
    if apart or v_ignored:
        kwargs["v"] = draw.floats(b, heads, s, _VALUE if apart else 2, dtype=dtype)
    index = draw.placed(index)
    return (kv, draw.floats(normed, dtype=dtype), *angles, index, *caches), kwargs


def _bad(place: int) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        half = torch.float16
        kv, gamma, cos = (draw.floats(*shape, dtype=half) for shape in ((2, 1, 3, 6), (4,), (2, 1, 3, 2)))
        args = [kv, gamma, cos, cos, torch.zeros(2, 3, dtype=torch.int64, device=draw.device)]
        args += [torch.zeros(2, 1, 5, width, dtype=half, device=draw.device) for width in (2, 4)]
        args[place] = args[place][None]
        return tuple(args), {}

    return call


_REFUSES = {"kv has to have 4": _bad(0), "gamma has to have 1": _bad(1), "cos has to have 4": _bad(2)}


def _outputs(kv: Tensor, gamma: Tensor, cos: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    for name, tensor, dims in (("kv", kv, 4), ("gamma", gamma, 1), ("cos", cos, 4)):
        words = f"{name} has to have {dims} dimension(s), and has {tensor.dim()}"
        torch._check(tensor.dim() == dims, lambda words=words: words)
    apart = v is not None and v.dim() == 4 and v.shape[3] == _VALUE
    key, value = (_KEY, _VALUE) if apart else (cos.shape[3], gamma.shape[0])
    return kv.new_empty((*kv.shape[:3], key)), kv.new_empty((*kv.shape[:3], value))


@fake_kernel(
    "npu::npu_kv_rmsnorm_rope_cache(Tensor kv, Tensor gamma, Tensor cos, Tensor sin, Tensor index, Tensor k_cache, "
    "Tensor ckv_cache, *, Tensor? k_rope_scale=None, Tensor? c_kv_scale=None, Tensor? k_rope_offset=None, "
    "Tensor? c_kv_offset=None, Tensor? v=None, float epsilon=1.0000000000000001e-05, "
    'str cache_mode="Norm", bool is_output_kv=False) -> (Tensor, Tensor, Tensor, Tensor)',
    reference=_v1,
    source=_SOURCE,
    library="torch_npu",
    arguments=_arguments,
    refuses=_REFUSES,
    writes=("k_cache", "ckv_cache"),
    returns_arguments={0: "k_cache", 1: "ckv_cache"},
)
def kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes both caches and returns `(k_cache, ckv_cache, k_rope, c_kv)`: neither is in the schema.

    `kv` `[B, N, S, Dv + Dk]`, float16 or bfloat16; `gamma` `[Dv]`; `cos`, `sin` `[B, 1, S or 1, Dk]`; `index` int64, -1
    where nothing is to be written: `[B, S]` for caches `[B', N, S', D]` (`Norm`), `[B * S]` for paged ones `[blocks,
    block size, N, D]`. The caches have kv's dtype, or int8 with scales `[N, D]`. `k_rope` is `[B, N, S, Dk]`, `c_kv`
    `[B, N, S, Dv]`, both of kv's dtype and contiguous, and uninitialised unless `is_output_kv`.
    """
    return k_cache, ckv_cache, *_outputs(kv, gamma, cos, v)


@fake_kernel(
    "npu::npu_kv_rmsnorm_rope_cache_v2(Tensor kv, Tensor gamma, Tensor cos, Tensor sin, Tensor index, "
    "Tensor(a!) k_cache, Tensor(b!) ckv_cache, *, Tensor? k_rope_scale=None, Tensor? c_kv_scale=None, "
    "Tensor? k_rope_offset=None, Tensor? c_kv_offset=None, Tensor? v=None, float epsilon=1.0000000000000001e-05, "
    'str cache_mode="Norm", bool is_output_kv=False, int? k_cache_dtype=None, int? ckv_cache_dtype=None) '
    "-> (Tensor, Tensor)",
    reference=_v2,
    source=_SOURCE,
    library="torch_npu",
    arguments=_arguments,
    refuses=_REFUSES,
)
def kv_rmsnorm_rope_cache_v2(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, returning `(k_rope, c_kv)`; the caches are declared as written. What the last two arguments do was
    added after the version of the kernel that could be read."""
    return _outputs(kv, gamma, cos, v)


KERNELS = (kv_rmsnorm_rope_cache, kv_rmsnorm_rope_cache_v2)
