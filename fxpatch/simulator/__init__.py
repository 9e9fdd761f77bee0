"""A simulated accelerator in pure Python: `simulate("musa")` makes this process's PrivateUse1 a device of that name.

Read `simulate` first, then `storage` (what device memory is), `dispatch` (how operators run), `graph` (capture).
"""

from fxpatch.simulator.graph import Graph, capturing
from fxpatch.simulator.registration import simulate

__all__ = ["Graph", "capturing", "simulate"]
