"""A kind of golden file: how the project reproduces its outputs, and their comparison."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from fnmatch import translate

import numpy as np

Arrays = dict[str, np.ndarray]

TOLERANCE = {np.dtype(np.float64): 1e-6, np.dtype(np.float32): 1e-4}
# Below this an array is rounding noise around zero (gradients that cancel exactly): no relative error is defined.
NOISE = 1e-12


class Kind:
    """`check(arrays)`: every array that is not an input must be reproduced, or AssertionError.

    reproduce: arrays -> the outputs, computed by the project's own code from the inputs only.
    inputs: name patterns of what the authors' code was given; all other arrays are outputs.
    """

    def __init__(self, reproduce: Callable[[Arrays], Arrays], inputs: tuple[str, ...]):
        self._reproduce = reproduce
        self._is_input = re.compile("|".join(map(translate, (*inputs, "kind")))).match
        self._done: dict[str, Arrays] = {}

    def outputs(self, arrays: Arrays) -> list[str]:
        return [k for k in arrays if not self._is_input(k)]

    def __call__(self, arrays: Arrays) -> None:
        produced, outputs = self.reproduced(arrays), self.outputs(arrays)
        assert outputs, "the file has no outputs to compare"
        missing = sorted(set(outputs) - set(produced))
        assert not missing, f"nothing reproduces {missing[:5]} ({len(missing)} arrays)"
        for name in outputs:
            self.compare(name, np.asarray(produced[name]), arrays[name])

    def compare(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        compare(name, actual, expected)

    def reproduced(self, arrays: Arrays) -> Arrays:
        """The outputs; computed once for equal inputs (a file is checked many times with altered outputs of floats; from others,
        such as a resized image, a kind may go on)."""
        floats = {name for name in self.outputs(arrays) if np.issubdtype(arrays[name].dtype, np.floating)}
        digest = hashlib.sha256()
        for name in sorted(set(arrays) - floats):
            digest.update(name.encode() + str(arrays[name].dtype).encode() + np.ascontiguousarray(arrays[name]).tobytes())
        key = digest.hexdigest()
        if key not in self._done:
            self._done[key] = self._reproduce(arrays)
        return self._done[key]


class Checked(Kind):
    """A kind whose comparison is its own: `check(arrays)` runs the project's code and raises AssertionError."""

    def __init__(self, check: Callable[[Arrays], None], inputs: tuple[str, ...]):
        super().__init__(lambda arrays: {}, inputs)
        self._check = check

    def __call__(self, arrays: Arrays) -> None:
        self._check(arrays)


def compare(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float | None = None) -> None:
    """max |a - b| <= tolerance * max |b|, by default that of the dtype; integers and text must be equal."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if expected.dtype not in TOLERANCE:
        assert (actual == expected).all(), f"{name}: {actual} != {expected}"
        return
    assert np.isfinite(actual).all(), f"{name}: not finite"
    error = np.abs(actual.astype(np.float64) - expected).max(initial=0)
    bound = (tolerance or TOLERANCE[expected.dtype]) * np.abs(expected).max(initial=0) + NOISE
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"
