"""Nothing that a program can do to a tensor, a storage or the device ends the process: every method is called with what
fits and what does not, and it answers or raises. What ends the process on the CPU as well is left out, by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

# they take a pointer, or a file, and believe it
TAKE_POINTERS = {"_expired", "_free_weak_ref", "_new_with_weak_ptr", "_set_cdata", "_set_from_file", "_write_file"}
# torch's own, on every device: storages have no slot for deletion, generators read a state unchecked
BY_TORCH = {"__delitem__", "__setstate__"}

SWEEP = """
    import contextlib, os, warnings
    import torch
    from fxpatch.simulator import simulate
    simulate("musa")
    warnings.simplefilter("ignore")

    KINDS = {
        "tensor": {"tensor": lambda: torch.arange(6.0, device="musa").view(2, 3)},
        "storages": {
            "untyped": lambda: torch.arange(6.0, device="musa").untyped_storage(),
            "typed": lambda: torch.arange(6.0, device="musa").storage(),
        },
        "device": {
            "module": lambda: torch.musa,
            "accelerator": lambda: torch.accelerator,
            "event": lambda: torch.Event("musa"),
            "generator": lambda: torch.musa.default_generators[0],
        },
    }

    def arguments():
        x, c, i = torch.ones(2, 3, device="musa"), torch.ones(2, 3), torch.tensor([0, 1], device="musa")
        s, d = x.untyped_storage(), torch.device("musa")
        yield from ((), (0,), (-1,), (2,), (1.5,), (None,), (True,), ("musa",), ("musa:1",), ("cpu",), ("a",), (b"a",))
        yield from ((x,), (c,), (x, x), (x, c), (i,), (0, i), (0, i, x), (s,), (s, False), (c.untyped_storage(), True))
        yield from ((torch.float16,), (torch.sparse_coo,), (torch.qint8,), (0.1, 0, torch.qint8), ([x, x],), ([1, 2],))
        yield from (((3, 2),), ((3, 2), (1, 2)), ((300,), (2,)), (0, 1), (0, 1, 2), (lambda *_: 0,), (d,))

    NAMED = (
        {"device": "musa"}, {"device": "musa:1"}, {"device": "cpu", "non_blocking": True}, {"dtype": torch.float16},
        {"pin_memory": True, "device": "musa"}, {"layout": torch.sparse_coo},
    )

    for kind, make in KINDS[WHAT].items():
        names = [name for name in dir(make()) if name not in SKIP and not (kind == "module" and name[:2] == "__")]
        answers = 0
        for name in names:
            for args, kwargs in [*((args, {}) for args in arguments()), *(((), named) for named in NAMED)]:
                os.write(2, f"{kind}.{name} {str(args)[:60]} {kwargs}\\n".encode())
                subject = make()
                with contextlib.suppress(Exception):  # whatever it says: the process goes on
                    member = getattr(subject, name)
                    result = member(*args, **kwargs) if callable(member) else member
                    answers += 1
                    if not args:
                        repr(result), repr(subject)
        print(kind, len(names), answers)
"""

NAMES = {  # kind -> at least how many names it has
    "tensor": {"tensor": 600},
    "storages": {"untyped": 90, "typed": 90},
    "device": {"module": 40, "accelerator": 20, "event": 20, "generator": 15},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", NAMES)
def test_every_method_answers_or_raises(fresh: Callable[..., str], what: str) -> None:
    """If this fails with a negative exit status, the last line is the call that ended the process."""
    out = fresh(f"WHAT, SKIP = {what!r}, {TAKE_POINTERS | BY_TORCH!r}" + SWEEP.replace("\n    ", "\n"), timeout=900)
    seen = {kind: (int(names), int(answers)) for kind, names, answers in map(str.split, out.splitlines()[-4:])}
    assert set(seen) == set(NAMES[what])
    for kind, (names, answers) in seen.items():
        assert names >= NAMES[what][kind]
        assert answers >= names
