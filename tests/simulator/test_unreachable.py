"""docs/simulator.md lists what pure Python cannot reach; each row raises what it says, and nothing ends the process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "simulator.md"

# row of the table -> what to run, over a device tensor `x` (2, 3); several must all raise
ROWS: dict[str, tuple[str, ...]] = {
    "a second device index": (
        "torch.empty(1, device='musa:1')",
        "torch.ones(1).to('musa:1')",
        "torch.accelerator.set_device_index(1)",
        "torch.musa.set_device(1)",
    ),
    '`torch.Generator(device="musa")`': ("torch.Generator(device='musa')", "torch.Generator('musa:0')"),
    "`torch.empty(..., pin_memory=True)`": (
        "torch.empty(3, pin_memory=True)",
        "torch.tensor([1.0], pin_memory=True)",
    ),
    "`torch.accelerator.Graph()`": ("torch.accelerator.Graph()",),
    "sparse, quantized, MKL-DNN tensors that an operator makes": (
        "x.to_sparse()",
        "torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)",
    ),
    "the same, moved here": (
        "torch.eye(2).to_sparse().to('musa')",
        "torch.eye(2).to_mkldnn().to('musa')",
        "torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8).to('musa')",
        "torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long, device='musa'), x[0, :1], (2,))",
        "torch.empty(2, device='musa', layout=torch.sparse_coo)",
    ),
    "nested tensors of `torch.strided` layout": ("repr(torch.nested.nested_tensor([x[0], x[1]]))",),
    "growing a tensor that shares its memory": ("x[0].resize_(100)",),
    "resizing a storage": ("x.untyped_storage().resize_(1000)", "x.untyped_storage().resize_(0)"),
    "device tensors through multiprocessing queues": ("through_a_queue(x)",),
    "`torch.from_dlpack(tensor)`": ("torch.from_dlpack(x)",),
    '`torch.Stream("musa").native_handle`, `torch.Event("musa").ipc_handle()`': (
        "torch.Stream('musa').native_handle",
        "torch.Event('musa', interprocess=True).ipc_handle()",
    ),
    "capturing an operator without a meta kernel": ("captured(x)",),
}
# not in the table: a real device raises as well
ALSO_ELSEWHERE = (
    "x.pin_memory()",
    "torch.empty(3, device='musa', pin_memory=True)",
    "x.untyped_storage().pin_memory()",
    "x.untyped_storage()._share_filename_cpu_()",
    "x.untyped_storage()._share_fd_cpu_()",
    "x.untyped_storage()._share_cuda_()",
    "x.numpy()",
    "x.as_strided((300,), (2,))",
    "torch.nn.functional.embedding(torch.tensor([99], device='musa'), x)",
)


def documented() -> dict[str, str]:
    """The rows of the table: what -> error."""
    table = DOCUMENT.read_text().split("## What it cannot do")[1].split("\n\n")[2]
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE)[1:])


def test_every_row_of_the_table_raises_what_it_says(fresh: Callable[..., str]) -> None:
    assert set(documented()) == set(ROWS)
    out = fresh(f"""
        import json, torch
        from fxpatch.simulator import simulate
        simulate("musa")
        x = torch.arange(6.0, device="musa").view(2, 3)

        def through_a_queue(x):
            queue = torch.multiprocessing.SimpleQueue()
            queue.put(x)
            queue.get()

        library = torch.library.Library("fxpatch_unreachable", "DEF")
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")

        def captured(x):
            with torch.musa.graph(torch.musa.MUSAGraph()):
                torch.ops.fxpatch_unreachable.twice(x)

        for code in {[code for codes in (*ROWS.values(), ALSO_ELSEWHERE) for code in codes]!r}:
            try:
                result = eval(code)
            except Exception as error:
                print(json.dumps([code, type(error).__name__ + ": " + " ".join(str(error).replace("`", "").split())]))
            else:
                raise AssertionError((code, result))
    """)
    errors = dict(json.loads(line) for line in out.splitlines())
    for what, codes in ROWS.items():
        for code in codes:
            for part in promised(documented()[what]):
                assert part in errors[code], (what, code)


def promised(cell: str) -> list[str]:
    """What a cell says about the error: its first quotation, where `...` stands for anything."""
    quoted = re.search(r"`([^`]+)`", cell.split(";")[0])
    return [part.strip() for part in quoted[1].split("...")] if quoted else []


def test_what_the_table_says_works_does(fresh: Callable[..., str]) -> None:
    """The other half of some rows, and what is taken without a word."""
    fresh("""
        import copy, torch
        from fxpatch.simulator import simulate
        simulate("musa")
        assert torch.ones(3).pin_memory().is_pinned()
        x = torch.ones(3, device="musa")
        assert torch.nested.nested_tensor([x, x], layout=torch.jagged).is_musa
        assert torch.Stream("musa:1").device_index == 0
        (generator,) = torch.musa.default_generators
        state = torch.musa.get_rng_state()
        drawn = torch.rand(3, generator=generator)
        assert not torch.equal(torch.musa.get_rng_state(), state)
        torch.musa.set_rng_state(state)
        assert generator.device.type == copy.deepcopy(generator).device.type == "cpu"
    """)
