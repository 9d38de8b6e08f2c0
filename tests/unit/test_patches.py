"""OBoW's patches: corners as its code places them, cuts as slices are, draws of the keyed stream."""

import os
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.overrides import TorchFunctionMode

from fastssl.augment.patches import corners, cut_patches, draw
from fastssl.recipes import w2ssl_windows
from fastssl.views import PatchCrop

GOLDEN = Path(os.environ.get("FASTSSL_GOLDEN") or Path(__file__).parents[1] / "golden" / "data") / "sfrik_patchgrid.npz"
BY_CHANCE = 1e-4
"""A test with a fixed seed fails when what it sees would happen so rarely."""


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"needs {GOLDEN.name}")
def test_corners_are_those_of_the_authors_code():
    arrays = np.load(GOLDEN)
    for c in range(int(arrays["n_cases"])):
        given = {name: arrays[f"case{c}_{name}"] for name in ("image_size", "patch_size", "patch_jitter", "num_patches")}
        size, patch, jitter, patches = (int(v) for v in given.values())
        crop = PatchCrop(size=size, patch_size=patch, patch_jitter=jitter, patches=patches)
        # two images, the second with the cells the other way round
        jitter_yx = torch.from_numpy(arrays[f"case{c}_jitter_yx"]).expand(2, 9, 2)
        cells = torch.from_numpy(arrays[f"case{c}_selected_cells"])
        ours = corners(crop, jitter_yx, torch.stack((cells, cells.flip(0))))
        assert ours.shape == (patches, 2, 2)
        np.testing.assert_array_equal(ours[:, 0], arrays[f"case{c}_top_left_yx"])
        np.testing.assert_array_equal(ours[:, 1], arrays[f"case{c}_top_left_yx"][::-1])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_slices(memory_format, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 40, 40, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    places = torch.randint(0, 40 - 13 + 1, (6, 4, 2), generator=generator)
    places[0] = 0
    places[1] = 40 - 13
    cut = cut_patches(x, places, 13)
    assert cut.dtype == dtype and cut.shape == (24, 3, 13, 13) and cut.is_contiguous(memory_format=memory_format)
    for p in range(6):
        for b in range(4):
            top, left = places[p, b].tolist()
            assert torch.equal(cut[4 * p + b], x[b, :, top : top + 13, left : left + 13])
    assert torch.equal(cut_patches(x, torch.zeros(1, 4, 2, dtype=torch.int64), 40), x)


class Calls(TorchFunctionMode):
    """Names of the torch functions and tensor methods that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("patches", [4, 9])
def test_nothing_waits_for_the_device(patches):
    """No value is read on the host, no size depends on one, no constant is copied from the host."""
    crop = PatchCrop(size=24, patch_size=8, patch_jitter=3, patches=patches)
    x, index = torch.zeros(5, 3, 24, 24), torch.arange(5)
    with Calls() as calls:
        cut_patches(x, draw(crop, seed=1, epoch=2, key=index, view=3), crop.patch_size)
    assert "unfold" in calls.seen
    assert not calls.seen & {"item", "tolist", "numpy", "__bool__", "__int__", "__index__", "nonzero", "masked_select", "tensor"}


def unscramble(crop: PatchCrop, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Corners [P, B, 2] of a crop whose grid step exceeds the jitter -> cells [P, B] and jitter [P, B, 2]."""
    step = (crop.size - crop.patch_size - crop.patch_jitter) // 2
    assert step > crop.patch_jitter
    row, column = (places // step).clamp(max=2).unbind(-1)
    return 3 * row + column, places - (places // step).clamp(max=2) * step


def test_jitter_and_cells_are_uniform_and_independent():
    n = 24_000
    crop = PatchCrop(size=256, patch_size=96, patch_jitter=6, patches=3)
    cells, jitter = unscramble(crop, draw(crop, seed=5, epoch=1, key=torch.arange(n), view=2))
    for p in range(3):
        assert chisquare(cells[p].bincount(minlength=9)).pvalue > BY_CHANCE
        for axis in range(2):
            assert chisquare(jitter[p, :, axis].bincount(minlength=7)).pvalue > BY_CHANCE
        assert chisquare((7 * jitter[p, :, 0] + jitter[p, :, 1]).bincount(minlength=49)).pvalue > BY_CHANCE
        assert chisquare((7 * cells[p] + jitter[p, :, 0]).bincount(minlength=63)).pvalue > BY_CHANCE
    chosen = (81 * cells[0] + 9 * cells[1] + cells[2]).bincount(minlength=729)
    possible = torch.tensor([81 * a + 9 * b + c for a, b, c in permutations(range(9), 3)])
    assert chosen[possible].sum() == n, "a cell was taken twice"
    assert chisquare(chosen[possible]).pvalue > BY_CHANCE
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert chisquare((7 * jitter[one, :, 0] + jitter[other, :, 0]).bincount(minlength=49)).pvalue > BY_CHANCE


def test_all_nine_keep_the_order_of_the_grid():
    crop = PatchCrop(size=256, patch_size=96, patch_jitter=24, patches=9)
    cells, jitter = unscramble(crop, draw(crop, seed=0, epoch=0, key=torch.arange(500), view=0))
    assert (cells == torch.arange(9)[:, None]).all()
    assert jitter.amin() == 0 and jitter.amax() == 24


def test_fewer_patches_are_the_first_ones():
    eight, three = (PatchCrop(size=256, patches=p) for p in (8, 3))
    key = dict(seed=0, epoch=4, key=torch.arange(50), view=1)
    assert torch.equal(draw(three, **key), draw(eight, **key)[:3])


def test_a_corner_depends_on_seed_epoch_sample_and_view_only():
    crop, ids = PatchCrop(size=256, patch_jitter=60), torch.tensor([3, 8, 2**32 - 1, 5])
    key = dict(seed=7, epoch=2, key=ids, view=1)
    here = draw(crop, **key)
    assert torch.equal(draw(crop, **{**key, "key": ids[[2, 0]]}), here[:, [2, 0]])
    for other in ({"seed": 8}, {"seed": 7 + 2**32}, {"epoch": 3}, {"key": ids + 10}, {"view": 2}):
        assert (draw(crop, **{**key, **other}) != here).any(-1).any(0).all(), other


def test_windows_of_w2ssl():
    """A common left side U{0..112}, tops U{0..67} and U{45..112}, independent of each other (methods/w2ssl.md section 14)."""
    crop = w2ssl_windows()[2].crop
    upper, lower = draw(crop, seed=3, epoch=1, key=torch.arange(20_000), view=2)
    assert torch.equal(upper[:, 1], lower[:, 1])
    for found, low, high in ((upper[:, 1], 0, 112), (upper[:, 0], 0, 67), (lower[:, 0], 45, 112)):
        assert (found.min(), found.max()) == (low, high)
        assert chisquare((found - low).bincount()).pvalue > BY_CHANCE
    for one, other in ((upper[:, 0], lower[:, 0]), (upper[:, 0], upper[:, 1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": 119}, "at least patch_size"),
        ({"size": 96, "patch_size": 100, "patch_jitter": 0}, "fit into a crop of 96"),
        ({"patch_jitter": -1}, "at least patch_size"),
        ({"patch_size": 0}, "at least patch_size"),
        ({"patches": 0}, "1 to 9"),
        ({"patches": 10}, "1 to 9"),
    ],
)
def test_impossible_patches_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        PatchCrop(**{"size": 256, **wrong})


def test_the_largest_patches_that_fit():
    crop = PatchCrop(size=12, patch_size=9, patch_jitter=3, patches=9)
    places = draw(crop, seed=0, epoch=0, key=torch.arange(300), view=0)
    assert places.amin() == 0 and places.amax() == 3
    assert cut_patches(torch.zeros(300, 3, 12, 12), places, 9).shape == (2700, 3, 9, 9)
