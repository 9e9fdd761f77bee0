"""The schemas of vendor operators: they parse, each says where it is from, and their counts are those of the vendor."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_kernels import library, schemas
from fake_kernels.errors import FakeKernelError, OperatorNameError
from fake_kernels.kernel import parse
from fake_kernels.same_schema import same_schema
from fake_kernels.schemas import VendorSchemas, VendorSchemasError, find, load, names, read

ROOT = Path(__file__).resolve().parents[2]

# schemas; of these without results; of these declaring what they write; of the others, those that are given tensors
COUNTS = {
    "sgl_kernel_cuda_01dcbdcf": (3, 3, 0, 3),
    "sgl_kernel_cuda_0_3_21": (109, 81, 49, 32),
    "sgl_kernel_cuda_0_4_10": (73, 60, 32, 25),
    "sgl_kernel_cuda_bcfdb498": (2, 2, 0, 2),
    "sgl_kernel_musa_fa9f2448": (59, 50, 27, 23),
    "sgl_kernel_npu_00fbd138": (25, 10, 7, 2),
    "torch_musa_14ed48bb": (16, 0, 0, 0),
    "torch_musa_2ff04547": (17, 0, 0, 0),
    "torch_musa_b2ff86fb": (14, 0, 0, 0),
    "vllm_ascend_0_23_0": (65, 15, 8, 6),
    "vllm_c_0_33_0": (111, 85, 85, 0),
    "vllm_c_cache_ops_0_33_0": (19, 19, 17, 2),
    "vllm_c_cuda_utils_0_33_0": (2, 0, 0, 0),
    "vllm_c_custom_ar_0_33_0": (15, 10, 6, 0),
    "vllm_moe_c_0_33_0": (18, 13, 13, 0),
    "vllm_musa_2da5f4b1": (15, 15, 15, 0),
}
GOOD = """
library = "lib"
namespace = "ns"
version = "1.2"
source = "lib-1.2.whl"
extent = "complete"
superseded_by = ""
inferred = []
schemas = ["ns::op(Tensor x) -> Tensor", "ns::op.wide(Tensor x) -> Tensor"]
"""


def takes_tensors(parsed: torch.FunctionSchema) -> bool:
    return any("Tensor" in str(argument.type) for argument in parsed.arguments)


def test_there_is_nothing_but_what_is_counted_here() -> None:
    assert names() == tuple(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_every_schema_parses_and_the_counts_are_the_vendors(name: str) -> None:
    data = load(name)
    parsed = [torch._C.parse_schema(schema) for schema in data.schemas]
    void = [schema for schema in parsed if not schema.returns]
    undeclared = [schema for schema in void if not schema.is_mutable]
    seen = len(parsed), len(void), len(void) - len(undeclared), sum(map(takes_tensors, undeclared))
    assert seen == COUNTS[name]
    written = [f"{schema.name}.{schema.overload_name}".rstrip(".") for schema in parsed]
    assert written == list(data.operators)
    assert len(set(written)) == len(written)
    assert set(data.inferred) <= set(written)


@pytest.mark.parametrize("name", COUNTS)
def test_every_file_says_where_it_is_from(name: str) -> None:
    data = load(name)
    assert ".whl: " in data.source or " at " in data.source
    assert data.extent.startswith(("complete", "selection: "))
    assert data.superseded_by in ("", *names())
    assert name.startswith(data.family)
    assert load(data.family).superseded_by == ""
    assert len(repr(data)) < 1000


def test_white_space_is_single_and_the_lies_are_kept() -> None:
    """What declares a mutation declares it here, in the vendor's spelling; what hides one hides it."""
    assert not [
        schema for name in names() for schema in load(name).schemas if "  " in schema or schema.strip() != schema
    ]
    cuda, musa = load("sgl_kernel_cuda"), load("sgl_kernel_musa")
    operator = "sgl_kernel::sgl_per_token_quant_fp8"
    assert f"{operator}(Tensor input, Tensor! output_q, Tensor! output_s) -> ()" in cuda.schemas
    assert f"{operator}(Tensor input, Tensor output_q, Tensor output_s) -> ()" in musa.schemas
    assert "sgl_kernel::moe_sum_reduce(Tensor input, Tensor output, float routed_scaling_factor) -> ()" in cuda.schemas


