"""Random profiles: the right ones are read whole, and a wrong one is refused by the key that is wrong."""

from __future__ import annotations

import copy
import datetime
import string
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from compile_configs import DeviceProfile, ProfileError, parse_profile
from compile_configs.profile import COMPILERS, FAMILIES
from compile_configs.version import version_key

Path = tuple[str | int, ...]

words = st.text(string.ascii_letters, min_size=1, max_size=4)
lower = st.text(string.ascii_lowercase, min_size=1, max_size=4)
sentences = st.text(min_size=1, max_size=6).filter(str.strip)
dotted = st.lists(words, min_size=1, max_size=3).map(".".join)
operators = st.builds("{}::{}{}".format, words, words, st.just("") | words.map(".{}".format))
scalars = st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False) | st.text(max_size=5)
versions = st.builds("2.{}{}".format, st.integers(11, 30), st.sampled_from(["", ".0", ".3", ".1rc2", ".0+cpu"]))
sizes = st.sets(st.integers(1, 9999), min_size=1, max_size=5).map(sorted)


def settings_of(name: st.SearchStrategy[str] = dotted) -> st.SearchStrategy[list[dict[str, object]]]:
    one = st.fixed_dictionaries({"name": name, "value": scalars, "reason": sentences, "source": sentences})
    return st.lists(one, max_size=2, unique_by=lambda setting: setting["name"])


split = st.fixed_dictionaries({"operators": st.lists(operators, max_size=3, unique=True), "source": sentences})
wrong = st.fixed_dictionaries(
    {"operators": st.lists(operators, max_size=3, unique=True), "reason": sentences, "source": sentences}
)
limit = st.fixed_dictionaries({"what": sentences, "source": sentences})
profiles = st.fixed_dictionaries(
    {
        "device": lower,
        "title": sentences,
        "vendor": sentences,
        "min_torch": versions,
        "compiler": st.sampled_from(COMPILERS),
        "capture": st.fixed_dictionaries(
            {"classes": st.lists(dotted, max_size=2, unique=True), "sizes": sizes, "source": sentences},
            optional={"budget": st.integers(1, (1 << 63) - 1), "split_tags": st.lists(lower, max_size=2, unique=True)},
        ),
    },
    optional={
        "packages": st.lists(dotted, max_size=2, unique=True),
        "families": st.lists(st.sampled_from(FAMILIES), max_size=3, unique=True),
        "split": st.lists(split, max_size=2, unique_by=lambda one: (one["source"], *one["operators"])),
        "dynamo": settings_of(),
        "inductor": settings_of(),
        "wrong_fakes": st.lists(wrong, max_size=2, unique_by=lambda one: one["source"]),
        "limits": st.lists(limit, max_size=2, unique_by=lambda one: one["what"]),
    },
)


def leaves(table: object, path: Path = ()) -> list[Path]:
    """The path of everything in a parsed TOML file, tables and arrays as well."""
    inside = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return [found for name, value in inside for found in [(*path, name), *leaves(value, (*path, name))]]


def spelled(path: Path) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def reach(mapping: object, path: Path) -> object:
    for step in path:
        mapping = mapping[step]  # type: ignore[index]
    return mapping


def keys_of_refusal(mapping: object) -> set[str]:
    """The keys that are named as wrong, in the attributes and in the text."""
    with pytest.raises(ProfileError) as caught:
        parse_profile(mapping, source="file")  # type: ignore[arg-type]
    keys = {problem.key for problem in caught.value.problems}
    assert all(f"'{key}'" in str(caught.value) for key in keys)
    assert all(part.strip() for problem in caught.value.problems for part in problem[1:])
    return keys


@given(profiles)
def test_a_right_one_is_read_whole(mapping: dict[str, object]) -> None:
    read = parse_profile(mapping, source="file")
    assert read.origin == "file"
    whole = asdict(read)
    for path in leaves(mapping):
        found, asked = reach(whole, path), reach(mapping, path)
        assert found == (tuple(asked) if isinstance(asked, list) and not leaves(asked) else found)
        if not isinstance(asked, dict | list):
            assert (found, type(found)) == (asked, type(asked))
    del whole["origin"]
    assert parse_profile(whole) == read
    assert hash(parse_profile(whole)) == hash(read)


@given(profiles, st.data())
def test_a_wrong_type_is_refused_by_its_key(mapping: dict[str, object], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(leaves(mapping)))
    junk = [datetime.date(2026, 1, 1), b"bytes", object(), 1j]  # no key has any of these types
    junk += [value for value in (None, {}, "", 1.5, True) if type(value) is not type(reach(mapping, path))]
    wrong = data.draw(st.sampled_from(junk))
    if path[-1] == "value" and isinstance(wrong, str | bool | float):
        wrong = [wrong]
    if path[-1] == "budget" and wrong is None:
        wrong = [wrong]
    changed = copy.deepcopy(mapping)
    reach(changed, path[:-1])[path[-1]] = wrong  # type: ignore[index]
    at = spelled(path)
    keys = keys_of_refusal(changed)
    assert keys
    assert all(key == at or key.startswith(f"{at}.") for key in keys), "an empty table lacks its keys"


