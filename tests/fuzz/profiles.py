"""The loader of compile profiles, for any file and any name: a profile, or a `ProfileError` that can be printed and has
all its parts; and a profile that was read is read again as the same one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict

from compile_configs import DeviceProfile, ProfileError, builtin_names, load_profile, parse_profile

_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None


def check(data: bytes) -> None:
    """`data` as a file, as a text, and as a name."""
    with tempfile.NamedTemporaryFile(suffix=".toml", dir=_FOLDER) as file:
        file.write(data)
        file.flush()
        loaded = _outcome(lambda: load_profile(file.name))
    try:
        text = data.decode()
    except UnicodeDecodeError:
        assert loaded is None, "a file that is no text was read"
    else:
        parsed = _outcome(lambda: parse_profile(text.replace("\r\n", "\n").replace("\r", "\n")))
        assert loaded == parsed, "a file and its text differ"
        if loaded is not None:
            _assert_read_again(loaded)
    name = data.decode(errors="surrogateescape").replace("/", "|")[:64]
    if not name.endswith(".toml"):
        assert (_outcome(lambda: load_profile(name)) is not None) == (name in (*builtin_names(), "example"))


def _outcome(read: Callable[[], DeviceProfile]) -> DeviceProfile | None:
    try:
        return read()
    except ProfileError as error:
        refusal = error
    assert all(part.strip() for part in (refusal.what, refusal.seen, refusal.expected, refusal.hint))
    assert refusal.problems
    str(refusal).encode()
    return None


def _assert_read_again(profile: DeviceProfile) -> None:
    repr(profile)
    hash(profile)
    whole = asdict(profile)
    del whole["origin"]
    if "nan" not in repr(whole):
        assert parse_profile(whole) == profile
