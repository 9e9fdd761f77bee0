"""What probes are made of: checks that go on after a failure, comparison by bits, versions, who wrote a function."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator

import pytest
import torch

from fxpatch.doctor.probe import Broken, NotApplicable
from fxpatch.doctor.probes import casts, conflicts, versions
from fxpatch.doctor.probes.artifacts import _globals_of
from fxpatch.doctor.probes.checks import Differs, expect, expect_close, in_words, listed, run_all, same_bits


def _fails() -> None:
    expect(1, 2, "one")


def test_all_checks_run_and_what_failed_is_one_diagnosis() -> None:
    ran: list[str] = []

    def raises() -> None:
        raise RuntimeError("no kernel\nand a long trace")

    with pytest.raises(Broken) as error:
        run_all({"first": _fails, "second": raises, "third": lambda: ran.append("third")})
    assert error.value.what == "first: one is 1, and should be 2; second: RuntimeError: no kernel"
    assert ran == ["third"]


def test_a_check_that_makes_no_sense_does_not_hide_one_that_fails() -> None:
    def no_sense() -> None:
        raise NotApplicable("no such thing")

    with pytest.raises(NotApplicable, match="no such thing"):
        run_all({"one": no_sense, "two": lambda: None})
    with pytest.raises(Broken, match="one is 1, and should be 2"):
        run_all({"one": no_sense, "two": _fails})
    assert run_all({"one": lambda: None, "two": lambda: None}) == "one, two"


def test_long_lists_and_texts_are_cut_and_say_so() -> None:
    assert listed([str(n) for n in range(9)]) == "0; 1; 2; 3; 4; 5; and 3 more"
    assert in_words(ValueError("x" * 1000)).endswith("xxx...")
    assert in_words(KeyError()) == "KeyError"


def test_equal_is_of_one_type() -> None:
    with pytest.raises(Differs, match="is True, and should be 1"):
        expect(True, 1, "it")


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (torch.ones(2, dtype=torch.float64), "the dtype of it is torch.float64"),
        (torch.ones(3), "the shape of it is"),
        (torch.tensor([1.0, 1.1]), "it is wrong: Tensor-likes are not close"),
        ((torch.ones(2), 3), "the number of results of it is 2"),
    ],
)
def test_results_that_differ(got: object, said: str) -> None:
    with pytest.raises(Differs, match=said):
        expect_close(got, torch.ones(2), "it")


@pytest.mark.parametrize("dtype", [*casts.REQUIRED, *casts.OPTIONAL], ids=str)
def test_bits_are_compared_in_every_dtype(dtype: torch.dtype) -> None:
    values = casts.host_values(dtype)
    assert same_bits(values, values.clone())
    for place in range(len(values)):
        other = values.clone()
        other[place] = 5.0 if dtype is not torch.bool else ~values[place]
        assert not same_bits(other, values), values[place]


def test_zeros_have_a_sign_and_nan_is_nan() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    other_nan = torch.tensor([0x7FC01234], dtype=torch.int32).view(torch.float32)
    assert same_bits(other_nan, torch.tensor([torch.nan]))


def test_casts_of_the_cpu_are_defined_for_the_values_that_are_cast() -> None:
    """The same twice, and in another memory layout, which takes another loop: undefined ones differ there."""
    dtypes = [*casts.REQUIRED, *casts.OPTIONAL]
    for source in dtypes:
        for target in dtypes:
            if source is not target and not (source.is_complex and not target.is_complex):
                host = casts.host_values(source, target)
                strided = torch.stack([host, host], 1)[:, 0]
                assert same_bits(strided.to(target), host.to(target)), (source, target)


@pytest.mark.parametrize(
    ("requirement", "version", "met"),
    [
        ("torch==2.13.0", "2.13.0+cpu", True),
        ("torch==2.13.0", "2.12.1", False),
        ("torch (==2.7.1)", "2.7.1", True),
        ("torch==2.13.*", "2.13.4", True),
        ("torch==2.13.*", "2.14.0", False),
        ("torch>=2.11,<2.14", "2.13.0", True),
        ("torch>=2.11,<2.14", "2.14.0", False),
        ("torch~=2.7.1", "2.7.9", True),
        ("torch~=2.7.1", "2.8.0", False),
        ("torch!=2.13.0", "2.13.0", False),
        ("torch<=2.13", "2.13.1", True),
        ("torch>2.13", "2.13.1", False),
        ("torch; python_version<'3.8'", "2.13.0", True),
        ("torch>=2.8.0a0", "2.8.0", True),
    ],
)
def test_what_wheels_ask_for(requirement: str, version: str, met: bool) -> None:
    assert versions.fits(requirement, version) is met


def test_the_requirements_agree_with_packaging() -> None:
    """The reference: what pip uses, on every pair of versions that were released."""
    packaging = pytest.importorskip("packaging.specifiers")
    released = ["2.7.1", "2.8.0", "2.11.0", "2.12.1", "2.13.0", "2.13.0+cpu", "2.14.1", "2.15.0"]
    clauses = [f"{op}{v}" for op in ("==", "!=", ">=", "<", "~=") for v in ("2.8.0", "2.13.0", "2.13.1")]
    for clause in [*clauses, "<=2.13.0", ">2.12.1", "==2.13.*", ">=2.8,<2.14", "~=2.12"]:
        for version in released:
            want = packaging.SpecifierSet(clause).contains(version)
            assert versions.fits(f"torch{clause}", version) is want, (clause, version)


def test_the_newest_torch_that_was_seen() -> None:
    assert versions.newest_seen() == "2.15.0"


def test_who_wrote_a_function() -> None:
    @contextlib.contextmanager
    def managed() -> Iterator[None]:
        yield

    assert conflicts.home(managed) == __name__
    assert conflicts.home(torch.nn.functional.linear).startswith("torch")
    assert conflicts.home(torch.fx.graph.CodeGen._gen_python_code) == "torch.fx.graph"


def test_what_a_pickle_imports_is_read_without_loading_it() -> None:
    for protocol in range(2, 6):
        names = _globals_of(pickle.dumps((torch.device("cpu"), contextlib.suppress), protocol))
        assert names == {"torch device", "contextlib suppress"}
