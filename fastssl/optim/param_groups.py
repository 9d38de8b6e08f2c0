"""Which parameters decay and adapt: by name (EMAN, LEWEL) or by shape (the DINO family)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from fastssl.config import NotDecayed

Named = Iterable[tuple[str, nn.Parameter]]


def split_by_name(named: Named, exclude: Sequence[str]) -> list[dict]:
    """Two optimizer groups of the trainable parameters: `adapted`, and `excluded` where the name contains one of `exclude`.

    Each group carries its parameters' `names`.
    """
    return _split(named, lambda name, p: any(word in name for word in exclude))


def split_by_shape(named: Named, excluded: NotDecayed = "vectors") -> list[dict]:
    """The same two groups, `excluded` being

    vectors        biases and tensors of fewer than two dimensions (methods/dino.md section 5)
    norm_weights   tensors of fewer than two dimensions that are no biases (methods/sere.md section 7)
    none           nothing (methods/mocov2.md section 5)

    So position tables, [CLS] tokens and a trainable weight-norm length [O, 1] decay.
    """
    rules = {
        "vectors": lambda name, p: p.ndim < 2 or name.endswith(".bias"),
        "norm_weights": lambda name, p: p.ndim < 2 and not name.endswith(".bias"),
        "none": lambda name, p: False,
    }
    return _split(named, rules[excluded])


def _split(named: Named, excluded: Callable[[str, nn.Parameter], bool]) -> list[dict]:
    groups = [{"params": [], "names": [], "excluded": False}, {"params": [], "names": [], "excluded": True, "weight_decay": 0.0}]
    for name, p in named:
        if p.requires_grad:
            group = groups[excluded(name, p)]
            group["params"].append(p)
            group["names"].append(name)
    return [g for g in groups if g["params"]]
