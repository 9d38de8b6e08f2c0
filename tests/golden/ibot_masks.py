"""Kinds of the iBOT files about masks: recorded draws replayed, statistics of the loader's own."""

from __future__ import annotations

import re

import numpy as np

from fastssl.methods.ibot import IBOT
from fastssl.recipes import ibot
from fastssl.views import Mask
from loaders.masks import Masks, draw_ratio, fill_blocks
from tests.golden.ibot_family import Unused, at_epoch
from tests.golden.kind import Arrays, Checked, Kind, compare


def as_uniform(value: float, low: float, high: float) -> float:
    """u in [0, 1) with low + (high - low) u == value, to the last bit where there is one."""
    u = (value - low) / ((high - low) or 1)
    near = (u, np.nextafter(u, 0), np.nextafter(u, 1))
    return next((x for x in near if low + (high - low) * x == value), u)


def ibot_mask_block(arrays: Arrays) -> Arrays:
    """The recorded draws, as the numbers in [0, 1) that give them, through the loader's own functions."""
    shape = int(arrays["grid_h"]), int(arrays["grid_w"])
    ratios, spreads = (np.atleast_1d(arrays[name]).astype(float) for name in ("pred_ratio", "pred_ratio_var"))
    log_aspect = tuple(arrays["log_aspect"].tolist())
    method = IBOT(IBOT.Config(out_dim=2, hidden=1, bottleneck=1, pred_start_epoch=int(arrays["pred_start_epoch"])), Unused, "local")
    method.before_step(at_epoch(int(arrays["epoch"])))
    masks = np.zeros((len(arrays["draw_offsets"]) - 1, *shape), bool)
    for mask, start, stop in zip(masks, arrays["draw_offsets"], arrays["draw_offsets"][1:], strict=False):
        part = slice(int(start), int(stop))
        given = zip(*(arrays[f"draw_{name}"][part] for name in ("kind", "value", "lo", "hi")), strict=True)
        # an integer is drawn as a number of the unit interval that begins at it
        u = np.array([as_uniform(v, lo, hi) if kind == 0 else (v - lo + 0.5) / (hi - lo + (kind == 1)) for kind, v, lo, hi in given])
        key = np.zeros(5, np.int64)
        if method.masking:
            fill_blocks(mask, draw_ratio(ratios, spreads, u, key) * mask.size, log_aspect, u, key)
        assert key[-1] == len(u), f"{key[-1]} numbers drawn, {len(u)} recorded"
    return {"masks": masks.astype(np.uint8), "mask_counts": masks.sum((1, 2)).astype(np.int32)}


def check_mask_stats(arrays: Arrays) -> None:
    """As many masks of the loader's as the file counts: all means within five standard errors of the difference of two samples, and
    the file's means those of its own histogram."""
    configurations = range(int(arrays["n_cfg"]))
    for i in configurations:
        histogram = arrays[f"cfg{i}/count_hist"]
        of, shares = np.arange(len(histogram)), histogram / histogram.sum()
        mean = of @ shares
        means = {"mean_count": mean, "std_count": np.sqrt((of - mean) ** 2 @ shares), "frac_empty": shares[0]}
        for name, value in means.items():
            compare(f"cfg{i}/{name}", np.asarray(value), arrays[f"cfg{i}/{name}"])
        compare(f"cfg{i}/cell_freq", arrays[f"cfg{i}/cell_freq"].sum(), np.asarray(mean))
    for i in configurations:
        spec = dict(re.findall(r"(\w+)=(\[.*?\]|\S+)", str(arrays[f"cfg{i}/spec"])))
        ratio, spread = (tuple(map(float, spec[name].strip("[]").split(","))) for name in ("ratio", "var"))
        n, patch_size = int(spec["n"]), int(spec["patch"])
        mask = Mask(shape=spec["shape"], pred_ratio=ratio, pred_ratio_var=spread, patch_size=patch_size)
        masks = Masks(ibot(size=int(spec["size"]), local_size=8, mask=mask), seed=i).draw(np.arange(n), 0)[:, 0]
        counts = masks.sum((1, 2))
        expected = {name: arrays[f"cfg{i}/{name}"] for name in ("count_hist", "cell_freq", "mean_count", "std_count", "frac_empty")}
        assert expected["count_hist"].sum() == n and masks.shape[1:] == expected["cell_freq"].shape

        def close(found, name: str, variance, n: int = n, expected: Arrays = expected) -> None:
            error = 5 * np.sqrt(2 * np.asarray(variance) / n) + 1e-9
            difference = np.abs(found - expected[name])
            assert (difference <= error).all(), f"{name}: off by {difference.max():.3g}, allowed {np.max(error):.3g}"

        frequency, empty = masks.mean(0), (counts == 0).mean()
        close(counts.mean(), "mean_count", counts.var())
        close(frequency, "cell_freq", frequency * (1 - frequency))
        close(empty, "frac_empty", empty * (1 - empty))
        central = ((counts - counts.mean()) ** 4).mean()
        close(counts.std(), "std_count", max(central - counts.var() ** 2, 0) / max(4 * counts.var(), 1e-9))
        histogram = np.bincount(counts, minlength=masks[0].size + 1)
        both = histogram + expected["count_hist"]
        assert (np.abs(histogram - expected["count_hist"]) <= 5 * np.sqrt(both) + 6).all(), "count_hist"  # Poisson where it is rare


KINDS = {
    "ibot/mask_block": Kind(
        ibot_mask_block,
        ("grid_h", "grid_w", "pred_ratio", "pred_ratio_var", "log_aspect", "pred_start_epoch", "epoch", "draw_*", "seed"),
    ),
    "ibot/mask_stats": Checked(check_mask_stats, ("n_cfg", "cfg*/spec")),
}
