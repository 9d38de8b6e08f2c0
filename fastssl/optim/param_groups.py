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


def split_by_layer(named: Named, *, depth: int, layer_decay: float, weight_decay: float, positions_decay: bool = False) -> list[dict]:
    """Groups of a ViT classifier for fine-tuning (methods/ibot.md 10, sere.md 9), by timm's names; each carries `names`, `lr_scale`
    and `weight_decay`.

    lr_scale      layer_decay^(depth + 1 - id): id 0 of [CLS], positions and patch embedding, i + 1 of block i of `depth`, and
                  depth + 1 of all after the blocks
    weight_decay  0 for vectors and, unless `positions_decay`, [CLS] and positions
    """
    groups: dict[tuple[int, float], dict] = {}
    for name, p in named:
        decay = 0.0 if p.ndim < 2 or (name in ("cls_token", "pos_embed") and not positions_decay) else weight_decay
        layer = depth + 1
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        new = {"params": [], "names": [], "lr_scale": layer_decay ** (depth + 1 - layer), "weight_decay": decay}
        group = groups.setdefault((layer, decay), new)
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())
