"""A file that is written whole or not at all: who reads it sees the old one or the new one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Writes beside the path, to disk, and then puts the file in place by a rename.

    Args:
        path: in a directory that exists; what is there is replaced.
        content: of the file.
        mode: permissions, less the process's umask: 0o600.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}")  # no longer than a name may be
    closed_in_children = getattr(os, "O_CLOEXEC", 0)  # on Windows they are, without it
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | closed_in_children, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
