"""The key under which a prepared model is saved: all that is known before anything is traced.

Two requests with the same key would be traced and compiled alike, as far as code and values that only tracing finds are
alike (`witness` compares those). The key holds the versions of Python, torch and this package with its own sources; the
device, its model and driver, and the vendor's packages, as far as they tell; the processor; the compiler with its
settings and custom passes; registered fake kernels; rules and dynamic dimensions; the form of the call; the model's
modules, plain attributes, hooks, parameters and buffers; torch's global switches, and this process's rank.

Settings of `torch._dynamo.config` are no part of it: what could change a trace is fixed by the trace itself.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fxpatch
from fake_kernels.registry import fingerprint
from fxpatch.native import find_operators
from fxpatch.piecewise.options import Options
from fxpatch.piecewise.start import Start
from fxpatch.piecewise.surroundings import autocast_of
from fxpatch.piecewise.warm_start.fingerprints import of_function, of_tensor, of_value, plain
from fxpatch.piecewise.warm_start.graph_json import NotCacheableError
from fxpatch.versions import imported_versions

FORMAT = 1
_PASSES = (
    *("pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass"),
    *("post_grad_custom_post_pass", "_pre_fusion_custom_pass", "_post_fusion_custom_pass", "custom_partitioner_fn"),
)
_MODULE_STATE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}


@dataclass(frozen=True)
class Request:
    """What is to be prepared.

    Args:
        options, start: what was asked for, and what it comes to.
        alone: whether this rank decides without the others.
    """

    options: Options
    start: Start
    alone: bool


def key_parts(request: Request) -> dict[str, Any]:
    """What the key is made of, by name.

    Raises:
        NotCacheableError: something has no name that another process would know it by.
    """
    options, begun = request.options, request.start
    if not isinstance(begun.compiler, str) or begun.compiler not in ("inductor", "eager"):
        raise NotCacheableError(f"compiler {begun.compiler!r} leaves nothing that can be saved")
    if options.native != "keep" and isinstance(options.model, torch.nn.Module):
        found = find_operators(options.model, begun.device.type)
        if found:
            raise NotCacheableError(f"it has {len(found)} native fallbacks, which are tried in every process")
    if request.alone and len(_rank()) and _rank()[1] > 1:
        raise NotCacheableError("there are several ranks, and without agree= one may trace while another does not")
    return {
        "format": FORMAT,
        "versions": [sys.version, torch.__version__, torch.version.git_version, fxpatch.__version__, _own_sources()],
        "device": _device(begun.device.device, begun.profile.packages),
        "processor": _processor(),
        "profile": repr(begun.profile),
        "compiler": [begun.compiler, _inductor() if begun.compiler == "inductor" else ""],
        "compile sizes": list(options.compile_sizes),
        "fakes": fingerprint(),
        "split": [_rule(each) for each in options.split],
        "dynamic": sorted((name, of_value(dims)) for name, dims in options.dynamic.items()),
        "call": _call(request),
        "choices": [
            *(options.inputs, options.native, begun.graphs, begun.device.registers_generator, begun.largest),
            begun.device.type,
        ],
        "model": _model(options.model),
        "torch": _switches(),
        "rank": _rank(),
    }


def key_of(parts: Mapping[str, Any]) -> str:
    """The key: hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


@cache
def _own_sources() -> str:
    found = hashlib.sha256()
    package = Path(fxpatch.__file__).parent
    for path in sorted((*(package / "piecewise").rglob("*.py"), *(package / "artifacts").rglob("*.py"))):
        found.update(path.read_bytes())
    return found.hexdigest()


def _device(device: torch.device, packages: tuple[str, ...]) -> list[str]:
    told = [device.type]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        told += [
            str(device),
            str(module.get_device_properties(device)),
            str(torch.version.cuda),
            str(torch.version.hip),
        ]
        told.append(str(getattr(module, "get_driver_version", getattr(module, "driver_version", str))()))
    return [*told, *(f"{name} {version}" for name, version in imported_versions(packages).items())]


@cache
def _processor() -> list[str]:
    """What compiled code for the processor depends on: with another set of instructions it ends the process."""
    told = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    path = Path("/proc/cpuinfo")
    if path.exists():
        lines = path.read_text().splitlines()
        told += sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    return told


