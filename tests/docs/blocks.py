"""The code blocks of the documentation, found in its Markdown.

What a reader sees decides. A block that cannot run in a test says so in a line in italics above it, with the reason:
`*Not run in the tests: ...*`; a page none of whose blocks can: `*Nothing on this page runs in the tests: ...*`. What a
block needs and a reader need not see (a model, a file) stands above it in a comment: `<!-- in the tests: ... -->`. A
block of `.output` is what the block before it prints; `...` stands for anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
)
OUTPUT = "output"
# README is read as plain text too, so what its blocks need stands here, by the first line of each.
UNSEEN = {
    "README.md": {
        "from fake_kernels import register_fake_if_exists, shadow": """
import torch

mylib = torch.library.Library("mylib", "DEF")
mylib.define("fill(Tensor x, Tensor out) -> ()")
mylib.impl("fill", lambda x, out: [out.copy_(x), None][1], "CompositeExplicitAutograd")
""",
        "from fxpatch.layers.adoption import optimize": """
import fxpatch
from transformers import LlamaConfig, LlamaForCausalLM

fxpatch.simulate("npu")
tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **tiny)).eval()
""",
    },
}
# Pages whose blocks do not continue each other.
APART = {"README.md"}

_PART = re.compile(
    r"^<!-- in the tests:\n(?P<setup>.*?)^-->$"
    r"|^\*(?:Not run in the tests: |测试中不运行\uff1a)(?P<block_mark>[^*]+)\*$"
    r"|^\*(?:Nothing on this page runs in the tests: |本页代码在测试中均不运行\uff1a)(?P<page_mark>[^*]+)\*$"
    r"|^```(?P<info>[^`\n]*)\n(?P<code>.*?)^```$"
    r"|(?<=\n\n)(?P<indented> {4}\S[^\n]*\n(?: {4}[^\n]*\n)*)(?=\n|\Z)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block.

    Args:
        page: path of the page, from the root of the repository.
        line: where its first line stands in the page; counted from 1.
        language: `python`, `console`, `text`, ...; `indented` for one without a fence, `setup` for a hidden one.
        code: its text, without indentation.
        marked: why it does not run in the tests; None where it does.
        output: what it prints; None where the page does not say.
    """

    page: str
    line: int
    language: str
    code: str
    marked: str | None = None
    output: str | None = None


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """All blocks of a page, in their order; `text` is the page's, if not what is in the file."""
    found = list(_parts(page, (ROOT / page).read_text(encoding="utf-8") if text is None else text))
    whole_page = next((block.marked for block in found if block.language == "page"), None)
    blocks: list[Block] = []
    for block in found:
        if block.language == OUTPUT:
            assert blocks[-1].language == "python", f"{page}:{block.line}: an output of nothing"
            blocks[-1] = replace(blocks[-1], output=block.code)
        elif block.language != "page":
            blocks.append(block if whole_page is None else replace(block, marked=whole_page))
    return blocks


def runs_of(page: str) -> list[list[Block]]:
    """The Python blocks of a page that run, with what they need: those of each list in one process, in this order.
    None of a translation: its blocks are those of the original."""
    if page.endswith(".zh.md"):
        return []
    blocks = [block for block in blocks_of(page) if block.language in ("python", "setup") and block.marked is None]
    if page not in APART:
        return [blocks] if blocks else []
    runs: list[list[Block]] = [[]]
    for block in blocks:
        runs[-1].append(block)
        if block.language == "python":
            runs.append([])
    return runs[:-1]


def _parts(page: str, text: str) -> Iterator[Block]:
    mark: str | None = None
    for part in _PART.finditer(text):
        kind = str(part.lastgroup)
        if kind == "block_mark":
            mark = part[kind]
            continue
        line = text.count("\n", 0, part.start(kind)) + 1
        if kind == "page_mark":
            yield Block(page, line, "page", "", marked=part[kind])
        elif kind == "setup":
            yield Block(page, line, "setup", part[kind])
        elif kind == "indented":
            yield Block(page, line, "indented", re.sub(r"(?m)^ {4}", "", part[kind]), mark)
        else:
            unseen = UNSEEN.get(page, {}).get(part[kind].partition("\n")[0])
            if unseen is not None:
                yield Block(page, line, "setup", unseen)
            yield Block(page, line, OUTPUT if ".output" in part["info"] else part["info"], part[kind], mark)
        mark = None
