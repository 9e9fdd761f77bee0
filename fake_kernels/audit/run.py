"""`audit(namespace)`: the front door."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase

from fake_kernels.audit.errors import NoSuchOperatorsError, UnknownNamespaceError
from fake_kernels.audit.findings import Report, make_report
from fake_kernels.audit.pool import Pool, Progress, start_worker


def audit(
    namespace: str,
    *,
    imports: Sequence[str] = (),
    operators: str = "*",
    limit_s: float = 20.0,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Audits the fake kernels of a namespace, without the hardware. This process imports nothing of the vendor's.

        report = fake_kernels.audit.audit("npu", imports=["torch_npu"])

    Args:
        namespace: as in `torch.ops.<namespace>`.
        imports: modules that bring its operators; what `import torch` loads by itself is loaded too.
        operators: shell pattern for `name` or `name.overload`.
        limit_s: seconds an operator may take before it counts as hanging.
        jobs: worker processes; by default one for each CPU, at most four.
        progress: called with (operators done, operators in all, the one just done).

    Raises:
        UnknownNamespaceError: no operator of that namespace is registered.
        NoSuchOperatorsError: none matches the pattern.
        ImportFailedError: a module cannot be imported.
        WorkerFailedError: the auditing process did not start.
    """
    start = {
        "namespace": namespace,
        "imports": list(imports),
        "autoload": os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1",
    }
    first, greeting = start_worker(start)
    try:
        if not greeting["operators"]:
            raise UnknownNamespaceError(namespace, greeting["namespaces"])
        names = [name for name in greeting["operators"] if _matches(name, operators)]
        if not names:
            some = [name.partition("::")[2] for name in greeting["operators"][:5]]
            raise NoSuchOperatorsError(namespace, operators, some)
    except Exception:
        first.end()
        raise
    pool = Pool(start, names, first, jobs or min(os.cpu_count() or 1, 4), limit_s, progress or (lambda *_: None))
    pool.run()
    return make_report(namespace, pool.findings, pool.states, greeting["versions"])


def _matches(name: str, pattern: str) -> bool:
    plain = name.partition("::")[2]
    return fnmatchcase(plain, pattern) or fnmatchcase(plain.partition(".")[0], pattern)
