"""The fuzzers' properties on their seeds and on some hundred changes of them, which are the same in every run."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compile_configs import DeviceProfile, parse_profile
from fuzz.targets import TARGETS, Target, changed
from fxpatch.codegen import Rewritten, rewrite

COUNT = 400


def run(target: Target, count: int) -> None:
    """Raises what the target raises, with the input."""
    check, seeds = target.check(), target.inputs()
    for data in (b"", *seeds, *changed(seeds, count, target.longest)):
        try:
            check(data)
        except BaseException as error:
            error.add_note(f"the input was {data!r}")
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_changes_of_them(musa: str, name: str) -> None:
    run(TARGETS[name], COUNT)


def _in_strings_too(src: str, globals_: Any, custom: str) -> Rewritten | None:
    changed = re.sub(rf"(?<![\w.])device\(type='{custom}'(?:, index=(\d+))?\)", f"torch.device('{custom}')", src)
    return None if changed == src else Rewritten(changed, "torch")


def _another_device(src: str, globals_: Any, custom: str) -> Rewritten | None:
    found = rewrite(src, globals_, custom)
    return found and found._replace(src=found.src.replace(", 0)", ", 1)"))


def _under_a_name_that_is_taken(src: str, globals_: Any, custom: str) -> Rewritten | None:
    found = rewrite(src, globals_, custom)
    return found and Rewritten(re.sub(r"_fxpatch_torch(_\d)?\.", "torch.", found.src), "torch")


def _not_at_all(src: str, globals_: Any, custom: str) -> None:
    return None


@pytest.mark.parametrize("broken", [_in_strings_too, _another_device, _under_a_name_that_is_taken, _not_at_all])
def test_a_rewrite_that_is_wrong_is_found(
    musa: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz.codegen.rewrite", broken)
    with pytest.raises(AssertionError):
        run(TARGETS["codegen"], COUNT)


def _raises_something_else(text: str) -> DeviceProfile:
    if "[[" in text:
        raise KeyError("split")
    return parse_profile(text)


def test_a_loader_of_profiles_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.profiles.parse_profile", _raises_something_else)
    with pytest.raises(KeyError):
        run(TARGETS["profiles"], 0)


def test_a_loader_of_artifacts_that_unpickles_is_found(musa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["artifacts"]
    check = target.check()
    written = pickle.dumps(OrderedDict)
    monkeypatch.setattr("fuzz.artifacts.loads", lambda content: pickle.loads(written) and torch.fx.GraphModule)
    with pytest.raises(AssertionError, match=r"loading it did pickle\.find_class"):
        check(b"anything")
