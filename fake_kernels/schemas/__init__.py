"""The operator schemas of vendor libraries that cannot be imported here, as data with their sources.

A library for CUDA or MUSA does not load on a machine without it, and nothing about its operators can be checked there.
Its schemas can: each file beside this one holds those of one library, namespace and version, exactly as the vendor
wrote them (white space apart), with what they say about mutation, true or not. `fake_kernels.declare` gives them to a
simulated device. `tests/vendor/extract_schemas.py` makes the files.

A file is `NAME_VERSION.toml`. Where there are several versions, the older ones say which one superseded them, and
`NAME` alone means the newest. Nothing is read before it is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from fake_kernels.errors import FakeKernelError
from fake_kernels.kernel import split_name

__all__ = ["VendorSchemas", "VendorSchemasError", "find", "load", "names", "read"]

_TEXTS = ("library", "namespace", "version", "source", "extent", "superseded_by")
_LISTS = ("inferred", "schemas")


class VendorSchemasError(FakeKernelError, ValueError):
    """There is no such data, it is damaged, or it gives more than one answer."""


@dataclass(frozen=True)
class VendorSchemas:
    """The operators that one version of a library registers in one namespace.

    Args:
        name: of the data file, `"sgl_kernel_cuda_0_4_10"`.
        library: the Python module that brings the operators, `"sgl_kernel"`.
        namespace: of all of them, `"sgl_kernel"`.
        version: a release, or the first 8 digits of a commit.
        source: the wheel and the libraries in it, or repository, path and commit.
        extent: `"complete"` or `"selection"`, and of what.
        superseded_by: name of the newer data for the same operators; `""` for the newest.
        inferred: operators whose schemas are not the vendor's text: torch made them from the types of a C++ function.
        schemas: `"namespace::name[.overload](arguments) -> results"`, each operator once.

    Raises:
        VendorSchemasError: a text or the list of schemas is empty, or a schema is another namespace's or there twice.
    """

    name: str
    library: str
    namespace: str
    version: str
    source: str
    extent: str
    superseded_by: str
    inferred: tuple[str, ...]
    schemas: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        empty = [each for each in (*_TEXTS, "schemas") if each != "superseded_by" and not getattr(self, each)]
        if empty:
            raise _damaged(self.name, f"nothing for {', '.join(empty)}", "something for every field")
        if self.extent.partition(":")[0] not in ("complete", "selection"):
            raise _damaged(self.name, f"extent = {self.extent!r}", "'complete' or 'selection: ...'")
        start = re.compile(rf"{re.escape(self.namespace)}::\w+(\.\w+)?\(", re.ASCII)
        for schema in self.schemas:
            if not start.match(schema):
                raise _damaged(self.name, repr(schema), f"'{self.namespace}::name(arguments) -> results'")
        twice = sorted({each for each in self.operators if self.operators.count(each) > 1})
        if twice:
            raise _damaged(self.name, f"several schemas of {', '.join(twice)}", "each operator once")

    @property
    def operators(self) -> tuple[str, ...]:
        """`"namespace::name[.overload]"` of every schema, in their order."""
        return tuple(schema.partition("(")[0] for schema in self.schemas)

    @property
    def family(self) -> str:
        """The name without its version."""
        return self.name.removesuffix("_" + re.sub(r"[^a-z0-9]+", "_", self.version.lower()))


@cache
def names() -> tuple[str, ...]:
    """The names of all data files, sorted. Reads none."""
    folder = files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder if file.name.endswith(".toml")))


def load(name: str) -> VendorSchemas:
    """What one data file holds: `load("sgl_kernel_cuda_0_4_10")`, or `load("sgl_kernel_cuda")` for the newest version.

    Args:
        name: a file without `.toml`, with or without its version.

    Raises:
        VendorSchemasError: there is none of that name, or it is damaged.
    """
    if name in names():
        return _read(name)
    for candidate in names():
        if candidate.startswith(f"{name}_"):
            found = _read(candidate)
            if found.family == name and not found.superseded_by:
                return found
    raise VendorSchemasError(
        f"No schemas are kept under the name {name!r}.",
        seen=repr(name),
        expected=f"one of {', '.join(names())}, or one of them without its version",
        hint="add them with tests/vendor/extract_schemas.py, which says how",
    )


def find(operator: str, name: str | None = None) -> tuple[VendorSchemas, str] | None:
    """Where `"namespace::name[.overload]"` is declared, and its schema there; None if in none of the data.

    Args:
        operator: as in a schema; the default overload has no name.
        name: of the data to look in, as `load` takes it. Without it the newest version of each library is asked, and
            an older one only about an operator that no newest one has.

    Raises:
        OperatorNameError: `operator` is not of that form.
        VendorSchemasError: libraries disagree about the operator and `name` does not say whose is meant.
    """
    namespace, packet, overload = split_name(operator)
    wanted = f"{namespace}::{packet}" + (f".{overload}" if overload else "")
    if name is not None:
        return next(((load(name), schema) for schema in load(name).schemas if schema.startswith(f"{wanted}(")), None)
    found = _index().get(wanted, ())
    if len({schema for _, schema in found}) > 1:
        raise VendorSchemasError(
            f"{wanted} has different schemas in different libraries.",
            seen="; ".join(f"{data.name}: {schema}" for data, schema in found),
            expected="one schema",
            hint=f"say whose is meant: find({operator!r}, name={found[0][0].name!r})",
        )
    return found[0] if found else None


@cache
def _index() -> dict[str, tuple[tuple[VendorSchemas, str], ...]]:
    """For each operator the data that have it, of those that were superseded least often."""
    found: dict[str, list[tuple[int, VendorSchemas, str]]] = {}
    for name in names():
        data = _read(name)
        for operator, schema in zip(data.operators, data.schemas, strict=True):
            found.setdefault(operator, []).append((_age(data), data, schema))
    newest = {operator: min(age for age, _, _ in rows) for operator, rows in found.items()}
    return {
        operator: tuple((data, schema) for age, data, schema in rows if age == newest[operator])
        for operator, rows in found.items()
    }


def _age(data: VendorSchemas) -> int:
    return 1 + _age(load(data.superseded_by)) if data.superseded_by else 0


@cache
def _read(name: str) -> VendorSchemas:
    return read(name, files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def read(name: str, text: str) -> VendorSchemas:
    """The data in `text`, the TOML of a file called `name`.

    Raises:
        VendorSchemasError: it is not TOML, or not of this form.
    """
    import tomllib  # here: whoever asks for no schema does not pay for it

    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _damaged(name, str(error), "TOML") from error
    if set(fields) != {*_TEXTS, *_LISTS}:
        missing = ", ".join(sorted({*_TEXTS, *_LISTS} - set(fields)))
        surplus = ", ".join(sorted(set(fields) - {*_TEXTS, *_LISTS}))
        raise _damaged(name, f"fields missing: {missing or 'none'}; unknown: {surplus or 'none'}", "none of either")
    wrong = [key for key in _TEXTS if not isinstance(fields[key], str)]
    wrong += [key for key in _LISTS if not _is_texts(fields[key])]
    if wrong:
        raise _damaged(name, f"another type for {', '.join(wrong)}", "texts, and lists of texts for inferred, schemas")
    fields |= {key: tuple(fields[key]) for key in _LISTS}
    return VendorSchemas(name, **fields)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _damaged(name: str, seen: str, expected: str) -> VendorSchemasError:
    return VendorSchemasError(
        f"The schemas in {name}.toml cannot be used.",
        seen=seen,
        expected=expected,
        hint="make the file again with tests/vendor/extract_schemas.py",
    )
