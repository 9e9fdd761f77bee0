"""One file: a zip archive of a manifest, a seal, and members, each of which the manifest names with its hash.

The archive is read from bytes and by rules much narrower than the format's, since a file may come from anybody: members
are stored and not compressed (so that what is in them is no larger than the file: there is no zip bomb), each once,
under a plain name, and none that the manifest does not name. Nothing is ever unpacked to a path. The manifest holds the
hash of each member, and the seal the hash of the manifest: what was cut short or changed is noticed before it is used.

Members: `manifest.json`; `seal.json`; JSON documents; `storage/N`, raw bytes of tensors; `payload`, what torch wrote.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

from fxpatch.artifacts import trust
from fxpatch.errors import ArtifactError

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "seal.json"
KINDS = ("graph", "exported", "caches", "function")
_NAME = re.compile(r"[a-z]+(?:\.json)?|storage/[0-9]{1,9}")
_MOST_MEMBERS = 1_000_000
_LARGEST_JSON = 1 << 28  # bytes: what is parsed takes some ten times as much memory
_STORED_AT = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes


def damaged(seen: str) -> ArtifactError:
    """The error for a file that is not what `fxpatch.save` wrote."""
    return ArtifactError(
        "This is no artifact that can be read.",
        seen=seen,
        expected="a file as fxpatch.save() wrote it",
        hint="copy the file again, or save it anew; nothing of it was used",
    )


def pack(manifest: Mapping[str, Any], members: Mapping[str, bytes], secret: bytes | None) -> bytes:
    """The file.

    Args:
        manifest: what there is to say of it; format and members are added.
        members: content by name.
        secret: this user's key; None leaves the file unsigned.
    """
    described = {name: {"bytes": len(each), "sha256": _hash(each)} for name, each in members.items()}
    told = json.dumps({"format": FORMAT, **manifest, "members": described}, indent=1).encode()
    sealed = {"sha256": _hash(told), "hmac-sha256": None if secret is None else trust.signature(told, secret)}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, each in ((MANIFEST, told), (SEAL, json.dumps(sealed).encode()), *members.items()):
            archive.writestr(zipfile.ZipInfo(name, _STORED_AT), each)
    return out.getvalue()


class Opened:
    """A file that is whole.

    Attributes:
        manifest: checked against the seal, as far as its own hash goes.
        sha256: of all bytes, hexadecimal.
    """

    def __init__(self, content: bytes) -> None:
        members = _unzip(content)
        self.sha256 = _hash(content)
        self._told = members.pop(MANIFEST, b"")
        self._seal = parse(members.pop(SEAL, b""), SEAL)
        self.manifest = parse(self._told, MANIFEST)
        self._members = members
        self._check()

    def is_signed_by(self, secret: bytes) -> bool:
        """Whether it was saved with this key."""
        signed = self._seal.get("hmac-sha256")
        return isinstance(signed, str) and trust.is_signed(self._told, signed, secret)

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return str(self.manifest["kind"])

    def document(self, name: str) -> dict[str, Any]:
        """A JSON member."""
        return parse(self.raw(name), name)

    def raw(self, name: str) -> bytes:
        """A member's bytes."""
        if name not in self._members:
            raise damaged(f"there is no member {name!r}")
        return self._members[name]

    def _check(self) -> None:
        told = self.manifest
        if self._seal.get("sha256") != _hash(self._told):
            raise damaged(f"{MANIFEST} is not what was sealed")
        if told.get("format") != FORMAT:
            raise ArtifactError(
                "This artifact has a format that this fxpatch does not read.",
                seen=f"format {str(told.get('format'))[:40]}, saved by fxpatch {str(told.get('fxpatch'))[:40]}",
                expected=f"format {FORMAT}",
                hint="load it with the fxpatch that saved it, or save it anew with this one",
            )
        described = told.get("members")
        if told.get("kind") not in KINDS or not isinstance(described, dict):
            raise damaged(f"kind {str(told.get('kind'))[:40]!r}, and members that are a {type(described).__name__}")
        if set(described) != set(self._members):
            other = sorted(set(described) ^ set(self._members))[:3]
            raise damaged(f"the archive and its manifest do not have the same members: {other}")
        for name, content in self._members.items():
            if described[name] != {"bytes": len(content), "sha256": _hash(content)}:
                raise damaged(f"{name} is not what was saved")


def parse(content: bytes, name: str) -> dict[str, Any]:
    """A JSON document whose root is an object; `ArtifactError` where it is none."""
    if len(content) > _LARGEST_JSON:
        raise damaged(f"{name} has {len(content)} bytes of JSON, and at most {_LARGEST_JSON} are read")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise damaged(f"{name}: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise damaged(f"{name} holds a {type(found).__name__}, not an object")
    return found


def _unzip(content: bytes) -> dict[str, bytes]:
    """Members by name, together no larger than the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            _check_infos(infos, len(content))
            return {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, LookupError) as error:
        raise damaged(f"{type(error).__name__}: {error}") from error
    except (struct.error, OverflowError, MemoryError) as error:
        raise damaged(f"{type(error).__name__}: {error}") from error


def _check_infos(infos: list[zipfile.ZipInfo], size: int) -> None:
    if len(infos) > _MOST_MEMBERS:
        raise damaged(f"{len(infos)} members")
    if len({info.filename for info in infos}) != len(infos):
        raise damaged("two members of one name")
    for info in infos:
        if _NAME.fullmatch(info.filename) is None:
            raise damaged(f"a member called {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise damaged(f"{info.filename} is compressed or encrypted")
        if info.file_size != info.compress_size:
            raise damaged(f"{info.filename} claims {info.file_size} bytes and has {info.compress_size}")
    if sum(info.file_size for info in infos) > size:
        raise damaged("the members claim to be larger than the file")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
