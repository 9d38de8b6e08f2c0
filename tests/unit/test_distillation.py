"""Heads, losses, centres and feature search of DINO and SCFS beyond the golden files."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.losses.distillation import dino_loss, matched_loss, teacher_probabilities, teacher_temperature
from fastssl.models.centers import Centers
from fastssl.models.heads import DINOHead
from fastssl.models.stage_heads import StageHead, attended, feature_search


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------ heads


def test_head_starts_as_published():
    torch.manual_seed(0)
    head = DINOHead(384, 3000, hidden=512, bottleneck=64, bn=True)
    for m in (head.linear1, head.linear2, head.linear3):
        assert not m.bias.any()
        assert m.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.last.v.abs().max().item() == pytest.approx(1 / 8, rel=1e-3)
    assert head.last.v.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)
    assert (head.last.g == 1).all() and not head.last.g.requires_grad
    assert DINOHead(8, 8, norm_last_layer=False).last.g.requires_grad


@pytest.mark.parametrize(("channels", "count"), [(2048, 25_760_000), (384, 22_352_128)])
def test_head_has_the_published_size(channels: int, count: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in DINOHead(channels, 65536).parameters()) == count


@pytest.mark.parametrize(("channels", "count"), [(512, 2_433_792), (1024, 3_745_536), (2048, 6_369_024)])
def test_stage_head_has_the_published_size(channels: int, count: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in StageHead(channels).parameters()) == count


def test_logits_are_cosines_whatever_the_length_of_the_weights():
    head = DINOHead(6, 9, hidden=8, bottleneck=4).double()
    x, before = randn(5, 6), head(randn(5, 6))
    with torch.no_grad():
        head.last.v.mul_(torch.linspace(0.1, 30, 9, dtype=torch.float64)[:, None])
    torch.testing.assert_close(head(x), before)
    assert before.abs().max() <= 1


def test_under_autocast_the_logits_are_bf16_and_near_the_exact_ones():
    head = DINOHead(32, 200, hidden=64, bottleneck=16)
    x = randn(8, 32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.dtype is torch.bfloat16
    assert (logits.float() - head(x)).abs().max() < 0.03


# ------------------------------------------------------------------------------------------------ losses


def pairwise_loss(student: Tensor, teacher: Tensor, center: Tensor, tau_s: float, tau_t: float) -> Tensor:
    """DINO's loss as the paper writes it: one cross-entropy for every pair of different crops.  [C, B, O], [2, B, O]."""
    q = ((teacher - center) / tau_t).softmax(-1)
    pairs = [(i, v) for i in range(2) for v in range(len(student)) if v != i]
    return sum(-(q[i] * F.log_softmax(student[v] / tau_s, -1)).sum(-1).mean() for i, v in pairs) / len(pairs)


