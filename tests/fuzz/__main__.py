"""`make fuzz`: each target under atheris for FUZZ_SECONDS seconds (600), on one core, one after the other.

What was found to reach new lines stays in build/fuzz/NAME/corpus for the next time; an input that breaks a property is
written to build/fuzz/NAME/, printed, and makes the exit status 1. Put it into tests/fuzz/seeds/NAME/ with the fix.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from fuzz.targets import ROOT, TARGETS, Target


def main() -> int:
    """Starts a process for each target, since libFuzzer ends the one that it runs in."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; all")
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("FUZZ_SECONDS", "600")), help="for each")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz", help="folder for what is found")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target is called {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    if options.here:
        fuzz(TARGETS[names[0]], options.seconds, options.out)
    failed = []
    for name in names:
        command = [sys.executable, "-m", "fuzz", name, "--here", "--seconds", str(options.seconds)]
        print(f"{name}: {options.seconds} s", flush=True)
        if subprocess.run([*command, "--out", str(options.out)]).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing was found")
    return int(bool(failed))


def fuzz(target: Target, seconds: int, out: Path) -> None:
    """Fuzzes in this process, and ends it."""
    import atheris

    with atheris.instrument_imports(include=[*target.modules, f"fuzz.{target.name}"]):
        check = target.check()
    if target.name == "codegen":  # its devices: one that torch knows by the name that is rewritten
        from fxpatch.simulator import simulate

        simulate("musa")
    corpus = out / target.name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for n, data in enumerate(target.inputs()):
        (corpus / f"seed_{n}").write_bytes(data)
    limits = [
        f"-max_total_time={seconds}",
        f"-max_len={target.longest}",
        "-timeout=20",
        "-len_control=0",
        "-rss_limit_mb=4096",
    ]
    findings = [f"-artifact_prefix={out / target.name}{os.sep}", "-print_final_stats=1", "-seed=1"]
    atheris.enabled_hooks.add("str")  # and not "RegEx": its patterns have no match(text, position)
    atheris.Setup([sys.argv[0], *limits, *findings, str(corpus)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    raise SystemExit(main())
