"""Ranks that decide together: the same questions, asked as often and in the same order on each of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from fxpatch.errors import CaptureFailedError


class Agreement:
    """Whether all ranks got as far, asked as often on each of them.

    Args:
        agree: takes whether this rank succeeded, returns whether all did.
        alone: nobody else is asked, whatever other ranks there are.
    """

    def __init__(self, agree: Callable[[bool], bool], *, alone: bool = False) -> None:
        self._agree, self.alone = agree, alone
        self._refused = False

    def require(self) -> None:
        """Says that this rank succeeded.

        Raises:
            CaptureFailedError: another one did not.
        """
        if not self._agree(True):
            self._refused = True
            raise disagreement()

    def everywhere(self, ok: bool) -> bool:
        """Whether something that is no failure, `ok` on this rank, holds on all of them."""
        return self._agree(ok)

    def same(self, text: str) -> bool:
        """Whether all ranks have the same text: each bit of its checksum is 1 everywhere, or 0 everywhere."""
        bits = [zlib.crc32(text.encode()) >> place & 1 for place in range(32)]
        answers = [(self._agree(bit == 1), self._agree(bit == 0)) for bit in bits]  # all are asked: no early end
        return all(one or zero for one, zero in answers)

    def close(self, ok: bool) -> bool:
        """Whether all ranks are through; `ok` for this one. No one is asked again where all know of a failure."""
        return False if self._refused else self._agree(ok)


def disagreement() -> CaptureFailedError:
    """What a rank raises where another one failed."""
    return CaptureFailedError(
        "Another rank could not prepare this.",
        seen="agree(True) returned False",
        expected="every rank succeeds",
        hint="look at the reports of the other ranks",
    )
