"""`rewrite` on text alone: each way in which a substitution over all of the source goes wrong."""

from __future__ import annotations

from unittest.mock import ANY

import pytest
import torch

from fxpatch.codegen import rewrite

BODY = "\n\n\ndef forward(self, x):\n    return {}\n"


def rewritten(expression: str, template: str = BODY) -> str:
    src = template.format(expression)
    found = rewrite(src, {"torch": torch}, "musa")
    after = src if found is None else found.src
    head, tail = template.split("{}")
    assert after.startswith(head)
    assert after.endswith(tail)
    return after[len(head) : len(after) - len(tail)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("device(type='musa', index=0)", "torch.device('musa', 0)"),
        ("device(type='musa')", "torch.device('musa')"),
        ("device(type='musa', index=65408)", "torch.device('musa', 65408)"),
        ("f(device(type='musa', index=1),[device(type='musa')])", "f(torch.device('musa', 1),[torch.device('musa')])"),
        ("{device(type='musa'): 'device(type=', 'b': device(type='musa')}",
         "{torch.device('musa'): 'device(type=', 'b': torch.device('musa')}"),
        ("-device(type='musa').type", "-torch.device('musa').type"),
        ("(device(type='musa', index=0), device(type='cuda', index=1))",
         "(torch.device('musa', 0), device(type='cuda', index=1))"),
        ("\x1b[34mdevice(type='musa', index=0)\x1b[0m", "\x1b[34mtorch.device('musa', 0)\x1b[0m"),
        ("\x1b[34mdevice(type='cpu')\x1b[0m, \x1b[34mdevice(type='musa')\x1b[0m",
         "\x1b[34mdevice(type='cpu')\x1b[0m, \x1b[34mtorch.device('musa')\x1b[0m"),
        ("'it', device(type='musa')  # it's device(type='musa')",
         "'it', torch.device('musa')  # it's device(type='musa')"),
        ("'\"', device(type='musa'), '\"'", "'\"', torch.device('musa'), '\"'"),
        ("'\\'', device(type='musa'), '\\\\', device(type='musa')",
         "'\\'', torch.device('musa'), '\\\\', torch.device('musa')"),
        ("''.join(device(type='musa').type)", "''.join(torch.device('musa').type)"),
        ("device(type='xpu'), device(type='musa'), device(type='cpu')",
         "device(type='xpu'), torch.device('musa'), device(type='cpu')"),
        ("'''a''', device(type='musa')", "'''a''', torch.device('musa')"),
        ('"#", device(type=\'musa\')', '"#", torch.device(\'musa\')'),
    ],
)  # fmt: skip
def test_in_code_the_literal_is_rewritten(before: str, after: str) -> None:
    assert rewritten(before) == after


@pytest.mark.parametrize(
    "text",
    [
        "device(type='cpu')",
        "device(type='cuda', index=1)",
        "device(type='musa2')",
        "\"device(type='musa', index=0)\"",
        "b\"want device(type='musa', index=0)\"",
        "'device(type=\\'musa\\', \"index=0)'",
        '"\\"device(type=\'musa\')"',
        "'\\\\', \"device(type='musa')\"",
        "{\"device(type='musa')\": 1}",
        "'''\n device(type='musa')\n it's \\''' '''",
        '"""\n  device(type=\'musa\')\n"""',
        "mymod.device(type='musa', index=0)",
        "torch.device(type='musa', index=0)",
        "mydevice(type='musa', index=0)",
        "_device(type='musa')",
        "größe_ädevice(type='musa')",
        "1  # code: y = torch.zeros(3, device=device(type='musa', index=0))",
        "1  # it's device(type='musa')",
        "device(type = 'musa')",
        "device('musa:0')",
    ],
)
def test_everything_else_is_left_alone(text: str) -> None:
    assert rewritten(text) == text
    assert rewrite(BODY.format(text), {"torch": torch}, "musa") is None


def test_a_docstring_that_spans_lines_shields_its_own_lines_only() -> None:
    block = '"""\n    val: device(type=\'musa\')\n    """\n    y = {}\n    """\n    it\'s {}\n    """'
    src = BODY.format("0").replace("return 0", block.format("device(type='musa')", "device(type='musa')"))
    found = rewrite(src, {}, "musa")
    assert found is not None
    assert found.src == BODY.format("0").replace(
        "return 0", block.format("torch.device('musa')", "device(type='musa')")
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("device(type='musa')", "torch.device('musa')"),
        ("f(device(type='musa', index=0))\n", "f(torch.device('musa', 0))\n"),
        ("'it'\nx = device(type='musa')", "'it'\nx = torch.device('musa')"),
        ("# device(type='musa')\nx\n# it's device(type='musa')", None),
        ("\n\n# device(type='musa')", None),
        ("'device(type='\n'device(type=\"musa\")'\n\"device(type='musa')\"", None),
        ("x = 'a'\ny = device(type='musa')\n\nz = device(type='musa'), device(type='musa')\n#",
         "x = 'a'\ny = torch.device('musa')\n\nz = torch.device('musa'), torch.device('musa')\n#"),
        ("device(type='musa'\ndevice(type='musa')\n", "device(type='musa'\ntorch.device('musa')\n"),
        ("device(type='musa'\n", None),
    ],
)  # fmt: skip
def test_a_line_may_be_the_first_the_last_or_the_only_one(before: str, after: str | None) -> None:
    found = rewrite(before, {}, "musa")
    assert (found and found.src) == after


