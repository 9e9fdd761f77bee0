"""What is said about a profile that cannot be used, word for word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compile_configs import ProfileError, builtin_names, load_profile, parse_profile
from compile_configs.profile import LARGEST

GOOD = """\
device = "x1"
title = "X"
vendor = "X Inc."
min_torch = "2.11"
compiler = "eager"
families = ["norms"]
[capture]
classes = ["torch.x1.Graph"]
sizes = [2, 4, 8]
source = "s"
[[split]]
operators = ["x1::attn"]
source = "s"
[[inductor]]
name = "compile_threads"
value = 1
reason = "r"
source = "s"
"""

HAND = "remove it; example.toml explains every key"
COUNT = "an integer of at least 1"
TOP = (
    "capture, compiler, device, dynamo, families, inductor, limits, min_torch, packages, split, title, vendor, "
    "wrong_fakes"
)
OPERATOR = 'an operator as "namespace::name" or "namespace::name.overload"'
COLONS = "write '::' after the namespace, and no 'torch.ops'"
VERSION = 'a torch version such as "2.13" or "2.13.1", and at least "2.11"'
DEVICE = 'a device type such as "musa"'
DOTTED = 'a dotted name such as "torch.cuda.CUDAGraph"'
FAMILIES = "one of activations, norms, rope, attention, quantisation, moe, kv_cache, sampling, casts"

# (text of GOOD, what to write instead, (what, seen, expected, hint))
ONE_MISTAKE = [
    ("[[split]]", "[[splits]]", ("unknown key 'splits'", "'splits'", f"one of {TOP}", "did you mean 'split'?")),
    ('title = "X"', 'title = "X"\nzzz = 1', ("unknown key 'zzz'", "'zzz'", f"one of {TOP}", HAND)),
    (
        "[[split]]",
        "size = 1\n[[split]]",
        (
            "unknown key 'capture.size'",
            "'size'",
            "one of budget, classes, sizes, source, split_tags",
            "did you mean 'sizes'?",
        ),
    ),
    (
        'title = "X"\n',
        "",
        ("missing key 'title'", "nothing", "'title' in the top level", "add it; example.toml explains every key"),
    ),
    (
        'reason = "r"\n',
        "",
        (
            "missing key 'inductor[0].reason'",
            "nothing",
            "'reason' in table [inductor[0]]",
            "add it; example.toml explains every key",
        ),
    ),
    ('"X"', "3", ("'title' has a wrong type", "3, an integer", "a string", "write a string there")),
    ('"X"', '" "', ("'title' is empty", "' '", "a string with something in it", "fill it in")),
    ('"x1"', "true", ("'device' has a wrong type", "True, a boolean", "a string", "write a string there")),
    (
        '"x1"',
        '"X1"',
        ("'device' has a wrong value", "'X1'", DEVICE, "write it as torch.device(...).type does"),
    ),
    (
        '["torch.x1.Graph"]',
        '["torch.x1."]',
        ("'capture.classes[0]' has a wrong value", "'torch.x1.'", DOTTED, "name it in full"),
    ),
    ('"2.11"', '"2.x"', ("'min_torch' is not a version", "'2.x'", VERSION, "write digits and dots")),
    ('"2.11"', "2.11", ("'min_torch' has a wrong type", "2.11, a float", "a string", "write a string there")),
    (
        '"2.11"',
        '"2.9.1"',
        (
            "'min_torch' is too old",
            "'2.9.1'",
            VERSION,
            "raise it; older ones lack hooks that everything here stands on",
        ),
    ),
    (
        '"eager"',
        '"inductr"',
        (
            "'compiler' has a wrong value",
            "'inductr'",
            "one of inductor, aot_eager, eager",
            "did you mean 'inductor'?",
        ),
    ),
    (
        '"eager"',
        '"tvm"',
        ("'compiler' has a wrong value", "'tvm'", "one of inductor, aot_eager, eager", "write one of those"),
    ),
    (
        '"norms"',
        '"norm"',
        ("'families[0]' has a wrong value", "'norm'", FAMILIES, "did you mean 'norms'?"),
    ),
    (
        '["norms"]',
        '["norms", "norms"]',
        (
            "'families[1]' is there twice",
            "'norms'",
            "each one once, and it is in families[0] already",
            "remove one of the two",
        ),
    ),
    (
        '["norms"]',
        '"norms"',
        ("'families' has a wrong type", "'norms', a string", "an array", "write an array there"),
    ),
    (
        "[2, 4, 8]",
        "[2, -4, 8]",
        ("'capture.sizes[1]' has a wrong value", "-4", COUNT, "correct it, or remove it"),
    ),
    (
        "[2, 4, 8]",
        "[2, true]",
        ("'capture.sizes[1]' has a wrong type", "True, a boolean", "an integer", "write an integer there"),
    ),
    (
        "[2, 4, 8]",
        "[2, 8, 4]",
        ("'capture.sizes[2]' is out of order", "4", "more than the 8 before it", "sort the sizes"),
    ),
    (
        "[2, 4, 8]",
        "[2, 4, 4]",
        (
            "'capture.sizes[2]' is there twice",
            "4",
            "each one once, and it is in capture.sizes[1] already",
            "remove one of the two",
        ),
    ),
    ("[2, 4, 8]", "[]", ("'capture.sizes' is empty", "[]", "at least one size", "write [8], say")),
    (
        "[2, 4, 8]",
        "[2, 4, 8]\nbudget = 0",
        ("'capture.budget' has a wrong value", "0", COUNT, "correct it, or remove it"),
    ),
    (
        "[2, 4, 8]",
        '[2, 4, 8]\nsplit_tags = ["Tag.unsafe"]',
        (
            "'capture.split_tags[0]' has a wrong value",
            "'Tag.unsafe'",
            'the name of a torch.Tag such as "cudagraph_unsafe"',
            "leave out 'torch.Tag.'",
        ),
    ),
    (
        '"x1::attn"',
        '"torch.ops.x1.attn"',
        ("'split[0].operators[0]' has a wrong value", "'torch.ops.x1.attn'", OPERATOR, COLONS),
    ),
    (
        '"x1::attn"',
        '"x1::attn.out.more"',
        ("'split[0].operators[0]' has a wrong value", "'x1::attn.out.more'", OPERATOR, COLONS),
    ),
    (
        "value = 1",
        "value = [1]",
        (
            "'inductor[0].value' has a wrong type",
            "[1], an array",
            "a boolean, an integer, a float or a string",
            "write a boolean, an integer, a float or a string there",
        ),
    ),
    (
        "[[inductor]]",
        "[inductor]",
        (
            "'inductor' has a wrong type",
            "{'name': 'compile_threads', 'value': 1, 'reason': 'r', 'source': 's'}, a table",
            "an array",
            "write an array there",
        ),
    ),
    (
        "[[inductor]]",
        '[[inductor]]\nname = "compile_threads"\nvalue = 2\nreason = "r"\nsource = "s"\n[[inductor]]',
        (
            "'inductor[1].name' is there twice",
            "'compile_threads'",
            "each one once, and it is in inductor[0] already",
            "remove one of the two",
        ),
    ),
]


def refusal(text: str) -> ProfileError:
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, source="my.toml")
    return caught.value


def test_good_is_good() -> None:
    assert parse_profile(GOOD).origin == "(given)"
    assert parse_profile(GOOD, source="my.toml").origin == "my.toml"


@pytest.mark.parametrize(("old", "new", "parts"), ONE_MISTAKE)
def test_one_mistake(old: str, new: str, parts: tuple[str, str, str, str]) -> None:
    assert old in GOOD
    error = refusal(GOOD.replace(old, new, 1))
    what, seen, expected, hint = parts
    assert (error.what, error.seen) == (f"compile profile my.toml: {what}", seen)
    assert (error.expected, error.hint) == (expected, hint)
    assert str(error) == (f"compile profile my.toml: {what}\n  seen: {seen}\n  expected: {expected}\n  to do: {hint}")
    (problem,) = error.problems
    assert problem[1:] == parts
    assert f"'{problem.key}'" in what


def test_all_mistakes_of_a_file_are_told_together() -> None:
    text = GOOD.replace("vendor =", "vendr =").replace("[2, 4, 8]", "[0, 4, 3.0]")
    assert str(refusal(text)) == (
        "compile profile my.toml: 4 problems: (1) unknown key 'vendr'; (2) missing key 'vendor'; "
        "(3) 'capture.sizes[0]' has a wrong value; (4) 'capture.sizes[2]' has a wrong type\n"
        "  seen: (1) 'vendr'; (2) nothing; (3) 0; (4) 3.0, a float\n"
        f"  expected: (1) one of {TOP}; (2) 'vendor' in the top level; (3) {COUNT}; (4) an integer\n"
        "  to do: (1) did you mean 'vendor'?; (2) add it; example.toml explains every key; "
        "(3) correct it, or remove it; (4) write an integer there"
    )
    assert [problem.key for problem in refusal(text).problems] == [
        "vendr",
        "vendor",
        "capture.sizes[0]",
        "capture.sizes[2]",
    ]


def test_a_long_value_is_cut() -> None:
    error = refusal(GOOD.replace('"eager"', f'"{"e" * 200}"'))
    assert error.seen == f"'{'e' * 76}..."


def test_bad_toml_names_line_and_column() -> None:
    error = refusal(GOOD.replace('title = "X"', "title = X"))
    assert (error.what, error.expected) == ("compile profile my.toml: not valid TOML", "TOML 1.0")
    assert error.seen == "Invalid value (at line 2, column 9)"
    assert error.hint == "correct that line"


@pytest.mark.parametrize("text", [f"a = {'9' * 5000}", f"a = {'[' * 5000}", "a = 1\na = 2"])
def test_what_the_toml_parser_cannot_take_is_bad_toml(text: str) -> None:
    assert refusal(text).what == "compile profile my.toml: not valid TOML"


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("muse")
    assert str(caught.value) == (
        "no built-in compile profile is called 'muse'\n"
        "  seen: 'muse'\n"
        f"  expected: one of {', '.join(builtin_names())}, or the path of a TOML file\n"
        "  to do: did you mean 'musa'?"
    )
    with pytest.raises(
        ProfileError, match=r"to do: copy /.*/compile_configs/example\.toml, fill it in, and pass its path$"
    ):
        load_profile("zzzzz")


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    for given in (path, str(path)):
        with pytest.raises(ProfileError) as caught:
            load_profile(given)
        assert str(caught.value) == (
            f"compile profile {path}: cannot be read\n"
            f"  seen: [Errno 2] No such file or directory: '{path}'\n"
            "  expected: a readable TOML file\n"
            "  to do: check the path"
        )


def test_a_folder_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(str(tmp_path) + os.sep)
    (tmp_path / "b.toml").write_bytes(b'device = "\xff"')
    with pytest.raises(ProfileError) as caught:
        load_profile(tmp_path / "b.toml")
    assert (caught.value.what, caught.value.hint) == (
        f"compile profile {tmp_path / 'b.toml'}: not a text file",
        "save it as UTF-8",
    )
    assert "can't decode byte 0xff" in caught.value.seen


DEEP = "title" + ".a" * 3000 + " = 1"
LONG = f"0x{'f' * 5000}"  # tomllib reads it, and Python prints no integer of more than 4300 digits


@pytest.mark.parametrize(
    ("old", "new", "key", "seen"),
    [
        ('title = "X"', DEEP, "title", "a table that cannot be printed (maximum recursion depth exceeded"),
        ('title = "X"', f"title = {LONG}", "title", "an integer that cannot be printed (Exceeds the limit"),
        ("[2, 4, 8]", f"[2, {LONG}, 8]", "capture.sizes[1]", "an integer that cannot be printed (Exceeds the limit"),
        ("[2, 4, 8]", f"[2, 4, {1 << 63}]", "capture.sizes[2]", f"{1 << 63}"),
        ("value = 1", f"value = {1 << 63}", "inductor[0].value", f"{1 << 63}"),
        ("value = 1", f"value = -{(1 << 63) + 1}", "inductor[0].value", f"-{(1 << 63) + 1}"),
    ],
)
def test_values_that_python_cannot_print_or_toml_does_not_have(old: str, new: str, key: str, seen: str) -> None:
    (problem,) = refusal(GOOD.replace(old, new)).problems
    assert problem.key == key
    assert problem.seen.startswith(seen)


def test_the_largest_integers_of_toml_are_read() -> None:
    text = GOOD.replace("[2, 4, 8]", f"[{(1 << 63) - 1}]").replace("value = 1", f"value = -{1 << 63}")
    profile = parse_profile(text)
    assert profile.capture.sizes == ((1 << 63) - 1,)
    assert profile.inductor[0].value == -(1 << 63)


def test_a_file_that_is_no_profile_is_not_read_whole(tmp_path: Path) -> None:
    """tomllib takes twenty seconds for a key of 64 thousand characters, and somebody may pass a checkpoint."""
    fits = GOOD + "#" * (LARGEST - len(GOOD))
    assert parse_profile(fits) == parse_profile(GOOD)
    (tmp_path / "large.toml").write_text(f"{fits}#")
    with pytest.raises(ProfileError) as caught:
        load_profile(tmp_path / "large.toml")
    assert str(caught.value) == (
        f"compile profile {tmp_path / 'large.toml'}: too large\n"
        f"  seen: {LARGEST + 1} characters or more\n"
        f"  expected: at most {LARGEST}; the longest of this package has 8 thousand\n"
        "  to do: check that this is the file you meant"
    )


@pytest.mark.parametrize(("name", "shown"), [("a\0b", r"'a\x00b'"), ("\ud800", r"'\ud800'")])
def test_a_name_that_no_file_can_have(name: str, shown: str) -> None:
    with pytest.raises(ProfileError, match="one of cpu, cuda, ") as caught:
        load_profile(name)
    assert caught.value.what == f"no built-in compile profile is called {shown}"
    assert caught.value.seen == shown
    str(caught.value).encode()
    with pytest.raises(ProfileError, match="cannot be read\n  seen: ") as caught:
        load_profile(f"{name}.toml")
    str(caught.value).encode()
