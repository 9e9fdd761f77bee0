"""The private torch names that the audit needs, in one place, checked before use.

Seen in torch 2.11, 2.13 and 2.15: the list of all operators and their dispatch keys, fake tensors made from a meta
tensor and a device, symbols made by hand in a `ShapeEnv`. Nothing else of the audit knows a private name, except for
`OpOverload._schema`, which every tool reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fake_kernels.adapter import how_traced

_NAMES = (
    "_C._dispatch_get_all_op_names",
    "_C._dispatch_has_kernel_for_dispatch_key",
    "_C._get_privateuse1_backend_name",
    "_library.simple_registry.singleton.find",
)


def check_torch() -> None:
    """`RuntimeError` where this torch no longer has a name that is needed."""
    for path in _NAMES:
        found: Any = torch
        for part in path.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise RuntimeError(
                f"torch {torch.__version__} has moved a private name that the audit needs.\n"
                f"  seen: no torch.{path}\n"
                "  expected: it, as in torch 2.11 to 2.15\n  to do: use such a torch, or report this one"
            )


def all_operator_names() -> list[str]:
    """`namespace::name` and `namespace::name.overload` of every registered operator, sorted."""
    return sorted(torch._C._dispatch_get_all_op_names())


def find_overload(name: str) -> Any:
    """The `OpOverload` for a name from `all_operator_names`."""
    namespace, _, rest = name.partition("::")
    operator, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")


def has_kernel(name: str, key: str) -> bool:
    """Whether the dispatcher has a kernel for exactly this key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def needs_no_fake(overload: Any) -> str | None:
    """Why an operator needs no fake kernel, in words; None if it needs one."""
    return how_traced(overload)


def registered_fake(name: str) -> Any:
    """The function given to `torch.library.register_fake`, or None."""
    kernel = torch._library.simple_registry.singleton.find(name).fake_impl.kernel
    if kernel is None:
        return None
    function = kernel.func
    if (
        getattr(function, "__qualname__", "") == "_check_pystubs_once.<locals>.inner"
    ):  # torch 2.11 to 2.15: a closure over it
        function = inspect.getclosurevars(function).nonlocals["func"]
    return function


def keeps_calls(overload: Any) -> bool:
    """Whether FX was told (`torch.fx.node.has_side_effect`) to keep calls whose results nobody reads."""
    from torch.fx import node

    return overload in getattr(node, "_side_effectful_functions", ())


def load_device_backends() -> None:
    """What `import torch` does by itself unless TORCH_DEVICE_BACKEND_AUTOLOAD=0: imports the vendors' plugins."""
    load = getattr(torch, "_import_device_backends", None)
    if load is not None:
        load()


def traced_device() -> torch.device:
    """The device that fake tensors claim: a fake kernel sees meta tensors, whatever they claim, and torch itself asks
    the driver about a PrivateUse1 device (its current stream) that is not there while auditing."""
    return torch.device("cpu")


def call_with_autograd(overload: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Calls the operator on meta tensors, through the autograd kernel that its vendor registered for the device."""
    if has_kernel(overload.name(), "AutogradPrivateUse1"):
        return overload._op_dk(torch._C.DispatchKey.AutogradPrivateUse1, *args, **kwargs)
    return overload(*args, **kwargs)


def is_device_module(name: str) -> bool:
    """Whether a module belongs to the PrivateUse1 device's runtime: `torch.<device>`, where it really lives."""
    backend = torch._C._get_privateuse1_backend_name()
    runtime = getattr(torch, backend, None)
    home = getattr(runtime, "__name__", None)
    return isinstance(home, str) and (name == home or name.startswith(home + "."))


def fake_mode(shape_env: Any = None) -> Any:
    """A `FakeTensorMode` that computes every answer anew."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(shape_env=shape_env)
    mode.cache_enabled = False
    return mode


@contextmanager
def tracing(mode: Any) -> Iterator[None]:
    """Fake tensors as Dynamo and AOTAutograd run them: with the Python dispatcher, so that what a kernel calls keeps
    sizes symbolic where its C++ kernel would not."""
    from torch._dispatch.python import enable_python_dispatcher

    with mode, enable_python_dispatcher():
        yield


def fake_tensor(mode: Any, shape: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: Any) -> Any:
    """A fake tensor on `device`, which is not touched; sizes and strides may be symbolic."""
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor(mode, torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta"), device)


def data_dependent_errors() -> tuple[type[BaseException], ...]:
    """What fake tensors raise where their contents are asked for."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return (DataDependentOutputException, DynamicOutputShapeException)


def unsupported_error() -> type[BaseException]:
    """What fake tensors raise at an operator without a fake kernel."""
    from torch._subclasses.fake_tensor import UnsupportedOperatorException

    return UnsupportedOperatorException


class Symbols:
    """One symbolic size for each plain size of at least 2: equal sizes move together, as in a duck-shaped graph."""

    def __init__(self) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.env = ShapeEnv()
        self._by_size: dict[int, Any] = {}

    def of(self, size: int) -> Any:
        """A `SymInt` whose hint is `size`; sizes 0 and 1 stay plain, as torch specialises them."""
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        if size < 2:
            return size
        if size not in self._by_size:
            source = ConstantSource(f"size_{size}")
            symbol = self.env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            self._by_size[size] = self.env.create_symintnode(symbol, hint=size, source=source)
        return self._by_size[size]

    def expressions(self) -> dict[int, Any]:
        """Plain size -> its sympy symbol."""
        return {size: symint.node._expr for size, symint in self._by_size.items()}

    def specialised(self) -> dict[int, int]:
        """Plain size -> the constant it has become."""
        found = {}
        for size, symbol in self.expressions().items():
            value = self.env.replace(symbol)
            if value.is_number:
                found[size] = int(value)
        return found

    def guards(self) -> list[Any]:
        """The sympy conditions that were assumed so far."""
        return [guard.expr for guard in self.env.guards]


def expression(value: Any) -> Any:
    """A `SymInt` as a sympy expression; a plain number as it is."""
    return value.node.expr if isinstance(value, torch.SymInt) else value


def warm_up() -> None:
    """Imports what the first symbolic trace imports (sympy, seconds of it), so that no operator is charged for it."""
    symbols = Symbols()
    size = symbols.of(4)
    mode = fake_mode(symbols.env)
    with mode:
        torch.empty_like(fake_tensor(mode, (size,), (1,), torch.float32, torch.device("cpu")))
