"""Acme's operators, and modules that use them."""

from pathlib import Path

from acme_kernels.swiglu import SwiGLU, swiglu

COMPILE_PROFILE = Path(__file__).with_name("acme.toml")

__all__ = ["COMPILE_PROFILE", "SwiGLU", "swiglu"]
