"""Every code block of README.md and the documentation runs, prints what the page says, or says on the page why not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, Block, blocks_of, runs_of
from commands import complaint

COMMANDS = ("bash", "console", "sh")
DATA = ("text", "toml", "yaml", "json", "ini", "output", "")
# Runs that compile with Inductor: page and number.
SLOW = {"README.md#1"}
# What README's examples print besides what the page shows.
PRINTED = {"README.md#1": ["codegen "], "README.md#2": ["size 4: captured, ", "\n{'captured': 1}\n"]}
# How many blocks of each page say that they do not run. A new one is a decision.
MARKED: dict[str, int] = {
    "docs/audit_torch_npu.md": 8,
    "docs/guides/bring_up.md": 1,
    "docs/guides/bring_up.zh.md": 1,
    "docs/telemetry.md": 1,
}


def _runs() -> list[object]:
    found = []
    for page in PAGES:
        runs = runs_of(page)
        for number, run in enumerate(runs, 1):
            name = page if len(runs) == 1 else f"{page}#{number}"
            found.append(pytest.param(name, run, id=name, marks=[pytest.mark.slow] if name in SLOW else []))
    return found


@pytest.fixture(scope="module")
def page_process() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("page_process.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "FXPATCH_AUTOLOAD": "0"},
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize(("name", "run"), _runs())
def test_blocks_run_in_turn(name: str, run: list[Block], page_process: subprocess.Popen[str]) -> None:
    page = run[0].page
    request = {"page": page, "blocks": [{"line": block.line, "code": block.code} for block in run]}
    assert page_process.stdin is not None
    assert page_process.stdout is not None
    print(json.dumps(request), file=page_process.stdin, flush=True)
    answer = json.loads(page_process.stdout.readline())
    for block, told in zip(run, answer, strict=False):
        assert told["error"] is None, f"{page}:{block.line}\n{told['error']}\n{told['printed']}"
        if block.output is not None:
            assert re.fullmatch(_pattern(block.output), _plain(told["printed"])), (
                f"{page}:{block.line} prints\n{told['printed']}\nand the page says\n{block.output}"
            )
    assert len(answer) == len(run)
    printed = "".join(told["printed"] for told in answer)
    assert [words for words in PRINTED.get(name, []) if words not in printed] == []


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _pattern(expected: str) -> str:
    return "(?s:.*?)".join(re.escape(part) for part in _plain(expected).split("..."))


def _all(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def test_commands_exist_with_their_options() -> None:
    wrong = []
    for block in _all(*COMMANDS, "indented"):
        if block.marked is None:
            lines = enumerate(block.code.splitlines(), block.line)
            wrong += [f"{block.page}:{n}: {said}" for n, line in lines if (said := complaint(line, block.language))]
    assert wrong == []


def test_every_block_is_of_a_known_kind() -> None:
    kinds = {"python", "setup", "indented", *COMMANDS, *DATA}
    odd = [f"{block.page}:{block.line}: {block.language}" for block in _all_blocks() if block.language not in kinds]
    assert odd == []


def _all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page)]


def test_what_does_not_run_is_marked_and_counted() -> None:
    assert dict(Counter(block.page for block in _all_blocks() if block.marked is not None)) == MARKED


def test_a_marked_block_says_why() -> None:
    short = [f"{b.page}:{b.line}" for b in _all_blocks() if b.marked is not None and len(b.marked) < 8]
    assert short == []


PAGE = """
# A page

```python
x = 1
```

*Not run in the tests: it would take a week.*

```python
x = 2
```

<!-- in the tests:
y = 3
-->

```python
print(x + y)
```

```{.text .output}
4
```

    make test       the whole suite

- a list

        no block
"""


def test_blocks_are_found_as_a_reader_sees_them() -> None:
    found = [(b.language, b.line, b.code, b.marked, b.output) for b in blocks_of("page.md", PAGE)]
    assert found == [
        ("python", 5, "x = 1\n", None, None),
        ("python", 11, "x = 2\n", "it would take a week.", None),
        ("setup", 15, "y = 3\n", None, None),
        ("python", 19, "print(x + y)\n", None, "4\n"),
        ("indented", 26, "make test       the whole suite\n", None, None),
    ]


def test_a_mark_for_the_page_is_for_all_its_blocks() -> None:
    marked = PAGE.replace("# A page", "# A page\n\n*Nothing on this page runs in the tests: it needs a rocket.*")
    assert {block.marked for block in blocks_of("page.md", marked)} == {"it needs a rocket."}


def test_a_block_that_fails_or_prints_something_else_is_seen(page_process: subprocess.Popen[str]) -> None:
    """The test above can fail: both ways of failing, in a page that exists."""
    assert page_process.stdin is not None
    assert page_process.stdout is not None
    blocks = [{"line": 3, "code": "print('one')"}, {"line": 9, "code": "1 / 0"}, {"line": 12, "code": "print('three')"}]
    print(json.dumps({"page": "README.md", "blocks": blocks}), file=page_process.stdin, flush=True)
    first, second = json.loads(page_process.stdout.readline())
    assert first == {"error": None, "printed": "one\n"}
    assert 'File "README.md", line 9' in second["error"]
    assert "ZeroDivisionError" in second["error"]
    assert not re.fullmatch(_pattern("two"), _plain(first["printed"]))
    assert re.fullmatch(_pattern("o...e"), _plain(first["printed"]))


def test_the_examples_of_the_readme_are_short_and_say_what_they_prove() -> None:
    """The first fits on half a screen."""
    first = next(block for block in blocks_of("README.md") if block.language == "python")
    assert len(first.code.splitlines()) <= 15
    assert (ROOT / "README.md").read_text().count("```python") >= 4
