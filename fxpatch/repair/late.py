"""What comes after `install()`: a shim, a vendor library. Everything is settled again before each compilation."""

from __future__ import annotations

from typing import Any

from fxpatch.patching import Edits, Needed, Patch, Target, settle_all

_MODULE = "torch._dynamo.callback"


def _settle(_args: Any) -> None:
    settle_all("at the start of a compilation")


def _apply(_device: str, _facts: None, edits: Edits) -> str:
    from torch._dynamo.callback import callback_handler, on_compile_start

    on_compile_start(_settle)

    def remove() -> None:
        if _settle in callback_handler.start_callbacks:  # somebody may have cleared all callbacks
            callback_handler.remove_start_callback(_settle)

    edits.on_undo(remove)
    return "every patch is settled again at the start of each compilation"


PATCH = Patch[None](
    name="settle-before-compile",
    why="a shim or a vendor library that arrives after install() would go unrepaired",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/callback.py",
    until="never: this is torch's own way to hear of a compilation",
    seen_in=("2.11.0", "2.13.0", "2.15.0"),
    targets=(Target(_MODULE, "on_compile_start", "callback"), Target(_MODULE, "callback_handler.start_callbacks")),
    probe=lambda _device: None,
    decide=lambda _facts: Needed("modules may arrive in any order"),
    apply=_apply,
    waits_for=(_MODULE,),
)
