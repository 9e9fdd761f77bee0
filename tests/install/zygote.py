"""A process with torch imported, and Dynamo not, that forks a child per request; the child plays one history.

PrivateUse1 can be named once, Dynamo imported once, so every history of `install`, `uninstall`, shims and imports needs
a fresh process; forking one takes milliseconds where starting one takes seconds. One line in is one line out, as JSON:
`fork`, then actions of the child (see `ACTIONS`), then `end`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import types
import warnings
from typing import Any

import torch

import fxpatch
from fxpatch.simulator import simulate
from fxpatch.simulator.shim import load_shim

REAL = torch._C.device
_handles: list[Any] = []


def snapshot() -> dict[str, Any]:
    """Everything in torch that a patch could have touched: each attribute of each torch module and class by identity,
    and each module-level dictionary, set and list by content. Independent of what the patches say they do."""
    seen: dict[str, Any] = {}
    for name, module in sorted(sys.modules.items()):
        if not (name == "torch" or name.startswith("torch.")) or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if key in _VOLATILE or (name, key) in _VOLATILE:
                continue
            place = f"{name}.{key}"
            seen[place] = _of(value)
            if issubclass(type(value), type) and value.__module__ == name:
                for attribute, member in list(vars(value).items()):
                    if attribute not in _VOLATILE and f"{value.__qualname__}.{attribute}" not in _VOLATILE:
                        seen[f"{place}.{attribute}"] = id(member)
    seen["config"] = repr(torch.compiler.config.cache_key_tag)
    seen["autocast"] = torch._C._dispatch_has_backend_fallback("AutocastPrivateUse1")
    for name in ("run_and_save_rng_state", "run_with_rng_state"):
        operator = getattr(torch._prims.rng_prims, name)
        seen[name] = [_of(operator.py_kernels), str(operator.non_fallthrough_keys.raw_repr())]
    for name in ("torch._dynamo.config", "torch._inductor.config"):
        if name in sys.modules:
            seen[name] = repr(sorted(sys.modules[name].get_config_copy().items(), key=lambda item: item[0]))
    user_defined = sys.modules.get("torch._dynamo.variables.user_defined")
    if user_defined is not None:
        fold = user_defined.UserDefinedClassVariable._constant_fold_classes
        by_torch = (torch.finfo, torch.iinfo, torch.Size, torch.device)  # filled in by torch at the first use
        seen["fold"] = sorted(id(each) for each in fold() if each not in by_torch) if fold.cache_info().currsize else []
    shim: Any = torch.device
    seen["shim"] = [shim.__module__, shim.__name__, shim.__qualname__, "__subclasscheck__" in vars(type(shim))]
    return seen


# What torch itself changes while it works: interpreter bookkeeping and caches.
_VOLATILE = {
    "__builtins__", "__warningregistry__", "__cached__", "__dict__", "__weakref__", "__abstractmethods__", "_abc_impl",
    "__doc__", "__annotations__", "__parameters__", "__static_attributes__",
}  # fmt: skip


def _of(value: Any) -> Any:
    """Content for flat containers of the kinds that patches edit, identity for all else."""
    if type(value) is dict and len(value) < 2000:
        return [(repr(k) if isinstance(k, (str, int)) else id(k), id(v)) for k, v in value.items()]
    if type(value) in (set, frozenset):
        return sorted(map(id, value))
    return id(value)


def _settled_snapshot() -> dict[str, Any]:
    gc.collect()
    return snapshot()


def install() -> str:
    _handles.append(fxpatch.install("musa"))
    return f"{len(_handles)}"


def uninstall() -> list[str]:
    _handles[-1].uninstall()
    return list(_handles[-1].left)


def shim(form: str) -> str:
    return load_shim("musa", form).__qualname__


def dynamo() -> str:
    return __import__("torch._dynamo")._dynamo.__name__


def inductor() -> None:
    for module in ("torch._inductor.codecache", "torch.nn.attention.flex_attention"):
        __import__(module)


def _module(literal: Any) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"), literal, graph.placeholder("device")))
    return torch.fx.GraphModule({}, graph)


def fx() -> list[str]:
    """Generated code with a literal and a placeholder called `device`, for three devices."""
    return [str(_module(REAL(*where))(0, "an argument")[1]) for where in (("musa", 0), ("cuda", 1), ("cpu",))]


def compile() -> list[Any]:
    import torch._dynamo

    torch._dynamo.reset()

    def f(x: Any) -> Any:
        return (x * 2 + torch.ones(2, device=x.device)).to(torch.device("cpu")), isinstance(x.device, torch.device)

    out, is_device = torch.compile(f, backend="eager", fullgraph=True)(torch.ones(2, device="musa"))
    return [out.tolist(), is_device]


ACTIONS = {f.__name__: f for f in (install, uninstall, shim, dynamo, inductor, fx, compile)}


def answer(request: list[Any]) -> Any:
    name, *arguments = request
    if name == "snapshot":
        globals()["_before"] = _settled_snapshot()
        return len(_before)  # type: ignore[name-defined]  # noqa: F821
    if name == "changed":
        before, now = globals()["_before"], _settled_snapshot()
        return sorted(place for place in before if before[place] != now.get(place, "gone"))
    return ACTIONS[name](*arguments)


def child() -> None:
    warnings.simplefilter("error")
    simulate("musa", without=("autocast",))
    print(json.dumps({"ok": "forked"}), flush=True)  # only now may requests come: the parent must not read them
    for line in sys.stdin:
        request = json.loads(line)
        if request == ["end"]:
            break
        try:
            reply = {"ok": answer(request)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


def main() -> None:
    for line in sys.stdin:
        assert json.loads(line) == ["fork"], line
        pid = os.fork()
        if pid == 0:
            child()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"ended": status}), flush=True)


if __name__ == "__main__":
    main()
