"""Compile profiles: what torch.compile and graph capture have to know about one device, as data.

Each device has another answer to the same few questions: where to split a graph, how many captured graphs may live at
once, which compiler may compile a piece, which of torch's settings are wrong for it. Engines keep these answers in
`if device == ...` all over their code. Here they are one TOML file per device, each number with its source, and this
module is the schema: a frozen dataclass per table, checked when built. `example.toml` explains every key in place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from compile_configs.errors import ProfileError
from compile_configs.readers import (
    Table,
    Wrong,
    ascending,
    by,
    closest,
    each,
    matching,
    one_of,
    positive,
    read_keys,
    scalar,
    table,
    text,
    version_from,
)

OLDEST_TORCH = "2.11"
LARGEST = 32 * 1024  # characters; tomllib takes seconds for as many in one dotted key, and its time grows quadratically
COMPILERS = ("inductor", "aot_eager", "eager")
FAMILIES = (
    "activations",
    "norms",
    "rope",
    "attention",
    "quantisation",
    "moe",
    "kv_cache",
    "sampling",
    "casts",
)

_HERE = os.path.dirname(os.path.abspath(__file__))
_EXAMPLE = "example"

_device = matching(r"[a-z][a-z0-9_]*", 'a device type such as "musa"', "write it as torch.device(...).type does")
_dotted = matching(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", 'a dotted name such as "torch.cuda.CUDAGraph"', "name it in full")
_tag = matching(r"[a-z]\w*", 'the name of a torch.Tag such as "cudagraph_unsafe"', "leave out 'torch.Tag.'")
_operator = matching(
    r"[A-Za-z_]\w*::[A-Za-z_]\w*(\.[A-Za-z_]\w*)?",
    'an operator as "namespace::name" or "namespace::name.overload"',
    "write '::' after the namespace, and no 'torch.ops'",
)


@dataclass(frozen=True, slots=True)
class Split(Table):
    """Operators that stay between captured pieces, and who says so. A name that is not registered splits nothing."""

    operators: tuple[str, ...] = field(metadata=by(each(_operator)))
    source: str = field(metadata=by(text))


@dataclass(frozen=True, slots=True)
class Capture(Table):
    """How a device captures graphs.

    Attributes:
        classes: graph classes by dotted name, the best first; the first that exists and can be built is used.
        sizes: default sizes to capture, in rows of the dynamic dimension (tokens, in a language model), ascending.
        budget: how many captured graphs may live in one process; None where no limit is known.
        split_tags: names in torch.Tag; an operator with one of them is not captured.
        source: where `sizes` and `budget` come from.
    """

    classes: tuple[str, ...] = field(metadata=by(each(_dotted)))
    sizes: tuple[int, ...] = field(metadata=by(ascending))
    source: str = field(metadata=by(text))
    budget: int | None = field(default=None, metadata=by(positive))
    split_tags: tuple[str, ...] = field(default=(), metadata=by(each(_tag)))


@dataclass(frozen=True, slots=True)
class Setting(Table):
    """One of torch's own settings that is wrong for the device by default: its name below the config module, dotted."""

    name: str = field(metadata=by(_dotted))
    value: bool | int | float | str = field(metadata=by(scalar))
    reason: str = field(metadata=by(text))
    source: str = field(metadata=by(text))


@dataclass(frozen=True, slots=True)
class WrongFakes(Table):
    """Operators whose own fake kernels are wrong, and are replaced by those of `fake_kernels`; and who says so."""

    operators: tuple[str, ...] = field(metadata=by(each(_operator)))
    reason: str = field(metadata=by(text))
    source: str = field(metadata=by(text))


@dataclass(frozen=True, slots=True)
class Limit(Table):
    """Something the device cannot do, whatever is installed; for reports."""

    what: str = field(metadata=by(text))
    source: str = field(metadata=by(text))


