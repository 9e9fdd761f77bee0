"""The door by which memory of the host gets a second name on the device: a host tensor goes out as a DLPack capsule,
and comes back as a tensor of PrivateUse1 whose storage keeps the host tensor alive, in C++.

The capsule is torch's own, with another device written into it. Layout: dlpack.h,
`struct DLTensor { void* data; int32 device_type, device_id; int32 ndim; ...; int64* shape; int64* strides; ... }`,
which no version of DLPack before 1.0's `DLManagedTensorVersioned` has changed.
"""

from __future__ import annotations

import ctypes

import torch

_to_dlpack, _from_dlpack = torch._C._to_dlpack, torch._C._from_dlpack
_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_size_t, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_int32, _int64 = ctypes.c_int32.from_address, ctypes.c_int64.from_address
_pointer = ctypes.c_size_t.from_address
_DEVICE_TYPE, _STRIDES = 8, 32  # offsets in bytes
_EXTENSION_DEVICE = 12  # kDLExtDev, which torch reads as PrivateUse1


def renamed(host: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A device tensor over the memory of a CPU tensor, from its first element on.

    Args:
        host: of any dtype that DLPack knows, without the conjugate and negative bits.
        strides: those of `host`.

    Raises:
        BufferError, RuntimeError: DLPack has no name for the dtype.
    """
    capsule = _to_dlpack(host)
    tensor = _pointer_in(capsule, b"dltensor")
    _int32(tensor + _DEVICE_TYPE).value = _EXTENSION_DEVICE
    shape = host.shape
    if 1 in shape:  # the exporter writes 1 for the stride of such a dimension; torch has other habits
        for dimension, stride in enumerate(strides):
            if stride != 1 and shape[dimension] == 1:
                _int64(_pointer(tensor + _STRIDES).value + 8 * dimension).value = stride
    return _from_dlpack(capsule)
