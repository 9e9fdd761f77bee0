"""`make fakes`: which operators have a fake kernel here, what there was before, and what becomes of it.

    python tests/fakes/coverage_table.py [--keep]

Measures torch_npu's operators against the real torch_npu where there is one (`make npu`), checks every kernel's
conformance, and writes the tables of docs/fake_kernels.md below its marker. `--keep` skips the measuring and checking.

What cannot be imported here (torch_musa, the engines' kernels) is declared from its schema, and the registry is asked
what it makes of that: so "before" is what the schema says.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter, defaultdict
from pathlib import Path

from fake_kernels import FakeKernel, Registry
from fake_kernels.adapter import overload_of, trivial_fake
from fake_kernels.declare import declare
from fake_kernels.honest import declared_aliases
from fake_kernels.kernel import parse
from fake_kernels.library import MODULES, load

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "fake_kernels.md"
MARKER = "<!-- Below this line `make fakes` writes. -->\n"
CALLS = 100
AFTER = {"Registered": "registered", "Shadowed": "shadowed", "AlreadyHad": "left alone", "Skipped": "skipped"}
sys.path.insert(0, str(ROOT / "tests" / "vendor"))
import npu_facts  # noqa: E402

Row = tuple[str, str, str, str, str]


def refused(record: FakeKernel, calls: int = CALLS) -> int:
    """How many calls that are to be refused `conformance.check` makes."""
    return min(calls, 5) * len(record.refuses)


def tables() -> str:
    """The generated part of the document."""
    rows = {family: [row(record) for record in load([family])] for family in MODULES}
    everything = [each for family in rows.values() for each in family]
    records = load()
    before = Counter(each[2].partition(":")[0] for each in everything)
    after = Counter(each[3] for each in everything)
    checks = sum(2 * CALLS + refused(record) for record in records)
    lines = [
        f"{len(everything)} operators in {len(rows)} families. {checks:,} checks by `make fakes`:",
        "",
        f"- {len(records) * CALLS:,} calls,",
        f"- {len(records) * CALLS:,} pairs of calls with sizes as symbols,",
        f"- {sum(map(refused, records)):,} calls that are to be refused.",
        "",
        "| before | operators | after `install()` | operators |",
        "|---|--:|---|--:|",
        *(f"| {' | '.join(cells)} |" for cells in side_by_side(counted(before), counted(after))),
    ]
    for family, each in rows.items():
        lines += ["", f"### {family}", "", "| operator | library | before | after | checks |", "|---|---|---|---|--:|"]
        lines += [f"| {' | '.join(cells)} |" for cells in each]
    return "\n".join(lines) + "\n"


def counted(counter: Counter[str]) -> list[tuple[str, str]]:
    """What and how many, the most first."""
    return [(what, str(number)) for what, number in sorted(counter.items(), key=lambda one: (-one[1], one[0]))]


def side_by_side(left: list[tuple[str, str]], right: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    return [(*a, *b) for a, b in itertools.zip_longest(left, right, fillvalue=("", ""))]


def row(record: FakeKernel) -> Row:
    before, after = on_torch_npu(record) if record.library == "torch_npu" else by_schema(record)
    return f"`{record.op}`", record.library, before, after, str(2 * CALLS + refused(record))


def on_torch_npu(record: FakeKernel) -> tuple[str, str]:
    """As measured with the real torch_npu (tests/vendor/torch_npu_fakes.json)."""
    known = npu_facts.facts()["operators"][record.op]
    own = known["has"] not in ("nothing", "trivial")
    after = "replaced" if known["replaced"] else AFTER[known["outcome"]]
    if after in ("shadowed", "skipped"):
        return lies(record) + ("; its own fake, too" if own and record.hidden else ""), after
    if not own:
        return "no fake" if known["has"] == "nothing" else "torch's trivial fake", after
    if not known["differs"]:
        return "own fake agrees", after
    return f"own fake wrong: {in_words(npu_facts.listed(record.op, 'ours'))}", after


def by_schema(record: FakeKernel) -> tuple[str, str]:
    """As the registry sees an operator of this schema that has no fake kernel."""
    with declare([record.schema]):
        registry = Registry([record])
        op = overload_of(record.op)
        trivial = trivial_fake(op)
        after = AFTER[type(registry.settle()[record.op]).__name__]
        registry.undo()
    if after == "shadowed":
        return lies(record), after
    return "torch's trivial fake" if trivial else "no fake", after


def lies(record: FakeKernel) -> str:
    """What makes a shadow necessary."""
    if not record.hidden:
        returned = sorted(set(declared_aliases(parse(record.schema))[1].values()))
        return f"returns what it writes: {', '.join(f'`{name}`' for name in returned)}"
    parts = [f"writes `{name}`" for name in record.writes]
    parts += [f"returns `{name}`" for name in record.returns_arguments.values()]
    return f"hidden: {', '.join(parts)}"


def in_words(kinds: set[str]) -> str:
    """`{"result 0: strides", "result 1: strides"}` -> `"strides of result 0, 1"`."""
    facts: dict[str, list[str]] = defaultdict(list)
    plain = {kind.replace("refuses: ", "raises ") for kind in kinds if not kind.startswith("result ")}
    for kind in sorted(kinds):
        where, _, fact = kind.partition(": ")
        if where.startswith("result "):
            facts["which tensors there are: " if fact == "is" else fact].append(where.removeprefix("result "))
    return "; ".join([*(f"{fact} of result {', '.join(at)}" for fact, at in sorted(facts.items())), *sorted(plain)])


def written() -> str:
    """The whole document as it has to be: its head by hand, and what follows from here."""
    return DOCUMENT.read_text().partition(MARKER)[0] + MARKER + "\n" + tables()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="measure and check nothing, only write the tables")
    options = parser.parse_args()
    if not options.keep:
        measure()
        check()
    DOCUMENT.write_text(written())
    print(tables().partition("\n### ")[0])


def measure() -> None:
    import subprocess

    from npu_python import environment, interpreter

    python = interpreter()
    if python is None:
        print("no torch_npu (make npu): its facts stay as they are")
        return
    script = [str(python), str(npu_facts.HERE / "measure_npu_fakes.py"), str(npu_facts.CALLS)]
    done = subprocess.run(script, env=environment(python), stdout=subprocess.PIPE, text=True, check=True)
    npu_facts.write(done.stdout)


def check() -> None:
    from rich.progress import track

    from fake_kernels import conformance

    wrong = []
    for record in track(load(), "conformance"):
        try:
            conformance.check(record, calls=CALLS)
        except conformance.ConformanceError as error:
            wrong.append(str(error))
    if wrong:
        sys.exit("\n\n".join([*wrong, f"{len(wrong)} fake kernels do not conform: nothing is written"]))


if __name__ == "__main__":
    main()
