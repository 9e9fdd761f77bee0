"""The public names, and the pages of the reference that show them.

A module's public names are its `__all__`, or else the classes and functions it defines whose names have no underscore
in front. Modules that are not here are not public: they can change between two versions.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Page:
    """One page of the reference.

    Args:
        name: of its file, without `.md`.
        title: its heading.
        modules: what it shows, in this order.
    """

    name: str
    title: str
    modules: tuple[str, ...]


PAGES = (
    Page("fxpatch", "fxpatch", ("fxpatch",)),
    Page("errors", "fxpatch.errors", ("fxpatch.errors",)),
    Page(
        "piecewise",
        "fxpatch.piecewise",
        tuple(f"fxpatch.piecewise.{name}" for name in ("buckets", "report", "reasons", "progress")),
    ),
    Page(
        "layers",
        "fxpatch.layers",
        tuple(
            f"fxpatch.layers.{name}"
            for name in (
                "platform_op",
                "activation",
                "norm",
                "fp32_parameters",
                "adoption",
                "masks",
                "npu_masks",
                "vlm_masks",
                "memory_format",
                "causal_conv3d",
                "height_parallel",
                "height_parallel_convs",
                "scheduler",
            )
        ),
    ),
    Page("testing", "fxpatch.testing", ("fxpatch.testing", "fxpatch.testing.strategies", "fxpatch.testing.fx_graphs")),
    Page(
        "fake_kernels",
        "fake_kernels",
        (
            "fake_kernels",
            "fake_kernels.conformance",
            "fake_kernels.declare",
            "fake_kernels.drawing",
            "fake_kernels.errors",
            "fake_kernels.library",
            "fake_kernels.schemas",
            "fake_kernels.audit",
        ),
    ),
    Page("compile_configs", "compile_configs", ("compile_configs",)),
)


def public_names(module: ModuleType) -> list[str]:
    """The public names of a module, in the order of its source."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return [name for name in own if not name.startswith("_")]


def defined_in(module: ModuleType, name: str) -> str:
    """The dotted name of a public name where it is defined: `fxpatch.install` is `fxpatch.installer.install`."""
    value = getattr(module, name)
    home = getattr(value, "__module__", None)
    if home is None or home == "builtins" or getattr(importlib.import_module(home), name, None) is not value:
        return f"{_home_of_constant(module, name)}.{name}"
    return f"{home}.{name}"


def _home_of_constant(module: ModuleType, name: str) -> str:
    """The submodule that assigns a constant or a type alias: neither knows where it was made."""
    value = getattr(module, name)
    for info in pkgutil.iter_modules(getattr(module, "__path__", []), module.__name__ + "."):
        inner = importlib.import_module(info.name)
        if getattr(inner, name, None) is value:
            for node in ast.parse(inspect.getsource(inner)).body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return info.name
    return module.__name__


def page(wanted: Page) -> str:
    """The page's Markdown: a directive of mkdocstrings for each name."""
    parts = [f"# {wanted.title}"]
    for module_name in wanted.modules:
        module = importlib.import_module(module_name)
        if len(wanted.modules) > 1:
            parts.append(f"## {module_name}")
        parts.append(_summary(module))
        level = 3 if len(wanted.modules) > 1 else 2
        for name in public_names(module):
            home = defined_in(module, name)
            elsewhere = _page_of(home.rpartition(".")[0])
            if elsewhere is None or home == f"{module_name}.{name}":
                parts.append(f"::: {home}\n    options:\n      heading_level: {level}")
            else:
                parts.append(f"[`{module_name}.{name}`]({elsewhere.name}.md#{home}) is `{home}`.")
    return "\n\n".join(parts) + "\n"


def _page_of(module: str) -> Page | None:
    """The page that shows a module as its own."""
    return next((each for each in PAGES if module in each.modules), None)


def _summary(module: ModuleType) -> str:
    """The first paragraph of a module's docstring."""
    return (module.__doc__ or "").strip().split("\n\n")[0]
