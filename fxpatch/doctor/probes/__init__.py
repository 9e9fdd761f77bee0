"""The probes, in the order in which a model passes through the stages: a module per stage or two."""

from __future__ import annotations

from fxpatch.doctor.probe import STAGES, Probe
from fxpatch.doctor.probes import (
    aot,
    arithmetic,
    artifacts,
    autocast,
    casts,
    conflicts,
    device_class,
    dynamo,
    fx,
    graphs,
    index,
    inductor,
    memory,
    model_fakes,
    processes,
    registration,
    rng,
    streams,
    versions,
)

PROBES: tuple[Probe, ...] = (
    *registration.PROBES,
    *device_class.PROBES,
    *fx.PROBES,
    *dynamo.PROBES,
    *aot.PROBES,
    *inductor.PROBES,
    *casts.PROBES,
    *arithmetic.PROBES,
    *autocast.PROBES,
    *rng.PROBES,
    *streams.PROBES,
    *memory.PROBES,
    *index.PROBES,
    *graphs.PROBES,
    *model_fakes.PROBES,
    *artifacts.PROBES,
    *processes.PROBES,
    *versions.PROBES,
    *conflicts.PROBES,
)
"""One for each question, no two of one name."""

assert len({probe.name for probe in PROBES}) == len(PROBES)
assert [probe.stage for probe in PROBES] == sorted((probe.stage for probe in PROBES), key=STAGES.index)

__all__ = ["PROBES"]
