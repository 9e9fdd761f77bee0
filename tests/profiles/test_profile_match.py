"""`match`: one outcome for every question, and a reason for every profile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compile_configs import DeviceProfile, Matched, Rejected, builtin_profiles, load_profile, match
from compile_configs.version import version_key

BUILTIN = builtin_profiles()


def changed(device: str, min_torch: str, origin: str) -> DeviceProfile:
    return replace(load_profile("cpu"), device=device, min_torch=min_torch, origin=origin)


@pytest.mark.parametrize("name", BUILTIN)
def test_each_builtin_profile_is_found_for_its_device_with_this_torch(name: str) -> None:
    outcome = match(name, torch.__version__, BUILTIN.values())
    assert isinstance(outcome, Matched)
    assert outcome.profile is BUILTIN[name]
    assert [reason.accepted for reason in outcome.trace] == [device == name for device in BUILTIN]


def test_the_trace_tells_what_was_taken_and_why_the_others_were_not() -> None:
    outcome = match(
        "musa", "2.13.0+cpu", [BUILTIN["cpu"], BUILTIN["musa"]], vendor_packages={"torchada": "0.1.103", "rich": "1"}
    )
    assert isinstance(outcome, Matched)
    assert [str(reason) for reason in outcome.trace] == [
        "compile_configs/cpu.toml: not taken, it is for device 'cpu', and this is 'musa'",
        "compile_configs/musa.toml: taken, device 'musa', torch 2.13.0+cpu is at least 2.11, with torchada 0.1.103",
    ]


def test_a_device_without_its_vendor_s_packages_is_matched_and_told() -> None:
    outcome = match("musa", "2.11", [BUILTIN["musa"]])
    assert isinstance(outcome, Matched)
    assert [reason.text for reason in outcome.trace] == [
        "device 'musa', torch 2.11 is at least 2.11, without torch_musa or torchada"
    ]
    both = match("musa", "2.11", [BUILTIN["musa"]], vendor_packages={"torch_musa": "2.11.0", "torchada": "0.2"})
    assert both.trace[0].text.endswith(", with torch_musa 2.11.0 and torchada 0.2")  # type: ignore[union-attr]


def test_an_old_torch_is_refused_with_both_versions() -> None:
    assert match("musa", "2.10.1+cpu", [BUILTIN["musa"]]) == Rejected(
        (("compile_configs/musa.toml", False, "it is for torch 2.11 and later, and this is 2.10.1+cpu"),)
    )


def test_no_profile_and_no_version_are_reasons_too() -> None:
    assert match("x", "2.13", []) == Rejected((("no profile", False, "there was none to choose from"),))
    assert match("cpu", "nightly", BUILTIN.values()) == Rejected(
        (("every profile", False, "torch calls itself 'nightly', which is no version"),)
    )


def test_the_newest_that_fits_wins_and_the_first_of_equals() -> None:
    old, new = changed("x", "2.11", "old"), changed("x", "2.14", "new")
    mine, future = changed("x", "2.14.0", "mine"), changed("x", "2.99", "future")
    outcome = match("x", "2.15.0a0+git", [old, mine, future, new])
    assert isinstance(outcome, Matched)
    assert outcome.profile is mine
    assert [(reason.profile, reason.accepted, reason.text) for reason in outcome.trace] == [
        ("old", False, "mine comes first: it asks for torch 2.14.0"),
        ("mine", True, "device 'x', torch 2.15.0a0+git is at least 2.14.0"),
        ("future", False, "it is for torch 2.99 and later, and this is 2.15.0a0+git"),
        ("new", False, "mine comes first: it asks for torch 2.14.0"),
    ]


def test_a_pre_release_does_not_satisfy_its_release() -> None:
    assert isinstance(match("x", "2.15.0a0+git", [changed("x", "2.15", "p")]), Rejected)
    assert isinstance(match("x", "2.15.0", [changed("x", "2.15", "p")]), Matched)


names = st.sampled_from(["cpu", "musa", "x", "y"])
versions = st.sampled_from(["2.11", "2.13.1", "2.15.0a0", "2.15", "2.15.0+cpu", "3.0"])


@given(
    names | st.text(),
    versions | st.text(),
    st.lists(
        st.builds(changed, names, versions, st.text(max_size=3)) | st.sampled_from([*BUILTIN.values()]), max_size=4
    ),
    st.dictionaries(st.sampled_from(["torch_musa", "torch_npu", "z"]), st.text(max_size=5)),
)
def test_it_never_raises_and_always_gives_one_outcome_with_a_reason_for_each(
    device: str, version: str, profiles: list[DeviceProfile], packages: dict[str, str]
) -> None:
    outcome = match(device, version, iter(profiles), vendor_packages=packages)
    fit = [
        profile
        for profile in profiles
        if profile.device == device and version_key(version) and version_key(profile.min_torch) <= version_key(version)  # type: ignore[operator]
    ]
    assert isinstance(outcome, Matched if fit else Rejected)
    reasons = outcome.trace if isinstance(outcome, Matched) else outcome.reasons
    assert reasons
    assert all(reason.text for reason in reasons)
    assert any(reason.accepted for reason in reasons) == bool(fit)
    if isinstance(outcome, Matched):
        assert len(reasons) == len(profiles)
        assert outcome.profile in fit
        newest = max(version_key(profile.min_torch) for profile in fit)  # type: ignore[type-var]
        assert version_key(outcome.profile.min_torch) == newest
