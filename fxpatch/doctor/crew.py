"""The zygotes of one examination, and replacements for those that are lost."""

from __future__ import annotations

from fxpatch.doctor.processes import Zygote
from fxpatch.errors import DoctorError

_STARTS = 3
"""So many that have not come to greet, and no more are tried."""


class Crew:
    """Several zygotes that start side by side.

    Args:
        probes: the module that has `PROBES`.
        folder: where compilers cache and temporary files go; exists.
        jobs: how many.

    Raises:
        DoctorError: no process can be started.
    """

    def __init__(self, probes: str, folder: str, jobs: int) -> None:
        self._make = lambda: Zygote(probes, folder)
        self._jobs, self._starts_left = jobs, _STARTS
        self._why: DoctorError | None = None
        self.zygotes = [self._make() for _ in range(jobs)]

    def mend(self) -> None:
        """Replaces those that are lost; `Zygote.receive` has told of each.

        Raises:
            DoctorError: none is left, and none can be started.
        """
        for zygote in [each for each in self.zygotes if each.lost]:
            self.zygotes.remove(zygote)
            zygote.close()
        while len(self.zygotes) < self._jobs and self._starts_left:
            try:
                self.zygotes.append(self._make())
            except DoctorError as error:
                self.not_started(error)
        if not self.zygotes:
            assert self._why is not None
            raise self._why

    def not_started(self, why: DoctorError) -> None:
        """One of them has ended before it greeted."""
        self._starts_left -= 1
        self._why = why

    def close(self) -> None:
        """Ends them all."""
        for zygote in self.zygotes:
            zygote.close()
