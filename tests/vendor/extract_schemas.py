"""Extracts the operator schemas of a vendor's libraries or sources, as the data files of `fake_kernels.schemas`.

From a wheel, by loading its libraries (`pip download --no-deps sglang-kernel==0.4.10`, then):

    python extract_schemas.py wheel sglang_kernel-0.4.10-*.whl 'sgl_kernel/sm*/common_ops*.so' \
        --name sgl_kernel_cuda --library sgl_kernel --out fake_kernels/schemas

The libraries need CUDA or CANN. For each that is missing, a stub is built here (gcc, nm, readelf) whose functions
return 0; then the library loads, and registers what it registers: names, namespaces and schemas are the dispatcher's,
and the text of each schema is the vendor's own, found in the library's strings (white space collapsed). A library
built for a torch with another C++ interface does not load: `--namespace NS` takes every schema among its strings then.

From C++ (`m.def("...")`) or native_functions.yaml, or a patch of it:

    python extract_schemas.py source torch_bindings.cpp --name vllm_musa --library vllm_musa --namespace _C_musa_ops \
        --version 2da5f4b1 --where 'MooreThreads/vllm-musa csrc/musa/torch_bindings.cpp' --out fake_kernels/schemas
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

OF_THE_SYSTEM = ("libc.so", "libm.so", "libstdc++", "libgcc_s", "libdl.so", "libpthread", "librt.so", "ld-linux")
LOAD = """
import json, sys, torch
before = set(torch._C._dispatch_get_all_op_names())
torch.ops.load_library(sys.argv[1])
seen = {}
for name in sorted(set(torch._C._dispatch_get_all_op_names()) - before):
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)  # None: a kernel is registered, and no schema
    if found is not None:
        seen[name] = str(found._schemas[overload])
