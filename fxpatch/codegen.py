"""Makes the source that FX generates build its devices by itself.

FX writes a device as its repr, `device(type='musa', index=0)`, and leaves it to the globals of the generated code to
bind `device`. A placeholder called `device` takes that name away (on plain CPU torch too: `TypeError: 'str' object is
not callable`), and so does a vendor's replacement of `torch.device`: FX adds no global that looks importable from
torch and is not `torch.device` (`add_global` in `CodeGen._gen_python_code`), so code generated, or pickled, under one
raises `NameError`. The patch wraps `CodeGen._gen_python_code` in every class that has its own, and rewrites the text it
returns.

The rules of the rewrite:

* A device of PrivateUse1 becomes `torch.device('musa', 0)`. No colon and no `#`: pytree codegens split on both.
* torch's own devices stay as they are, because a shim may map `torch.device('cuda', 1)` elsewhere. Only where the
  generated function binds `device` itself do they become `torch._C.device('cuda', 1)`: no shim replaces that class.
* Where `torch` is taken, by a placeholder or a global, a reserved alias stands in for it.
* Text is rewritten in code only: never in strings, bytes, docstrings or comments, after a dot or inside a longer
  name. No line is added or removed, so `_lineno_map` and `_prologue_start` stay valid. Doing it twice changes nothing.
* Coloured source is for people, and follows the same rules.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.fx.graph

from fxpatch.patching import Edits, Needed, NotNeeded, Patch, Target, settle_all
from fxpatch.privateuse1 import private_type

# -- text ----------------------------------------------------------------------------------------------------------

_LITERAL = "device(type='"
_ALIAS = "_fxpatch_torch"

# Strings and comments first, so that what is inside them is consumed; then the literal, whose first letter comes before
# the look-behinds because `re` skips fast to a fixed first letter. A name may touch a colour code: `\x1b[34mdevice(`.
_TOKEN = re.compile(
    r"""
    \"""(?:[^\\]|\\.)*?\""" | '''(?:[^\\]|\\.)*?'''
    | "(?:[^"\\\n]|\\.)*+"  | '(?:[^'\\\n]|\\.)*+'
    | \#[^\n]*+
    | device(?:(?<![\w.]device)|(?<=\x1b\[\d\dmdevice))\(type='(?P<type>\w+)'(?:,\ index=(?P<index>\d+))?\)
    """,
    re.VERBOSE | re.DOTALL,
)


class Rewritten(NamedTuple):
    """Source that builds its devices by itself, provided that its globals bind `torch_name` to torch."""

    src: str
    torch_name: str


def rewrite(src: str, globals_: Mapping[str, object], custom: str) -> Rewritten | None:
    """`src` with its device literals made self-contained; None where nothing has to change.

    Args:
        src: source as FX generates it: one function, its body indented.
        globals_: what the source's globals will bind.
        custom: the name of PrivateUse1, e.g. `"musa"`.
    """
    if _LITERAL not in src:
        return None
    every = _binds(src, "device")
    wanted = _LITERAL if every else f"{_LITERAL}{custom}'"
    at = src.find(wanted)
    if at < 0:
        return None
    torch_name = _free_name(src, globals_)

    def constructor(token: re.Match[str]) -> str:
        kind, index = token["type"], token["index"]
        if kind is None or not (every or kind == custom):
            return token[0]
        owner = torch_name if kind == custom else f"{torch_name}._C"
        return f"{owner}.device('{kind}')" if index is None else f"{owner}.device('{kind}', {index})"

    if '"""' in src or "'''" in src or "\\\n" in src:  # a literal's own line does not tell whether it is in a string
        changed = _TOKEN.sub(constructor, src)
    else:  # only the lines that hold a candidate: a tenth of the cost of lexing everything
        pieces: list[str] = []
        done = 0
        while at >= 0:
            start, end = src.rfind("\n", 0, at) + 1, src.find("\n", at)
            end = len(src) if end < 0 else end
            pieces += src[done:start], _TOKEN.sub(constructor, src[start:end])
            done, at = end, src.find(wanted, end)
        changed = "".join([*pieces, src[done:]])
    return None if changed == src else Rewritten(changed, torch_name)


def _binds(src: str, name: str) -> bool:
    """Whether the generated function binds `name`: as a parameter, or by an assignment in its body.

    Read off the text, and so true of every codegen: raw placeholders, the arguments of pytree codegens, the leaves of
    `_ExportCodeGen`, the unpacking of `_BoxedCodeGen`, body transformers. It may err towards yes (a string with an
    indented `name:` in it), and what follows from a yes is exact as well.
    """
    signature = _TOKEN.sub("", src.partition("\ndef ")[2].partition("\n")[0])
    return bool(_parameter(name).search(signature) or _assignment(name).search(src))


@functools.cache
def _parameter(name: str) -> re.Pattern[str]:
    """`name` in a signature on one line; on several lines each parameter looks like an assignment's target."""
    return re.compile(rf"(?:[(*]|, ){name} *[,:=)]")


@functools.cache
def _assignment(name: str) -> re.Pattern[str]:
    """`name` as a target: after indentation or `;  `, or in the `x, name, = ...` that FX unpacks with."""
    before = rf"(?<=  {name})|(?<=\t{name})|(?<=  \*{name})|(?<= \*\*{name})"
    return re.compile(rf"{name}(?:(?:{before}) *(?:[,:]|=(?!=))|(?<=, {name})(?: *, \w+)* *, = )")


