"""A device with one fault at a time, each of a kind that was seen in the wild: what the probes are there to find.

`FAULTS` says how each is planted (faulty_parts.py), which probe has to find it, and what it has to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from faulty_parts import (
    DEVICE,
    RunsAtOnce,
    another_signature,
    casts_in_another_dtype,
    children_that_compute_garbage,
    children_that_hang,
    copies_to_the_same_place,
    entry_points,
    flattened_zeros,
    forgetful_model,
    graphs_that_repeat_themselves,
    graphs_with_old_inputs,
    graphs_without_a_pool,
    kernel,
    kernels_off_by_one,
    namespace_for_a_module,
    narrowing_copies,
    raises,
    raw_kernel,
    regex_over_generated_code,
    remove,
    replace,
    truncating_casts,
    undone_by_nobody,
    unordered_streams,
    untagged,
    versions,
)

from fxpatch.simulator.shim import load_shim


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        probe: which has to find it.
        says: part of what it has to say.
        plant: makes it so, in a process with the simulated device.
        repaired: with `fxpatch.install()`, the probe is content.
        after_install: planted after `fxpatch.install()`, which is there from the beginning.
        without: what the simulated device lacks.
        subject: of the probe's `Subject`, what is not the simulated `musa`.
        plain: the compilers are imported after it.
        slow: Inductor compiles kernels.
    """

    probe: str
    says: str
    plant: Callable[[], object] = lambda: None
    repaired: bool = False
    after_install: bool = False
    without: tuple[str, ...] = ()
    subject: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.probe}: {self.says}"


HERE = {"device": DEVICE, "simulated": True}