@pytest.mark.parametrize("crops", [2, 3, 10])
@pytest.mark.parametrize("images", [1, 4])
def test_loss_is_the_mean_over_all_pairs(crops: int, images: int):
    student, teacher, center = randn(crops, images, 17).requires_grad_(), randn(2, images, 17, seed=1), randn(1, 17, seed=2)
    expected = pairwise_loss(student, teacher, center, 0.1, 0.05)
    (expected_grad,) = torch.autograd.grad(expected, student)
    rows = student.flatten(0, 1).split((2 * images, (crops - 2) * images))
    probs = teacher_probabilities(teacher.flatten(0, 1), torch.tensor(0.05, dtype=torch.float64), center)
    loss = dino_loss(*rows, probs, 0.1)
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)
    if crops == 2:
        torch.testing.assert_close(dino_loss(rows[0], None, probs, 0.1), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_widened_first(dtype: torch.dtype):
    student, teacher = F.normalize(randn(10, 33), dim=-1).to(dtype), F.normalize(randn(4, 33, seed=1), dim=-1).to(dtype)
    center = randn(1, 33, seed=2, dtype=torch.float32) * 0.1

    def losses(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        probs = teacher_probabilities(t, 0.04, center)
        return dino_loss(s[:4], s[4:], probs, 0.1), matched_loss(s[:4], probs, 0.1)

    for narrow, wide in zip(losses(student, teacher), losses(student.float(), teacher.float()), strict=True):
        assert narrow.dtype is torch.float32
        assert torch.equal(narrow, wide)


def test_teacher_temperature():
    def table(epochs: int, warmup_epochs: int) -> list[float]:
        return [teacher_temperature(e, warmup=0.04, final=0.07, warmup_epochs=warmup_epochs) for e in range(epochs)]

    assert table(3, 0) == [0.07] * 3
    assert table(3, 1) == [0.04, 0.07, 0.07]
    assert table(6, 4) == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert table(2, 4) == pytest.approx([0.04, 0.05])  # a run shorter than its warm-up


# ------------------------------------------------------------------------------------------------ centres


def test_centres_of_micro_batches_are_those_of_the_whole_batch():
    rows = {"final": randn(12, 5), "stage": randn(24, 3, seed=1)}
    whole, parts = Centers(dict(final=5, stage=3), 0.8).double(), Centers(dict(final=5, stage=3), 0.8).double()
    for _ in range(2):
        whole.accumulate(rows)
        for a, b in ((0, 1), (1, 4)):
            parts.accumulate({k: r[a * len(r) // 4 : b * len(r) // 4] for k, r in rows.items()})
        whole.update()
        parts.update()
    for name, r in rows.items():
        torch.testing.assert_close(whole[name], 0.36 * r.mean(0, keepdim=True), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-15)


def test_centres_are_all_that_is_saved():
    centers = Centers({"final": 5, "layer2": 3})
    assert {k: v.shape for k, v in centers.state_dict().items()} == {"final": (1, 5), "layer2": (1, 3)}


def test_centres_sum_narrow_rows_in_fp32():
    rows = torch.full((300, 4), 1.0, dtype=torch.bfloat16)  # a bf16 sum of ones stops at 256
    centers = Centers({"final": 4}, momentum=0.0)
    centers.accumulate({"final": rows})
    centers.update()
    assert (centers["final"] == 1).all()


def test_centres_never_read_a_value_on_the_host():
    centers = Centers({"final": 5}).to("meta")  # reading a tensor without storage raises
    centers.accumulate({"final": torch.empty(4, 5, device="meta")})
    centers.update()


# ------------------------------------------------------------------------------------------------ feature search and stage heads


def maps_and_queries(images: int, crops: int, *, channels: int = 6, size: int = 5) -> tuple[Tensor, Tensor]:
    maps = randn(2 * images, channels, size, size).relu().contiguous(memory_format=torch.channels_last)
    return maps, randn(crops * images, channels, seed=1).relu()


@pytest.mark.parametrize(("images", "crops"), [(3, 4), (1, 2), (2, 1)])
def test_a_searched_map_is_projected_as_if_it_had_been_formed(images: int, crops: int):
    maps, queries = maps_and_queries(images, crops)
    attention = feature_search(queries, maps[:images])
    torch.manual_seed(0)
    head, plain = StageHead(6, bottleneck=4, hidden=16, dim=7).double(), StageHead(6, bottleneck=4, hidden=16, dim=7).double()
    for p in head.parameters():
        nn.init.normal_(p, std=0.5)
    plain.load_state_dict(head.state_dict())
    with torch.no_grad():
        rows, searched = head.with_searched(maps, attention)
        expected = plain(maps), plain(attended(attention, maps[:images]))
    torch.testing.assert_close((rows, searched), expected, rtol=1e-9, atol=1e-12)
    # Batch statistics of both calls, in this order.
    torch.testing.assert_close(head.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-12)
    assert (head.bn1.num_batches_tracked == 2).all()


def test_searched_maps_stay_channels_last():
    maps, queries = maps_and_queries(3, 4)
    attention = feature_search(queries, maps[:3])
    assert attended(attention, maps[:3]).is_contiguous(memory_format=torch.channels_last)
    head = StageHead(6, bottleneck=4, hidden=16, dim=7).double().to(memory_format=torch.channels_last)
    seen = []
    head.embed = lambda y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
    head.with_searched(maps, attention)
    assert seen == [True, True]


def test_attention_is_the_cosine_of_query_and_pixel():
    maps, queries = maps_and_queries(2, 3)
    maps[1, :, 2, 3] = 0
    queries[4] = 0  # crop 2 of image 0
    attention = feature_search(queries, maps[:2])
    for k in range(3):
        for b in range(2):
            expected = F.cosine_similarity(queries[2 * k + b][:, None, None], maps[b], dim=0, eps=1e-12)
            torch.testing.assert_close(attention[k, b], expected, rtol=1e-12, atol=1e-15)
    assert not attention[2, 0].any() and not attention[:, 1, 2, 3].any()


def test_search_in_bf16_is_near_the_exact_one():
    maps, queries = maps_and_queries(2, 3, channels=64)
    exact = feature_search(queries, maps[:2])
    narrow = feature_search(queries.bfloat16(), maps[:2].bfloat16())
    assert narrow.dtype is torch.float32
    assert (narrow - exact).abs().max() < 2**-7


# ------------------------------------------------------------------------------------------------ compiled


class Distillation(nn.Module):
    """All pieces in one forward pass, as a method puts them together."""

    def __init__(self):
        super().__init__()
        self.head, self.stage = DINOHead(6, 20, hidden=8, bottleneck=4, bn=True), StageHead(6, bottleneck=4, hidden=8, dim=7)
        self.centers = Centers({"final": 20, "stage": 7})
        self.register_buffer("temperature", torch.tensor(0.04))

    def forward(self, images: Tensor, crops: Tensor) -> Tensor:
        n = len(images) // 2
        logits, u, u_local = self.head(torch.cat((images.mean((2, 3)), crops.mean((2, 3))))), self.stage(images), self.stage(crops)
        with torch.no_grad():
            teacher = self.head(images.mean((2, 3)))
            attention = feature_search(crops.mean((2, 3)), images[:n])
            v, v_local = self.stage.with_searched(images, attention)
            final = teacher_probabilities(teacher, self.temperature, self.centers["final"])
            stage = teacher_probabilities(v, self.temperature, self.centers["stage"])
            local = teacher_probabilities(v_local, self.temperature)
            self.centers.accumulate({"final": teacher, "stage": v})
        stages = dino_loss(u, None, stage, 0.1) + matched_loss(u_local, local, 0.1)
        return dino_loss(logits[: 2 * n], logits[2 * n :], final, 0.1) + stages


def train(compiled: str | None) -> list[Tensor]:
    torch.manual_seed(0)
    net = Distillation().double()
    if compiled:
        net.compile(fullgraph=True, dynamic=False, backend=compiled)
    out = []
    for epoch in range(3):
        net.temperature.fill_(teacher_temperature(epoch, warmup=0.04, final=0.07, warmup_epochs=3))
        loss = net(randn(4, 6, 5, 5, seed=epoch).relu(), randn(6, 6, 3, 3, seed=9 + epoch).relu())
        loss.backward()
        net.centers.update()
        out += [loss.detach(), net.centers["final"].clone(), net.centers["stage"].clone()]
    return out + [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compiled_graph_serves_all_temperatures(backend: str):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled, train(None), rtol=1e-9, atol=1e-11)
