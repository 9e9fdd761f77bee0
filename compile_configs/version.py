"""Which of two torch versions is older, as PEP 440 has it.

torch prints `2.13.0`, `2.13.0+cpu`, `2.15.0.dev20260801+cu130` (a nightly) and `2.15.0a0+git1f2e3d4` (a build from
source). The part after `+` says where a build comes from, not how new it is. Anything before a release is older than
that release: `2.15.0a0` does not satisfy `2.15`, because a build from source may be older than the hook that was waited
for. The packaging library would do this too; this package stays within the standard library.
"""

from __future__ import annotations

import re

VersionKey = tuple[tuple[int, ...], tuple[str, int], int, float]

_FINAL = ("z", 0)  # after "a", "b" and "rc"


def version_key(version: str) -> VersionKey | None:
    """What to compare instead of `version`; None where it is not a version as torch writes them."""
    found = re.fullmatch(
        r"([0-9]{1,9}(?:\.[0-9]{1,9})+)(?:(a|b|rc)([0-9]{1,9}))?"
        r"(?:\.post([0-9]{1,9}))?(?:\.dev([0-9]{1,9}))?(?:\+[\w.]+)?",
        version,
        re.ASCII,
    )
    if found is None:
        return None
    digits, letter, number, post, dev = found.groups()
    release = [int(part) for part in digits.split(".")]
    while len(release) > 1 and release[-1] == 0:  # 2.11 and 2.11.0 are one version
        release.pop()
    stage = (letter, int(number)) if letter else _FINAL
    if dev and not letter and not post:
        stage = ("", 0)  # a nightly comes before the first alpha
    return tuple(release), stage, int(post) if post else -1, int(dev) if dev else float("inf")
