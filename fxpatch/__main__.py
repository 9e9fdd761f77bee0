"""The command line: `fxpatch doctor` and `fxpatch audit NAMESPACE`, also as `python -m fxpatch`.

Results go to stdout or to the files named, progress and errors to stderr; the exit status is for continuous
integration: 0: nothing at or above --fail-on, 1: something, 2: the request could not be met, or fxpatch itself failed;
128 and a signal's number: stopped by it. What a command needs is imported when it runs: importing torch loads the
vendor's package, and the doctor does without both.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence

from fxpatch import __version__
from fxpatch.commands import audit, doctor
from fxpatch.commands.stderr import refused, say
from fxpatch.commands.stopping import stoppable
from fxpatch.commands.streams import open_missing
from fxpatch.errors import FxPatchError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit status. To be called in the main thread."""
    open_missing()
    chosen = parser().parse_args(arguments)
    try:
        with stoppable():
            status: int = chosen.run(chosen)
    except (FxPatchError, OSError) as error:
        return refused(error)
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        say(f"fxpatch: stopped by {signal.Signals(number).name}")
        return 128 + number
    except Exception:  # Python's own status for it is 1, which says that something was found
        say(f"fxpatch: this is an error in fxpatch itself, please report it:\n{traceback.format_exc()}")
        return 2
    return status


def parser() -> argparse.ArgumentParser:
    """Of all commands and options."""
    whole = argparse.ArgumentParser(prog="fxpatch", description="torch.compile on accelerators PyTorch does not know.")
    whole.add_argument("--version", action="version", version=f"fxpatch {__version__}")
    commands = whole.add_subparsers(dest="command", required=True)
    doctor.add(commands)
    audit.add(commands)
    return whole


if __name__ == "__main__":
    sys.exit(main())
