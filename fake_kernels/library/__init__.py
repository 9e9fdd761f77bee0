"""The fake kernels that come with fxpatch, by family. A module is imported when its family is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

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
VENDORS = {"musa": "torch_musa", "npu": "torch_npu"}  # by the words of a module's name; the others are the engines'


def load(families: Iterable[str] = tuple(MODULES), packages: Iterable[str] | None = None) -> tuple[FakeKernel, ...]:
    """The records of some families, in a fixed order: what each module has as `KERNELS`, and as `UNDECLARED` the same
    operators in builds whose schemas do not declare what they write.

    Args:
        families: names in `MODULES`; others have no kernels yet.
        packages: only what these vendors' packages bring, and the engines; None for all.
    """
    wanted = None if packages is None else set(packages)

    def fits(module: str) -> bool:
        vendor = next((VENDORS[part] for part in module.split("_") if part in VENDORS), None)
        return wanted is None or vendor is None or vendor in wanted

    names = [name for family in families for name in MODULES.get(family, ()) if fits(name)]
    modules = [importlib.import_module(f"fake_kernels.library.{name}") for name in names]
    return tuple(kernel for module in modules for kernel in (*module.KERNELS, *getattr(module, "UNDECLARED", ())))


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
