"""What comes after `install()`: a shim, a vendor library. Everything is settled again before each compilation.

torch has a public decorator for this, `torch._dynamo.on_compile_start`; but `torch._dynamo.reset()` throws away what
was registered with it, and the next compilation would go unrepaired. So the method that runs them is wrapped.
"""

from __future__ import annotations

from typing import Any

from fxpatch.patching import Edits, Needed, Patch, Target, settle_all

_MODULE = "torch._dynamo.callback"


def _apply(_device: str, _facts: None, edits: Edits) -> str:
    from torch._dynamo.callback import callback_handler

    original = callback_handler.run_start_callbacks

    def run_start_callbacks(args: Any) -> None:
        if edits.active:
            settle_all("at the start of a compilation")
        original(args)

    edits.set_attr(callback_handler, "run_start_callbacks", run_start_callbacks)
    return "every patch is settled again at the start of each compilation"


PATCH = Patch[None](
    name="settle-before-compile",
    why="a shim or a vendor library that arrives after install() would go unrepaired",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/callback.py",
    until="torch._dynamo.reset() leaves callbacks alone that it did not register",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(Target(_MODULE, "callback_handler.run_start_callbacks", "args"),),
    probe=lambda _device: None,
    decide=lambda _facts: Needed("modules may arrive in any order"),
    apply=_apply,
    waits_for=(_MODULE,),
)