def test_a_name_without_a_version_is_the_newest() -> None:
    assert load("torch_musa").name == "torch_musa_b2ff86fb"
    assert load("sgl_kernel_cuda").version == "0.4.10"
    assert load("vllm_c").namespace == "_C"
    assert load("vllm_c_cache_ops").namespace == "_C_cache_ops"


def test_an_operator_is_found_with_its_overload() -> None:
    found = find("_C::scaled_fp4_quant.out")
    assert found is not None
    data, schema = found
    assert data.name == "vllm_c_0_33_0"
    assert schema.startswith("_C::scaled_fp4_quant.out(Tensor input, ")
    plain = find("_C::scaled_fp4_quant.default")
    assert plain is not None
    assert plain[1].startswith("_C::scaled_fp4_quant(Tensor input, ")
    assert find("_C::scaled_fp4_quant.nonsense") is None
    assert find("sgl_kernel::no_such_operator") is None


def test_the_newest_data_answer_and_older_ones_where_the_operator_is_gone() -> None:
    swiglu = find("aten::_fused_swiglu_forward")
    rmsnorm = find("aten::_fused_rmsnorm_forward")
    own_rms_norm = find("aten::rms_norm")
    assert swiglu is not None and swiglu[0].name == "torch_musa_b2ff86fb"  # noqa: PT018
    assert rmsnorm is not None and rmsnorm[0].name == "torch_musa_14ed48bb"  # noqa: PT018
    assert "SymInt[] normalized_shape" in rmsnorm[1]
    assert own_rms_norm is not None and own_rms_norm[0].name == "torch_musa_2ff04547"  # noqa: PT018


def test_where_libraries_disagree_one_has_to_be_named() -> None:
    operator = "sgl_kernel::sgl_per_token_group_quant_8bit_v2"
    with pytest.raises(VendorSchemasError, match="has different schemas in different libraries") as error:
        find(operator)
    assert "sgl_kernel_cuda_0_4_10: " in str(error.value)
    assert "sgl_kernel_musa_fa9f2448: " in str(error.value)
    assert f"to do: say whose is meant: find({operator!r}, name='sgl_kernel_cuda_0_4_10')" in str(error.value)
    declared, hidden = find(operator, "sgl_kernel_cuda"), find(operator, "sgl_kernel_musa")
    assert declared is not None
    assert hidden is not None
    assert torch._C.parse_schema(declared[1]).is_mutable
    assert not torch._C.parse_schema(hidden[1]).is_mutable
    agreed = find("sgl_kernel::silu_and_mul")  # in both, and the same
    assert agreed is not None
    assert agreed[1] == "sgl_kernel::silu_and_mul(Tensor! out, Tensor input) -> ()"


def test_the_fake_kernels_have_schemas_of_these() -> None:
    """A record of an operator that cannot be imported here is for a schema that some version of its vendor has."""
    known: dict[str, list[str]] = {}
    for name in names():
        for operator, schema in zip(load(name).operators, load(name).schemas, strict=True):
            known.setdefault(operator, []).append(schema)
    records = [record for record in library.load() if record.library != "torch_npu"]
    assert records
    for record in records:
        vendors = known.get(record.op, [])
        same = [schema for schema in vendors if same_schema(parse(schema), parse(record.schema))]
        assert same, f"the record has {record.schema}, and the vendor {vendors}"


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="No schemas are kept under the name 'torch_mussa'") as error:
        load("torch_mussa")
    assert "expected: one of sgl_kernel_cuda_01dcbdcf, " in str(error.value)
    assert "to do: add them with tests/vendor/extract_schemas.py" in str(error.value)
    with pytest.raises(OperatorNameError):
        find("silu_and_mul")


