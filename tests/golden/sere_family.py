"""Kinds of SERE's files: overlap grids, relation heads, both relation losses."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from fastssl.losses.overlap import overlap_coordinates
from fastssl.losses.relations import (
    channel_factors,
    channel_loss,
    global_factors,
    local_factors,
    pixel_factor,
    pixel_loss,
    relation,
    relation_loss,
    teacher_relation,
)
from fastssl.models.relations import RelationHeads
from tests.golden.kind import Arrays, Kind, compare

# Official name inside a relation module -> ours; of its running statistics, (module of both, first half or second).
NAMES = (
    (r"^projection\.0\.", "projection."),
    (r"^predictor\.0\.", "predictor."),
    (r"^predictor\.1\.", "predictor_norm."),
)


def head_name(official: str) -> str:
    for pattern, own in NAMES:
        official = re.sub(pattern, own, official)
    return official


class Fp32Grids(Kind):
    """The authors' sampling grids are float32: what depends on them agrees as far as golden/sere.md says, losses to 1e-7."""

    def compare(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        compare(name, actual, expected, tolerance=1e-7 if "loss" in name else 1e-5)


def tensor(a: np.ndarray, *, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.array(a)).requires_grad_(grad)


def boxes_and_flips(xywh_flip: np.ndarray) -> tuple[Tensor, Tensor]:
    """[..., 5] integers -> boxes [..., 4] (top, left, height, width) as float64, flips [...]."""
    a = tensor(xywh_flip)
    return a[..., [1, 0, 3, 2]].double(), a[..., 4].bool()


def official_grid(coordinates: Tensor) -> np.ndarray:
    """[..., 2, S] (y, x) -> [..., S, S, 2] (x, y) in float32."""
    y, x = coordinates.unbind(-2)
    pairs = (x.unsqueeze(-2).expand(*x.shape[:-1], x.shape[-1], -1), y.unsqueeze(-1).expand(*y.shape, y.shape[-1]))
    return torch.stack(pairs, -1).float().numpy()


def sere_grid(arrays: Arrays) -> Arrays:
    (q, q_flip), (k, k_flip) = (boxes_and_flips(arrays[f"boxes_{side}_xywh_flip"]) for side in "qk")
    out = {}
    for size in arrays["sizes"].tolist():
        on_q, on_k = overlap_coordinates(q, q_flip, k, size), overlap_coordinates(k, k_flip, q, size)
        out |= {f"grid_q_size{size}": official_grid(on_q), f"grid_k_size{size}": official_grid(on_k)}
        out["has_overlap"] = (on_q[:, 0, 0] != -2).long().numpy()
    return out


# ------------------------------------------------------------------------------------------------ heads


def load_heads(heads: RelationHeads, arrays: Arrays, prefixes: dict[str, str], statistics: str | None = None) -> None:
    """Parameters of the official modules; the shared running statistics from module `statistics`, if the file has them."""
    for head, prefix in prefixes.items():
        for official, a in arrays.items():
            if official.startswith(prefix) and "running" not in official:
                own = heads.get_submodule(head).get_parameter(head_name(official.removeprefix(prefix)))
                own.data = tensor(a).reshape(own.shape)
    if statistics is not None:
        for which in ("mean", "var"):
            shared = arrays[f"{prefixes[statistics]}projection.0.running_{which}"]
            heads.statistics.get_buffer(f"running_{which}").copy_(tensor(shared))
            both = [arrays[f"{prefix}predictor.1.running_{which}"] for prefix in prefixes.values()]
            heads.predictor_statistics.get_buffer(f"running_{which}").copy_(tensor(np.concatenate(both)))


def dump_statistics(heads: RelationHeads, head: str, prefix: str) -> Arrays:
    """Running statistics of one head under the official names."""
    half = ("channel", "pixel").index(head)
    out = {}
    for which in ("mean", "var"):
        out[f"{prefix}projection.0.running_{which}"] = heads.statistics.get_buffer(f"running_{which}").numpy().copy()
        both = heads.predictor_statistics.get_buffer(f"running_{which}").numpy()
        out[f"{prefix}predictor.1.running_{which}"] = np.split(both, 2)[half].copy()
    return out


def sere_heads(arrays: Arrays) -> Arrays:
    prefixes = {head: f"{head}/in/" for head in ("channel", "pixel")}
    groups, divisor = int(arrays["num_heads"]), float(arrays["channel_divisor"])
    out: Arrays = {}
    for head in prefixes:  # the file's two modules start from other statistics, ours share them: once for each
        heads = RelationHeads(arrays["tokens"].shape[-1]).double().train()
        for norm in (heads.statistics, heads.predictor_statistics):
            assert (norm.eps, norm.momentum) == (float(arrays["bn_eps"]), float(arrays["bn_momentum"]))
        load_heads(heads, arrays, prefixes, statistics=head)
        tokens = tensor(arrays["tokens"], grad=True)
        p = heads(tokens)
        out |= dump_statistics(heads, head, f"{head}/out/")
    z = heads.project(tokens)
    for name, x in (("z", z), ("p", p)):
        out[f"relation_channel_{name}"] = relation(channel_factors(x.channel, divisor))
        out[f"relation_pixel_{name}"] = relation((pixel_factor(x.pixel, groups),))
    cotangents = ((out[f"relation_{head}_p"] * tensor(arrays[f"cot_{head}_p"])).sum() for head in prefixes)
    sum(cotangents).backward()
    out["grad_tokens"] = tokens.grad
    for head in prefixes:
        grads = {name: p.grad for name, p in heads.get_submodule(head).named_parameters()}
        names = [k.removeprefix(f"{head}/grad/") for k in arrays if k.startswith(f"{head}/grad/")]
        out |= {f"{head}/grad/{name}": grads[head_name(name)].reshape(arrays[f"{head}/grad/{name}"].shape) for name in names}
    return {k: v.detach().numpy() if isinstance(v, Tensor) else v for k, v in out.items()}


# ------------------------------------------------------------------------------------------------ losses


def sere_loss(arrays: Arrays) -> Arrays:
    b, n_local, groups = (int(arrays[name]) for name in ("batch", "n_local", "num_heads"))
    sizes, local_size = tuple(arrays["overlap_size"].tolist()), int(arrays["local_grid_size"])
    locals_ = ("local",) if n_local else ()
    nets = {}
    for net, kinds in (("student", ("global", *locals_)), ("teacher", ("global",))):
        for kind in kinds:
            suffix = "_local" if kind == "local" else ""
            nets[net, kind] = heads = RelationHeads(arrays["student_tokens_global"].shape[-1]).double().train()
            load_heads(heads, arrays, {head: f"{net}/{head}_sere{suffix}." for head in ("channel", "pixel")})
    stacked = np.concatenate([arrays[f"boxes_{kind}_xywh_flip"] for kind in ("global", *locals_)], axis=1)
    boxes, flips = boxes_and_flips(stacked)
    tokens = {kind: tensor(arrays[f"student_tokens_{kind}"], grad=True) for kind in ("global", *locals_)}

    def projected():
        p = {kind: nets["student", kind](x) for kind, x in tokens.items()}
        return p["global"], p.get("local"), nets["teacher", "global"].project(tensor(arrays["teacher_tokens_global"]))

    p, p_local, z = projected()
    out = {
        "loss_pixel": pixel_loss(
            *(z.pixel, p.pixel, p_local and p_local.pixel, boxes, flips),
            **dict(groups=groups, sizes=sizes, local_size=local_size, temperature=float(arrays["temperature_pixel"])),
        ),
        "loss_channel": channel_loss(
            *(z.channel, p.channel, p_local and p_local.channel),
            divisors=tuple(float(arrays[f"channel_divisor_{kind}"]) for kind in ("global", "local")),
            temperature=float(arrays["temperature_channel"]),
        ),
    }
    for which in ("pixel", "channel"):
        for kind, grad in zip(tokens, torch.autograd.grad(out[f"loss_{which}"], list(tokens.values()), retain_graph=True), strict=True):
            out[f"grad_{which}_student_tokens_{kind}"] = grad
    by_view = boxes.transpose(0, 1), flips.T
    for kind, size in zip((1, 2), sizes, strict=True):
        for view in (0, 1):
            grid = overlap_coordinates(by_view[0][view], by_view[1][view], by_view[0][1 - view], size)
            out[f"grid{kind}_view{view}"] = official_grid(grid)
    teacher, student = (global_factors(x.pixel, *by_view, sizes, groups) for x in (z, p))
    for net, factors in (("teacher", teacher), ("student", student)):
        out[f"{net}_relation_pixel_sampled"] = relation(factors).flatten(0, 1)
    probs = teacher_relation(teacher, float(arrays["temperature_pixel"]))
    out["pixel_terms_global"] = torch.stack([relation_loss([s[1 - q] for s in student], probs[q]) for q in (0, 1)])
    if n_local:
        (of_global, of_local), (global_flips, local_flips) = ((x[:2, None], x[2:]) for x in by_view)
        out["grid_global"] = official_grid(overlap_coordinates(of_global, global_flips, of_local, local_size).flatten(0, 1))
        out["grid_local"] = official_grid(overlap_coordinates(of_local, local_flips, of_global, local_size).flatten(0, 1))
        t, s = local_factors(z.pixel, p_local.pixel, *by_view, local_size, groups)
        out["teacher_view0_vs_local0_sampled"], out["student_local0_vs_view0_sampled"] = (relation((x[0, 0],)) for x in (t, s))
    assert b == len(boxes) and n_local == boxes.shape[1] - 2
    return {k: v.detach().numpy() if isinstance(v, Tensor) else v for k, v in out.items()}


KINDS = {
    "sere/grid": Kind(sere_grid, ("boxes_?_xywh_flip", "sizes")),
    "sere/heads": Kind(sere_heads, ("tokens", "num_heads", "channel_divisor", "bn_*", "*/in/*", "cot_*")),
    "sere/loss": Fp32Grids(
        sere_loss,
        (
            *("batch", "n_local", "num_heads", "overlap_size", "local_grid_size", "temperature_*", "channel_divisor_*", "image_wh"),
            *("student_tokens_*", "teacher_tokens_*", "student/*", "teacher/*", "boxes_*"),
        ),
    ),
}