print(json.dumps(seen))
"""


def output(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def dynamic_symbols(library: Path, which: str) -> set[tuple[str, str]]:
    """(name, version) of what is `--defined-only` or (not weakly) `--undefined-only` in a library."""
    rows = [line.split() for line in output("nm", "-D", which, str(library))]
    wanted = [row[-1] for row in rows if len(row) > 1 and (which == "--defined-only" or row[-2] == "U")]
    return {(name, version.lstrip("@")) for name, _, version in (symbol.partition("@") for symbol in wanted)}


def stub(library: Path, out: Path) -> None:
    """Builds in `out` every shared library that `library` needs and this machine lacks."""
    ours = Path(torch.__file__).parent / "lib"
    system = [
        Path(line.split()[-1]) for line in output("ldconfig", "-p") if any(name in line for name in OF_THE_SYSTEM)
    ]
    known = {name for each in [*system, *ours.glob("*.so*")] for name, _ in dynamic_symbols(each, "--defined-only")}
    needed = [line.split("[")[1].rstrip("]") for line in output("readelf", "-d", str(library)) if "NEEDED" in line]
    absent = [name for name in needed if not name.startswith(OF_THE_SYSTEM) and not (ours / name).exists()]
    missing = {
        symbol
        for symbol in dynamic_symbols(library, "--undefined-only")
        if symbol[0] not in known and not symbol[0].startswith(("Py", "_Py"))
    }
    for position, name in enumerate(absent):
        versioned = sorted(symbol for symbol, version in missing if version == name)
        plain = sorted(symbol for symbol, version in missing if version not in absent) if position == 0 else []
        source = out / f"{name}.c"
        functions = [
            f'long f{i}(void) __asm__("{symbol}"); long f{i}(void) {{ return 0; }}'
            for i, symbol in enumerate([*versioned, *plain])
        ]
        source.write_text("\n".join(functions))
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(out / name), str(source)]
        if versioned:
            (out / f"{name}.map").write_text(f"{name} {{ global: *; }};\n")
            command.append(f"-Wl,--version-script={out / name}.map")
        subprocess.run(command, check=True)


def registered(library: Path) -> dict[str, str]:
    """What the library registers when it is loaded: schema, as torch prints it, by `namespace::name.overload`."""
    with tempfile.TemporaryDirectory() as stubs:
        stub(library, Path(stubs))
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(library)],
            env={**os.environ, "LD_LIBRARY_PATH": stubs},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(f"{library.name} does not load: {done.stderr.strip().splitlines()[-1]}\n  to do: give --namespace")
    seen: dict[str, str] = json.loads(done.stdout)
    if not seen:
        sys.exit(f"{library.name} loads and registers no schema: it is built for another torch\n  to do: --namespace")
    return seen


def texts(candidates: Iterable[str]) -> list[str]:
    """Those that are schemas, with white space collapsed, in order and once each."""
    found: dict[str, None] = {}
    for candidate in candidates:
        text = " ".join(candidate.split())
        try:
            torch._C.parse_schema(text)
        except RuntimeError:
            continue
        found[text] = None
    return list(found)


def in_library(library: Path) -> list[str]:
    strings = re.findall(rb"[\x20-\x7e\n\t]{6,}(?=\x00)", library.read_bytes())
    return texts(text.decode() for text in strings if b"(" in text and b"->" in text)


def in_source(source: str) -> list[str]:
    yaml = re.findall(r"^\+?- func: (.*)$", source, re.MULTILINE)
    calls = re.findall(r'\bdef\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)', source)
    literals = ["".join(re.findall(r'"((?:[^"\\]|\\.)*)"', call)).replace('\\"', '"') for call in calls]
    return texts([*yaml, *(literal for literal in literals if "->" in literal)])


def of_wheel(wheel: Path, patterns: list[str], namespace: str | None) -> tuple[list[str], list[str], list[str]]:
    """Schemas of the libraries in `wheel`; those among them inferred from C++ types; names of the libraries."""
    schemas: dict[str, str] = {}
    inferred: list[str] = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        members = sorted(name for name in archive.namelist() if any(fnmatch.fnmatch(name, each) for each in patterns))
        for member in members:
            library = Path(archive.extract(member, folder))
            written = in_library(library)
            if namespace is not None:
                schemas |= {f"{namespace}::{text.partition('(')[0]}": f"{namespace}::{text}" for text in written}
                continue
            for name, printed in registered(library).items():
                own = [text for text in written if text.partition("(")[0] == name.partition("::")[2]]
                whole = [f"{name.partition('::')[0]}::{text}" for text in own]
                same = [text for text in whole if str(torch._C.parse_schema(text)) == printed]
                inferred += [] if same or name in schemas else [name]
                schemas[name] = same[0] if same else printed
    return [schemas[name] for name in sorted(schemas)], inferred, members


def write(given: argparse.Namespace, version: str, source: str, schemas: list[str], inferred: list[str]) -> None:
    """One file for each namespace, `NAME_VERSION.toml`, or `NAME_NAMESPACE_VERSION.toml` where there are several."""
    namespaces = sorted({schema.partition("::")[0] for schema in schemas})
    for namespace in namespaces:
        parts = (given.name, namespace if len(namespaces) > 1 else "", version)
        stem = re.sub(r"[^a-z0-9]+", "_", "_".join(parts).lower()).strip("_")
        own = [schema for schema in schemas if schema.startswith(f"{namespace}::")]
        fields = {
            "library": given.library,
            "namespace": namespace,
            "version": version,
            "source": source,
            "extent": given.extent,
            "superseded_by": given.superseded_by,
            "inferred": [name for name in inferred if name.startswith(f"{namespace}::")],
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
        lines += ["schemas = [", *(f"    {json.dumps(schema)}," for schema in own), "]"]
        (given.out / f"{stem}.toml").write_text("\n".join(lines) + "\n")
        print(f"{stem}.toml: {len(own)} schemas, {len(fields['inferred'])} of them inferred from C++ types")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("wheel", "source"))
    parser.add_argument("file", type=Path)
    parser.add_argument("patterns", nargs="*", help="of libraries in the wheel")
    parser.add_argument("--name", required=True, help="of the data file, without version")
    parser.add_argument("--library", required=True, help="the Python module that brings the operators")
    parser.add_argument("--namespace", help="of a source, or of a library that does not load")
    parser.add_argument("--version", help="of a source: release or commit")
    parser.add_argument("--where", help="of a source: repository, path and commit")
    parser.add_argument("--extent", default="complete", help="'complete', or 'selection: ...'")
    parser.add_argument("--superseded-by", default="", help="name of the newer data file of the same library")
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    if given.kind == "source":
        found = sorted(f"{given.namespace}::{text}" for text in in_source(given.file.read_text()))
        write(given, given.version, given.where, found, [])
        return
    schemas, inferred, members = of_wheel(given.file, given.patterns, given.namespace)
    how = "strings of the library" if given.namespace else "registered when loaded on stub libraries"
    version = given.file.name.split("-")[1]
    write(given, version, f"{given.file.name}: {', '.join(members)} ({how})", schemas, inferred)


if __name__ == "__main__":
    main()
