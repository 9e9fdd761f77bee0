"""Audits the fake kernels that a vendor ships: `audit("npu", imports=["torch_npu"])`, with no hardware.

A wrong fake kernel is worse than none: the program compiles, and computes something else. Most mistakes can be shown
without the device, by holding the kernel's signature against the schema, and by calling it with meta, fake and
symbolic tensors; what only the real kernel can tell is reported as a question.
"""

from fake_kernels.audit.errors import (
    AuditError,
    ImportFailedError,
    NoSuchOperatorsError,
    UnknownNamespaceError,
    WorkerFailedError,
)
from fake_kernels.audit.findings import Confidence, Finding, Report
from fake_kernels.audit.rules import RULES, Level, Rule
from fake_kernels.audit.run import audit
from fake_kernels.audit.written import as_json, as_sarif, as_text

__all__ = [
    "RULES",
    "AuditError",
    "Confidence",
    "Finding",
    "ImportFailedError",
    "Level",
    "NoSuchOperatorsError",
    "Report",
    "Rule",
    "UnknownNamespaceError",
    "WorkerFailedError",
    "as_json",
    "as_sarif",
    "as_text",
    "audit",
]
