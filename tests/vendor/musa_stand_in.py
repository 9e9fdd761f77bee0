"""Loads the real torchada onto a simulated `torch.musa`.

torchada changes nothing unless `import torch_musa` works, and then reads some of it. torch_musa is not on PyPI, so this
puts a stand-in in its place: the simulated device module, which is filled up from `torch.cuda` as torch_musa's own is.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from typing import Any

import torch
from torch.utils import cpp_extension


class Stream(torch.Stream):
    """A class that torchada may add members to: `torch.Stream` is immutable."""


def torch_musa() -> dict[str, Any]:
    """The modules of the stand-in by name."""
    musa: Any = torch.musa  # type: ignore[attr-defined]
    names = ("core", "core.stream", "core._utils", "utils", "utils.musa_extension")
    modules: dict[str, Any] = {f"torch_musa.{name}": types.ModuleType(f"torch_musa.{name}") for name in names}
    core, stream, indices, utils, extension = modules.values()
    stream.Stream, stream.Event = Stream, torch.Event
    stream.StreamContext = type("StreamContext", (), {})
    indices._get_musa_device_index = lambda device, optional=False: 0
    core.stream, core._utils, utils.musa_extension = stream, indices, extension
    musa.core, musa.utils, musa._lazy_init = core, utils, lambda: None
    # Inductor asks these two where torch's headers and libraries are
    extension.include_paths = lambda musa=True, theirs=cpp_extension.include_paths: theirs("cpu")
    extension.library_paths = lambda musa=True, theirs=cpp_extension.library_paths: theirs("cpu")
    # Inductor's cache key reads this of "CUDA" where torch.version.cuda is None
    type(musa.get_device_properties(0)).gcnArchName = "simulated"
    for name, value in vars(torch.cuda).items():
        if not hasattr(musa, name):
            setattr(musa, name, value)
    return {"torch_musa": musa, **modules}


def load_torchada() -> Any:
    """Imports torchada, as on a machine with torch_musa; `simulate("musa")` comes first. Returns `torch.device`."""
    os.environ["TORCHADA_PLATFORM"] = "musa"
    sys.modules |= torch_musa()
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    # torchada compiles its C++ operators when it is imported, here without a chance: it warns and goes on without them
    os.environ["TORCH_EXTENSIONS_DIR"] = os.devnull
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchada  # noqa: F401
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]
        if before is not None:
            os.environ["TORCH_EXTENSIONS_DIR"] = before
    assert torch.device is not torch._C.device, "torchada has not replaced torch.device: nothing would be tested"
    return torch.device
