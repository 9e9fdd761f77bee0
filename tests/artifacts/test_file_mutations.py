"""A file that was changed anywhere gives the right result or a typed error: nothing else, and nothing is unpickled.

Bytes are flipped, cut out, put in and swapped, with a fixed seed; and, so that the checks behind the hashes are
reached, what is in the JSON is changed and the hashes are made right again, as an attacker would. `load` must then give
a graph or an error of ours, never run anything of the file's, and never take more memory than the file is large.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import random
import tracemalloc
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from artifact_models import Model, assert_same, traced

from fxpatch.artifacts import files
from fxpatch.artifacts.container import FORMAT, Opened
from fxpatch.errors import ArtifactError

SEED = 20_26
VARIANTS = 1500


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXPATCH_KEY_FILE", str(tmp_path_factory.mktemp("k") / "key"))
        return files.dumps(traced(Model("cpu")))


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        *((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load"), (os, "system"), (os, "popen")),
        *((torch._C, "_pickle_load_obj"), (torch.export, "load"), (torch.compiler, "load_cache_artifacts")),
    ):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("something of the file's was run"))


def mutated(content: bytes, random_: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(random_.choice((1, 1, 1, 2, 8))):
        at, length = random_.randrange(len(data)), random_.randrange(1, 64)
        kind = random_.randrange(5)
        if kind == 0:
            data[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = random_.randbytes(length)
        elif kind == 3:
            data[at : at + length] = data[random_.randrange(len(data)) :][:length]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def test_changed_bytes(content: bytes) -> None:
    model, x = Model("cpu"), torch.randn(2, 4)
    wanted = model(x)
    random_ = random.Random(SEED)
    outcomes = {"right": 0, "refused": 0}
    for _ in range(VARIANTS):
        try:
            loaded = files.loads(mutated(content, random_))
        except ArtifactError:
            outcomes["refused"] += 1
        else:
            assert_same(loaded(x), wanted)
            outcomes["right"] += 1
    assert outcomes["refused"] > VARIANTS * 0.9
    assert sum(outcomes.values()) == VARIANTS


# -- with hashes made right --------------------------------------------------------------------------------------------


def sealed(members: dict[str, bytes], manifest: dict[str, Any]) -> bytes:
    """A file whose hashes are right, made without the code under test, and not signed."""
    hashes = {name: {"bytes": len(e), "sha256": hashlib.sha256(e).hexdigest()} for name, e in members.items()}
    told = json.dumps({**manifest, "members": hashes}).encode()
    seal = json.dumps({"sha256": hashlib.sha256(told).hexdigest(), "hmac-sha256": None}).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, each in {"manifest.json": told, "seal.json": seal, **members}.items():
            archive.writestr(name, each)
    return out.getvalue()


def opened(content: bytes) -> tuple[dict[str, bytes], dict[str, Any]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    del members["seal.json"]
    return members, json.loads(members.pop("manifest.json"))


def places(form: Any) -> Iterator[tuple[Any, Any]]:
    """Each container of a document with a key in it."""
    if isinstance(form, (dict, list)):
        for key in list(form) if isinstance(form, dict) else range(len(form)):
            yield form, key
            yield from places(form[key])


HOSTILE = [
    *(None, True, -1, 0, 7, 1 << 40, 1 << 62, 1 << 63, 1 << 200, 0.5, float("nan"), "", "x", "getattr", "self", "os"),
    *(
        "__class__",
        "a b",
        "x): pass\n",
        "'",
        '"',
        "\\",
        "\x00",
        "call_function",
        "call_method",
        "call_module",
        "musa:0",
    ),
    *(
        "__subclasses__",
        "a" * 5000,
        "1" * 5000,
        [],
        {},
        [[]],
        {"node": "x"},
        {"tuple": []},
        {"tensor": 99},
        {"float": "nan"},
    ),
    *(
        {"function": ["function", "os", "system"]},
        {"device": "musa:0"},
        {"device": "cuda:1"},
        ["function", "os", "system"],
    ),
    *(["op", "aten", "from_file", "default"], ["function", "torch", "load"], ["function", "torch.hub", "load"]),
    *(
        ["function", "builtins", "eval"],
        ["function", "builtins", "getattr"],
        ["higher", "torch.ops.higher_order", "cond"],
    ),
]


@pytest.mark.parametrize("document", ["modules.json", "tensors.json", "manifest.json"])
def test_changed_content_with_right_hashes(content: bytes, document: str) -> None:
    members, manifest = opened(content)
    told = manifest if document == "manifest.json" else json.loads(members[document])
    count = len(list(places(told)))
    random_ = random.Random(SEED)
    loaded = 0
    for _ in range(400):
        changed = copy.deepcopy(told)
        for owner, key in random_.sample(list(places(changed)), 1 + random_.randrange(2)):
            if not isinstance(owner, list) or key < len(owner):
                owner[key] = copy.deepcopy(random_.choice(HOSTILE))
        if document == "manifest.json":
            data = sealed(members, changed)
        else:
            data = sealed({**members, document: json.dumps(changed).encode()}, manifest)
        try:
            found = files.loads(data)
        except ArtifactError:
            continue
        assert isinstance(found, torch.fx.GraphModule)
        loaded += 1
    assert count > 10
    assert loaded < (350 if document == "manifest.json" else 200)  # most of a manifest is for people


def test_the_way_of_the_mutations_can_load(content: bytes) -> None:
    """What is sealed anew without a change loads: the refusals above are not for the seal."""
    members, manifest = opened(content)
    x = torch.randn(2, 4)
    assert_same(files.loads(sealed(members, manifest))(x), Model("cpu")(x))


def graph_of(*nodes: list[Any]) -> bytes:
    """A file of one graph, given its nodes."""
    every = [[*node, {"dict": []}, [], None] if len(node) == 4 else node for node in nodes]
    module = {
        "class": None, "name": "G", "training": True, "state": [], "parameters": {}, "buffers": {}, "modules": {},
        "meta": [], "graph": {"nodes": every, "codegen": None},
    }  # fmt: skip
    members = {"modules.json": json.dumps({"modules": [module]}).encode()}
    members["tensors.json"] = json.dumps({"storages": [], "tensors": []}).encode()
    return sealed(members, {"format": FORMAT, "kind": "graph", "root": 0, "devices": []})


X = ["placeholder", "x", "x", {"tuple": []}]
OUT = ["output", "output", "output", {"tuple": [{"node": "y"}]}]


def call(op: str, target: Any, *args: Any) -> list[Any]:
    return [op, "y", target, {"tuple": [{"node": "x"}, *args]}]


def test_graphs_made_by_hand_load() -> None:
    good = graph_of(X, call("call_function", ["function", "torch", "relu"]), OUT)
    assert files.loads(good)(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (call("call_function", ["function", "os", "system"]), "the function os.system"),
        (call("call_function", ["function", "torch", "load"]), "the function torch.load"),
        (call("call_function", ["function", "torch.hub", "load"]), "the function torch.hub.load"),
        (call("call_function", ["function", "builtins", "eval"]), "no function of a graph"),
        (call("call_function", ["function", "builtins", "getattr"], "__class__"), "the attribute '__class__'"),
        (call("call_function", ["function", "builtins", "getattr"], {"node": "x"}), "no attribute of a tensor"),
        (call("call_function", ["op", "aten", "from_file", "default"]), "the operator aten::from_file"),
        (call("call_function", ["op", "aten", "save", None]), "aten::save"),
        (call("call_function", ["op", "debugprims", "load_tensor", "default"]), "debugprims::load_tensor"),
        (call("call_method", "__reduce_ex__"), "the method '__reduce_ex__'"),
        (call("call_method", "__subclasses__"), "the method '__subclasses__'"),
        (call("call_method", "apply_"), "the method 'apply_'"),
        (call("call_method", "relu(); import os"), "no method"),
        (call("get_attr", 'a"); import os; ("'), "no operation of a graph"),
        (["placeholder", "y", "y): pass\nimport os\ndef f(", {"tuple": []}], "no operation of a graph"),
        (["placeholder", "y; import os", "y", {"tuple": []}], "no name of a node"),
        (call("call_function", ["function", "torch", "add"], {"function": ["function", "os", "system"]}), "os.system"),
        (call("call_module", "linear"), "linear"),
    ],
)
def test_what_a_strangers_graph_may_not_do(node: list[Any], words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        files.loads(graph_of(X, node, OUT))
    assert words in str(caught.value)


def test_keywords_and_names_of_parts_are_names() -> None:
    for bad in ("a b", "a=1, b", "", "self.x", "lambda"):
        node = [
            "call_function",
            "y",
            ["function", "torch", "relu"],
            {"tuple": [{"node": "x"}]},
            {"dict": [[bad, 1]]},
            [],
            None,
        ]
        with pytest.raises(ArtifactError, match="no dict with names"):
            files.loads(graph_of(X, node, OUT))


# -- the container -----------------------------------------------------------------------------------------------------


def archive(*entries: tuple[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as made:
        for name, each in entries:
            made.writestr(name, each)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda c: b"", "BadZipFile"),
        (lambda c: c[: len(c) // 2], "BadZipFile"),
        (lambda c: archive(("../../x.json", b"{}")), "a member called '../../x.json'"),
        (lambda c: archive(("/etc/x", b"{}")), "a member called '/etc/x'"),
        (lambda c: archive(("manifest.json", b"{}"), ("manifest.json", b"{}")), "two members of one name"),
        (lambda c: archive(("manifest.json", b"0" * (1 << 22)), compress=zipfile.ZIP_DEFLATED), "compressed"),
        (lambda c: archive(("manifest.json", b"[" * 100_000), ("seal.json", b"{}")), "RecursionError|manifest"),
        (lambda c: archive(("manifest.json", b"{}"), ("seal.json", b"[]")), "not an object"),
        (lambda c: archive(("manifest.json", b"{}"), ("seal.json", b"{}")), "not what was sealed"),
        (lambda c: sealed({}, {"format": 99, "kind": "graph"}), "does not read"),
        (lambda c: sealed({}, {"format": FORMAT, "kind": "shell"}), "kind 'shell'"),
    ],
)
def test_archives_that_are_none_of_ours(content: bytes, made: Any, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        files.loads(made(content))


@pytest.mark.parametrize(
    "row",
    [
        [0, "torch.float32", [1 << 40], [1], 0, "tensor", False, [False, False]],
        [0, "torch.float32", [3], [1 << 60], 0, "tensor", False, [False, False]],
        [0, "torch.float32", [1], [1], 4, "tensor", False, [False, False]],
        [0, "torch.float32", [-1], [1], 0, "tensor", False, [False, False]],
        [0, "torch.float32", [1], [-1], 3, "tensor", False, [False, False]],
        [0, "torch.float32", [2], [1, 1], 0, "tensor", False, [False, False]],
        [0, "torch.float32", [1] * 65, [1] * 65, 0, "tensor", False, [False, False]],
        [0, "torch.float32", [1 << 33] * 3, [0] * 3, 0, "tensor", False, [False, False]],
        [0, "torch.qint8", [1], [1], 0, "tensor", False, [False, False]],
        [0, "torch.int64", [1], [1], 0, "parameter", True, [False, False]],
        [1, "torch.float32", [1], [1], 0, "tensor", False, [False, False]],
        [0, "torch.float32", [True], [1], 0, "tensor", False, [False, False]],
        [0, "torch.float32", [1.0], [1], 0, "tensor", False, [False, False]],
    ],
)
def test_a_tensor_that_is_not_in_its_storage(row: list[Any]) -> None:
    members = {"storage/0": bytes(16), "modules.json": b'{"modules": []}'}
    members["tensors.json"] = json.dumps({"storages": [["cpu", 16]], "tensors": [row]}).encode()
    manifest = {"format": FORMAT, "kind": "graph", "root": 0, "devices": ["cpu"]}
    with pytest.raises(ArtifactError, match=r"a tensor is|does not fit"):
        files.loads(sealed(members, manifest))


def test_a_file_that_claims_much_takes_little_memory() -> None:
    row = [0, "torch.float32", [1 << 50], [0], 0, "tensor", False, [False, False]]  # one element, expanded
    members = {"storage/0": bytes(16), "modules.json": b'{"modules": []}'}
    members["tensors.json"] = json.dumps({"storages": [["cpu", 16]], "tensors": [row]}).encode()
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="no number of a module"):
        files.loads(sealed(members, {"format": FORMAT, "kind": "graph", "root": 0, "devices": ["cpu"]}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_the_hash_of_the_file_is_that_of_its_bytes(content: bytes) -> None:
    assert Opened(content).sha256 == hashlib.sha256(content).hexdigest()


def test_attributes_of_the_class_are_no_part_of_a_module() -> None:
    for target in ("__class__.__init__.__globals__", "forward", "code", "_graph"):
        with pytest.raises(ArtifactError, match=r"which the module does not have|no operation"):
            files.loads(graph_of(X, call("get_attr", target), OUT))
