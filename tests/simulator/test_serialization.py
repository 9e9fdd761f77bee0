"""Storages as torch itself uses them: deepcopy, pickle, save and load; and nothing on the way ends the process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpatch.errors import SimulatorError


def saved_and_loaded(obj: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda obj: pickle.loads(pickle.dumps(obj)),
    "save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
def test_tensors_come_back_to_the_device(musa: str, how: str) -> None:
    x = torch.arange(6.0, device=musa).view(2, 3)
    tensors = {"x": x, "row": x[1], "parameter": torch.nn.Parameter(x.clone()), "half": x.to(torch.bfloat16)}
    again = COPIES[how](tensors)
    for name, tensor in tensors.items():
        assert again[name].device == tensor.device
        assert type(again[name]) is type(tensor)
        assert again[name].data_ptr() != tensor.data_ptr()
        assert torch.equal(again[name], tensor)
    again["x"][1, 0] = 9
    assert again["row"][0] == (3 if how == "pickle" else 9)  # sharing survives where it does on the CPU
    assert x[1, 0] == 3


def test_load_moves_between_devices(musa: str) -> None:
    x = torch.arange(3.0)
    assert saved_and_loaded(x.to(musa), map_location="cpu").device.type == "cpu"
    assert saved_and_loaded(x, map_location=musa).is_musa
    assert saved_and_loaded({"x": x}, map_location="musa:0")["x"].tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"device_count\(\) is 1"):
        saved_and_loaded(x, map_location="musa:1")


LOCATIONS: dict[str, tuple[Any, str]] = {  # what is given -> where a device tensor goes
    "nothing": (None, "musa"),
    "text": ("cpu", "cpu"),
    "device": (torch.device("cpu"), "cpu"),
    "table to the CPU": ({"musa:0": "cpu"}, "cpu"),
    "table from the CPU": ({"cpu": "musa"}, "musa"),
    "function that keeps": (lambda storage, location: storage, "cpu"),
    "function that leaves it to torch": (lambda storage, location: None, "musa"),
    "function that moves": (lambda storage, location: torch.UntypedStorage.to(storage, device="musa:0"), "musa"),
}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("location", LOCATIONS)
def test_every_kind_of_map_location(musa: str, tmp_path: Path, location: str, weights_only: bool) -> None:
    where, expected = LOCATIONS[location]
    x = torch.arange(6.0, device=musa).view(2, 3)
    torch.save({"x": x, "row": x[1]}, tmp_path / "file")
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "file", map_location=where, weights_only=weights_only, mmap=mmap)
        assert loaded["x"].device.type == expected
        assert torch.equal(loaded["x"].cpu(), x.cpu())
        loaded["x"][1, 0] = 9
        assert loaded["row"][0] == 9


def test_location_tags_name_the_device(musa: str) -> None:
    storage = torch.ones(1, device=musa).untyped_storage()
    assert torch.serialization.location_tag(storage) == "musa:0"
    assert torch.serialization.default_restore_location(torch.UntypedStorage(4), "musa:0").device.type == musa


def test_an_optimizer_goes_on_where_it_was(musa: str) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2).to(musa)
        return net, torch.optim.AdamW(net.parameters(), lr=0.1)

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(torch.ones(1, 3, device=musa)).sum().backward()
        optimizer.step()

    net, optimizer = made()
    step(net, optimizer)
    again, other = made()
    for there, here in ((again, net), (other, optimizer)):
        there.load_state_dict(saved_and_loaded(here.state_dict(), map_location="cpu"))
    moments = [state["exp_avg"] for state in other.state_dict()["state"].values()]
    assert {moment.device.type for moment in moments} == {musa}
    step(net, optimizer)
    step(again, other)
    torch.testing.assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_sharing_memory_is_nothing_to_do(musa: str) -> None:
    """As on CUDA: tensors of a device are not in the host's shared memory, and say that they are shared."""
    x = torch.arange(3.0, device=musa)
    address = x.data_ptr()
    assert x.share_memory_() is x
    assert x.is_shared()
    assert x.untyped_storage().is_shared()
    assert x.data_ptr() == address
    torch.nn.Linear(2, 2).to(musa).share_memory()


def test_modules(musa: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(musa)
    other = copy.deepcopy(net)
    net[0].weight.data.zero_()
    other.load_state_dict(saved_and_loaded(net.state_dict()))
    assert other[0].weight.eq(0).all()
    assert {p.device.type for p in other.parameters()} == {musa}


def test_storages(musa: str) -> None:
    storage = torch.UntypedStorage([1, 2, 3], device=musa)
    assert storage.device == torch.device(musa, 0)
    assert storage.tolist() == storage.clone().tolist() == storage.cpu().tolist() == [1, 2, 3]
    assert torch.UntypedStorage(5, device="musa:0").nbytes() == 5
    assert torch.UntypedStorage(device=musa).nbytes() == storage.new().nbytes() == 0
    assert torch.UntypedStorage([4, 5]).to(device=musa).tolist() == [4, 5]
    storage[0] = 7
    assert storage[0] == 7
    assert storage.fill_(0).tolist() == [0, 0, 0]
    assert storage.resize_(3) is storage
    with pytest.raises(SimulatorError, match="cannot be resized"):
        storage.resize_(4)


def test_cpu_storages_are_as_before(musa: str) -> None:
    assert torch.UntypedStorage(4).device.type == "cpu"
    assert torch.UntypedStorage(4, device="meta").device.type == "meta"
    assert torch.UntypedStorage([1, 2]).resize_(3).nbytes() == 3
    assert torch.UntypedStorage([1, 2]).new().nbytes() == 0


def test_what_is_sent_to_another_process_raises_where_it_arrives(fresh: Callable[..., str]) -> None:
    fresh("""
        import torch, torch.multiprocessing as mp
        from fxpatch.errors import SimulatorError
        from fxpatch.simulator import simulate
        simulate("musa")

        class OnDevice(torch.utils.data.Dataset):
            def __len__(self): return 2
            def __getitem__(self, i): return torch.ones(3, device="musa")

        def refused(call):
            try:
                call()
            except SimulatorError as error:
                assert "tensor.cpu()" in str(error)
            else:
                raise AssertionError("no error")

        refused(lambda: list(torch.utils.data.DataLoader(OnDevice(), num_workers=1)))
        queue = mp.get_context("fork").Queue()
        queue.put(torch.ones(3, device="musa"))
        refused(lambda: queue.get(timeout=20))
        queue.put(torch.ones(3))
        assert queue.get(timeout=20).sum() == 3
        refused(mp.get_context("spawn").Process(target=print, args=(torch.ones(3, device="musa"),)).start)
    """)
