"""Everything that is done to one operator, in order, as named stages: the unit in which a crash or a hang is
located."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fake_kernels.audit.adapter import needs_no_fake
from fake_kernels.audit.backward import has_autograd, probe_backward
from fake_kernels.audit.declared import check_declared
from fake_kernels.audit.defaults import probe_defaults
from fake_kernels.audit.effects import not_probed, probe_effects, probe_refused
from fake_kernels.audit.findings import Finding
from fake_kernels.audit.layout import probe_dtypes, probe_strides
from fake_kernels.audit.search import Found, Search
from fake_kernels.audit.signature import check_signature, undefined_names
from fake_kernels.audit.symbolic import has_tensors, probe_symbolic
from fake_kernels.audit.target import Target

Stage = tuple[str, Callable[[], Iterator[Finding]]]
SEARCH = "search for accepted calls"


class Audit:
    """The audit of one operator. `state` is what the report says of it once all stages have run."""

    def __init__(self, target: Target, siblings: dict[str, Any]) -> None:
        self.target, self.siblings = target, siblings
        self.found = Found()
        self.state = "no fake" if needs_no_fake(target.overload) is None else "no kernel of its own"

    def stages(self) -> Iterator[Stage]:
        """The stages; what a later one does depends on the search before it, so take them one at a time."""
        target = self.target
        yield "schema", lambda: check_declared(target, self.siblings)
        if target.kernel is None:
            return
        kernel = target.kernel
        yield "signature", lambda: check_signature(target.name, target.schema, kernel)
        yield "names", lambda: undefined_names(target.name, kernel)
        yield SEARCH, self._search
        if not self.found.accepted:
            yield "refused calls", lambda: probe_refused(target, self.found)
        yield "defaults", lambda: probe_defaults(target, self.found)
        for number, tried in enumerate(self.found.accepted):
            yield f"FakeTensorMode {number}", partial(probe_effects, target, tried.sample)
            if has_tensors(tried.sample):
                yield f"symbolic sizes {number}", partial(probe_symbolic, target, tried.sample)
                yield f"strides {number}", partial(probe_strides, target, tried)
                yield f"dtypes {number}", partial(probe_dtypes, target, tried)
        if self.found.accepted and has_autograd(target.name):
            yield "backward", lambda: probe_backward(target, self.found.accepted[0].sample)

    def _search(self) -> Iterator[Finding]:
        self.found = Search(self.target.overload, self.target.kernel).run()
        self.state = "probed" if self.found.accepted else "not probed"
        if not self.found.accepted:
            yield not_probed(self.target, self.found)