FAULTS: tuple[Fault, ...] = (
    Fault("registration", "is_available() is False", replace("is_available", lambda: False)),
    Fault("registration", "has no is_available()", remove("is_available")),
    Fault("registration", "torch.musa does not exist", lambda: delattr(torch, DEVICE)),
    Fault("registration", "torch knows no device 'other'", subject={"device": "other"}),
    Fault("registration", "missing: Tensor.is_musa", lambda: delattr(torch.Tensor, "is_musa")),
    Fault("device-module", "is a SimpleNamespace, not a module", namespace_for_a_module, repaired=True),
    Fault("device-module", "calls itself 'vendor.device'", replace("__name__", "vendor.device"), repaired=True),
    Fault("device-module-surface", "lacks empty_cache (asked by every engine", remove("empty_cache")),
    Fault("tensors", "(x + 1) * 2", kernel("add.Tensor", lambda a, b, **_: a)),
    Fault(
        "accelerator-api",
        "empty_cache: RuntimeError: Allocator for musa is not a DeviceAllocator",
        lambda: setattr(torch._C, "_accelerator_emptyCache", raises("Allocator for musa is not a DeviceAllocator")),
    ),
    Fault("torch-device", "after Dynamo was imported", lambda: load_shim(DEVICE), repaired=True),
    Fault("torch-device", "before Dynamo was imported", lambda: load_shim(DEVICE), plain=True),
    Fault("operator-schemas", "has unsupported type", lambda: load_shim(DEVICE), repaired=True),
    Fault("fx-literals", "NameError: name 'device' is not defined", lambda: load_shim(DEVICE), repaired=True),
    Fault("fx-literals", "text that looks like one: generated code gives", regex_over_generated_code),
    Fault("fx-placeholder-device", "'str' object is not callable", repaired=True),
    Fault("fx-copies", "pickle: NameError", lambda: load_shim(DEVICE), repaired=True),
    Fault("dynamo-devices", "Unexpected type in sourceless builder", lambda: load_shim(DEVICE), True, plain=True),
    Fault("dynamo-isinstance", "and should be True", lambda: load_shim(DEVICE, "equal"), repaired=True),
    Fault("dynamo-device-module", "__name__", namespace_for_a_module, repaired=True),
    Fault("dynamo-streams", "no such stream", replace("current_stream", raises("no such stream"))),
    Fault("flex-attention", "FlexAttention is only supported on CUDA", repaired=True),
    Fault("aot-backward", "against the CPU, is wrong", kernel("gelu_backward", lambda grad, x, **_: grad)),
    Fault("aot-functionalisation", "indexed writes", kernel("index_put", lambda x, *_, **__: x)),
    Fault("aot-checkpoint", "Backend not supported for musa", repaired=True),
    Fault("aot-checkpoint", "another dropout mask", replace("set_rng_state", lambda *_: None)),
    Fault("inductor-registration", "nobody has called register_backend_for_device", without=("inductor",)),
    Fault("inductor-kernels", "against eager, is wrong", kernels_off_by_one, slow=True),
    Fault("inductor-index", "allocates on the current device, on one of 2", replace("device_count", lambda: 2)),
    Fault("reduce-overhead", "mode='reduce-overhead', against eager, is wrong", kernels_off_by_one, slow=True),
    Fault("copies", "int64: a copy gives", narrowing_copies),
    Fault("copies", "float32: a copy gives", flattened_zeros),
    Fault("casts", "to float64 comes as float32", casts_in_another_dtype),
    Fault("casts", "float32 to bfloat16 gives", truncating_casts),
    Fault("int64", "cumsum", kernel("cumsum", lambda x, dim, **_: x.double().cumsum(dim).long())),
    Fault("float64", "exp: the result is", kernel("exp", lambda x: x.float().exp().to(x.dtype))),
    Fault("special-values", "maximum", kernel("maximum", torch.fmax)),
    Fault("autocast", "'Autocastmusa' backend", without=("autocast",), repaired=True),
    Fault("autocast-casts", "nothing is cast", without=("autocast",), after_install=True),
    Fault("rng-seed", "the same seed gives other numbers", replace("manual_seed_all", lambda seed: None)),
    Fault("rng-state", "a draw after set_rng_state()", replace("set_rng_state", lambda *_: None)),
    Fault("rng-state", "fork_rng: AttributeError", remove("get_rng_state")),
    Fault("rng-generator", "getNewGenerator", subject={"simulated": False}),
    Fault("rng-apart", "moves the CPU's sequence", raw_kernel("bernoulli_.float", undone_by_nobody)),
    Fault("streams", "reads after wait_stream()", unordered_streams),
    Fault("streams", "event.query()", replace("Event.query", lambda self: False)),
    Fault("current-stream", "after the block", replace("stream.__exit__", lambda *_: None)),
    Fault(
        "accelerator-stream",
        "torch.accelerator's current stream",
        lambda: setattr(torch.accelerator, "current_stream", lambda: torch.Stream(device=DEVICE)),
    ),
    Fault("elapsed-time", "two intervals of -1.0 ms", replace("Event.elapsed_time", lambda *_: -1.0)),
    Fault("memory", "allocated grows", replace("memory_allocated", lambda: 0)),
    Fault("memory", "after empty_cache()", replace("empty_cache", lambda: None)),
    Fault("out-of-memory", "and not torch.OutOfMemoryError", subject={"simulated": False}),
    Fault("device-index", "the memory of x.to('musa')", copies_to_the_same_place),
    Fault("graph-capture", "capture computes nothing", replace("MUSAGraph", RunsAtOnce)),
    Fault("graph-capture", "after x was written", graphs_with_old_inputs),
    Fault("graph-capture", "no graph class can be built", remove("MUSAGraph")),
    Fault("graph-host-read", "nothing is raised", replace("MUSAGraph", RunsAtOnce)),
    Fault("graph-memory", "the pool is not shared", graphs_without_a_pool),
    Fault("graph-random", "the same random numbers", graphs_that_repeat_themselves),
    Fault("hidden-writes", "leaves out every call of oot::store", forgetful_model),
    Fault(
        "model-fakes",
        "oot::narrow: result 0: dtype is torch.float16, and the fake kernel says torch.float32",
        subject={"model": "patient_models:wrong_dtype"},
    ),
    Fault("model-fakes", "oot::unknown has no fake kernel", subject={"model": "patient_models:no_fake"}),
    Fault("model-fakes", "oot::scale: result 0: strides", subject={"model": "patient_models:wrong_strides"}),
    Fault(
        "model-schemas",
        "oot::fill writes its tensor argument 1, and its schema hides it",
        subject={"model": "patient_models:hidden_write"},
    ),
    Fault("device-pickles", "Can't pickle", lambda: load_shim(DEVICE, "local"), repaired=True),
    Fault("saving", "save and load: RuntimeError", replace("device_count", lambda: 0)),
    Fault("module-to", "whether tied weights are tied", without=("module_to",), repaired=True),
    Fault("cache-key", "torch's key holds nothing of musa", repaired=True),
    Fault("cache-key", "cache_key_tag is ''", untagged, after_install=True),
    Fault("data-workers", "timed out after 1", children_that_hang),
    Fault("fork", "hangs", children_that_hang),
    Fault("fork", "a forked child computes", children_that_compute_garbage),
    Fault("spawn", "No module named 'no_such_vendor'", subject={"imports": ["no_such_vendor"]}),
    Fault("version-matrix", "torch_musa 2.7.1 was built for torch 2.7", versions(torch_musa="2.7.1")),
    Fault("version-matrix", "asks for torch==2.7.1", versions(torch_musa="2.13.0", torchada="0.1.99")),
    Fault("entry-points", "fxpatch is not among the entry points", entry_points("json.decoder:JSONDecoder")),
    Fault("entry-points", "there is no module no_such_vendor", entry_points("no_such_vendor:autoload")),
    Fault("conflicts", "changes text in it", regex_over_generated_code),
    Fault("conflicts", "checkpoint-rng: torch._prims.rng_prims: get_device", another_signature),
)
