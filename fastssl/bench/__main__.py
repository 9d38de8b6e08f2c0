"""`python -m fastssl.bench NAME [flags]`: one measurement per name; each has its own --help."""

from __future__ import annotations

import logging
import sys
from importlib import import_module

import tyro

from fastssl.config import ConfigError
from loaders.errors import DataError

BENCHES = ("augment", "gram", "knn", "loader", "montage", "step", "train")
"""Modules with a function `bench`.  Only the one that is asked for is imported; none imports another."""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    name, *flags = sys.argv[1:] or [""]
    if name not in BENCHES:
        sys.exit(f"usage: python -m fastssl.bench {{{','.join(BENCHES)}}} [flags]; --help after the name lists its flags")
    try:
        tyro.cli(import_module(f"fastssl.bench.{name}").bench, args=flags, prog=f"python -m fastssl.bench {name}")
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
