"""Do the versions fit together, and will other processes load what this one has?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys

import torch

from compile_configs import builtin_names, load_profile
from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import listed
from fxpatch.errors import TorchTooOldError
from fxpatch.probe import check_torch, vendor_package
from fxpatch.repair import patches

_GROUP = "torch.backends"
_SWITCHES = ("FXPATCH_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")


def _number(version: str) -> tuple[int, ...]:
    """`"2.13.0+cpu"` -> (2, 13, 0); what is no number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in re.split(r"[.+\-]|(?<=\d)(?=[a-z])", version)[:3])


def newest_seen() -> str:
    """The newest torch in which every patch's targets were seen."""
    return min((max(patch.seen_in, key=_number) for patch in patches()), key=_number)


def fits(requirement: str, version: str) -> bool:
    """Whether a version meets what a wheel's metadata asks of torch: `"torch==2.13.0"`, `"torch>=2.7,<2.9"`. Clauses of
    other kinds than `==`, `~=`, `>=`, `<=`, `>`, `<`, `!=` are met."""
    have = _number(version)
    for operator, wanted in re.findall(r"(==|~=|>=|<=|!=|>|<)\s*([0-9][\w.+]*)(?!\*)", requirement.partition(";")[0]):
        asked = _number(wanted)
        width = wanted.partition("+")[0].count(".") + 1
        mine, theirs = have[:width], asked[:width]
        met = {
            "==": mine == theirs,
            "!=": mine != theirs,
            ">=": have >= asked,
            "<=": mine <= theirs,
            ">": mine > theirs,
            "<": have < asked,
            "~=": have >= asked and have[: width - 1] == asked[: width - 1],
        }
        if not met[operator]:
            return False
    return True


def _packages(subject: Subject) -> dict[str, str]:
    """The vendor's packages that are installed, with their versions."""
    names = {*subject.imports, vendor_package(subject.device)}
    if subject.device in builtin_names():
        names |= set(load_profile(subject.device).packages)
    found = {}
    for name in sorted(name.partition(".")[0] for name in names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _matrix(subject: Subject) -> str:
    have = torch.__version__
    try:
        check_torch(have)
    except TorchTooOldError as error:
        raise Broken(f"{error.seen}, and fxpatch needs {error.expected}", todo=error.hint) from error
    said, wrong = [f"torch {have}"], []
    if _number(have)[:2] > _number(newest_seen())[:2]:
        said.append(
            f"newer than the newest that fxpatch has seen ({newest_seen()}): patches whose targets moved are left out"
        )
    for package, version in _packages(subject).items():
        said.append(f"{package} {version}")
        asked = [line for line in importlib.metadata.requires(package) or [] if re.match(r"torch\s*[(=<>!~]", line)]
        wrong += [f"{package} {version} asks for {line}, and torch is {have}" for line in asked if not fits(line, have)]
        if not asked and package == vendor_package(subject.device) and _number(version)[:2] != _number(have)[:2]:
            wrong.append(
                f"{package} {version} was built for torch {'.'.join(map(str, _number(version)[:2]))}, not {have}"
            )
    if wrong:
        raise Broken(listed(wrong))
    return ", ".join(said)


def _entry_points(subject: Subject) -> str:
    found = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=_GROUP)}
    lost = [
        f"{name} = {value}: there is no module {value.partition(':')[0]}"
        for name, value in found.items()
        if not _exists(value.partition(":")[0])
    ]
    if lost:
        raise Broken(listed(lost), why="an entry point that cannot be loaded makes `import torch` itself fail")
    off = [name for name in _SWITCHES if os.environ.get(name) == "0"]
    odd = [f"{name}={os.environ[name]}" for name in _SWITCHES if os.environ.get(name, "1") not in ("0", "1")]
    if odd:
        raise Broken(f"{', '.join(odd)}: neither 0 nor 1", todo="0 turns autoloading off, 1 or nothing leaves it on")
    if not any(value.startswith("fxpatch.") for value in found.values()):
        raise Broken(f"fxpatch is not among the entry points ({', '.join(found) or 'there are none'})")
    said = f"torch loads {', '.join(found)}"
    if off:
        said += f"; turned off here by {', '.join(f'{name}=0' for name in off)}: call fxpatch.install() yourself"
    return said


def _exists(module: str) -> bool:
    if module in sys.modules:
        return True
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):  # a half imported or broken parent
        return False


PROBES = (
    Probe(
        name="version-matrix",
        stage="versions",
        title="versions fit together",
        run=_matrix,
        why="a vendor's package works with the torch it was built for, and crashes or miscompiles with others; "
        "fxpatch's private targets were seen in some versions",
        todo="install the vendor's wheel for this torch, or the torch that the wheel asks for",
        installs=False,
    ),
    Probe(
        name="entry-points",
        stage="versions",
        title="other processes load it too",
        run=_entry_points,
        why="worker processes have what torch's entry points load: without fxpatch's, they compile without its repairs "
        "(out-of-tree catalogue A13)",
        todo="pip install fxpatch into this environment, or call fxpatch.install() in every worker",
        installs=False,
    ),
)
