"""A runner's counters in Prometheus' formats, read back: by a parser of our own, and by prometheus_client."""

from __future__ import annotations

import gc
import re
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from piecewise_models import ops, runner_of

from fxpatch.errors import OptionError
from fxpatch.piecewise import metrics
from fxpatch.piecewise.runner import PiecewiseRunner

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
LINE = re.compile(r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\.)*",?)*)\} (\S+)')
LABEL = re.compile(r'([a-z]+)="((?:[^"\\]|\\.)*)"')


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runners of other tests are not counted."""
    monkeypatch.setattr(metrics, "_all", [])
    monkeypatch.setattr(metrics, "_ended", metrics.Tally(metrics.ENDED))
    monkeypatch.setattr(metrics, "_made", Counter())
    return


def parsed(page: str) -> Samples:
    """Every sample of a page, by its name and labels; a line that is none, or one that is there twice, fails."""
    found: Samples = {}
    for line in page.splitlines():
        if line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        assert match is not None, line
        pairs = LABEL.findall(match[2])
        labels = frozenset((name, re.sub(r"\\(.)", unescaped, text)) for name, text in pairs)
        assert (match[1], labels) not in found, line
        found[match[1], labels] = float(match[3])
    return found


def unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def total(name: str, page: str | None = None, **labels: str) -> float:
    """The sum over the samples that have these labels."""
    samples = parsed(metrics.text() if page is None else page)
    return sum(value for (each, its), value in samples.items() if each == name and labels.items() <= dict(its).items())


def model(x: torch.Tensor) -> torch.Tensor:
    return ops.functional(x + 1).tanh()


CALLS, DOWNS = "fxpatch_piecewise_calls_total", "fxpatch_piecewise_step_downs_total"


@pytest.fixture
def used(musa: str) -> Iterator[PiecewiseRunner]:
    """Two calls replayed, one too large, one after the graphs have been released."""
    runner = runner_of(model, graphs="device", sizes=[2, 4])
    runner.prepare(torch.randn(4, 4).to(musa))
    for n in (3, 2, 9):
        runner(torch.randn(n, 4).to(musa))
    yield runner
    runner.release()


def test_calls_and_what_was_made(used: PiecewiseRunner) -> None:
    page = metrics.text()
    assert total(CALLS, page) == 3
    assert total(CALLS, page, runner="model", outcome="captured", reason="") == 2
    assert total(CALLS, page, runner="model", outcome="original", reason="over_largest") == 1
    assert total(DOWNS, page) == total(DOWNS, page, runner="model", outcome="original", reason="over_largest") == 1
    assert total("fxpatch_piecewise_prepares_total", page, runner="model", result="ok") == 1
    assert 0 < total("fxpatch_piecewise_prepare_seconds_total", page, runner="model") < 600
    assert total("fxpatch_piecewise_runner_info", page, model="model", device="musa", compiler="eager") == 1
    assert total("fxpatch_piecewise_pieces", page, kind="graph") == 2
    assert total("fxpatch_piecewise_pieces", page, kind="split") == 1
    assert [total("fxpatch_piecewise_size_graphs", page, size=size) for size in ("2", "4", "8")] == [2, 2, 0]
    assert total("fxpatch_piecewise_pool_bytes", page) > 0
    assert total("fxpatch_piecewise_prepared", page) == 1

    used.release()
    used(torch.randn(3, 4).to("musa"))
    page = metrics.text()
    assert total(DOWNS, page, outcome="compiled", reason="released") == 1
    assert total("fxpatch_piecewise_size_graphs", page) == total("fxpatch_piecewise_pool_bytes", page) == 0


def test_both_formats_say_the_same(used: PiecewiseRunner) -> None:
    plain, strict = metrics.text(), metrics.openmetrics()
    assert parsed(plain) == parsed(strict)
    assert strict.endswith("\n# EOF\n")
    assert "# TYPE fxpatch_piecewise_calls_total counter\n" in plain
    assert "# TYPE fxpatch_piecewise_calls counter\n" in strict
    assert "# UNIT fxpatch_piecewise_pool_bytes bytes\n" in strict
    assert "# UNIT" not in plain
    assert "EOF" not in plain


def test_prometheus_reads_them(used: PiecewiseRunner) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
    from prometheus_client.parser import text_string_to_metric_families as text

    used.name = 'a "name"\\with\nall of it'
    page = metrics.text()
    for read, given in ((text, page), (openmetrics, metrics.openmetrics())):
        families = {family.name: family for family in read(given)}
        samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families.values()
            for sample in family.samples
        }
        assert samples == parsed(page)
        assert {sample.labels["runner"] for family in families.values() for sample in family.samples} == {used.name}
        kinds = {name.removeprefix("fxpatch_piecewise_"): family.type for name, family in families.items()}
        assert (kinds["calls"], kinds["pieces"]) == ("counter", "gauge")


def test_every_reason_has_a_short_word() -> None:
    from fxpatch.piecewise.reasons import Reason

    assert {metrics._REASONS[reason.value] for reason in Reason} == {reason.name.lower() for reason in Reason}


def test_names(musa: str) -> None:
    first, second, third = (runner_of(model, graphs="none") for _ in range(3))
    assert (first.name, second.name, third.name) == ("model", "model-2", "model-3")
    second.name = "decode"
    second.name = "decode"
    with pytest.raises(OptionError, match=r"A runner cannot be called 'decode'(.|\n)*taken are decode, ended, model"):
        third.name = "decode"
    for wrong in ("", "ended", None, 3):
        with pytest.raises(OptionError, match="A runner cannot be called"):
            third.name = wrong  # type: ignore[assignment]
    assert third.name == "model-3"


def test_a_runner_that_is_gone_is_still_counted(used: PiecewiseRunner, musa: str) -> None:
    """Sums never fall; what is no counter disappears."""

    def use_one() -> None:
        runner = runner_of(model, graphs="none")
        runner.prepare(torch.randn(4, 4).to(musa))
        runner(torch.randn(3, 4).to(musa))

    for calls in (4, 5):
        use_one()
        gc.collect()
        page = metrics.text()
        assert total(CALLS, page) == calls
        assert total(CALLS, page, runner="ended", outcome="compiled", reason="no_device_graph") == calls - 3
        assert total("fxpatch_piecewise_prepares_total", page) == calls - 2
        runners = {value for _, labels in parsed(page) for name, value in labels if name == "runner"}
        assert runners == {"model", "ended"}
        assert total("fxpatch_piecewise_prepared", page, runner="ended") == 0
    assert len(metrics._all) == 1


def test_a_preparation_that_fails_is_counted(musa: str) -> None:
    runner = runner_of(model, graphs="none")
    with pytest.raises(Exception, match="too short"):
        runner.prepare(torch.randn(1, 4).to(musa))
    assert total("fxpatch_piecewise_prepares_total", runner="model", result="failed") == 1
    assert total("fxpatch_piecewise_prepared", runner="model") == 0


def test_without_runners_nothing_is_told() -> None:
    assert (metrics.text(), metrics.openmetrics()) == ("", "# EOF\n")


def test_scraping_while_calls_and_runners_come_and_go(musa: str) -> None:
    """Each page is whole, and no counter falls from one page to the next."""
    stop, wrong = threading.Event(), []

    def scrape() -> None:
        before = 0.0
        while not stop.is_set():
            try:
                now = total(CALLS)
            except Exception as error:
                wrong.append(error)
                return
            if now < before:
                wrong.append(AssertionError(f"{now} after {before}"))
            before = now

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        for _ in range(60):
            runner = runner_of(model, graphs="none")
            for reason in range(40):
                runner.counts[f"original: reason {reason}"] += 1
            del runner
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert total(CALLS) == 60 * 40
