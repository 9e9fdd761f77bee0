"""What leaves the process: pickles, checkpoints, keys of compile caches; and modules that move."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
from typing import Any

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import Differs, expect, run_all
from fxpatch.doctor.probes.presence import needs_accelerator, needs_device, not_the_cpu
from fxpatch.privateuse1 import is_private
from fxpatch.repair.device_class import REAL


def _written(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def _device_pickles(subject: Subject) -> str:
    device = REAL(subject.device)

    def loads() -> None:
        expect(pickle.loads(pickle.dumps(device)), device, "a device that was pickled")  # our own bytes

    def portable() -> None:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            names = _globals_of(pickle.dumps(device, protocol))
            expect(names, {"torch device"}, f"what a device's pickle imports, by protocol {protocol},")

    def checkpoint() -> None:
        read = torch.load(_written({"device": device}), weights_only=True)
        expect(read, {"device": device}, "a checkpoint with a device in it")

    return run_all({"pickle": loads, "names torch only": portable, "weights_only": checkpoint})


def _globals_of(data: bytes) -> set[str]:
    """The `module name` pairs that a pickle imports, read without loading it."""
    names: set[str] = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            names.add(str(argument))
        elif opcode.name == "STACK_GLOBAL":
            names.add(" ".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return names


def _saving(subject: Subject) -> str:
    needs_device(subject)
    device = subject.device
    x = torch.arange(6.0).reshape(2, 3).to(device)

    def same_place() -> None:
        read = torch.load(_written({"x": x, "view": x[1]}), weights_only=True)
        expect(read["x"].device, x.device, "the device of a loaded tensor")
        expect(read["x"].tolist(), x.tolist(), "a loaded tensor")
        read["x"][1, 0] = 50
        expect(read["view"].tolist()[0], 50.0, "a loaded view, after its base was written")

    def onto_the_cpu() -> None:
        read = torch.load(_written(x), map_location="cpu", weights_only=True)
        expect((read.device.type, read.tolist()), ("cpu", x.tolist()), "a tensor loaded onto the CPU")

    def onto_the_device() -> None:
        read = torch.load(_written(x.cpu()), map_location=device, weights_only=True)
        expect((read.device, read.tolist()), (x.device, x.tolist()), "a CPU tensor loaded onto the device")

    def state_dict() -> None:
        model, other = (torch.nn.Linear(3, 2).to(device) for _ in range(2))
        other.load_state_dict(torch.load(_written(model.state_dict()), weights_only=True))
        expect(other(x).tolist(), model(x).tolist(), "a module that loaded another's state")

    def deepcopied() -> None:
        model = torch.nn.Linear(3, 2).to(device)
        again, view = copy.deepcopy(model), copy.deepcopy({"x": x, "view": x[1]})
        expect(again(x).tolist(), model(x).tolist(), "a deep copy of a module")
        view["x"].zero_()
        expect(view["view"].tolist(), [0.0, 0.0, 0.0], "a deep copied view, after its base was written")
        expect(float(x.sum()), 15.0, "the original, after its copy was written")

    return run_all(
        {
            "save and load": same_place,
            "map_location='cpu'": onto_the_cpu,
            f"map_location={device!r}": onto_the_device,
            "state_dict": state_dict,
            "deepcopy": deepcopied,
        }
    )


def _moving(subject: Subject) -> str:
    needs_accelerator(subject)

    def tied() -> Any:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    def same_parameters() -> None:
        model = torch.nn.Linear(4, 4)
        before = model.weight
        model.to(subject.device)
        expect(before is model.weight, True, "whether a parameter is the same object after module.to(device)")

    def stays_tied() -> None:
        model = tied().to(subject.device)
        expect(model[0].weight is model[1].weight, True, "whether tied weights are tied after module.to(device)")

    def optimizer_trains() -> None:
        model = torch.nn.Linear(4, 4, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.to(subject.device)
        before = model.weight.detach().cpu().clone()
        model(torch.ones(2, 4, device=subject.device)).sum().backward()
        optimizer.step()
        if torch.equal(model.weight.detach().cpu(), before):
            raise Differs("an optimizer made before module.to(device) trains parameters that nobody uses")

    def back() -> None:
        model = tied()
        want = model[0].weight.tolist()
        model.to(subject.device).to("cpu")
        expect(model[0].weight.tolist(), want, "a parameter that went there and back")

    return run_all(
        {"the same parameters": same_parameters, "ties": stays_tied, "optimizers": optimizer_trains, "and back": back}
    )


def _cache_key(subject: Subject) -> str:
    not_the_cpu(subject, "the code that Inductor writes for the CPU says which instructions it needs")
    from torch._inductor.codecache import CacheBase

    system = CacheBase.get_system()
    if system.get("device"):
        return f"torch's key holds {system['device']}"
    tag = str(torch.compiler.config.cache_key_tag)
    parts = [part for part in tag.split("|") if subject.device in part.split("/")]
    if not parts:
        raise Broken(
            f"torch's key holds nothing of {subject.device}, and torch.compiler.config.cache_key_tag is {tag!r}"
        )
    return f"the tag holds {parts[0]}" + ("" if is_private(subject.device) else ", though torch knows the device")


PROBES = (
    Probe(
        name="device-pickles",
        stage="artifacts",
        title="devices in pickles",
        run=_device_pickles,
        why="under a shim a device pickles as the vendor's class: such checkpoints load only where that package is, "
        "and never with weights_only=True (out-of-tree catalogue 0.4, A3)",
        todo="fxpatch.install() before anything is saved; vendor: __module__ and __qualname__ of torch.device",
    ),
    Probe(
        name="saving",
        stage="artifacts",
        title="tensors are saved and loaded",
        run=_saving,
        why="torch.load finds a custom device by a tag and its module: 'don't know how to restore data location' "
        "(out-of-tree catalogue B2); a storage that is copied twice takes views apart",
        todo="vendor: name the backend before loading; implement set_.source_Storage_storage_offset and storage copies",
        installs=False,
    ),
    Probe(
        name="module-to",
        stage="artifacts",
        title="modules move in place",
        run=_moving,
        why="torch moves parameters in place for its own devices only; elsewhere ties and optimizers are lost, "
        "silently (c10/core/TensorImpl.h, has_compatible_shallow_copy_type)",
        todo="fxpatch.install() before module.to(device); vendor: register aten::_has_compatible_shallow_copy_type",
    ),
    Probe(
        name="cache-key",
        stage="artifacts",
        title="compile caches know the device",
        run=_cache_key,
        why="compile caches are keyed on CUDA's device name only: after a driver or vendor upgrade, or on another "
        "model of the device, stale kernels run (out-of-tree catalogue S4)",
        todo="fxpatch.install(); or TORCH_COMPILE_CACHE_KEY_TAG with device, driver and vendor's version",
    ),
)
