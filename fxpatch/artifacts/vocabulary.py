"""What a graph in a file may name: operators, torch's functions, tensor methods, modules.

A graph is a program: whoever may name any function and any method can run any code where the graph runs (`getattr`
and a call are enough), and FX writes the names it is given into source that it executes. So names are identifiers, and
there are two vocabularies. **Anybody's** file may name torch's own operators (`aten`, `prims`; not the one that opens
files), its functions and methods that work on tensors, arithmetic, and the modules of `torch.nn`. A file that is
**trusted** (`trust`) may name more: every operator and function of torch's, and operators, functions and modules of any
package that this process has imported. Nothing is ever imported because a file says so.

That keeps a stranger's graph from running code and from opening files. Its operators still run: torch's kernels are not
made for hostile arguments, and a graph may ask for more memory than there is.
"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
import sys
from functools import cache
from typing import Any

import torch
import torch.overrides

from fxpatch.errors import MissingHereError

Json = Any


class NotWritableError(Exception):
    """Why something has no form as plain data, in words."""


class NotTrustedError(Exception):
    """What only a trusted file may name, in words."""


_NAMESPACES = ("torch", "torch.functional", "torch.nn.functional", "torch.linalg", "torch.fft", "torch.special")
_BINDINGS = ("torch._C._nn", "torch._C._special", "torch._C._linalg", "torch._C._fft")  # of operators, and nothing else
_ELSEWHERE = (*_NAMESPACES, *_BINDINGS, "torch._C", "torch.sym", "_operator", "math", "builtins")
_OPERATORS = ("aten", "prims")
_OPENS_FILES = {"from_file"}
_FACTORIES = {
    *("arange", "as_strided", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace"),
    *("ones", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros", "is_tensor", "promote_types", "result_type", "can_cast"),
    *("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_sum", "sym_sqrt", "sym_ite", "is_grad_enabled"),
    *("hann_window", "hamming_window", "bartlett_window", "blackman_window", "kaiser_window", "normal", "range"),
    *("fft_fftfreq", "fft_rfftfreq", "fftfreq", "rfftfreq", "_assert", "device", "finfo", "iinfo"),
}
_FUNCTIONS_NOT = ("__", "fbgemm_", "autocast")
_BUILTINS = {"max", "min", "abs", "round", "getattr", "int", "float", "bool", "len", "divmod", "pow", "sum", "slice"}
_OPERATOR_FUNCTIONS = {
    *("lt", "le", "eq", "ne", "ge", "gt", "not_", "truth", "is_", "is_not", "abs", "add", "and_", "floordiv", "index"),
    *("inv", "invert", "lshift", "mod", "mul", "matmul", "neg", "or_", "pos", "pow", "rshift", "sub", "truediv", "xor"),
    *("concat", "contains", "getitem", "setitem", "iadd", "iand", "ifloordiv", "ilshift", "imod", "imul", "imatmul"),
    *("ior", "ipow", "irshift", "isub", "itruediv", "ixor"),
}
_METHODS_TOO = {
    *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros", "as_strided", "keys", "get"),
    *("values", "items", "append", "index", "count", "to_sparse_coo", "unflatten"),
}
_METHODS_NOT = {
    *("__reduce_ex__", "__setstate__", "__deepcopy__", "__array__", "__array_wrap__", "__dlpack__", "__format__"),
    *(
        "__dlpack_device__",
        "__repr__",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "apply_",
        "map_",
        "map2_",
    ),
    *("storage", "untyped_storage", "share_memory_", "module_load", "numpy", "backward", "data_ptr", "const_data_ptr"),
    *("_clear_non_serializable_cached_data", "as_subclass", "resize_", "resize_as_", "set_", "__contains__", "type"),
}
_ATTRIBUTES = {
    *("shape", "dtype", "device", "layout", "ndim", "T", "H", "mT", "mH", "real", "imag", "requires_grad", "itemsize"),
    *("nbytes", "is_cpu", "is_cuda", "is_meta", "is_leaf", "is_sparse", "is_quantized", "type", "index", "start"),
    *("stop", "step", "data", "values", "indices", "min", "max", "eps", "tiny", "bits", "names", "is_nested"),
}
_PATH = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")


class Vocabulary:
    """What may be named.

    Args:
        trusted: whether everything that this process has may be.
    """

    def __init__(self, *, trusted: bool) -> None:
        self.trusted = trusted

    def function(self, form: Json) -> Any:
        """What a `call_function` node calls, from its name (`name_of`).

        Raises:
            ValueError: it is no name of a function.
            NotTrustedError: only a trusted file may name it.
            MissingHereError: this process has no such operator or function.
        """
        kind, where, name, *rest = form
        if not (isinstance(where, str) and is_path(where) and isinstance(name, str) and is_identifier(name)):
            raise ValueError(f"no function of a graph: {str(form)[:120]}")
        if kind == "op" and len(rest) == 1:
            return self._operator(where, name, rest[0])
        if kind == "higher" and not rest:
            self._only_trusted(f"the higher-order operator {name}")
            return _attribute(torch.ops.higher_order, name, f"the higher-order operator {name}", "another torch")
        if kind != "function" or rest:
            raise ValueError(f"no function of a graph: {str(form)[:120]}")
        return self._function(where, name)

    def argument(self, form: Json) -> Any:
        """A function that is an argument, or the attribute of a module, and may be called with anything: in anybody's
        file, one of torch's own."""
        found = self.function(form)
        if not self.trusted and (form[0] != "function" or not form[1].startswith("torch")):
            raise NotTrustedError(f"{form[1]}.{form[2]} as an argument")
        return found

    def method(self, name: Json) -> str:
        """The name of a method that a `call_method` node calls."""
        if not (isinstance(name, str) and is_identifier(name)):
            raise ValueError(f"no method of a tensor: {str(name)[:120]}")
        if name not in _methods():
            self._only_trusted(f"the method {name!r}")
        return name

    def attribute(self, name: Json) -> str:
        """What a graph's `getattr` reads."""
        if not (isinstance(name, str) and is_identifier(name)):
            raise ValueError(f"no attribute of a tensor: {str(name)[:120]}")
        if name not in _ATTRIBUTES and re.fullmatch("is_[a-z]+", name) is None:
            self._only_trusted(f"the attribute {name!r}")
        return name

    def module_class(self, where: Json, name: Json) -> type[torch.nn.Module]:
        """The class of a submodule.

        Raises:
            ValueError, NotTrustedError, MissingHereError: as for `function`.
        """
        if not (isinstance(where, str) and is_path(where) and isinstance(name, str) and is_path(name)):
            raise ValueError(f"no class of a module: {str([where, name])[:120]}")
        found: Any = None
        if where == "torch.nn.modules.module" or where.startswith("torch.nn.modules."):
            found = getattr(torch.nn, name, None)
        if found is None:
            self._only_trusted(f"the module {where}.{name}")
            found = _imported(where, name, f"the module class {where}.{name}")
        if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
            raise ValueError(f"{where}.{name} is no class of modules")
        return found

    def _only_trusted(self, what: str) -> None:
        if not self.trusted:
            raise NotTrustedError(what)

    def _operator(self, namespace: str, name: str, overload: Any) -> Any:
        if not is_identifier(namespace) or not (
            overload is None or (type(overload) is str and is_identifier(overload))
        ):
            raise ValueError(f"no operator: {namespace}::{name}.{str(overload)[:40]}")
        if namespace not in _OPERATORS or name in _OPENS_FILES:
            self._only_trusted(f"the operator {namespace}::{name}")
        what = f"the operator {namespace}::{name}"
        hint = f"import the package that defines {namespace}:: (for npu:: that is torch_npu), then load again"
        packet = _attribute(getattr(torch.ops, namespace), name, what, hint)
        full = f"{namespace}::{name}{_dotted(packet, overload)}"
        if namespace in _OPERATORS and not torch._C._dispatch_has_kernel(full):
            self._only_trusted(f"{what}, which is no operator on tensors")
        return packet if overload is None else _attribute(packet, overload, f"{what}.{overload}", hint)

    def _function(self, where: str, name: str) -> Any:
        if (where, name) in _functions():
            return getattr(sys.modules[where], name)
        if where in ("builtins", "posix", "nt"):
            raise ValueError(f"no function of a graph: {where}.{name}")
        self._only_trusted(f"the function {where}.{name}")
        return _imported(where, name, f"the function {where}.{name}")


