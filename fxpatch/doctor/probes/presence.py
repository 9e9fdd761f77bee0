"""What there is of the subject's device in this process, for probes that need some of it."""

from __future__ import annotations

from typing import Any

import torch

from fxpatch.doctor.probe import NotApplicable, Subject


def device_module(subject: Subject) -> Any:
    """`torch.<device>`; None where nobody has registered it."""
    return getattr(torch, subject.device, None)


def unusable(subject: Subject) -> str:
    """Why nothing can run on the device here, in words; empty where the device says that something can.

    A device module that raises when it is asked counts as one that can be used: the probe will meet the error itself.
    """
    module = device_module(subject)
    if module is None:
        return f"torch.{subject.device} does not exist: see the line `registration`"
    if module_says_no(module):
        return f"torch.{subject.device}.is_available() is False: see the line `registration`"
    return ""


def module_says_no(module: Any) -> bool:
    """Whether the device module says that there is no device."""
    try:
        return not getattr(module, "is_available", lambda: True)()
    except Exception:  # a vendor's runtime may raise anything; what it raises, the first real call raises again
        return False


def needs_device(subject: Subject) -> None:
    """For a probe that computes on the device.

    Raises:
        NotApplicable: the device says that there is none.
    """
    if reason := unusable(subject):
        raise NotApplicable(f"nothing can run on {subject.device}: {reason}")


def needs_accelerator(subject: Subject) -> None:
    """For a probe that computes on the device and compares with the CPU, or asks what only accelerators have.

    Raises:
        NotApplicable: the device is the CPU, or says that there is none.
    """
    not_the_cpu(subject, "the CPU is what other devices are compared with")
    needs_device(subject)


def not_the_cpu(subject: Subject, why: str) -> None:
    """For a probe of what the CPU does not have.

    Raises:
        NotApplicable: the device is the CPU.
    """
    if subject.device == "cpu":
        raise NotApplicable(why)


def where_it_can_run(subject: Subject) -> str:
    """The device, or the CPU where the device cannot be used: for what depends on torch's tables and not on kernels."""
    return "cpu" if unusable(subject) else subject.device
