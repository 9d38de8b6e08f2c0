"""Signs that a representation collapses: what methods log of their embeddings, and when it is time to warn (hooks.CollapseAlarm).

Losses are not watched.  Some are low because a run has collapsed and others stay at chance although all is well: W2SSL's
location loss is near ln 2 in the published run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.precision import unit_rows

ROWS = 512
"""Embeddings that the effective rank is taken of, at most."""


class Watch(NamedTuple):
    """A logged value that leaves [low, high] in a collapse; what it means then, and what to try."""

    metric: str
    low: float
    too_low: str
    high: float = math.inf
    too_high: str = ""


def embedding_logs(z: Tensor) -> dict[str, Tensor]:
    """The two logged signs of embeddings z [B, D], which `SPREAD` watches."""
    return {"embed_std": embed_std(z), "effective_rank": effective_rank(z)}


def embed_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit rows of z [B, D], times sqrt(D): about 1 when spread, 0 when collapsed."""
    return unit_rows(z.detach()).std(dim=0).mean() * z.shape[-1] ** 0.5


def effective_rank(z: Tensor) -> Tensor:
    """(sum l_i)^2 / sum l_i^2 of the eigenvalues l of the covariance of unit rows of z [B, D]: the number of directions that carry
    the variance, from 1 to min(B - 1, D); 0 when there is no variance.

    At most `ROWS` rows.  It needs traces of a Gram matrix only, so it costs one small product in any step, and the host waits for no
    decomposition.  BatchNorm before z hides a collapse onto few directions from `embed_std`, not from this.
    """
    x = unit_rows(z[:ROWS].detach())
    x = x - x.mean(0)
    with torch.autocast(x.device.type, enabled=False):
        gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return gram.trace().square() / gram.square().sum().clamp(min=torch.finfo(gram.dtype).tiny)


SPREAD = (
    Watch(
        "embed_std",
        low=0.05,
        too_low="all images have nearly the same embedding. Lower --optim.base-lr or lengthen --optim.warmup-epochs, and compare "
        "--model.norm and --train.ema-momentum with the preset's",
    ),
    Watch(
        "effective_rank",
        low=1.5,
        too_low="embeddings vary along one direction only. Lower --optim.base-lr or lengthen --optim.warmup-epochs",
    ),
)
"""What methods watch unless they say otherwise."""


def target_entropy(metric: str, outputs: int) -> Watch:
    """Entropy in nats of a teacher's distributions over so many outputs: 0 or ln(outputs) when centring and sharpening lose their
    balance (DINO section 5.3)."""
    most = math.log(outputs)
    return Watch(
        metric,
        low=0.01 * most,
        high=0.9995 * most,
        too_low="the teacher gives every image the same output. Raise --method.teacher-temp or lower --optim.base-lr",
        too_high="the teacher's outputs are uniform. Lower --method.teacher-temp and --method.warmup-teacher-temp, or --optim.base-lr",
    )


def signs(watches: tuple[Watch, ...], record: dict[str, float]) -> list[str]:
    """One line for each watched value of a log record that is out of its range."""
    lines = []
    for w in watches:
        value = record.get(f"train/{w.metric}")
        if value is not None and value < w.low:
            lines.append(f"train/{w.metric} {value:.3g} is below {w.low:.3g}: {w.too_low}.")
        elif value is not None and value > w.high:
            lines.append(f"train/{w.metric} {value:.4g} is above {w.high:.4g}: {w.too_high}.")
    return lines