def test_a_string_that_is_continued_on_the_next_line_is_left_alone() -> None:
    """FX writes none; a codegen of somebody's may."""
    assert rewritten("\"a\\\n device(type='musa')\"") == "\"a\\\n device(type='musa')\""
    after = rewritten("\"\\\n device(type='musa')\", device(type='musa')")
    assert after == "\"\\\n device(type='musa')\", torch.device('musa')"


def test_it_is_idempotent() -> None:
    src = BODY.format("device(type='musa', index=0), device(type='cpu')")
    once = rewrite(src, {}, "musa")
    assert once is not None
    assert rewrite(once.src, {"torch": torch}, "musa") is None


def test_before_the_rename_the_unnamed_device_is_custom() -> None:
    found = rewrite(BODY.format("device(type='privateuseone', index=0)"), {}, "privateuseone")
    assert found is not None
    assert "torch.device('privateuseone', 0)" in found.src


@pytest.mark.parametrize(
    "template",
    [
        "\n\n\ndef forward(self, device):\n    return {}\n",
        "\n\n\ndef forward(self, x, device : torch.device, y):\n    return {}\n",
        "\n\n\ndef forward(self, x, device=1, *y) -> device:\n    return {}\n",
        "\n\n\ndef forward(self, *device):\n    return {}\n",
        "\n\n\ndef forward(self, x, **device):\n    return {}\n",
        "\n\n\ndef forward(\n    self,\n    device,  # desc\n):\n    return {}\n",
        "\n\n\ndef forward(\n    self,\n    *device,\n):\n    return {}\n",
        "\n\n\ndef forward(\n    self,\n    **device,\n):\n    return {}\n",
        "\n\n\ndef forward(self, args_list):\n    device = next(args_iter)\n    args_list.clear()\n    return {}\n",
        "\n\n\ndef forward(self, a):\n    x, device, y, = fx_pytree.tree_flatten_spec([a])\n    return {}\n",
        "\n\n\ndef forward(self, a):\n    device, y, = pytree.tree_leaves((self, a,))\n    return {}\n",
        "\n\n\ndef forward(self, a):\n    device: int; \n    return {}\n",
        "\n\n\ndef forward(self, a):\n    if a:\n        device = 3\n    return {}\n",
    ],
)
def test_where_the_function_binds_device_every_literal_is_rewritten(template: str) -> None:
    assert rewritten("device(type='cuda', index=1)", template) == "torch._C.device('cuda', 1)"
    assert (
        rewritten("device(type='cpu'), device(type='musa')", template) == "torch._C.device('cpu'), torch.device('musa')"
    )
    assert rewritten("device(type='xpu', index=2)", template) == "torch._C.device('xpu', 2)"
    assert rewritten("\"device(type='cpu')\"", template) == "\"device(type='cpu')\""
    for name in ("torch", "_fxpatch_torch"):
        taken = template.replace("torch", "x").replace("device", name)
        expected = "_fxpatch_torch.device('musa')" if name == "torch" else "torch.device('musa')"
        assert rewritten("device(type='musa')", taken) == expected


@pytest.mark.parametrize(
    "template",
    [
        "\n\n\ndef forward(self, x : device, y : typing_Union[device,NoneType] = 1) -> device:\n    return {}\n",
        "\n\n\ndef forward(self, x = 'a, device, b', y = (1, \"*device=\")):\n    return {}\n",
        "\n\n\ndef forward(self, x = device(type='cpu')):\n    return {}\n",
        "\n\n\ndef forward(self, x):\n    y = f(x, device = device(type='cpu'), torch = 1)\n    return {}\n",
        "\n\n\ndef forward(self, x):\n    y : device = x.device;  x = None\n    return {}\n",
        "\n\n\ndef forward(self, mydevice, device_1, mytorch, torch_1):\n    return {}\n",
        "\n\n\ndef forward(self, x):\n    x == (device(type='cpu'), torch)\n    return {}\n",
    ],
)
def test_other_uses_of_the_names_bind_nothing(template: str) -> None:
    assert rewritten("device(type='cuda', index=1)", template) == "device(type='cuda', index=1)"
    assert rewritten("device(type='musa')", template) == "torch.device('musa')"


def test_the_alias_avoids_every_name_that_is_taken() -> None:
    template = "\n\n\ndef forward(self, torch, _fxpatch_torch):\n    return device(type='musa')\n"
    assert rewrite(template, {"torch": torch}, "musa").torch_name == "_fxpatch_torch_1"  # type: ignore[union-attr]
    template = "\n\n\ndef forward(self, torch):\n    return device(type='musa')\n"
    taken = {"torch": torch, "_fxpatch_torch": 1, "_fxpatch_torch_1": 2}
    assert rewrite(template, taken, "musa").torch_name == "_fxpatch_torch_2"  # type: ignore[union-attr]
    ours = {"torch": torch, "_fxpatch_torch": torch}
    assert rewrite(template, ours, "musa").torch_name == "_fxpatch_torch"  # type: ignore[union-attr]
    template = "\n\n\ndef forward(self, torch, _fxpatch_torch):\n    return device(type='musa')\n"
    assert rewrite(template, ours, "musa").torch_name == "_fxpatch_torch_1"  # type: ignore[union-attr]


def test_a_global_called_torch_that_is_something_else_is_not_used() -> None:
    found = rewrite(BODY.format("device(type='musa')"), {"torch": "a user's"}, "musa")
    assert found is not None
    assert "_fxpatch_torch.device('musa')" in found.src
    for globals_, name in (
        ({"torch": ANY}, "_fxpatch_torch"),  # it says that it equals torch
        ({"torch": 1, "_fxpatch_torch": ANY}, "_fxpatch_torch_1"),
    ):
        found = rewrite(BODY.format("device(type='musa')"), globals_, "musa")
        assert found is not None
        assert found.torch_name == name
