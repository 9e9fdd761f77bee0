"""What a caller of the audit can get wrong."""

from __future__ import annotations

from collections.abc import Sequence


class AuditError(ValueError):
    """The audit cannot start; the message says what was seen, what was expected, and what to do."""

    def __init__(self, what: str, *, seen: str, expected: str, hint: str) -> None:
        super().__init__(f"{what}\n  seen: {seen}\n  expected: {expected}\n  to do: {hint}")


class UnknownNamespaceError(AuditError):
    """No operator of that namespace is registered."""

    def __init__(self, namespace: str, known: Sequence[str]) -> None:
        super().__init__(
            f"there is no operator namespace {namespace!r}",
            seen="the namespaces " + ", ".join(known),
            expected="one of them",
            hint="a vendor's operators exist once its package is imported: add --import PACKAGE (imports=['PACKAGE'])",
        )


class NoSuchOperatorsError(AuditError):
    """The namespace exists, and the pattern matches none of its operators."""

    def __init__(self, namespace: str, pattern: str, some: Sequence[str]) -> None:
        super().__init__(
            f"no operator of {namespace} matches {pattern!r}",
            seen=f"operators such as {', '.join(some)}",
            expected="a shell pattern for name or name.overload, as in 'npu_rms_norm*'",
            hint="quote the pattern, and leave out the namespace",
        )


class ImportFailedError(AuditError):
    """A module asked for with --import cannot be imported."""

    def __init__(self, module: str, error: str) -> None:
        super().__init__(
            f"cannot import {module!r} in the process that audits",
            seen=error,
            expected="a module that registers the operators when it is imported",
            hint="import it in a plain `python -c` first; environment variables are handed on",
        )


class WorkerFailedError(AuditError):
    """The auditing process ended before it could list the operators."""

    def __init__(self, how: str, output: str) -> None:
        super().__init__(
            "the process that audits did not start",
            seen=f"{how}; its last output: {output or 'none'}",
            expected="a process that imports torch and the modules asked for",
            hint="run `python -c 'import torch, MODULE'` in this environment",
        )
