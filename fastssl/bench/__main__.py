"""`python -m fastssl.bench NAME [flags]`: one measurement per name; each has its own --help."""

from __future__ import annotations

import logging
import sys

import tyro

from fastssl.bench import loader
from loaders.errors import DataError

BENCHES = {"loader": loader.bench}


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    name, *flags = sys.argv[1:] or [""]
    if name not in BENCHES:
        sys.exit(f"usage: python -m fastssl.bench {{{','.join(BENCHES)}}} [flags]; --help after the name lists its flags")
    try:
        tyro.cli(BENCHES[name], args=flags, prog=f"python -m fastssl.bench {name}")
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
