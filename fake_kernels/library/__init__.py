"""The fake kernels that come with fxpatch, by family. A module is imported when its family is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from fake_kernels.errors import UnknownOperatorError
from fake_kernels.kernel import FakeKernel, split_name

MODULES: dict[str, tuple[str, ...]] = {
    "activations": ("activations_musa", "activations_npu"),
}
ENGINES = ("sgl", "vllm")  # libraries that engines bring on several devices; the other modules are a vendor's
VENDORS = {"musa": "torch_musa", "npu": "torch_npu"}


def load(families: Iterable[str] = tuple(MODULES), packages: Iterable[str] | None = None) -> tuple[FakeKernel, ...]:
    """The records of some families, in a fixed order: what each module has as `KERNELS`.

    Args:
        families: names in `MODULES`; others have no kernels yet.
        packages: only what these vendors' packages bring, and the engines; None for all.
    """
    wanted = None if packages is None else set(packages)

    def fits(module: str) -> bool:
        brings = module.rpartition("_")[2]
        return wanted is None or brings in ENGINES or VENDORS[brings] in wanted

    names = [name for family in families for name in MODULES.get(family, ()) if fits(name)]
    modules = [importlib.import_module(f"fake_kernels.library.{name}") for name in names]
    return tuple(kernel for module in modules for kernel in module.KERNELS)


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
