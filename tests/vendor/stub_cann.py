"""Makes `import torch_npu` work without CANN and without an NPU: `python stub_cann.py OUT`, in torch_npu's environment.

torch_npu's wheel links against CANN libraries that are not on PyPI. For each of them OUT gets a stub that defines every
symbol the wheel misses; each returns 0, and so does the number of devices. Then, with OUT in `LD_LIBRARY_PATH`, the
import works: real schemas, real Meta kernels, the real `torch.npu`; no operator runs. Needs gcc, nm and ldd.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

RETURNING_MORE_THAN_ZERO = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *n) { *n = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B1"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return ""; }',
}
OF_THE_SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++", "libgcc_s", "libdl.so.2", "libpthread", "ld-linux")


def output(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def symbols(libraries: Iterable[Path], which: str) -> set[str]:
    """Names without their versions, of what is `--defined-only` or (not weakly) `--undefined-only` in `libraries`."""
    rows = [line.split() for library in libraries for line in output("nm", "-D", which, str(library))]
    kinds = {"U"} if which == "--undefined-only" else {row[-2] for row in rows if len(row) > 1}
    return {row[-1].split("@")[0] for row in rows if len(row) > 1 and row[-2] in kinds}


def main(out: Path) -> None:
    site = Path(sysconfig.get_paths()["purelib"])
    vendors = [*site.glob("torch_npu/lib/*.so"), *site.glob("torch_npu/*.so")]
    known = [Path(line.split()[-1]) for line in output("ldconfig", "-p") if any(name in line for name in OF_THE_SYSTEM)]
    known += [*vendors, *site.glob("torch/lib/*.so"), *site.glob("torch_npu.libs/*.so*")]
    missing = symbols(vendors, "--undefined-only") - symbols(known, "--defined-only")
    functions = [
        RETURNING_MORE_THAN_ZERO.get(name, f'long f{i}(void) __asm__("{name}"); long f{i}(void) {{ return 0; }}')
        for i, name in enumerate(sorted(missing))
        if not name.startswith(("Py", "_Py"))
    ]
    out.mkdir(parents=True, exist_ok=True)
    source = out / "stub.c"
    source.write_text("\n".join(functions))
    absent = {line.split()[0] for library in vendors for line in output("ldd", str(library)) if "not found" in line}
    wanted = sorted(name for name in absent if not name.startswith(("libtorch", "libc10")))
    for name in wanted:
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", str(out / name), str(source)], check=True)
    print(f"{len(functions)} symbols stubbed in {', '.join(wanted) or 'no library: none is missing'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
