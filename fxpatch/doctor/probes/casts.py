"""Do values survive the way to the device, from dtype to dtype, and back? Compared with the CPU to the last bit."""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import Differs, expect, in_words, listed, run_all, same_bits
from fxpatch.doctor.probes.presence import needs_accelerator

REQUIRED = (torch.float32, torch.float16, torch.bool, torch.int32, torch.int64, torch.uint8)
OPTIONAL = (
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_SMALL = [0.0, 1.0, 2.0, 3.0, 7.0, 100.0, 127.0]  # exact in every dtype but float8, and defined in every cast
_SIGNED = [-1.0, -2.0, -100.0, 0.5, -1.5, 0.1]
_LARGE = [2**31 - 1, 2**31, 2**53, 2**53 + 1, -(2**53) - 1, 2**62 + 1, -(2**63), 2**63 - 1]


def host_values(dtype: torch.dtype, to: torch.dtype | None = None) -> torch.Tensor:
    """Values of a dtype on the CPU: exact ones, ones that have to be rounded, large ones, and for copies special ones.

    Args:
        dtype: theirs.
        to: what they will be cast to, which leaves out values whose cast is undefined; None: they will be copied.
    """
    signed = dtype.is_signed and (to is None or to.is_signed or to is torch.bool)
    values = torch.tensor([*_SMALL, *(_SIGNED if signed else [])], dtype=torch.float64).to(dtype)
    if dtype is torch.int64 and (to is None or to is torch.float64 or to is torch.float32):
        values = torch.cat([values, torch.tensor(_LARGE)])
    if to is None and (dtype.is_floating_point or dtype.is_complex):
        values = torch.cat([values, special_values(dtype)])
    return values


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """NaN, both infinities, both zeros, the largest, the smallest normal and the smallest denormal value of a dtype, as
    far as it has them."""
    real = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    limits = torch.finfo(real)
    each = [math.nan, math.inf, -math.inf, 0.0, -0.0, limits.max, -limits.max, limits.tiny, limits.smallest_normal / 4]
    return torch.tensor(each, dtype=torch.float64).to(real).to(dtype)


def _supported(device: str) -> tuple[list[torch.dtype], list[str]]:
    """The dtypes that the device takes, and those that it refuses, with its words."""
    taken, refused = [], []
    for dtype in (*REQUIRED, *OPTIONAL):
        try:
            torch.zeros(2, dtype=dtype).to(device)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if dtype in REQUIRED:
                raise Broken(f"{_name(dtype)} is refused: {in_words(error)}") from error
            refused.append(_name(dtype))
        else:
            taken.append(dtype)
    return taken, refused


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(got: torch.Tensor, want: torch.Tensor, what: str) -> str:
    """What is wrong with a tensor that came back from the device, in words."""
    if got.dtype is not want.dtype:
        return f"{what} comes as {_name(got.dtype)}"
    back = got.cpu()
    if back.dtype is not want.dtype:
        return f"{what} comes back as {_name(back.dtype)}"
    if same_bits(back, want):
        return ""
    place = next(n for n in range(len(want)) if not same_bits(back[n : n + 1], want[n : n + 1]))
    return f"{what} gives {back[place].item()!r} where the CPU has {want[place].item()!r}"


def _casts(subject: Subject) -> str:
    needs_accelerator(subject)
    dtypes, refused = _supported(subject.device)
    wrong, pairs, without = [], 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a cast from complex drops the imaginary part
        for source in dtypes:
            for target in dtypes:
                if source is target:
                    continue
                host = host_values(source, target)
                what = f"{_name(source)} to {_name(target)}"
                try:
                    cast = host.to(subject.device).to(target)
                    at_once = host.to(subject.device, target)
                except (RuntimeError, TypeError, NotImplementedError) as error:
                    if source in REQUIRED and target in REQUIRED:
                        wrong.append(f"{what}: {in_words(error)}")
                    without.append(what)
                    continue
                pairs += 1
                want = host.to(target)
                wrong += filter(None, (_check(cast, want, what), _check(at_once, want, f"{what} while copying")))
    if wrong:
        raise Broken(listed(wrong))
    found = f"{pairs} casts between {len(dtypes)} dtypes, as on the CPU"
    return found + _not_there(refused, without)


def _not_there(refused: list[str], without: list[str]) -> str:
    said = [f"without {', '.join(refused)}"] if refused else []
    said += [f"no cast {listed(without)}"] if without else []
    return "".join(f"; {each}" for each in said)


def _copies(subject: Subject) -> str:
    needs_accelerator(subject)
    dtypes, refused = _supported(subject.device)

    def dtype_kept(dtype: torch.dtype) -> None:
        host = host_values(dtype)
        for what, got in (
            ("a copy", host.to(subject.device)),
            ("a copy that may overlap", host.to(subject.device, non_blocking=True)),
            ("a clone on the device", host.to(subject.device).clone()),
        ):
            if problem := _check(got, host, what):
                raise Differs(problem)

    host = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    layouts = {
        "transposed": host.transpose(1, 3),
        "sliced": host[:, ::2, 1:],
        "channels last": host.to(memory_format=torch.channels_last),
        "expanded": host[:1].expand(3, 3, 4, 5),
        "empty": host[:, :0],
        "without dimensions": host[0, 0, 0, 1],
    }

    def layout_kept(view: torch.Tensor) -> None:
        there = view.to(subject.device)
        expect(tuple(there.shape), tuple(view.shape), "the shape on the device")
        expect(there.cpu().tolist(), view.tolist(), "a tensor that went there and back")
        filled = torch.zeros(view.shape, device=subject.device)
        filled.copy_(view)
        expect(filled.cpu().tolist(), view.tolist(), "a device tensor after copy_()")

    def read_back_into_a_view() -> None:
        target = torch.zeros(3, 4)
        target.t().copy_(torch.arange(12.0).reshape(4, 3).to(subject.device))
        expect(
            target.t().tolist(), torch.arange(12.0).reshape(4, 3).tolist(), "a CPU view after copy_() from the device"
        )

    checks = {_name(dtype): partial(dtype_kept, dtype) for dtype in dtypes}
    checks |= {name: partial(layout_kept, view) for name, view in layouts.items()}
    run_all({**checks, "into a CPU view": read_back_into_a_view})
    return f"{len(dtypes)} dtypes, NaN, infinities, -0.0 and denormals included; {len(layouts)} layouts" + _not_there(
        refused, []
    )


PROBES = (
    Probe(
        name="copies",
        stage="numerics",
        title="copies keep every value",
        run=_copies,
        why="a copy that narrows float64 or int64, loses the sign of zero or flattens NaN damages data before any "
        "model sees it, and nothing says so",
        todo="vendor: copy bytes; where the hardware lacks a dtype, raise instead of taking another",
        installs=False,
    ),
    Probe(
        name="casts",
        stage="numerics",
        title="casts are the CPU's",
        run=_casts,
        why="a cast that truncates where it has to round, goes through float32, or returns another dtype is wrong "
        "silently: token ids, masks and float64 statistics are damaged",
        todo="vendor: mend the cast kernel; until then cast on the CPU before the copy",
        installs=False,
    ),
)
