"""What comes after `install()`: a shim, a vendor library, another thread. All is settled before each compilation.

torch has a public decorator for this, `torch._dynamo.on_compile_start`; but `torch._dynamo.reset()` throws away what
was registered with it, and it is told of the first of several threads only. So what runs the callbacks is wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fxpatch.patching import Edits, Needed, Patch, Target, compiling

_MODULE = "torch._dynamo.callback"


def _apply(_device: str, _facts: None, edits: Edits) -> str:
    from torch._dynamo.callback import callback_handler

    original = callback_handler.install_callbacks

    @contextmanager
    def install_callbacks(trigger: Any, compile_id: str) -> Iterator[None]:
        if not edits.active:
            with original(trigger, compile_id):
                yield
            return
        with compiling(), original(trigger, compile_id):
            yield

    edits.set_attr(callback_handler, "install_callbacks", install_callbacks)
    return "every patch is settled again at the start of each compilation"


PATCH = Patch[None](
    name="settle-before-compile",
    why="a shim or a vendor library that arrives after install() would go unrepaired, and a thread that compiles would "
    "not see the settings that another one made",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/callback.py",
    until="torch._dynamo.reset() leaves callbacks alone that it did not register",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(Target(_MODULE, "callback_handler.install_callbacks", "trigger, compile_id"),),
    probe=lambda _device: None,
    decide=lambda _facts: Needed("modules may arrive in any order"),
    apply=_apply,
    waits_for=(_MODULE,),
)
