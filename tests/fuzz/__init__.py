"""Fuzzing: what reads text or bytes that others wrote either does its work or says what is wrong, whatever they are.

A target is a function of bytes that raises AssertionError, or anything else that is no typed error, where a property
does not hold. atheris calls it for as long as one likes (`python -m fuzz codegen --seconds 600`), and looks for inputs
that reach new lines; `make test` calls it with the seeds and some hundred changes of them, without atheris.
"""