@dataclass(frozen=True, slots=True)
class DeviceProfile(Table):
    """All that is known about compiling for one device type.

    Attributes:
        device: what `torch.device(...).type` says.
        title, vendor: for people.
        packages: the vendor's importable modules, to notice one that is only half imported and to key caches.
        min_torch: the oldest torch this profile is right for.
        compiler: what compiles a piece unless the caller says otherwise; one of `COMPILERS`.
        families: which groups of fake kernels the device needs; some of `FAMILIES`.
        capture: its graph classes, sizes and budget of graphs.
        split: operators that run between captured pieces, with their sources.
        wrong_fakes: fake kernels of the vendor's own that are not to be believed.
        dynamo, inductor: settings of torch._dynamo.config and torch._inductor.config.
        limits: what does not work, for reports.
        origin: where the profile was read from; no part of its value.
    """

    device: str = field(metadata=by(_device))
    title: str = field(metadata=by(text))
    vendor: str = field(metadata=by(text))
    min_torch: str = field(metadata=by(version_from(OLDEST_TORCH)))
    compiler: str = field(metadata=by(one_of(COMPILERS)))
    capture: Capture = field(metadata=by(table(Capture)))
    packages: tuple[str, ...] = field(default=(), metadata=by(each(_dotted)))
    families: tuple[str, ...] = field(default=(), metadata=by(each(one_of(FAMILIES))))
    split: tuple[Split, ...] = field(default=(), metadata=by(each(table(Split))))
    dynamo: tuple[Setting, ...] = field(default=(), metadata=by(each(table(Setting), unique="name")))
    inductor: tuple[Setting, ...] = field(default=(), metadata=by(each(table(Setting), unique="name")))
    wrong_fakes: tuple[WrongFakes, ...] = field(default=(), metadata=by(each(table(WrongFakes))))
    limits: tuple[Limit, ...] = field(default=(), metadata=by(each(table(Limit), unique="what")))
    origin: str = field(default="(built by hand)", compare=False, kw_only=True)

    @property
    def splitting_operators(self) -> tuple[str, ...]:
        """The operators of all `split` tables, each once, in the order of the file."""
        return tuple(dict.fromkeys(name for split in self.split for name in split.operators))


def parse_profile(given: str | Mapping[str, object], *, source: str = "(given)") -> DeviceProfile:
    """The profile in a TOML text, or in the mapping that was parsed from one; `source` names it in messages.

    Args:
        given: TOML, or what `tomllib` made of it.

    Raises:
        ProfileError: a wrong key, type or value; all that is wrong at once.
    """
    if isinstance(given, str):
        if len(given) > LARGEST:
            raise ProfileError(
                f"compile profile {source}: too large",
                seen=f"{len(given)} characters or more",
                expected=f"at most {LARGEST}; the longest of this package has 8 thousand",
                hint="check that this is the file you meant",
            )
        import tomllib  # 1 ms: only for those who have a text

        try:
            given = tomllib.loads(given)
        except (
            ValueError,
            RecursionError,
        ) as error:  # also for what TOML allows and Python does not: too long, too deep
            what, seen = f"compile profile {source}: not valid TOML", str(error)
            raise ProfileError(what, seen=seen, expected="TOML 1.0", hint="correct that line") from None
    try:
        return DeviceProfile(**read_keys(DeviceProfile, given, ""), origin=source)
    except Wrong as wrong:
        raise ProfileError.of(source, wrong.problems) from None


def load_profile(path_or_name: str | os.PathLike[str]) -> DeviceProfile:
    """The profile in a TOML file of yours, or, by device type, one of this package's own.

    What ends in ".toml" or holds a path separator is a path, and so is every `os.PathLike`; the rest is a name.

    Args:
        path_or_name: `"my_device.toml"`, or `"musa"`.

    Raises:
        ProfileError: there is no such file or name, or it has a wrong key, type or value; all that is wrong at once.
    """
    given = os.fspath(path_or_name)
    is_path = given is not path_or_name or given.endswith(".toml") or os.sep in given
    path = given if is_path else os.path.join(_HERE, f"{given}.toml")
    origin = given if is_path else f"compile_configs/{given}.toml"
    origin = origin.encode("utf-8", "backslashreplace").decode()  # a path may hold what no terminal can print
    try:
        with open(path, encoding="utf-8") as file:
            return parse_profile(file.read(LARGEST + 1), source=origin)
    except UnicodeDecodeError as error:
        what = f"compile profile {origin}: not a text file"
        raise ProfileError(what, seen=str(error), expected="UTF-8, as TOML has it", hint="save it as UTF-8") from None
    except ProfileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte, or that is not Unicode
        if is_path or not isinstance(error, FileNotFoundError | ValueError):
            what, hint = f"compile profile {origin}: cannot be read", "check the path"
            raise ProfileError(what, seen=str(error), expected="a readable TOML file", hint=hint) from None
    names = builtin_names()
    raise ProfileError(
        f"no built-in compile profile is called {given!r}",
        seen=repr(given),
        expected=f"one of {', '.join(names)}, or the path of a TOML file",
        hint=closest(given, names, f"copy {os.path.join(_HERE, 'example.toml')}, fill it in, and pass its path"),
    )


def builtin_names() -> tuple[str, ...]:
    """The device types that have a profile in this package."""
    names = (name.removesuffix(".toml") for name in os.listdir(_HERE) if name.endswith(".toml"))
    return tuple(sorted(name for name in names if name != _EXAMPLE))


def builtin_profiles() -> dict[str, DeviceProfile]:
    """Every profile in this package by device type. To get one, `load_profile` reads one file instead of all."""
    return {name: load_profile(name) for name in builtin_names()}
