"""The report as one page: no script, no network, nothing beside it. What a vendor's error says is text here, whatever
it looks like.

The page forbids itself both scripts and requests (Content-Security-Policy), so that a mistake in escaping would be
ugly, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fxpatch.doctor.drawings import CLASSES, anchor, memory, pipeline, timeline
from fxpatch.doctor.probe import State
from fxpatch.doctor.report import Attempt, Line, Report

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root{--page:#fff;--text:#1b1f24;--soft:#59636e;--line:#d1d9e0;--code:#f6f8fa;--link:#0550ae;
--ok:#dafbe1;--ok-line:#1a7f37;--repaired:#ddf4ff;--repaired-line:#0969da;--broken:#ffebe9;--broken-line:#cf222e;
--absent:#f6f8fa;--absent-line:#818b98;--graph:#54aeff;--split:#e16f24}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--text:#e6edf3;--soft:#9198a1;--line:#3d444d;--code:#151b23;
--link:#58a6ff;--ok:#12261e;--ok-line:#3fb950;--repaired:#121d2f;--repaired-line:#58a6ff;--broken:#25171c;
--broken-line:#f85149;--absent:#151b23;--absent-line:#656c76;--graph:#1f6feb;--split:#bd561d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1.5rem;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1{margin:0}h2{margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line)}h3{margin:1.6rem 0 .4rem}
a{color:var(--link)}p{margin:.4rem 0;overflow-wrap:anywhere}.soft{color:var(--soft)}.error{white-space:pre-wrap}
pre{margin:.4rem 0;padding:.6rem;overflow-x:auto;background:var(--code);border:1px solid var(--line);font-size:.82rem}
svg{display:block;width:100%;height:auto;margin:.8rem 0}svg text{fill:var(--text);font:14px system-ui,sans-serif}
svg .name{font-weight:600}svg .state{font-size:13px}
.stage{stroke-width:1.5}.arrow,.axis{fill:none;stroke:var(--soft);stroke-width:1.5}
.ok{fill:var(--ok);stroke:var(--ok-line)}.repaired{fill:var(--repaired);stroke:var(--repaired-line)}
.broken{fill:var(--broken);stroke:var(--broken-line);stroke-width:3}
.absent{fill:var(--absent);stroke:var(--absent-line);stroke-dasharray:5 3}
.unasked{fill:none;stroke:var(--line);stroke-dasharray:2 3}
.graph,.alone{fill:var(--graph)}.split,.added{fill:var(--split)}
svg a:focus rect{stroke-width:5}a:focus,summary:focus{outline:3px solid var(--link);outline-offset:2px}
.probe{margin:.6rem 0;padding:.5rem .9rem;border:1px solid var(--line);border-left-width:6px}
.probe.ok{border-left-color:var(--ok-line)}.probe.repaired{border-left-color:var(--repaired-line)}
.probe.broken{border-left-color:var(--broken-line)}.probe.absent{border-left-color:var(--absent-line)}
.probe b{margin-right:.6rem}.badge{font-weight:600}
""".strip()


def page(report: Report) -> str:
    """The whole page, UTF-8."""
    title = f"fxpatch doctor: {report.device}" + (" (simulated)" if report.simulated else "")
    counts = ", ".join(f"{count} {state}" for state, count in report.counts.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    imports, model = ", ".join(report.imports), report.model
    given = [f"imports: {imports}" if imports else "", f"model: {model}" if model else ""]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(counts)}; {report.seconds:.0f} s</p>",
        *(f'<p class="soft">{escape(each)}</p>' for each in (versions, *given, *report.notes) if each),
        "<h2>Stages</h2>",
        pipeline(report.stages),
        *(_stage(stage, lines) for stage, lines in report.stages.items()),
        *_pictures(report.pictures),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _stage(stage: str, lines: Sequence[Line]) -> str:
    return f'<section id="{escape(anchor(stage))}"><h3>{escape(stage)}</h3>{"".join(map(_line, lines))}</section>'


def _line(line: Line) -> str:
    broken = line.state == State.BROKEN.value
    told = [f'<p><b>{escape(line.title)}</b> <span class="badge">{escape(line.state)}</span></p>']
    if line.found:
        told.append(f"<p>{escape(line.found)}</p>")
    if line.error:
        without = "" if broken else "without fxpatch: "
        told.append(f'<p class="error">{without}{escape(line.error)}</p>')
    if line.applied:
        told.append(f"<p>applied: {escape(', '.join(line.applied))}</p>")
    if line.error:
        told.append(f'<p class="soft">why: {escape(line.why)}</p>')
    if line.todo:
        told.append(f"<p>to do: {escape(line.todo)}</p>")
    more = [each for each in line.attempts if each.traceback or each.output or each.error not in ("", line.error)]
    told += [_attempt(each, open_=broken and each is line.attempts[-1]) for each in more]
    return f'<article class="probe {CLASSES[line.state]}" id="{escape(line.name)}">{"".join(told)}</article>'


def _attempt(attempt: Attempt, *, open_: bool) -> str:
    which = "after fxpatch.install()" if attempt.installed else "without fxpatch"
    parts = [("error", attempt.error), ("where", "\n".join(attempt.traceback)), ("output", "\n".join(attempt.output))]
    told = "".join(f'<p class="soft">{name}</p><pre tabindex="0">{escape(text)}</pre>' for name, text in parts if text)
    return (
        f"<details{' open' if open_ else ''}><summary>{which}: {attempt.state} after {attempt.seconds:.1f} s</summary>"
        f"{told}</details>"
    )


def _pictures(pictures: Mapping[str, Any] | None) -> list[str]:
    if pictures is None:
        return []
    pieces, buckets = pictures["pieces"], pictures["memory"]
    told = ["<h2>Pieces of a replay</h2>"]
    if "why_not" in pieces:
        told.append(f"<p>Not measured: {escape(pieces['why_not'])}</p>")
    else:
        told += [
            f"<p>A small model in pieces, at size {pieces['size']}, captured with {escape(pieces['graph_class'])}: "
            "graphs, and between them the operator that it is split at. Medians of replays, the device waited for "
            "before and after each piece.</p>",
            timeline(pieces),
        ]
    told.append("<h2>Memory per bucket</h2>")
    if "why_not" in buckets:
        told.append(f"<p>Not measured: {escape(buckets['why_not'])}</p>")
    else:
        told += [
            "<p>What the graphs of each captured size reserve on the device: alone, in a pool of their own, and what "
            "they added to the pool that all sizes share, captured from the largest down.</p>",
            memory(buckets["rows"]),
        ]
    return told
