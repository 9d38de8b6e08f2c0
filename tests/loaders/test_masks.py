"""Masks: keyed draws, bounds of both shapes, and their way from a loader to a method."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastssl.augment.augmenter import Augmenter
from fastssl.batch import MASKED_CHUNK, masked_patches
from fastssl.recipes import dino, ibot
from fastssl.rng import MASK, fill_uniform, uniform
from fastssl.views import Mask
from loaders.build import build_loader
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.masks import _LOG_ASPECT, Masks, draw_ratio, fill_blocks
from tests.loaders.stored import OneMachine

CPU = torch.device("cpu")


def masks(ids, *, epoch: int = 0, seed: int = 0, **mask) -> np.ndarray:
    return Masks(ibot(mask=Mask(**mask)), seed).draw(np.asarray(ids), epoch)


def test_a_mask_follows_from_seed_epoch_sample_and_view():
    whole = masks(range(40))
    np.testing.assert_array_equal(masks([7, 30, 7]), whole[[7, 30, 7]])
    for other in (masks(range(40), epoch=1), masks(range(40), seed=2**64 - 1), whole[:, ::-1], np.roll(whole, 1, 0)):
        assert not np.array_equal(other, whole)
    only = tuple(dataclasses.replace(view, mask=None) if v == 0 else view for v, view in enumerate(ibot()))
    np.testing.assert_array_equal(Masks(only, 0).draw(np.arange(40), 0), whole[:, 1:])


def test_slots_of_a_stream_one_by_one():
    u = np.empty(11)
    fill_uniform(u, np.uint64(2**64 - 3), MASK, 5, 77, 1)
    assert [uniform(np.int64(-3), MASK, 5, 77, 1, slot) for slot in range(11)] == u.tolist()


def test_more_numbers_than_are_drawn_at_once():
    """The same masks whether their first 64 numbers come in one piece or not."""
    expected = masks(range(60))
    u, key, found = np.empty(0), np.zeros(5, np.int64), np.zeros((60, 14, 14), bool)
    longest = 0
    for b in range(60):
        key[:] = 0, 0, b, 0, 0
        share = draw_ratio(np.array([0.0, 0.3]), np.array([0.0, 0.2]), u, key)
        fill_blocks(found[b], share * 196, _LOG_ASPECT, u, key)
        longest = max(longest, key[4])
    np.testing.assert_array_equal(found, expected[:, 0])
    assert longest > 64


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.8])
def test_no_more_than_the_drawn_share(ratio: float):
    fixed = {"pred_ratio": (ratio,), "pred_ratio_var": (0.0,)}
    most = ratio * 196
    blocks = masks(range(50), **fixed).sum((2, 3))
    assert blocks.max() <= most and blocks.min() >= 0.7 * most
    assert (masks(range(50), shape="rand", **fixed).sum((2, 3)) == int(most)).all()


@pytest.mark.parametrize(
    "spec",
    [
        ibot(mask=Mask(patch_size=15)),
        ibot(mask=Mask(patch_size=448)),
        tuple(dataclasses.replace(view, mask=Mask(patch_size=16 << v)) for v, view in enumerate(ibot(local_crops=0))),
    ],
)
def test_grids_that_do_not_fit_are_refused(spec):
    with pytest.raises(DataError, match="patch_size"):
        Geometry(spec)


@pytest.mark.parametrize(
    "mask", [{"pred_ratio": ()}, {"pred_ratio": (0.3,)}, {"pred_ratio": (0.0, 0.1)}, {"pred_ratio": (0.0, 0.9)}, {"patch_size": 0}]
)
def test_impossible_masks(mask: dict):
    with pytest.raises(ValueError, match="pred_ratio|patch_size"):
        Mask(**mask)


def test_masked_patches_are_listed_view_major_and_none_is_left_out():
    drawn = masks(range(12))
    rows = masked_patches(drawn)
    assert len(rows) % MASKED_CHUNK == 0 and len(rows) - drawn.sum() < MASKED_CHUNK
    listed = rows[rows >= 0]
    assert len(listed) == drawn.sum() and (rows[len(listed) :] == -1).all()
    seen = np.zeros(drawn.size, bool)
    seen[listed] = True
    np.testing.assert_array_equal(seen.reshape(2, 12, 14, 14), drawn.swapaxes(0, 1))
    none = masked_patches(np.zeros_like(drawn))
    assert len(none) == MASKED_CHUNK and (none == -1).all()


def test_from_the_loader_to_the_method(class_folders):
    spec = ibot(size=32, local_size=16, local_crops=1, mask=Mask(patch_size=8))
    for rank in (0, 1):
        dist = OneMachine(rank, 2, 2)
        loader = build_loader(str(class_folders), "train", spec, dist=dist, batch=4, seed=5, backend="folder", workers=1)
        batches = loader.from_step(7)
        batch = next(batches)
        views = Augmenter(spec, device=CPU, dtype=torch.float32, seed=5)(batch)
        batches.close()
        expected = Masks(spec, 5).draw(batch.index.numpy(), batch.epoch)
        assert batch.epoch == 1 and expected.any()
        np.testing.assert_array_equal(views.masks.numpy(), expected)
        np.testing.assert_array_equal(views.masked.numpy(), masked_patches(expected))
        assert views.masks.dtype == torch.bool and views.masked.dtype == torch.int64


def test_views_without_masks_have_none():
    geometry = Geometry(dino(), 0)
    assert geometry.draw_masks(np.arange(3), 0) is None
