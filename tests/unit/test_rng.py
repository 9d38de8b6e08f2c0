"""The keyed draws: Random123's known answers, one stream in numba and torch, and keys that do not collide."""

import numpy as np
import pytest
import torch

from fastssl import rng
from tests.draws import uniform_numpy

KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_random123s_known_answers(counter, key, words):
    assert rng.philox4x32(*counter, *key) == words


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 7, 2**63 - 1])
def test_torch_and_numba_draw_the_same_numbers(seed):
    samples, views, slots = np.array([0, 1, 5, 1_281_166, 2**32 - 1]), torch.arange(3), 10
    drawn = rng.uniform_torch(seed, rng.COLOUR, 7, torch.from_numpy(samples), views, slots)
    assert drawn.shape == (3, len(samples), slots)
    for v in range(3):
        np.testing.assert_array_equal(drawn[v].numpy(), uniform_numpy(seed, rng.COLOUR, 7, samples, v, slots))


def test_the_first_slots_do_not_depend_on_how_many_are_drawn():
    samples = np.arange(4)
    long = uniform_numpy(3, rng.CROP, 0, samples, 1, 23)
    for slots in (1, 4, 6):
        np.testing.assert_array_equal(uniform_numpy(3, rng.CROP, 0, samples, 1, slots), long[:, :slots])


def test_every_part_of_the_key_matters():
    base = {"seed": 1, "stream": rng.CROP, "epoch": 2, "sample": np.array([3]), "view": 4, "slots": 4}
    others = [{"seed": 2}, {"seed": 1 + 2**32}, {"stream": rng.COLOUR}, {"epoch": 3}, {"sample": np.array([4])}, {"view": 5}]
    drawn = [tuple(uniform_numpy(**(base | other)).ravel()) for other in [{}, *others]]
    assert len(set(drawn)) == len(drawn)
    assert len({value for row in drawn for value in row}) == 4 * len(drawn)


def test_values_are_uniform():
    x = uniform_numpy(0, rng.CROP, 0, np.arange(5000), 0, 8)
    assert x.min() >= 0 and x.max() < 1
    counts = np.histogram(x, bins=64, range=(0, 1))[0]
    expected = x.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63)
    assert np.abs(np.corrcoef(x.T) - np.eye(8)).max() < 0.06
