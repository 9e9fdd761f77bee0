"""Registers fake kernels only where their operators exist and need one, as soon as they do, and takes them back.

`torch.compile` stops at an operator without a fake kernel. Four ways of registering one make things worse, silently,
and are refused here: for an operator that does not exist yet (nothing happens and nobody is told: ours is asked again),
over a vendor's own (torch 2.13 replaces it by default), for an operator of another schema, and for an operator that
returns nothing and declares no mutation (torch refuses to invent a fake for it on purpose, because its only possible
effect is hidden: with a fake, the call is dead code and is deleted). Each fake kernel that is wanted has an outcome
that says what became of it.

`settle()` may be called any number of times. Somebody has to: `fxpatch.install()` does when a vendor's library has
been imported and at the start of every compilation.
"""

from __future__ import annotations

import hashlib
import marshal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fake_kernels.adapter import (
    check_torch,
    decomposes,
    forget_results,
    overload_of,
    own_fake,
    put,
    put_over,
    registered,
    trivial_fake,
)
from fake_kernels.errors import RegisteredTwiceError, SignatureError
from fake_kernels.guarded import checked, code_of, place_of
from fake_kernels.honest import declared_aliases
from fake_kernels.kernel import FakeKernel, check_signature, parse, split_name
from fake_kernels.outcomes import (
    AlreadyHad,
    Deferred,
    Outcome,
    RefusedHidden,
    Registered,
    SchemaDiffers,
    Shadowed,
    Skipped,
)
from fake_kernels.same_schema import same_schema
from fake_kernels.shadow import differentiates, shadow, shadow_of

Policy = Literal["if_missing", "override"]
LIBRARIES = {
    "npu": "torch_npu",
    "atb": "torch_npu",
    "_C": "vllm._C_stable_libtorch",
    "_moe_C": "vllm._moe_C_stable_libtorch",
    "_C_cache_ops": "vllm._C_stable_libtorch",
}


_in_place: dict[str, Wanted] = {}  # of all registries


@dataclass(frozen=True)
class Wanted:
    """A fake kernel that is to be registered; `record` where its schema is known, and what it hides."""

    op: str
    fn: Callable[..., Any]
    library: str
    policy: Policy = "if_missing"
    record: FakeKernel | None = None