@given(profiles, st.data())
def test_an_unknown_and_a_missing_key_are_refused_by_name(mapping: dict[str, object], data: st.DataObject) -> None:
    tables = [(), *(path for path in leaves(mapping) if isinstance(reach(mapping, path), dict))]
    path = data.draw(st.sampled_from(tables))
    prefix = f"{spelled(path)}." if path else ""

    name = data.draw(words.map("x_{}".format) | st.integers())
    added = copy.deepcopy(mapping)
    reach(added, path)[name] = 1  # type: ignore[index]
    assert keys_of_refusal(added) == {f"{prefix}{name}"}

    optional = {"packages", "families", "split", "dynamo", "inductor", "wrong_fakes", "limits", "budget", "split_tags"}
    gone = data.draw(st.sampled_from(sorted(set(reach(mapping, path)) - optional)))  # type: ignore[call-overload]
    less = copy.deepcopy(mapping)
    del reach(less, path)[gone]  # type: ignore[attr-defined]
    assert keys_of_refusal(less) == {f"{prefix}{gone}"}


@given(profiles, st.data())
def test_a_wrong_value_is_refused_by_its_key(mapping: dict[str, object], data: st.DataObject) -> None:
    sizes_of = mapping["capture"]["sizes"]  # type: ignore[index]
    top = max(sizes_of)
    wrong_values: dict[Path, list[object]] = {
        ("device",): ["", "A", "a b", "a:0", "1a"],
        ("title",): ["", " \n"],
        ("min_torch",): ["", "2", "2.10.9", "two", "2.11.", "2.11a0", "2.12-rc1", "v2.12", "2.12+"],
        ("compiler",): ["", "Inductor", "cudagraphs"],
        ("capture", "budget"): [0, -1],
        ("capture", "classes"): [["a..b"], ["a", "a"], ["1"], [""]],
        ("capture", "sizes"): [[], [0], [-1], [top, top], [top, top - 1], [top + 1, top]],
        ("capture", "split_tags"): [["A"], ["torch.Tag.x"], ["x", "x"]],
        ("packages",): [["torch-npu"], [""]],
        ("families",): [["quantization"], [FAMILIES[0]] * 2],
        ("split",): [[{"operators": [name], "source": "s"}] for name in ("a", "a.b", "a:b", "a::b::c", "::a", "a::")],
        ("limits",): [[{"what": "w", "source": "s"}] * 2, [{"what": "", "source": "s"}]],
        ("inductor",): [[{"name": name, "value": 1, "reason": "r", "source": "s"}] for name in ("", "a.", "a-b")],
    }
    path = data.draw(st.sampled_from(sorted(wrong_values)))
    changed = copy.deepcopy(mapping)
    reach(changed, path[:-1])[path[-1]] = data.draw(st.sampled_from(wrong_values[path]))  # type: ignore[index]
    assert all(key.startswith(spelled(path)) for key in keys_of_refusal(changed))


anything = st.recursive(
    st.none() | scalars | st.dates() | st.sampled_from([*FAMILIES, *COMPILERS]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["device", "capture", "split", "source", "sizes", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3) | st.sampled_from(["device", "capture", "split", "limits"]), anything))
def test_no_mapping_raises_anything_else(mapping: dict[str, object]) -> None:
    assert keys_of_refusal(mapping)


@given(st.text(max_size=40) | st.text("[]{}=\"'\n.,#a1: ", max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    with pytest.raises(ProfileError):
        parse_profile(text)


torch_versions = st.builds(
    "{}{}{}{}{}".format,
    st.lists(st.integers(0, 30), min_size=2, max_size=4).map(lambda parts: ".".join(map(str, parts))),
    st.sampled_from(["", "a0", "b1", "rc1", "rc12"]),
    st.sampled_from(["", "", ".post1", ".post0"]),
    st.sampled_from(["", "", ".dev20260801", ".dev0"]),
    st.sampled_from(["", "+cpu", "+cu130", "+git1f2e3d4"]),
)


@given(torch_versions, torch_versions)
def test_versions_compare_as_packaging_compares_them(a: str, b: str) -> None:
    ours, theirs = (version_key(a), version_key(b)), (Version(a.partition("+")[0]), Version(b.partition("+")[0]))
    assert None not in ours
    assert (ours[0] < ours[1], ours[0] == ours[1]) == (theirs[0] < theirs[1], theirs[0] == theirs[1])


@pytest.mark.parametrize(
    "text", ["", "2", "2.", ".2", "2.x", "2.13.0 ", "2.13\n", "2.13+", "2.13+a b", "\u0662.\u0661", "9" * 5000]
)
def test_what_is_no_version(text: str) -> None:
    assert version_key(text) is None


def test_torch_s_own_spellings() -> None:
    ascending = ["2.11", "2.13.0+cpu", "2.15.0.dev20260801+cu130", "2.15.0a0+git1f2e3d4", "2.15.0rc1", "2.15.0"]
    assert sorted(ascending, key=version_key) == ascending  # type: ignore[arg-type]
    assert version_key("2.11") == version_key("2.11.0+cpu")


def test_the_type_is_the_one_that_is_exported() -> None:
    assert DeviceProfile.__module__ == "compile_configs.profile"
