"""The piecewise graph runner."""
