"""Is `torch.device` torch's own class, and if not: which of torch's tables know the class that took its place?

Dynamo and torch.library keep the class that `torch.device` was when they were imported. So which of the two the tables
hold tells which came first, the shim or Dynamo.
"""

from __future__ import annotations

import torch

from fxpatch.doctor.probe import Broken, Probe, Subject
from fxpatch.doctor.probes.checks import expect, run_all
from fxpatch.patching import Target
from fxpatch.repair.device_class import REAL, name_of

# Read only. Seen in torch 2.11, 2.13, 2.15.
_CONSTANTS = Target("torch._dynamo.utils", "common_constant_types")
_FOLDED = Target("torch._dynamo.variables.user_defined", "UserDefinedClassVariable._constant_fold_classes", "")


def _torch_device(subject: Subject) -> str:
    current = torch.device
    if current is REAL:
        return "torch's own class"
    name = name_of(current)
    if not isinstance(REAL("cpu"), current):
        raise Broken(
            f"torch.device is replaced by {name}, and isinstance(x.device, torch.device) is False",
            todo="vendor: answer isinstance through a metaclass with __instancecheck__, or leave torch.device alone",
        )
    mapped = str(current("cuda:1"))
    says = f"torch.device is replaced by {name}" + ("" if mapped == "cuda:1" else f", which makes {mapped} of cuda:1")
    constants, folded = _CONSTANTS.resolve(), _FOLDED.resolve()()
    if not any(each is REAL for each in constants):
        raise Broken(f"{says}, before Dynamo was imported: Dynamo does not know the class of real devices")
    if not all(any(each is known for each in folded) for known in (REAL, current)):
        raise Broken(f"{says}, after Dynamo was imported: code that holds torch's own class cannot be compiled")
    return f"{says}; Dynamo's tables know both classes"


def _schemas(subject: Subject) -> str:
    def of(device_class: type) -> None:
        def operator(x: torch.Tensor, device: torch.device) -> torch.Tensor:
            return x.clone()

        operator.__annotations__ = {"x": torch.Tensor, "device": device_class, "return": torch.Tensor}
        schema = torch.library.infer_schema(operator, mutates_args=())
        expect(schema, "(Tensor x, Device device) -> Tensor", "the schema")

    checks = {"annotated with the real class": lambda: of(REAL)}
    if torch.device is not REAL:
        checks["annotated with the class in its place"] = lambda: of(torch.device)
    return run_all(checks)


PROBES = (
    Probe(
        name="torch-device",
        stage="torch.device",
        title="torch.device is torch's own",
        run=_torch_device,
        why="a vendor shim that replaces torch.device before Dynamo is imported breaks every x.device in compiled "
        "code; after it, every use of the shim's class (out-of-tree catalogue 0.3, A2)",
        todo="fxpatch.install(), before or after the shim; vendor: map device names without replacing the class",
    ),
    Probe(
        name="operator-schemas",
        stage="torch.device",
        title="operators may take devices",
        run=_schemas,
        why="torch.library infers a schema from annotations through a table of classes: 'Parameter device has "
        "unsupported type' (out-of-tree catalogue A2; torch/_library/infer_schema.py)",
        todo="fxpatch.install(); or give torch.library.custom_op the schema in words",
    ),
)
