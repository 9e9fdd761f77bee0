"""Memory that nobody wants any more, really given back before it is counted."""

from __future__ import annotations

import gc
import time

from fxpatch.simulator.memory import ledger


def collect() -> None:
    """Collect garbage until the device's memory stays as it is.

    Once is not enough: `gc.collect()` returns at once while another thread collects, and a thread of autograd's may
    hold the last node of a graph a moment longer than `backward()` lasts. On a busy machine an earlier test's memory
    has been seen to come back in the middle of the next.
    """
    seen = None
    for _ in range(50):
        gc.collect()
        now = ledger.in_pools, ledger.blocks.current, ledger.allocated.current
        if now == seen:
            return
        seen = now
        time.sleep(0.02)
    raise AssertionError(f"the device's memory never came to rest; last {seen}")
