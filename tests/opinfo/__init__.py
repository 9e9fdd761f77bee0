"""torch's own operator suites, run on the simulated device and compared with the CPU.

OpInfo and ModuleInfo ship in the torch wheel and know nothing of this project. `python -m opinfo` runs all of them and
writes the table in docs/operators.md; the tests run a fixed part. Everything up to `worker` takes the device by name.
"""