def _free_name(src: str, globals_: Mapping[str, object]) -> str:
    """A name by which `src` can reach torch: `torch`, or an alias where that means something else."""
    if globals_.get("torch", torch) is torch and not _binds(src, "torch"):
        return "torch"
    names = itertools.chain([_ALIAS], (f"{_ALIAS}_{n}" for n in itertools.count(1)))
    return next(n for n in names if (globals_[n] is torch and not _binds(src, n) if n in globals_ else n not in src))


# -- the patch -----------------------------------------------------------------------------------------------------

_METHOD = "_gen_python_code"
_probing: ContextVar[bool] = ContextVar("fxpatch_codegen_probing", default=False)


class _Wrapping:
    """One application of the patch: the wrappers it has put into codegen classes."""

    def __init__(self, edits: Edits) -> None:
        self._edits = edits
        self._wrappers: set[object] = set()
        self._device_class: object = torch.device

    def cover(self, cls: type[Any]) -> None:
        """Wraps the method where `cls` and its subclasses have another one than ours: inherited from elsewhere too."""
        found = inspect.getattr_static(cls, _METHOD)
        if found not in self._wrappers:
            wrapper = self._wrap(found)
            self._wrappers.add(wrapper)
            self._edits.set_attr(cls, _METHOD, wrapper)
        for subclass in cls.__subclasses__():
            self.cover(subclass)

    def cover_later_subclasses(self, root: type[Any]) -> None:
        """Every subclass of `root` that is yet to be defined goes through `cover` as well."""
        before = vars(root).get("__init_subclass__")

        def __init_subclass__(cls: type[Any], /, **kwargs: Any) -> None:
            follow = before.__get__(None, cls) if before else super(root, cls).__init_subclass__
            follow(**kwargs)
            if self._edits.active:
                self.cover(cls)

        self._edits.set_attr(root, "__init_subclass__", classmethod(__init_subclass__))

    def _wrap(self, original: Any) -> Any:
        @functools.wraps(original)
        def _gen_python_code(codegen: Any, *args: Any, **kwargs: Any) -> Any:
            ours = self._edits.active and not _probing.get()
            if ours and torch.device is not self._device_class:  # a shim came after install(), and nothing is compiled
                self._device_class = torch.device
                settle_all("before FX generates code under another torch.device")
            result = original.__get__(codegen, type(codegen))(*args, **kwargs)
            return self._self_contained(result) if ours else result

        return _gen_python_code

    def _self_contained(self, result: Any) -> Any:
        found = rewrite(result.src, result.globals, private_type())
        if found is None:
            return result
        name = found.torch_name
        if name not in torch.fx.graph._custom_builtins:
            # For pickles, torch.package and to_folder, which otherwise look for some module that has an attribute
            # `torch` and import it from there. FX adds nothing to other graphs: there, torch already has a name.
            builtin = torch.fx.graph._CustomBuiltin(f"import torch as {name}", torch)
            self._edits.set_item(torch.fx.graph._custom_builtins, name, builtin, "torch.fx.graph._custom_builtins")
        fields = {"src": found.src, "globals": {**result.globals, name: torch}}
        return result._replace(**fields) if hasattr(result, "_replace") else dataclasses.replace(result, **fields)


def probe_codegen() -> bool:
    """Whether torch's own codegen, without this patch, survives a placeholder named `device`.

    The string in the graph is there because a rewrite by somebody else does not count if it changes data, and the
    device is `cuda:1` because one that goes through a shim does not count either.
    """
    literal = torch._C.device("cuda", 1)
    expected = (literal, repr(literal))
    graph = torch.fx.graph.Graph()
    graph.placeholder("device")
    graph.output(expected)
    token = _probing.set(True)
    try:
        code = graph.python_code("self")
        scope = dict(code.globals)
        exec(code.src, scope)
        return bool(scope["forward"](None, "an argument") == expected)
    except Exception:  # whatever generated code raises, it could not stand by itself
        return False
    finally:
        _probing.reset(token)


def _decide(self_contained: bool) -> Needed | NotNeeded:
    if self_contained:
        return NotNeeded("torch generates code that builds its devices by itself")
    return Needed("generated code calls `device(...)`, which a placeholder or a replaced torch.device takes away")


def _apply(device: str, _self_contained: bool, edits: Edits) -> str:
    root = torch.fx.graph.CodeGen
    wrapping = _Wrapping(edits)
    wrapping.cover(root)
    wrapping.cover_later_subclasses(root)
    return f"generated code says torch.device({device!r}, ...), and no longer depends on the name `device`"


PATCH = Patch[bool](
    name="codegen",
    why="FX writes devices as `device(type='musa', index=0)`: TypeError where a placeholder is called `device`, "
    "NameError under a replaced torch.device, in pickles written there even on a healthy machine",
    upstream="https://github.com/sgl-project/sglang/pull/23633",
    until="torch.fx generates code whose devices need no name that the graph can take (the probe finds out)",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(
        Target("torch.fx.graph", "CodeGen._gen_python_code", "self, nodes, root_module, namespace, ..."),
        Target("torch.fx.graph", "PythonCode", "src, globals, _lineno_map, ..."),
        Target("torch.fx.graph", "_custom_builtins"),
        Target("torch.fx.graph", "_CustomBuiltin", "import_str, obj"),
    ),
    probe=lambda _device: probe_codegen(),
    decide=_decide,
    apply=_apply,
)
