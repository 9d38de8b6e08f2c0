"""How the conversion commands start, end and print."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from loaders.errors import DataError

T = TypeVar("T")


def run(command: Callable[..., T], name: str, args: Sequence[str] | None, interrupted: str = "Interrupted; nothing was written.") -> T:
    """command(**options) with the options of the command line, of `python -m name`.  A DataError or Ctrl-C ends the process with
    one paragraph; SIGTERM unwinds as they do, so that partial files go."""
    import tyro  # not at the top: worker processes import the commands' modules

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return tyro.cli(command, prog=f"python -m {name}", args=args)
    except DataError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)


def say(text: str) -> None:
    """Print a result.  File names may be any bytes: what standard output cannot encode is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
