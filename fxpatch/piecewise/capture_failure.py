"""What a failed capture says. The problem: devices report that they have run out of graphs in words that speak of
something else (streams on Ascend, an illegal address on MUSA), and the remedy differs from that of any other failure.
The rule: running out is recognised and said; everything else keeps the device's own words.

Sources: vllm-ascend vllm_ascend/compilation/acl_graph.py (207005, 207008: no more streams or models); torchada
torchada/_graph_rotation.py (MUSA's limit on executables shows as an illegal memory access when the capture ends).
"""

from __future__ import annotations

import re

import torch

from fxpatch.errors import CaptureFailedError

_CODES = re.compile(r"(?<!\d)20700[58](?!\d)")
_OUT_OF_RESOURCES = re.compile(
    r"out of resources|no more (streams|graphs)|stream resources? (are|is) insufficient", re.I
)
_ILLEGAL_ACCESS = re.compile(r"illegal[ -](memory[ -]access|address)", re.I)


def failure(device: str, error: BaseException, step: str, budget: int | None) -> CaptureFailedError:
    """The typed error for `error`, which was raised in `step` of a capture.

    Args:
        device: the device type.
        step: "capture_begin", "the call" or "capture_end".
        budget: how many graphs the device's profile plans with; for the hint.
    """
    gone = out_of_graphs(device, error, step)
    if gone:
        planned = f"; its profile plans with {budget}" if budget else ""
        expected = f"room for one more graph on this device{planned}"
        hint = (
            "capture fewer sizes (sizes=), release() runners that are not used, or give the device a profile with a "
            "smaller budget"
        )
    elif isinstance(error, torch.OutOfMemoryError):
        expected = "room for the memory of this graph"
        hint = "capture fewer or smaller sizes, or leave more of the device's memory free before prepare()"
    else:
        expected = (
            "operations that the device can record: none that the host has to wait for (.item(), .cpu(), "
            "synchronize()), no shape that depends on data, every side stream joined"
        )
        hint = "make the operator named above a splitting point (split=), or let this size run without a graph"
    return CaptureFailedError(
        f"A call could not be captured into a graph of device {device!r}.",
        seen=f"{step}: {type(error).__name__}: {_line(error)}",
        expected=expected,
        hint=hint,
        out_of_graphs=gone,
    )


def interrupted(device: str, size: int, error: Exception) -> CaptureFailedError:
    """For what went wrong between captures: in an operator that runs there, or in a warm-up."""
    wrong = CaptureFailedError(
        f"A size could not be captured into graphs of device {device!r}.",
        seen=f"while size {size} was run on the example, padded with zeros: {type(error).__name__}: {_line(error)}",
        expected="a model that runs at this size, and room for what it computes",
        hint="leave the size out (sizes=), or make what fails right for rows of zeros",
    )
    wrong.__cause__ = error
    return wrong


def under_way(device: str) -> CaptureFailedError:
    """For a capture that is asked for inside another."""
    return CaptureFailedError(
        f"A call could not be captured into a graph of device {device!r}.",
        seen="the current stream is being captured already",
        expected="one capture at a time",
        hint="call the runner outside torch graphs, and prepare one runner after the other",
    )


def out_of_graphs(device: str, error: BaseException, step: str) -> bool:
    """Whether the device has no room for another graph: the same call may be captured once others are released."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if _CODES.search(text) or _OUT_OF_RESOURCES.search(text):
        return True
    return device == "musa" and step == "capture_end" and _ILLEGAL_ACCESS.search(text) is not None


def _line(error: BaseException) -> str:
    """The first line of the message that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), "(no message)")
