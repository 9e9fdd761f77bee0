"""An ExportedProgram in a file: torch's own JSON for the graph, our table for tensors; no pickle.

`torch.export.save` writes weights as bytes and the graph as JSON, but example inputs, opaque constants and tensors of
unusual kinds as pickles, which remember their device and which `torch.export.load` opens with `weights_only=False` if
need be (torch 2.13: `_export/serde/serialize.py:deserialize_torch_artifact`, `export/pt2_archive/_package.py`). So the
two private functions below are called without tensors, and tensors go where GraphModules keep theirs.

Even so the JSON is not safe to read from anybody: torch hands its shape expressions to `sympy.sympify`, which evaluates
them, executes its guards' source, imports modules that its trees name, and looks its targets up anywhere in torch. So
files of this kind are read only when they are trusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxpatch.artifacts.container import damaged
from fxpatch.artifacts.devices import Devices
from fxpatch.artifacts.tensors import Writer
from fxpatch.artifacts.values import Json, plain, value
from fxpatch.artifacts.vocabulary import NotWritableError
from fxpatch.errors import ArtifactError, MissingHereError
from fxpatch.patching.record import Target

# Seen in torch 2.11, 2.13 and 2.15.
_MODULE = "torch._export.serde.serialize"
_SERIALIZE = Target(
    _MODULE,
    "serialize",
    "exported_program, opset_version, pickle_protocol, serialize_state_dict, serialize_constants, "
    "serialize_example_inputs",
)
_DESERIALIZE = Target(_MODULE, "deserialize", "artifact, expected_opset_version, ...")
_ARTIFACT = Target(_MODULE, "SerializedArtifact", "exported_program, state_dict, constants, example_inputs")


def written(program: torch.export.ExportedProgram, tensors: Writer, devices: set[str]) -> dict[str, bytes]:
    """The members of the file, without those of the tensors.

    Raises:
        NotWritableError, ArtifactError: something of it has no form as data.
        TargetMovedError: torch has moved what this needs.
    """
    serialize = _SERIALIZE.resolve()
    for name, constant in program.constants.items():
        if not isinstance(constant, torch.Tensor):
            raise NotWritableError(f"its constant {name} is a {type(constant).__name__}, which torch would pickle")
    artifact, deserialize = _ARTIFACT.resolve(), _DESERIALIZE.resolve()
    leaves, spec = pytree.tree_flatten(program.example_inputs)
    try:
        held = serialize(
            program, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
        ).exported_program
        tree = None if program.example_inputs is None else pytree.treespec_dumps(spec)
        # It is read at once: what torch writes and cannot read is noticed now, and not when it is needed.
        deserialize(artifact(held, dict(program.state_dict), dict(program.constants), b""))
    except Exception as error:  # of any class: of torch's serializer, of what a library registered with pytree
        raise NotWritableError(f"torch cannot write this program, or read it again: {_said(error)}") from error
    devices.update(f"{each['type']}" + _colon(each["index"]) for each, _ in _devices(json.loads(held)))
    told = {
        "state": {name: tensors.add(each, name) for name, each in program.state_dict.items()},
        "constants": {name: tensors.add(each, name) for name, each in program.constants.items()},
        "inputs": None if tree is None else [_inputs(leaves, tensors), tree],
    }
    return {"program.json": held, "exported.json": json.dumps(told).encode()}


def read(program: Json, told: Json, devices: Devices, tensors: list[torch.Tensor]) -> torch.export.ExportedProgram:
    """The program again; only for trusted files.

    Raises:
        MissingHereError: this process has not an operator.
        ArtifactError: its guards name a device that has become another.
        TargetMovedError: torch has moved what this needs.
        LookupError, ValueError, TypeError: it is no such form.
    """
    artifact, deserialize = _ARTIFACT.resolve(), _DESERIALIZE.resolve()
    _check_operators(program)
    if devices.moved:
        _check_guards(program, devices)
    for each, literal in _devices(program):
        name = each["type"] + _colon(each["index"])
        found = devices(name) if literal else devices.now(name)
        each["type"], each["index"] = found.type, found.index
    for node in _nodes(program):
        _move_autocast(node, devices)
    inputs: Any = b""
    if told["inputs"] is not None:
        leaves = value({"list": told["inputs"][0]}, make={"tensor": tensors.__getitem__, "device": devices})
        inputs = pytree.tree_unflatten(leaves, pytree.treespec_loads(told["inputs"][1]))
    state = {name: tensors[number] for name, number in told["state"].items()}
    constants = {name: tensors[number] for name, number in told["constants"].items()}
    with torch.no_grad():
        found = deserialize(artifact(json.dumps(program).encode(), state, constants, inputs))
    if not isinstance(found, torch.export.ExportedProgram):
        raise damaged(f"torch read a {type(found).__name__} from it")
    return found


def _inputs(leaves: list[Any], tensors: Writer) -> list[Json]:
    def other(each: Any) -> Json:
        if isinstance(each, torch.Tensor):
            kept = each.detach().requires_grad_(each.requires_grad)
            return {"tensor": tensors.add(kept, "an example input")}
        raise NotWritableError(f"an example input is a {type(each).__name__}")

    return [plain(each, other) for each in leaves]


def _devices(form: Json) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each device of a program, and whether it is a literal (or else that of a value)."""
    if isinstance(form, dict):
        for key, each in form.items():
            if key in ("device", "as_device") and isinstance(each, dict) and set(each) == {"type", "index"}:
                yield each, key == "as_device"
            else:
                yield from _devices(each)
    elif isinstance(form, list):
        for each in form:
            yield from _devices(each)


def _nodes(form: Json) -> Iterator[dict[str, Any]]:
    """Each call of a program, those in its subgraphs too."""
    if isinstance(form, dict):
        if isinstance(form.get("target"), str) and isinstance(form.get("inputs"), list):
            yield form
        for each in form.values():
            yield from _nodes(each)
    elif isinstance(form, list):
        for each in form:
            yield from _nodes(each)


def _move_autocast(node: dict[str, Any], devices: Devices) -> None:
    """An autocast region names its device type by a string."""
    if "autocast" not in node["target"]:
        return
    for given in node["inputs"]:
        if isinstance(given.get("arg"), dict) and isinstance(given["arg"].get("as_string"), str):
            given["arg"]["as_string"] = devices.type_of(given["arg"]["as_string"])


def _check_guards(program: Json, devices: Devices) -> None:
    for guard in program.get("guards_code") or ():
        for kind in devices.types_moved:
            if re.search(rf"\b{re.escape(kind)}\b", guard):
                raise ArtifactError(
                    "The program's guards name a device that is to become another.",
                    seen=guard[:200],
                    expected="guards on shapes and values",
                    hint="load it without device=, or export it again where it is to run",
                )


def _check_operators(program: Json) -> None:
    for node in _nodes(program):
        _, *names = node["target"].split(".")
        if node["target"].startswith("torch.ops."):
            found: Any = torch
            for name in names:
                try:
                    found = getattr(found, name)
                except (AttributeError, RuntimeError) as error:
                    raise MissingHereError(
                        "The artifact calls what this process has not.",
                        seen=f"the operator {node['target']} is not here",
                        expected="a process that has imported everything that the program calls",
                        hint=f"import the package that defines {names[1]}::, then load again",
                    ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _colon(index: int | None) -> str:
    return "" if index is None else f":{index}"
