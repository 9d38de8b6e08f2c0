"""Which parameters decay and adapt: rules by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn


def split_by_name(named: Iterable[tuple[str, nn.Parameter]], exclude: Sequence[str]) -> list[dict]:
    """Two optimizer groups of the trainable parameters: `adapted`, and `excluded` where the name contains one of `exclude`.

    Each group carries its parameters' `names`.
    """
    groups = [{"params": [], "names": [], "excluded": False}, {"params": [], "names": [], "excluded": True}]
    for name, p in named:
        if p.requires_grad:
            group = groups[any(word in name for word in exclude)]
            group["params"].append(p)
            group["names"].append(name)
    return [g for g in groups if g["params"]]
