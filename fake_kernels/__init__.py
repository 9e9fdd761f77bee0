"""Fake kernels."""
