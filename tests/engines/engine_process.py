"""One process of an engine: imports torch and the engine's loader, then plays each scenario in a forked child.

    python engine_process.py published|real vllm|sglang|diffusion

One line of JSON per scenario: what was installed, what was logged, what the process had imported. The caller puts a
`torch_musa` on the path, which brings up a device when it is imported (see `VENDOR` in `test_engine_plugins`).
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import published_loaders
import torch

kind, engine = sys.argv[1:] if __name__ == "__main__" else os.environ["ENGINE_PROCESS"].split()
os.environ["ENGINE_PROCESS"] = f"{kind} {engine}"  # for children that are spawned
loader: Any = getattr(published_loaders, kind)(engine)


def told() -> dict[str, Any]:
    """What became of fxpatch. Looks at modules, so that looking imports nothing."""
    installer = sys.modules.get("fxpatch.installer")
    now = None if installer is None else installer.current()
    return {
        "installed": None if now is None else now.facts.device,
        "automatic": None if now is None else now.automatic,
        "installs": 0 if now is None else now.installs,
        "installer imported": installer is not None,
    }


def no_device() -> dict[str, Any]:
    loader.load()
    loader.again()
    return told()


def device_there() -> dict[str, Any]:
    import torch_musa  # noqa: F401

    loader.load()
    first = told()
    outcomes = {name: type(each).__name__ for name, each in sys.modules["fxpatch.installer"].current().outcomes.items()}
    before = sys.modules["fxpatch.installer"].current()
    loader.load()
    for _ in range(3):
        loader.again()
    same = sys.modules["fxpatch.installer"].current() is before
    left = {name: type(each).__name__ for name, each in before.outcomes.items()} == outcomes
    return {**told(), "unchanged": first == told() and same and left, "applied": "Applied" in outcomes.values()}


def vendor_comes_later() -> dict[str, Any]:
    loader.load()
    loader.again()
    before = told()
    import torch_musa  # noqa: F401

    return {**told(), "before": before["installed"]}


def loaded_within_the_vendors_import() -> dict[str, Any]:
    os.environ["TORCH_MUSA_CALLS"] = "engine"
    torch._fxpatch_test_engine = lambda: (loader.load(), told())  # type: ignore[attr-defined]
    import torch_musa

    return {**told(), "inside": torch_musa.inside[1]["installed"]}


def device_without_a_profile() -> dict[str, Any]:
    name_device("zzz")
    loader.load()
    return told()


def device_without_a_module() -> dict[str, Any]:
    torch.utils.rename_privateuse1_backend("musa")
    loader.load()
    return told()


def turned_off() -> dict[str, Any]:
    os.environ["FXPATCH_AUTOLOAD"] = "0"
    import torch_musa  # noqa: F401

    loader.load()
    return told()


def not_allowed() -> dict[str, Any]:
    os.environ["VLLM_PLUGINS"] = os.environ["SGLANG_PLUGINS"] = "somebody_elses"
    import torch_musa  # noqa: F401

    loader.load()
    return told()


def install_fails() -> dict[str, Any]:
    import torch_musa  # noqa: F401

    import fxpatch.installer as installer

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("sabotage")

    installer.read_facts = fail  # type: ignore[assignment]
    loader.load()
    return told()


def warnings_are_errors() -> dict[str, Any]:
    import torch_musa  # noqa: F401

    import fxpatch.installer as installer

    before = installer.Ledger.settle

    def settle(self: Any) -> None:
        before(self)
        warnings.warn("a patch was refused", installer.FxPatchWarning, stacklevel=2)

    installer.Ledger.settle = settle  # type: ignore[method-assign,assignment]
    warnings.simplefilter("error")
    loader.load()
    return told()


def asked_for_before() -> dict[str, Any]:
    import torch_musa  # noqa: F401

    import fxpatch

    handle = fxpatch.install()
    loader.load()
    loader.again()
    found = {**told(), "same": sys.modules["fxpatch.installer"].current() is handle}
    handle.uninstall()
    return {**found, "after": told()["installed"]}


def asked_for_later() -> dict[str, Any]:
    import dataclasses

    import torch_musa  # noqa: F401

    import compile_configs
    import fxpatch

    loader.load()
    fxpatch.install(profile=dataclasses.replace(compile_configs.load_profile("musa"), title="mine"))
    return told()


def forked_afterwards() -> dict[str, Any]:
    import torch_musa  # noqa: F401

    loader.load()
    return in_child(lambda: (loader.load(), told())[1])


def spawned(queue: Any) -> None:
    """A worker as engines start it: it has imported this module, and nothing of the parent's is in it."""
    import torch_musa  # noqa: F401

    before = told()["installed"]
    loader.load()
    queue.put({**told(), "before": before})


def in_spawned_worker() -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=spawned, args=(queue,))
    process.start()
    found: dict[str, Any] = queue.get(timeout=120)
    process.join(60)
    return {**found, "exit": process.exitcode}


def name_device(name: str) -> None:
    import types

    torch.utils.rename_privateuse1_backend(name)
    torch._register_device_module(name, types.ModuleType(f"torch.{name}"))


def in_child(scenario: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its answer and its log, or what it raised: as a worker that has died of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        heard = io.StringIO()
        logging.basicConfig(stream=heard, level=logging.WARNING, force=True)
        try:
            answer = {**scenario(), "died": None}
        except BaseException as error:
            answer = {"died": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps({**answer, "log": heard.getvalue()[:20_000]}).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        answer = json.loads(stream.read())
    os.waitpid(child, 0)
    return answer


SCENARIOS = (
    no_device, device_there, vendor_comes_later, loaded_within_the_vendors_import, device_without_a_profile,
    device_without_a_module, turned_off, not_allowed, install_fails, warnings_are_errors, asked_for_before,
    asked_for_later, forked_afterwards, in_spawned_worker,
)  # fmt: skip

if __name__ == "__main__":
    assert importlib.util.find_spec("torch_musa") is not None
    assert "torch_musa" not in sys.modules
    for each in SCENARIOS:
        answer = each() if each is in_spawned_worker else in_child(each)
        print("SCENARIO", json.dumps({"scenario": each.__name__, **answer}), flush=True)
