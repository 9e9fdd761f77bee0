"""Runs the Python blocks of pages, each page in a process of its own, forked from one that has Dynamo imported.

One line in is one page, as JSON: its path and blocks; one line out says how each block ended. A page's blocks share a
namespace, as they do for a reader who types them in.
"""

from __future__ import annotations

import io
import json
import linecache
import os
import sys
import tempfile
import traceback
import types
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

# what takes time to import, and what most pages need
import torch._dynamo.backends.debugging
import torch._functorch.aot_autograd  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import fxpatch.piecewise.preparing  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


def run(page: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs the blocks in turn, up to the first that fails; tells what each printed, or how it failed."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # torch itself, as in pyproject.toml
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    text = (ROOT / page).read_text(encoding="utf-8")
    linecache.cache[page] = (len(text), None, text.splitlines(keepends=True), page)  # tracebacks and getsource see it
    told = []
    for block in blocks:
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                exec(compile("\n" * (block["line"] - 1) + block["code"], page, "exec"), vars(main))
        except BaseException:
            told.append({"error": traceback.format_exc(), "printed": printed.getvalue()})
            break
        told.append({"error": None, "printed": printed.getvalue()})
    return told


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                os.environ["HOME"] = folder  # what a page keeps in ~/.cache goes with it
                answer = json.dumps(run(request["page"], request["blocks"]))
            print(answer, flush=True)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            print(json.dumps([{"error": f"the process ended with status {status}", "printed": ""}]), flush=True)


if __name__ == "__main__":
    main()