def test_good_data() -> None:
    data = read("lib_1_2", GOOD)
    assert data.operators == ("ns::op", "ns::op.wide")
    assert data.family == "lib"


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ('version = "1.2"', 'version = ""', "seen: nothing for version"),
        ('version = "1.2"', "version = 1.2", "seen: another type for version"),
        ('version = "1.2"', "", "seen: fields missing: version; unknown: none"),
        ('version = "1.2"', 'version = "1.2"\nvresion = "1"', "unknown: vresion"),
        ('version = "1.2"', "version = ", "Invalid value"),
        ('"ns::op.wide(', '"op.wide(', "expected: 'ns::name(arguments) -> results'"),
        ('"ns::op.wide(', '"ns::op(', "seen: several schemas of ns::op"),
        ('["ns::op(Tensor x) -> Tensor", "ns::op.wide(Tensor x) -> Tensor"]', "[]", "seen: nothing for schemas"),
        ('["ns::op(Tensor x) -> Tensor", ', "[1, ", "seen: another type for schemas"),
        ('"complete"', '"most"', "expected: 'complete' or 'selection: ...'"),
    ],
)
def test_damaged_data(old: str, new: str, seen: str) -> None:
    assert old in GOOD
    with pytest.raises(VendorSchemasError) as error:
        read("lib_1_2", GOOD.replace(old, new))
    assert isinstance(error.value, FakeKernelError)
    assert "The schemas in lib_1_2.toml cannot be used." in str(error.value)
    assert seen in str(error.value)
    assert "to do: make the file again with tests/vendor/extract_schemas.py" in str(error.value)


def test_the_data_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("torch_musa").version = "2"  # type: ignore[misc]


def test_importing_reads_nothing(fresh: Any) -> None:
    code = """
        import sys
        from pathlib import Path
        import fake_kernels
        sys.modules.pop("tomllib", None)  # a coverage tool has read its own options with it
        read, before = [], Path.read_text
        Path.read_text = lambda self, *a, **k: (read.append(self.name), before(self, *a, **k))[1]
        from fake_kernels import schemas
        schemas.names()
        print(read, "tomllib" in sys.modules)
        schemas.load("torch_musa_b2ff86fb")
        print(read)
    """
    assert fresh(code) == "[] False\n['torch_musa_b2ff86fb.toml']\n"


@pytest.fixture(scope="module")
def extractor() -> Any:
    spec = importlib.util.spec_from_file_location("extract_schemas", ROOT / "tests/vendor/extract_schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_schemas_are_extracted_from_cpp(extractor: Any) -> None:
    source = r"""
        m.def("inferred", &inferred);
        m.def("one(Tensor x) -> Tensor");
        ops.def(
            "two(Tensor! out,"
            "    str how=\"fast\") ->()",
            {at::Tag::needs_fixed_stride_order});
        m.impl("two", torch::kCUDA, &two);
    """
    assert extractor.in_source(source) == ["one(Tensor x) -> Tensor", 'two(Tensor! out, str how="fast") ->()']


def test_schemas_are_extracted_from_a_patch_of_native_functions(extractor: Any) -> None:
    patch = " # - func: old(Tensor x) -> Tensor\n+- func: new(Tensor x, int reduction=Mean) -> Tensor\n+  tags: core\n"
    assert extractor.in_source(patch) == ["new(Tensor x, int reduction=Mean) -> Tensor"]


def test_schemas_are_extracted_from_the_strings_of_a_library(extractor: Any, tmp_path: Path) -> None:
    binary = tmp_path / "lib.so"
    strings = [
        "one(Tensor x,   Tensor! y)->() ",
        "one",
        "one(at::Tensor)::<lambda()>",
        "a(b) -> c d",
        "plain text here",
    ]
    binary.write_bytes(b"\x7fELF\x00" + b"\x00".join(text.encode() for text in strings) + b"\x00")
    assert extractor.in_library(binary) == ["one(Tensor x, Tensor! y)->()"]


def test_what_is_extracted_can_be_read(extractor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "bindings.cpp"
    source.write_text('m.def("one(Tensor x) -> Tensor");')
    options = ["--name", "lib", "--library", "lib.ops", "--namespace", "ns", "--version", "1.2", "--where", "owner/lib"]
    monkeypatch.setattr("sys.argv", ["extract", "source", str(source), *options, "--out", str(tmp_path)])
    extractor.main()
    data = schemas.read("lib_1_2", (tmp_path / "lib_1_2.toml").read_text())
    assert data == VendorSchemas(
        "lib_1_2", "lib.ops", "ns", "1.2", "owner/lib", "complete", "", (), ("ns::one(Tensor x) -> Tensor",)
    )
