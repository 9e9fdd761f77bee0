"""Storages as torch itself uses them: deepcopy, pickle, save and load; and nothing on the way ends the process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
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


OUT_OF_REACH = [
    "torch.Generator(device='musa')",
    "x.pin_memory()",
    "torch.empty(3, pin_memory=True)",
    "torch.empty(3, device='musa', pin_memory=True)",
    "x.untyped_storage().pin_memory()",
    "x.untyped_storage()._share_filename_cpu_()",
    "x.untyped_storage().to(device='cpu', non_blocking=True)",
    "torch.from_dlpack(x)",
    "torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long, device='musa'), x[0, :1], (2,))",
    "torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)",
    "repr(torch.nested.nested_tensor([x[0], x[1]]))",
    "x.as_strided((300,), (2,))",
    "torch.accelerator.synchronize()",
    "torch.accelerator.memory_allocated()",
    "torch.nn.functional.embedding(torch.tensor([99], device='musa'), x)",
]


def test_what_pure_python_cannot_give_raises_and_does_not_crash(fresh: Callable[..., str]) -> None:
    fresh(f"""
        import torch
        from fxpatch.simulator import simulate
        simulate("musa")
        x = torch.arange(6., device="musa").view(2, 3)
        for code in {OUT_OF_REACH!r}:
            print(code, flush=True)
            try:
                result = eval(code)
            except Exception as error:
                assert str(error), code
            else:
                raise AssertionError((code, result))
    """)


def test_a_forked_child_can_use_the_device(fresh: Callable[..., str]) -> None:
    out = fresh("""
        import os, torch
        from fxpatch.simulator import simulate
        simulate("musa")
        x = torch.ones(3, device="musa")
        if (child := os.fork()) == 0:
            print((x + 1).tolist(), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """)
    assert out == "[2.0, 2.0, 2.0]\n"


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
