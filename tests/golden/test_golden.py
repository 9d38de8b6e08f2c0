"""The project against the numbers of the authors' own code: every file of FASTSSL_GOLDEN (default: the shipped selection)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.golden.kinds import KINDS, PENDING

FOLDER = Path(os.environ.get("FASTSSL_GOLDEN") or Path(__file__).parent / "data")
FILES = sorted(FOLDER.glob("*.npz"))


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        return {k: data[k] for k in data.files}


def kind_of(path: Path) -> str:
    with np.load(path, allow_pickle=False) as data:
        return str(data["kind"])


def test_the_folder_has_files():
    assert FILES, f"no golden files in {FOLDER}"


def test_nothing_is_both_built_and_pending():
    assert not set(KINDS) & set(PENDING)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path: Path):
    kind = kind_of(path)
    if kind in PENDING:
        pytest.skip(f"{kind}: its issue is not built yet")
    assert kind in KINDS, f"{path.name} has the unknown kind '{kind}'"
    KINDS[kind](load(path))


def smallest_of_each_kind() -> list[Path]:
    smallest: dict[str, Path] = {}
    for path in sorted(FILES, key=lambda p: p.stat().st_size):
        smallest.setdefault(kind_of(path), path)
    return [p for kind, p in sorted(smallest.items()) if kind in KINDS]


@pytest.mark.parametrize("path", smallest_of_each_kind(), ids=lambda p: p.stem)
def test_a_change_of_one_percent_is_noticed(path: Path):
    arrays = load(path)
    check = KINDS[kind_of(path)]
    altered = 0
    for name in check.outputs(arrays):
        a = arrays[name]
        if np.issubdtype(a.dtype, np.floating) and a.size and np.abs(a).max() > 1e-9:
            with pytest.raises(AssertionError):
                check({**arrays, name: a * a.dtype.type(1.01)})
            altered += 1
    if not altered:  # a kind whose outputs are all integers or text
        name = check.outputs(arrays)[0]
        a = arrays[name]
        with pytest.raises(AssertionError):
            check({**arrays, name: np.char.add(a.astype(str), "x") if a.dtype.kind in "US" else a + 1})
