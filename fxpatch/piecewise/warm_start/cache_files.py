"""Files of a cache that are trusted before they are read, and written whole or not at all.

What Inductor saved is code: loading it is running it. So a file is read only if nobody else can have written it: it,
its directory and all above belong to this user (or, above, to root) and cannot be written by group or others, as far as
a sticky directory does not protect it (`fxpatch.artifacts.trust`). A symbolic link is followed for the cache directory
and for nothing within. After that, contents are compared with the sums that were written last, so a file that was cut
short, or was put there besides, is noticed. On Windows there are no such permissions, and nothing is trusted.

An entry is a directory of files with a name of its own, and one record that names it. The record is put in place by a
rename, when everything else is on disk: who reads sees the old entry or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from fxpatch.artifacts.trust import DistrustedError, check_own, read_own, trusted_directory
from fxpatch.artifacts.whole_file import write_whole

_OLD = 3600.0  # seconds: nobody reads a replaced entry for longer, and no writer takes longer


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Puts a record in place, with a sum of its own, by a rename."""
    body = json.dumps(content, separators=(",", ":")).encode()
    write_whole(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body, 0o600)
    _sync(path.parent)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none.

    Raises:
        DistrustedError: others may have written it, or it is not what was written.
    """
    content = read_own(path)
    if content is None:
        return None
    total, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != total:
        raise DistrustedError(f"{path.name} is damaged: its content is not what was written")
    found = json.loads(body)
    if not isinstance(found, dict):
        raise DistrustedError(f"{path.name} is damaged: it is no record")
    return found


def sums(directory: Path) -> dict[str, str]:
    """The sum of each file under a directory, by its path there. Locks are left out: they are empty.

    Raises:
        DistrustedError: one of them, or a directory, may have been written by others.
    """
    found: dict[str, str] = {}
    check_own(os.lstat(directory), directory, stat.S_ISDIR, "directory")
    for base, directories, files in os.walk(directory):
        for name in directories:
            check_own(os.lstat(os.path.join(base, name)), Path(base, name), stat.S_ISDIR, "directory")
        if os.path.basename(base) == "locks":
            continue
        for name in files:
            content = read_own(Path(base, name))
            if content is not None:
                found[os.path.relpath(os.path.join(base, name), directory)] = hashlib.sha256(content).hexdigest()
    return found


def difference(directory: Path, wanted: dict[str, str]) -> str | None:
    """How the files under a directory differ from what was written, in words.

    Raises:
        DistrustedError: others may have written there.
    """
    if not os.path.lexists(directory):
        return "it is missing"
    found = sums(directory)
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            how = "missing" if name not in found else "new" if name not in wanted else "another"
            return f"{name} is {how}"
    return None


def seal(directory: Path) -> dict[str, str]:
    """Takes the right to write from others, puts everything on disk, and gives the sums."""
    for base, _, files in os.walk(directory):
        os.chmod(base, 0o700)
        for name in files:
            path = os.path.join(base, name)
            os.chmod(path, 0o700 if os.access(path, os.X_OK) else 0o600)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _sync(Path(base))
    return sums(directory)


def new_directory(cache: Path, key: str) -> Path:
    """A directory for an entry, which no record names yet."""
    path = cache / f"{key}.{secrets.token_hex(8)}"
    path.mkdir(mode=0o700)
    return path


def forget_old(cache: Path, key: str, current: str) -> None:
    """Removes what earlier writers of a key left, once nobody can be reading it."""
    for path in cache.glob(f"{key}.*"):
        if path.is_dir() and path.name != current and time.time() - path.stat().st_mtime > _OLD:
            shutil.rmtree(path, ignore_errors=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "DistrustedError",
    "difference",
    "forget_old",
    "new_directory",
    "read_record",
    "seal",
    "sums",
    "trusted_directory",
    "write_record",
]
