"""The fake kernels that come with fxpatch, by family. A module is imported when its family is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass

from fake_kernels.errors import UnknownOperatorError
from fake_kernels.kernel import FakeKernel, split_name

MODULES: dict[str, tuple[str, ...]] = {
    "activations": (
        "activations_gated_npu",
        "activations_gelu_npu",
        "activations_infer_npu",
        "activations_musa",
        "activations_npu",
        "activations_sgl",
        "activations_vllm",
    ),
    "norms": (
        "norms_add_npu",
        "norms_group_npu",
        "norms_layer_npu",
        "norms_musa",
        "norms_npu",
        "norms_sgl",
        "norms_vllm",
    ),
    "rope": (
        "rope_musa",
        "rope_npu",
        "rope_positions_npu",
        "rope_sgl",
        "rope_vllm",
    ),
    "attention": (
        "attention_backward_musa",
        "attention_musa",
        "fusion_attention_grad_npu",
        "fusion_attention_npu",
        "infer_attention_npu",
        "infer_attention_single_npu",
        "nsa_npu",
    ),
    "quantisation": (
        "dequantisation_npu",
        "matmul_blocks_sgl",
        "matmul_npu",
        "matmul_sgl",
        "matmul_vllm",
        "quantisation_int8_vllm",
        "quantisation_norms_dynamic_npu",
        "quantisation_norms_npu",
        "quantisation_npu",
        "quantisation_sgl",
        "quantisation_sgl_rows",
        "quantisation_sgl_v2",
        "quantisation_static_npu",
        "quantisation_static_vllm",
        "quantisation_vllm",
    ),
    "moe": (
        "moe_combine_npu",
        "moe_gating_npu",
        "moe_gating_sgl",
        "moe_group_gating_npu",
        "moe_permute_npu",
        "moe_plan_sgl",
        "moe_quant_routing_npu",
        "moe_routing_npu",
        "moe_sgl",
        "moe_vllm",
        "topk_sgl",
    ),
    "kv_cache": (
        "kv_cache_npu",
        "kv_cache_vllm",
        "kv_rope_cache_npu",
    ),
    "sampling": (
        "sampling_masks_sgl",
        "sampling_npu",
        "sampling_sgl",
        "sampling_vllm",
    ),
    "casts": (
        "casts_format_npu",
        "casts_layout_npu",
        "casts_npu",
        "casts_order_npu",
    ),
}


@dataclass(frozen=True)
class Vendor:
    """Who brings operators.

    Args:
        namespaces: of its operators.
        libraries: the importable modules that register them.
        package: as profiles name it; `""` for an engine's, which there is on several devices.
    """

    namespaces: tuple[str, ...]
    libraries: tuple[str, ...]
    package: str = ""


# by a word in the names of the modules
VENDORS = {
    "musa": Vendor(("aten",), ("torch_musa",), "torch_musa"),
    "npu": Vendor(("npu", "atb"), ("torch_npu",), "torch_npu"),
    "sgl": Vendor(("sgl_kernel",), ("sgl_kernel",)),
    "vllm": Vendor(("_C", "_moe_C", "_C_cache_ops"), ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch")),
}


def modules(
    families: Iterable[str] = tuple(MODULES), packages: Iterable[str] | None = None
) -> tuple[tuple[str, Vendor], ...]:
    """The modules of some families, and whose operators they are for.

    Args:
        families: names in `MODULES`; others have no kernels yet.
        packages: only what these vendors' packages bring, and the engines; None for all.
    """
    wanted = None if packages is None else {"", *packages}
    named = [(name, vendor_of(name)) for family in families for name in MODULES.get(family, ())]
    return tuple((name, vendor) for name, vendor in named if wanted is None or vendor.package in wanted)


def vendor_of(module: str) -> Vendor:
    """Whose operators a module is for.

    Args:
        module: its name in this package, as `modules` gives it.
    """
    return next(VENDORS[word] for word in module.split("_") if word in VENDORS)


def records_of(module: str) -> tuple[FakeKernel, ...]:
    """What a module has as `KERNELS`, and as `UNDECLARED` the same operators in builds whose schemas do not declare
    what they write.

    Args:
        module: its name in this package, as `modules` gives it.
    """
    found = importlib.import_module(f"fake_kernels.library.{module}")
    return (*found.KERNELS, *getattr(found, "UNDECLARED", ()))


def load(families: Iterable[str] = tuple(MODULES)) -> tuple[FakeKernel, ...]:
    """The records of some families, in a fixed order.

    Args:
        families: some of those that profiles name, `"norms"`.
    """
    return tuple(record for name, _ in modules(families) for record in records_of(name))


def find(operator: str) -> FakeKernel:
    """The record of one operator.

    Raises:
        OperatorNameError: `operator` is no name.
        UnknownOperatorError: the library has none for it.
    """
    wanted = split_name(operator)
    records = load()
    for kernel in records:
        if split_name(kernel.op) == wanted:
            return kernel
    raise UnknownOperatorError(
        f"There is no record of {operator}.",
        seen=operator,
        expected=f"one of the {len(records)} operators of fake_kernels.library",
        hint="see docs/fake_kernels.md for the list, or pass a FakeKernel of your own",
    )
