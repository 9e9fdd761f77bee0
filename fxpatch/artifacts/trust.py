"""Which files are believed: the rule for everything whose loading can run code.

A pickle, a compiler's cache, an expression that torch evaluates: who writes it runs code where it is loaded. So
a file of that kind is believed in two cases only, and otherwise refused, before one byte of it is given to a parser
that could run it.

* It is **ours**: nobody else can have written it, and it is what was written. It belongs to this user (or to root, and
  this user could not have written it), neither it nor a directory on the way to it can be written by group or others
  (a sticky directory protects what is in it), it is no symbolic link, and it carries a keyed hash made with this user's
  key.
* The caller says so: `trust=` is the SHA-256 of its bytes.

The bytes that were looked at are the bytes that are used: a file is opened once, its descriptor is checked, and it is
read from that descriptor. Where a system has no such permissions to look at (Windows), nothing is ours.

The key is 32 random bytes in a file of this user's, mode 0600, made at the first save: `FXPATCH_KEY_FILE`, or
`fxpatch/artifacts.key` in `XDG_DATA_HOME` (`~/.local/share`). Machines that share it believe each other's files.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Any

KEY_VARIABLE = "FXPATCH_KEY_FILE"
_KEY_BYTES = 32


class DistrustedError(Exception):
    """Why a file is not believed, in words. The caller decides what follows: an error, or doing without the file."""


def read_own(path: Path) -> bytes | None:
    """A file's content, for a file that nobody else can have written, in a directory already trusted; None where there
    is no file.

    Raises:
        DistrustedError: others may have written it, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DistrustedError(f"{path.name}: {error.strerror}") from error
    try:
        check_own(os.fstat(descriptor), path, stat.S_ISREG, "file")
    except DistrustedError:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def read_and_judge(path: Path) -> tuple[bytes, str | None]:
    """A file's content, whoever wrote it, and why others may have written it: None where they cannot.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    flags = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK"))  # Windows has neither
    descriptor = os.open(path, os.O_RDONLY | flags)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    with os.fdopen(descriptor, "rb") as file:
        content = file.read()
    try:
        _check_read(found, path)
    except DistrustedError as error:
        return content, str(error)
    except OSError as error:
        return content, f"{type(error).__name__}: {error}"
    return content, None


def _check_read(found: os.stat_result, path: Path) -> None:
    """That the open file is the one at `path`, is no link, and that nobody else could have put it there."""
    check_system()
    named = os.lstat(path)
    if stat.S_ISLNK(named.st_mode):
        raise DistrustedError(f"{path.name} is a symbolic link")
    if (named.st_dev, named.st_ino) != (found.st_dev, found.st_ino):
        raise DistrustedError(f"{path.name} was replaced while it was read")
    if found.st_uid == 0 != os.geteuid():
        if os.access(path, os.W_OK) or found.st_mode & 0o022:
            raise DistrustedError(f"{path.name} belongs to root and can be written by others ({mode_of(found)})")
    else:
        check_own(found, path, stat.S_ISREG, "file")
    _check_way(path.absolute().parent, set())


def _check_way(directory: Path, seen: set[Path]) -> None:
    """That nobody else can say what a path means: neither in the directories that it names, nor where links lead."""
    for above in (directory, *directory.parents):
        if above in seen:
            continue
        seen.add(above)
        check_above(above)
        named = os.lstat(above)
        if stat.S_ISLNK(named.st_mode):
            if named.st_uid not in (0, os.geteuid()):
                raise DistrustedError(f"{above}, where it is, is a link of user {named.st_uid}")
            _check_way(above.parent / os.readlink(above), seen)


def check_system() -> None:
    """`DistrustedError` where this system does not say who may write to a file."""
    if not hasattr(os, "geteuid"):
        raise DistrustedError("this system does not say who may write to a file")


def check_own(found: os.stat_result, path: Path, is_kind: Any, kind: str) -> None:
    """`DistrustedError` where a file or directory is not this user's alone to write."""
    if not is_kind(found.st_mode):
        raise DistrustedError(f"{path.name} is no {kind}")
    if found.st_uid != os.geteuid():
        raise DistrustedError(f"{path.name} belongs to user {found.st_uid}, and this is user {os.geteuid()}")
    if found.st_mode & 0o022:
        raise DistrustedError(f"{path.name} can be written by others ({mode_of(found)})")


def check_above(above: Path) -> None:
    """`DistrustedError` where others could replace what is in a directory."""
    found = os.stat(above)
    if found.st_uid not in (0, os.geteuid()):
        raise DistrustedError(f"{above}, where it is, belongs to user {found.st_uid}")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise DistrustedError(f"{above}, where it is, can be written by others ({mode_of(found)})")


def trusted_directory(path: Path) -> Path:
    """A directory of this user's own, made where there is none.

    Raises:
        DistrustedError: others may write to it, or to where it is.
    """
    check_system()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        real = path.resolve(strict=True)
        check_own(os.stat(real), real, stat.S_ISDIR, "directory")
        for above in real.parents:
            check_above(above)
    except OSError as error:
        raise DistrustedError(f"{type(error).__name__}: {error}") from error
    return real


def mode_of(found: os.stat_result) -> str:
    """Permissions as `ls` shows them."""
    return stat.filemode(found.st_mode)


# -- the key -----------------------------------------------------------------------------------------------------------


def key_file() -> Path:
    """Where this user's key is kept; under `~` itself, for a user without a home."""
    given = os.environ.get(KEY_VARIABLE)
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.path.expanduser(given or os.path.join(data, "fxpatch", "artifacts.key")))


def key(*, make: bool = False) -> bytes:
    """This user's key.

    Args:
        make: a new one, where there is none.

    Raises:
        DistrustedError: there is none, it cannot be made, or others may know or have written it.
    """
    check_system()
    path = key_file()
    if path.parts[:1] == ("~",):
        raise DistrustedError(f"this user has no home to keep a key in: set HOME or {KEY_VARIABLE}")
    try:
        directory = trusted_directory(path.parent) if make else path.parent.resolve()
        content = read_own(directory / path.name)
        if content is None and make:
            _make_key(directory / path.name)
            content = read_own(directory / path.name)
        if content is None:
            raise DistrustedError(f"there is no key {path}: nothing was saved by this user")
        for above in (directory, *directory.parents):
            check_above(above)
        if os.lstat(directory / path.name).st_mode & 0o077:
            raise DistrustedError(f"the key {path} can be read by others: chmod 600 {path}")
    except OSError as error:
        raise DistrustedError(f"the key {path}: {type(error).__name__}: {error}") from error
    if len(content) != _KEY_BYTES:
        raise DistrustedError(f"the key {path} is damaged: it has {len(content)} bytes instead of {_KEY_BYTES}")
    return content


def _make_key(path: Path) -> None:
    """Whole or not at all: of several processes that make one at a time, the first wins."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)


def signature(content: bytes, secret: bytes) -> str:
    """The keyed hash of some bytes: HMAC with SHA-256, hexadecimal."""
    return hmac.new(secret, content, "sha256").hexdigest()


def is_signed(content: bytes, signed: str, secret: bytes) -> bool:
    """Whether a keyed hash is of these bytes and this key; takes as long for a wrong one as for the right one."""
    return hmac.compare_digest(signature(content, secret).encode(), signed.encode(errors="replace"))