class Registry:
    """Fake kernels that somebody wants, and what became of each.

    Args:
        kernels: records; several for one operator are taken for its schemas in several versions of its library.
        override: operators whose own fake kernels are known to be wrong, and are replaced.
    """

    def __init__(self, kernels: Iterable[FakeKernel] = (), *, override: Iterable[str] = ()) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._wanted: dict[str, list[Wanted]] = {}
        self._taken: dict[str, Callable[[], None]] = {}  # how to take back what is in place
        self._lock = threading.RLock()
        self._replaced = {split_name(op) for op in override}
        self.add(kernels)

    def add(self, kernels: Iterable[FakeKernel]) -> None:
        """Wants more records.

        Args:
            kernels: the records.
        """
        for kernel in kernels:
            policy: Policy = "override" if split_name(kernel.op) in self._replaced else "if_missing"
            self.want(Wanted(kernel.op, kernel.fn, kernel.library, policy, kernel))

    def want(self, wanted: Wanted) -> None:
        """Adds one; `settle()` registers it.

        Args:
            wanted: operator, fake kernel, and whether it may take another's place.

        Raises:
            OperatorNameError: its operator is no name.
            RegisteredTwiceError: there is one for this operator and schema.
        """
        key = _key(wanted.op)
        with self._lock:
            others = self._wanted.setdefault(key, [])
            same = (None, wanted.record and wanted.record.schema)
            other = next((one for one in others if (one.record and one.record.schema) in same), None)
            if other is not None:
                raise RegisteredTwiceError(
                    f"{wanted.op} has a fake kernel here already.",
                    seen=f"{place_of(other.fn)}, and now {place_of(wanted.fn)}",
                    expected="one for each operator and schema",
                    hint="remove one of the two",
                )
            others.append(wanted)

    def settle(self, there: set[str] | None = None) -> dict[str, Outcome]:
        """Registers what can be registered now; returns all outcomes by operator.

        Args:
            there: the names of all operators of this process, if the caller has just asked.

        Raises:
            RuntimeError: this torch has moved a private name that is needed; nothing was changed.
        """
        check_torch()
        with self._lock:
            there = registered() if there is None and self._wanted else there or set()
            for key, candidates in self._wanted.items():
                overload = overload_of(key) if key in there else None
                if key in self._taken and overload is not None:
                    continue
                self._take_back(key)  # of a library that is gone
                self.outcomes[key] = self._settle_one(key, overload, candidates)
            return dict(self.outcomes)

    def outcome(self, op: str) -> Outcome | None:
        """What became of one operator's; None where nobody wants one.

        Args:
            op: `"namespace::name"` or `"namespace::name.overload"`.
        """
        return self.outcomes.get(_key(op))

    def undo(self) -> None:
        """Takes back exactly what was registered; a later `settle()` would register it again."""
        with self._lock:
            for key in list(self._taken):
                self._take_back(key)
            self.outcomes.clear()

    def remove(self, op: str) -> None:
        """Takes one operator's fake kernel back, and wants it no more.

        Args:
            op: `"namespace::name"` or `"namespace::name.overload"`.
        """
        key = _key(op)
        with self._lock:
            self._wanted.pop(key, None)
            self.outcomes.pop(key, None)
            self._take_back(key)

    def _settle_one(self, key: str, overload: Any, candidates: list[Wanted]) -> Outcome:
        if overload is None:
            module = candidates[0].library
            return Deferred(key, module, f"{key} is not registered: waits for {module}, and asks at each compilation")
        wanted = next((one for one in candidates if _complaint(overload, one) is None), None)
        if wanted is None:
            return SchemaDiffers(
                key, str(overload._schema), " or ".join(filter(None, (_complaint(overload, one) for one in candidates)))
            )
        aliases = declared_aliases(overload._schema)[1]
        if wanted.record is not None and (wanted.record.hidden or aliases):
            return self._shadow(key, overload, wanted, wanted.record)
        if not overload._schema.returns and not overload._schema.is_mutable:
            return RefusedHidden(
                key,
                f"{overload._schema} returns nothing and declares no mutation, so whatever it does is hidden: with a "
                "fake kernel compiled code would drop the call. Say what it writes: fake_kernels.shadow(op, "
                "mutates_args=(...))",
            )
        if decomposes(overload):
            return Skipped(key, f"{key} has a kernel for CompositeImplicitAutograd: it decomposes, and needs no fake")
        had = own_fake(overload)
        if had is None and wanted.record is None and trivial_fake(overload):
            had = f"{key} returns nothing and declares what it mutates: torch makes its fake kernel"
        if had is not None and wanted.policy == "if_missing":
            return AlreadyHad(key, had)
        return self._register(key, overload, wanted, had)

    def _register(self, key: str, overload: Any, wanted: Wanted, had: str | None) -> Outcome:
        source = wanted.record.source if wanted.record is not None else place_of(wanted.fn)
        fake = checked(overload, wanted.fn)
        if had is not None:
            self._put(key, wanted, put_over(overload, fake, source))
            return Registered(key, f"asked for instead of the operator's own: {source}", had)
        self._put(key, wanted, put(overload, fake, source))
        return Registered(key, f"it had no fake kernel; this one is after {source}")

    def _shadow(self, key: str, overload: Any, wanted: Wanted, record: FakeKernel) -> Outcome:
        """For what no fake kernel can mend: an operator that hides what it does, or returns what it writes."""
        had = shadow_of(key)
        if had is not None:
            return AlreadyHad(key, f"calls go through {had.op.name()} already")
        if not record.hidden and differentiates(overload):
            reason = "torch does not functionalize it, and it has a derivative, which a shadow would hide"
            return Skipped(key, f"{key} returns what it writes: {reason}. Call the variant that returns new tensors")
        made = shadow(key, mutates_args=record.writes, returns_args=record.returns_arguments, fake=record.fn)
        self._put(key, wanted, made.remove)
        if not record.hidden:
            reason = "it returns what it writes, which torch functionalizes for its own operators only"
            return Shadowed(key, f"{reason}: calls go through {made.op.name()}")
        hides = [f"writes {name}" for name in record.writes]
        hides += [f"returns {name} as result {number}" for number, name in record.returns_arguments.items()]
        return Shadowed(
            key, f"it {', '.join(hides)}, and its schema does not say so: calls go through {made.op.name()}"
        )

    def _put(self, key: str, wanted: Wanted, take_back: Callable[[], None]) -> None:
        self._taken[key] = take_back
        _in_place[key] = wanted
        forget_results()

    def _take_back(self, key: str) -> None:
        take = self._taken.pop(key, None)
        if take is not None:
            del _in_place[key]
            take()
            forget_results()


def fingerprint() -> str:
    """What traced graphs depend on and torch's cache keys leave out: the code of every fake kernel that is in place.
    The same in every process that has the same; `""` where there are none."""
    parts = [key.encode() + marshal.dumps(code_of(wanted.fn)) for key, wanted in sorted(_in_place.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16] if parts else ""


def _key(op: str) -> str:
    namespace, name, overload = split_name(op)
    return f"{namespace}::{name}" + (f".{overload}" if overload else "")


def _complaint(overload: Any, wanted: Wanted) -> str | None:
    """What the fake kernel was written for instead of this operator; None where it fits."""
    if wanted.record is not None:
        fits = same_schema(overload._schema, parse(wanted.record.schema))
        return None if fits else wanted.record.schema
    try:
        check_signature(wanted.op, overload._schema, wanted.fn)
    except SignatureError as error:
        return f"a fake kernel that is {error.seen}"
    return None