def _inductor() -> list[str]:
    from torch._inductor import config

    passes = []
    for name in _PASSES:
        each = getattr(config, name, None)
        if each is None:
            continue
        uuid = each.uuid() if hasattr(each, "uuid") else None
        if uuid is None:
            raise NotCacheableError(f"the Inductor pass {name} has no uuid")
        passes.append(f"{name} {of_value(uuid)}")
    tag = "|".join(part for part in str(torch.compiler.config.cache_key_tag).split("|") if part[:8] != "fxpatch/")
    settings = sorted(f"{name} {of_value(value)}" for name, value in config.save_config_portable().items())
    return [*settings, *passes, tag, *_compiler_settings()]


def _compiler_settings() -> list[str]:
    import os

    return [f"{name}={os.environ.get(name)}" for name in ("CXX", "CC", "ATEN_CPU_CAPABILITY", "TRITON_INTERPRET")]


def _rule(rule: Any) -> str:
    if isinstance(rule, (str, torch.Tag)):
        return f"{type(rule).__name__} {rule}"
    if isinstance(rule, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"operator {rule}"
    if callable(getattr(rule, "_opoverload", None)):
        return f"operator {rule._opoverload.name()}"
    found = plain(rule)
    cells = [cell.cell_contents for cell in getattr(rule, "__closure__", None) or ()]
    if found is None or any(plain(each) is None for each in cells):
        raise NotCacheableError(f"the splitting rule {rule!r} depends on what cannot be compared")
    return found


def _call(request: Request) -> list[Any]:
    begun = request.start
    arguments = begun.arguments
    tensors = {each.leaf: each for each in arguments.inputs}
    first = {id(begun.leaves[each.leaf]): each.leaf for each in reversed(arguments.inputs)}
    form: list[Any] = [
        str(arguments.signature),
        str(arguments.spec),
        len(begun.args),
        sorted(begun.kwargs),
    ]
    for leaf, value in enumerate(begun.leaves):
        if leaf not in tensors:
            found = plain(value)
            if found is None:
                raise NotCacheableError(f"{arguments.name_of(leaf)} is a {type(value).__name__}, not a plain value")
            form.append(found)
            continue
        each = tensors[leaf]
        order = sorted(range(value.dim()), key=lambda d: (-value.stride(d), d))
        dense = value.is_contiguous() or (value.is_non_overlapping_and_dense() and value.storage_offset() == 0)
        layout = order if dense else [list(value.stride()), value.storage_offset()]
        # several inputs, and the form of each is the same only if they are as much apart
        form.append([each.name, list(each.dims), list(each.shape), str(each.dtype), str(each.device), layout])
        form.append([type(value).__qualname__, value.requires_grad, value.is_contiguous(), first[id(value)]])
    return form


def _model(model: Any) -> list[Any]:
    if not isinstance(model, torch.nn.Module):
        return [of_function(model)]
    if torch.nn.modules.module._has_any_global_hook():
        raise NotCacheableError("there are hooks on all modules of this process")
    if hasattr(model, "_orig_mod"):
        raise NotCacheableError("the model is compiled by torch.compile itself")
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        plain_state = {k: plain(v) for k, v in vars(module).items() if k not in _MODULE_STATE}
        found.append([name, f"{type(module).__module__}.{type(module).__qualname__}", module.training])
        if type(module).__module__.startswith("torch."):  # Dynamo guards no forward of torch's own: it may be replaced
            found.append([of_function(type(module).forward), of_function(type(module).__call__)])
        found.append(sorted((k, v) for k, v in plain_state.items() if v is not None and not k.startswith("__")))
    numbers: dict[int, int] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        found.append([name, numbers.setdefault(id(tensor), len(numbers)), of_tensor(tensor)])
    return found


def _switches() -> list[str]:
    autocast = [autocast_of(each) for each in ("cpu", torch._C._get_accelerator().type)]
    return [
        *(str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_float32_matmul_precision()),
        *(str(autocast), str(torch.are_deterministic_algorithms_enabled())),
        *(str(torch._C._len_torch_function_stack()), str(torch.get_num_threads())),
        *(str(torch.backends.cudnn.allow_tf32), str(torch.backends.cuda.matmul.allow_tf32)),
    ]


def _rank() -> list[int]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    return [torch.distributed.get_rank(), torch.distributed.get_world_size()]
