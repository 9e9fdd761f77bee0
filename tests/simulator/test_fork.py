"""Other processes: a child forked after the device was used cannot use it, a spawned one starts afresh, no tensor of
the device travels between them. As on hardware: a program that breaks these rules breaks here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FORKED = """
    import os, sys, torch
    from fxpatch.simulator import simulate
    simulate("musa")

    def forked(call):
        child = os.fork()
        if child == 0:
            try:
                print(call(), flush=True)
            except Exception as error:
                print(type(error).__name__, str(error).splitlines()[0], flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""
BAD = (
    "RuntimeError Cannot re-initialize MUSA in forked subprocess. To use MUSA with multiprocessing, you must use the "
    "'spawn' start method"
)


def test_a_child_of_a_process_that_has_not_used_the_device_can(fresh: Callable[..., str]) -> None:
    out = fresh(
        FORKED
        + """
    torch.manual_seed(0), torch.musa.is_available(), torch.musa.device_count()  # none of these uses it
    assert not torch.musa.is_initialized()
    forked(lambda: ((torch.ones(3, device="musa") + 1).tolist(), torch.musa._is_in_bad_fork()))
    forked(lambda: torch.musa.is_initialized())
    """
    )
    assert out == "([2.0, 2.0, 2.0], False)\nFalse\n"


CALLS = """
    torch.empty(2, device="musa")
    x + 1
    x.view(3, 1)
    x.cpu()
    x.tolist()
    repr(x)
    torch.ones(3).to("musa")
    torch.ones(3).copy_(x)
    x.copy_(torch.ones(3))
    x.untyped_storage().tolist()
    torch.UntypedStorage(4, device="musa")
    y.backward()
    torch.musa.synchronize()
    torch.musa.init()
    torch.musa.get_rng_state()
    torch.musa.current_device()
    torch.musa.get_device_properties()
    torch.accelerator.synchronize()
    torch.accelerator.set_device_index(0)
"""


def test_a_child_of_a_process_that_has_used_it_cannot(fresh: Callable[..., str]) -> None:
    calls = CALLS.split("\n")[1:-1]
    out = fresh(
        FORKED
        + f"""
    x = torch.ones(3, device="musa", requires_grad=True)
    y = (x * 2).sum()
    x = x.detach()

    def all_refused():
        for call in {[call.strip() for call in calls]!r}:
            try:
                result = eval(call)
            except RuntimeError as error:
                assert f"RuntimeError {{error}}" == {BAD!r}, (call, error)
            else:
                raise AssertionError(call)
        return torch.musa._is_in_bad_fork(), torch.musa.is_initialized()

    forked(all_refused)
    forked(lambda: (torch.ones(3) + 1, torch.manual_seed(1).initial_seed(), x.shape, x.device))  # is no use of it
    forked(lambda: torch.ones(2).pin_memory().is_pinned())
    forked(lambda: forked(lambda: x + 1))
    assert not torch.musa._is_in_bad_fork() and (x + 1).tolist() == [2, 2, 2]  # the parent goes on
    """
    )
    assert out.splitlines() == [
        "(True, False)",
        "(tensor([2., 2., 2.]), 1, torch.Size([3]), device(type='musa', index=0))",
        "True",
        BAD,
        "None",
    ]


def test_what_counts_as_use(fresh: Callable[..., str]) -> None:
    out = fresh(
        FORKED
        + """
    def uses():
        torch.ones(1, device="musa")
        torch.musa.empty_cache()
        torch.musa.reset_peak_memory_stats()
    for use in (torch.musa.init, uses, torch.musa.get_rng_state):
        forked(lambda: (use(), forked(torch.musa._is_in_bad_fork))[1])
    """
    )
    assert out.split() == ["True", "None"] * 3


@pytest.mark.slow
def test_data_loaders(fresh: Callable[..., str]) -> None:
    """CPU tensors from workers, pinned or not; a worker that uses the device gets what it gets on hardware."""
    out = fresh("""
        import torch
        from torch.utils.data import DataLoader, Dataset, TensorDataset
        from fxpatch.errors import SimulatorError
        from fxpatch.simulator import simulate
        simulate("musa")

        class OnDevice(Dataset):
            def __len__(self): return 2
            def __getitem__(self, i): return torch.ones(3, device="musa")

        try:
            list(DataLoader(OnDevice(), num_workers=1))
        except SimulatorError as error:
            print("sent:", error.hint)
        x = torch.ones(3, device="musa")
        try:
            list(DataLoader(OnDevice(), num_workers=1))
        except RuntimeError as error:
            print("used:", str(error).splitlines()[-1])
        assert next(iter(DataLoader(OnDevice(), batch_size=2))).sum().item() == 6
        numbers = TensorDataset(torch.arange(8.0))
        for options in ({}, {"num_workers": 2}, {"num_workers": 2, "pin_memory": True}, {"pin_memory": True}):
            batches = [batch for batch, in DataLoader(numbers, batch_size=2, **options)]
            assert {batch.is_pinned() for batch in batches} == {"pin_memory" in options}
            assert [b.to("musa", non_blocking=True).sum().item() for b in batches] == [1, 5, 9, 13]
    """)
    assert out.splitlines()[0].startswith("sent: send tensor.cpu(), and move it to the device where it arrives")
    assert out.splitlines()[1] == f"used: {BAD.replace('RuntimeError ', 'RuntimeError: ', 1)}"


SPAWNING = """
import torch
import torch.multiprocessing as mp
from fxpatch.errors import SimulatorError
from fxpatch.simulator import simulate

simulate("musa")  # at the top of the main module, which a spawned child imports again


def work(queue, model):
    queue.put(model.to("musa")(torch.ones(1, 2, device="musa")).tolist())  # a tensor would have to outlive this process


if __name__ == "__main__":
    model = torch.nn.Linear(2, 2)
    used = torch.ones(1, 2, device="musa")
    context = mp.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=work, args=(queue, model))
    child.start()
    assert queue.get(timeout=100) == model(used.cpu()).tolist()
    child.join()
    assert child.exitcode == 0
    try:
        context.Process(target=work, args=(queue, torch.nn.Linear(2, 2).to("musa"))).start()
    except SimulatorError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_spawned_child_has_the_device_that_its_main_module_simulates(
    fresh: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "spawning.py").write_text(SPAWNING)
    out = fresh(f"""
        import runpy, sys
        sys.argv[0] = {str(tmp_path / "spawning.py")!r}
        runpy.run_path(sys.argv[0], run_name="__main__")
    """)
    assert "A tensor of a simulated device cannot be sent to another process." in out
