"""One call of the model, ready to be made again and again. The rule: every run gets copies of its own, with the layout,
the shared memory and the `requires_grad` of the originals: what a run writes to its arguments no later run sees.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.errors import InputError
from fxpatch.native.copies import Saved

_IMMUTABLE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)


class Call:
    """Arguments for one run.

    Attributes:
        args, kwargs: to call with.
        tensors: those among their leaves that are tensors, by their place: `"[0]"`, `"['mask']"`.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.tensors: dict[str, torch.Tensor] = {}
        for tree in (args, kwargs):
            for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
                if isinstance(leaf, torch.Tensor):
                    self.tensors[pytree.keystr(path)] = leaf

    def leaves(self) -> dict[str, Any]:
        """All leaves by their place, as they are now: a call may have put more into a list or a dict."""
        found = (leaf for tree in (self.args, self.kwargs) for leaf in pytree.tree_flatten_with_path(tree)[0])
        return {pytree.keystr(path): leaf for path, leaf in found}


class Example:
    """An example call.

    Args:
        args, kwargs: as of the model; tensors, trees of them, other objects.

    Raises:
        InputError: an argument can neither be shared nor copied.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._saved = Saved((args, kwargs))
        self._requires_grad = [
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((args, kwargs))
        ]
        self.differentiable = any(self._requires_grad)
        self.call()

    def call(self) -> Call:
        """Copies to run with."""
        fresh = self._saved.fresh()
        for leaf, wanted in zip(fresh.leaves, self._requires_grad, strict=True):
            if wanted:
                leaf.requires_grad_()
        args, kwargs = pytree.tree_map_only(_is_object, _copied, fresh.tree)
        return Call(args, kwargs)


def examples(inputs: Any) -> list[Example]:
    """What a caller may pass as inputs: a tuple of positional arguments, a dict of named ones, a tensor; or a list of
    these.

    Raises:
        InputError: it is none of them.
    """
    given = inputs if isinstance(inputs, list) else [inputs]
    made = []
    for each in given:
        if isinstance(each, torch.Tensor):
            made.append(Example((each,), {}))
        elif isinstance(each, tuple):
            made.append(Example(each, {}))
        elif isinstance(each, dict) and all(isinstance(name, str) for name in each):
            made.append(Example((), dict(each)))
        else:
            raise InputError(
                "These inputs cannot be called with.",
                seen=f"a {type(each).__name__}",
                expected="a tuple of positional arguments, a dict of named ones, a tensor, or a list of such inputs",
                hint="verify(model, (x, mask)) or verify(model, {'x': x, 'mask': mask})",
            )
    if not made:
        raise InputError(
            "There is nothing to verify with.",
            seen="an empty list of inputs",
            expected="at least one input",
            hint="verify(model, (x,))",
        )
    return made


def _is_object(leaf: Any) -> bool:
    return not isinstance(leaf, (torch.Tensor, *_IMMUTABLE)) and not callable(leaf)


def _copied(leaf: Any) -> Any:
    try:
        return copy.deepcopy(leaf)
    except Exception as error:
        raise InputError(
            "An argument cannot be copied, and every run needs one of its own.",
            seen=f"{type(leaf).__name__}: {type(error).__name__}: {error}",
            expected="tensors, trees of them, or objects that copy.deepcopy takes",
            hint="wrap the model in a function that makes this object",
        ) from error