def name_of(target: Any) -> Json:
    """The form under which `Vocabulary.function` finds a function again.

    Raises:
        NotWritableError: it has no name by which another process could find it.
    """
    if isinstance(target, torch._ops.OpOverload):
        return ["op", target.namespace, target._schema.name.partition("::")[2], target._overloadname]
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return ["op", namespace, name, None]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return ["higher", "torch.ops.higher_order", target.name()]
    name = getattr(target, "__name__", "")
    if isinstance(name, str) and is_identifier(name):
        for module in (getattr(target, "__module__", None), *_ELSEWHERE):
            held = getattr(sys.modules.get(module or ""), name, None)
            if held is target and (module != "builtins" or name in _BUILTINS):
                return ["function", module, name]
    raise NotWritableError(
        f"{name or repr(target)} is neither an operator nor a function that a module has by its name"
    )


def class_name(kind: type) -> tuple[str, str]:
    """The form under which `Vocabulary.module_class` finds a class again; `NotWritableError` where it cannot."""
    where, name = kind.__module__, kind.__qualname__
    found: Any = sys.modules.get(where)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not kind or not is_path(name):
        raise NotWritableError(f"the class {where}.{name} cannot be found by its name")
    return where, name


def is_identifier(name: str) -> bool:
    """Whether FX can write a name into source as it is, and nothing but a name."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and len(name) < 1000


def is_path(name: str) -> bool:
    """Whether it is a dotted path of plain parts; a part may begin with a digit, as in `layers.0.weight`."""
    return len(name) < 2000 and _PATH.fullmatch(name) is not None


def _dotted(packet: Any, overload: str | None) -> str:
    names = packet.overloads() if overload is None else [overload]
    first = names[0] if names else "default"
    return "" if first == "default" else f".{first}"


def _attribute(owner: Any, name: str, what: str, hint: str) -> Any:
    try:
        return getattr(owner, name)
    except (AttributeError, RuntimeError) as error:
        raise _missing(what, hint) from error


def _imported(where: str, name: str, what: str) -> Any:
    found: Any = sys.modules.get(where)
    for part in name.split(".") if found is not None else ():
        found = getattr(found, part, None)
    if found is None:
        raise _missing(what, f"import {where}, then load again")
    return found


def _missing(what: str, hint: str) -> MissingHereError:
    return MissingHereError(
        "The artifact calls what this process has not.",
        seen=f"{what} is not here",
        expected="a process that has imported everything that the graph calls",
        hint=hint,
    )


@cache
def _functions() -> frozenset[tuple[str, str]]:
    """Module and name of each function that anybody's file may name."""
    overridable = torch.overrides.get_overridable_functions()
    known = {id(each) for space, each_of in overridable.items() if not isinstance(space, type) for each in each_of}
    found = set()
    for space in _NAMESPACES:
        for name, each in vars(sys.modules[space]).items():
            if callable(each) and (id(each) in known or name in _FACTORIES) and not name.startswith(_FUNCTIONS_NOT):
                found.add((space, name))
    for space in _BINDINGS:
        module: Any = torch
        for part in space.split(".")[1:]:
            module = getattr(module, part)
        sys.modules.setdefault(space, module)
        found |= {(space, name) for name in dir(module) if not name.startswith("_")}
    found |= {("builtins", name) for name in _BUILTINS if hasattr(builtins, name)}
    found |= {("_operator", name) for name in _OPERATOR_FUNCTIONS if hasattr(operator, name)}
    found |= {("math", name) for name in dir(math) if not name.startswith("_") and callable(getattr(math, name))}
    return frozenset(found)


@cache
def _methods() -> frozenset[str]:
    """The methods of tensors (and of the tuples and dicts that operators return) that anybody's file may call."""
    overridable = torch.overrides.get_overridable_functions()[torch.Tensor]
    named = {getattr(each, "__name__", "") for each in overridable}
    return frozenset((named | _METHODS_TOO | {"size", "dim", "item", "tolist"}) - _METHODS_NOT)
