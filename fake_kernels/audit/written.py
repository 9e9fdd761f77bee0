"""A report as text, JSON, and SARIF 2.1.0 (what code hosts and editors read:
docs.oasis-open.org/sarif/sarif/v2.1.0)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import PurePath
from typing import Any

from fake_kernels.audit.findings import Finding, Report
from fake_kernels.audit.rules import RULES, Rule

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def as_text(report: Report) -> str:
    """Rules in the order of their list, worst first within none: findings by operator, each with the call that shows
    it.

    Args:
        report: of `audit`.
    """
    states = Counter(report.states.values())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"{report.namespace}: {len(report.states)} operators ({versions}): "
        + ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
    ]
    for id_, count in report.counts().items():
        rule = RULES[id_]
        lines += ["", f"{rule.level} {id_} ({count}): {rule.title}", f"  {rule.why}; to do: {rule.fix}"]
        for finding in (f for f in report.findings if f.rule == id_):
            where = f"  [{finding.file}:{finding.line}]" if finding.file else ""
            sure = "" if finding.confidence == "shown" else f" ({finding.confidence})"
            lines.append(f"  {finding.operator}: {finding.message}{sure}{where}")
            if finding.evidence:
                lines.append(f"      {finding.evidence}")
    levels = Counter(str(finding.level) for finding in report.findings)
    total = ", ".join(f"{levels[level]} {level}s" for level in ("error", "warning", "note"))
    lines += ["", f"{len(report.findings)} findings: {total}"]
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """Namespace, versions, counts, states and findings, in a stable order.

    Args:
        report: of `audit`.
    """
    content = {
        "namespace": report.namespace,
        "versions": report.versions,
        "counts": report.counts(),
        "states": report.states,
        "findings": [finding.as_dict() for finding in report.findings],
    }
    return json.dumps(content, indent=2)


def as_sarif(report: Report, version: str) -> str:
    """One run of the tool `fxpatch`; `version` is its own.

    Args:
        report: of `audit`.
    """
    used = list(report.counts())
    run = {
        "tool": {
            "driver": {"name": "fxpatch", "version": version, "rules": [_rule(RULES[id_]) for id_ in used]},
        },
        "results": [_result(finding, used.index(finding.rule)) for finding in report.findings],
        "properties": {"namespace": report.namespace, "versions": report.versions},
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": f"{rule.title}: {rule.why}"},
        "help": {"text": rule.fix},
        "defaultConfiguration": {"level": str(rule.level)},
    }


def _result(finding: Finding, index: int) -> dict[str, Any]:
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": finding.operator, "kind": "function"}]}
    if finding.file:
        path = PurePath(finding.file)
        location["physicalLocation"] = {
            "artifactLocation": {"uri": path.as_uri() if path.is_absolute() else path.as_posix()},
            "region": {"startLine": max(finding.line, 1)},
        }
    text = f"{finding.operator}: {finding.message}" + (f"\n{finding.evidence}" if finding.evidence else "")
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": str(finding.level),
        "message": {"text": text},
        "locations": [location],
        "properties": {"confidence": finding.confidence},
    }
