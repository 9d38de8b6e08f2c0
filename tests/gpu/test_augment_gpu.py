"""fastssl.augment on CUDA: Triton kernels and torch operations give the CPU kernels' numbers, without a synchronisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastssl.augment import Augmenter, augmenter
from fastssl.augment.draws import ColourDraws
from fastssl.batch import ImageBatch
from fastssl.bench.parity import parity
from fastssl.recipes import RECIPES, byol_asymmetric
from fastssl.views import CenterCrop, Crop, Photometric, View, ViewSpec
from tests.images import WILD_COLOURS, batch_of, images, small
from tests.unit.test_parity import too_large

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

# Grey levels, but for the few values that rounding puts on the other side of solarise's threshold.
TOLERANCE = 0.02
WILD = 0.03
OUTLIERS = 1e-4

EVERYTHING = Photometric(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, blur=0.5, solarize=0.2)
SPEC = (
    View(crop=Crop(size=48, interpolation="bicubic"), photometric=EVERYTHING),
    View(crop=Crop(size=48), photometric=replace(EVERYTHING, blur=1.0)),
    View(crop=CenterCrop(size=48, resize=60, flip=0.5)),
    View(crop=Crop(size=24), photometric=EVERYTHING),
)
IMPLEMENTATIONS = ["triton", "torch"]


def on_cuda(implementation: str, spec: ViewSpec = SPEC, **options) -> Augmenter:
    """An augmenter that takes this implementation."""
    options = {"dtype": torch.float32, "seed": 5, **options}
    aug = Augmenter(spec, device="cuda", **options)
    if implementation == "torch":
        aug.render = augmenter.render
    else:
        assert aug.implementation == "triton", augmenter.triton_problem(torch.device("cuda"))
    return aug


def grey_levels(views, spec: ViewSpec) -> list[torch.Tensor]:
    """Every group's pixels back on the 0..255 scale, on the host."""
    out = []
    for group in views.groups:
        photo = [spec[v].photometric for v in group.views]
        mean, std = (torch.tensor([getattr(p, name) for p in photo])[:, None, :, None, None] for name in ("mean", "std"))
        out.append((group.pixels.float().cpu().unflatten(0, (len(group.views), -1)) * std + mean) * 255)
    return out


def assert_same(ours, theirs, tolerance: float = TOLERANCE) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() > tolerance).float().mean() <= OUTLIERS, (a - b).abs().max()


def expected(spec: ViewSpec, batch: ImageBatch, **options) -> list[torch.Tensor]:
    """The CPU kernels' views, which the unit tests compare with Pillow."""
    return grey_levels(Augmenter(spec, device="cpu", dtype=torch.float32, seed=5, **options)(batch), spec)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cuda_equals_the_cpu_kernels(implementation):
    want = expected(SPEC, batch_of(SPEC, images(16)))
    aug = on_cuda(implementation)
    assert_same(grey_levels(aug(batch_of(SPEC, images(16), device="cuda")), SPEC), want)
    without_bound = replace(batch_of(SPEC, images(16), device="cuda"), max_hw=None)
    assert_same(grey_levels(aug(without_bound), SPEC), want)


@pytest.mark.parametrize("name", {RECIPES[name](): name for name in reversed(RECIPES)}.values())
def test_every_recipe_at_its_size(name):
    spec, sources = RECIPES[name](), images(6, low=200, high=500)
    ours = on_cuda("triton", spec)(batch_of(spec, sources, device="cuda"))
    assert_same(grey_levels(ours, spec), expected(spec, batch_of(spec, sources)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_wild_parameters_and_extreme_scales(interpolation):
    spec = (
        View(crop=Crop(size=37, scale=(1e-4, 1.0), interpolation=interpolation), photometric=WILD_COLOURS),
        View(crop=Crop(size=37, scale=(1e-4, 0.01)), photometric=WILD_COLOURS),
        View(crop=CenterCrop(size=37, resize=50, interpolation=interpolation), photometric=WILD_COLOURS),
    )
    for low, high in ((1, 12), (30, 160), (700, 800)):
        sources = images(24, low=low, high=high)
        ours = on_cuda("triton", spec)(batch_of(spec, sources, device="cuda"))
        assert_same(grey_levels(ours, spec), expected(spec, batch_of(spec, sources)), WILD)


def test_pixels_are_pillows():
    def render(batch, plan, params):
        from fastssl.augment import fused

        return fused.render(batch, plan, params, dtype=torch.float32, channels_last=True)

    errors = parity(render, "cuda")
    assert not too_large(errors), {name: errors[name] for name in too_large(errors)}


@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_draws_are_those_of_the_cpu(seed):
    """Flags and orders bit for bit; factors to the last bit of float32, since a GPU fuses multiplications and additions."""
    index = torch.cat((torch.arange(500), torch.tensor([2**32 - 1])))
    aug = on_cuda("triton", seed=seed)
    for epoch in (0, 1, 16, 17):
        ours, theirs = aug.draws(epoch, index.cuda()), ColourDraws(SPEC, device=torch.device("cpu"), seed=seed)(epoch, index)
        for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(a.cpu(), b) if not b.is_floating_point() else torch.allclose(a.cpu(), b, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_host_synchronisation(implementation):
    aug = on_cuda(implementation, dtype=torch.bfloat16)
    batch = batch_of(SPEC, images(16), device="cuda")
    aug(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = aug(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for group in views.groups:
        assert group.pixels.dtype == torch.bfloat16 and group.pixels.is_contiguous(memory_format=torch.channels_last)


def test_a_cuda_graph_replays_other_images():
    """Captured once; then other pixels, boxes and draws in the same memory give the views of those."""
    spec, device = small(RECIPES["dino"]()), torch.device("cuda")
    first, second = (batch_of(spec, images(8), epoch=e, device="cuda") for e in (1, 2))
    second.pixels = second.pixels.flip(0).contiguous()
    aug = on_cuda("triton", spec)
    drawn, others = aug.draws(1, first.index), aug.draws(2, first.index)

    def render():
        return [aug.render(first, plan, drawn.of(plan.views)) for plan in aug.plans]

    render()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = render()
    wanted = [aug.render(second, plan, others.of(plan.views)) for plan in aug.plans]
    for name in ("pixels", "boxes", "flips"):
        getattr(first, name).copy_(getattr(second, name))
    for ours, theirs in zip(drawn.tensors(), others.tensors(), strict=True):
        ours.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize(device)
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


def test_nothing_is_compiled_in_mid_run():
    """Other epochs, lengths of a batch and places in memory (a ring's slots) are the same kernels."""
    from fastssl.augment.fused.crop import crop_kernel
    from fastssl.augment.fused.draws import draw_kernel

    def variants():
        caches = [kernel.device_caches[torch.cuda.current_device()][0] for kernel in (crop_kernel, draw_kernel)]
        return [len(c) for c in caches]

    aug = on_cuda("triton")
    aug(batch_of(SPEC, images(16), device="cuda"))
    before = variants()
    for epoch, count in ((1, 16), (2, 15), (16, 1), (3, 7)):
        batch = batch_of(SPEC, images(count), epoch=epoch, device="cuda")
        moved = torch.cat((batch.pixels.new_zeros(3), batch.pixels))
        batch.pixels = moved[3:]
        aug(batch)
    assert variants() == before


def test_compiled_torch_chain_gives_the_same_and_compiles_once():
    want = expected(SPEC, batch_of(SPEC, images(16)))
    aug = on_cuda("torch")
    chain = torch.compile(augmenter.photometric, fullgraph=True, dynamic=False)
    aug.render = lambda batch, plan, params: augmenter.render(batch, plan, params, chain)
    assert_same(grey_levels(aug(batch_of(SPEC, images(16), device="cuda")), SPEC), want)
    with torch._dynamo.config.patch(error_on_recompile=True):
        aug(batch_of(SPEC, images(16, seed=1), device="cuda"))


def test_autocast_around_it_changes_nothing():
    want = expected(SPEC, batch_of(SPEC, images(16)))
    for implementation in IMPLEMENTATIONS:
        with torch.autocast("cuda", torch.bfloat16):
            assert_same(grey_levels(on_cuda(implementation)(batch_of(SPEC, images(16), device="cuda")), SPEC), want)


def test_without_triton_the_torch_operations_run_and_say_so_once(monkeypatch, caplog):
    monkeypatch.setattr(augmenter, "triton_problem", lambda device: "of a test")
    aug = Augmenter(SPEC, device="cuda", dtype=torch.float16, seed=5)
    assert aug.implementation == "torch" and "of a test" in caplog.text
    want = expected(SPEC, batch_of(SPEC, images(4)))
    found = grey_levels(aug(batch_of(SPEC, images(4), device="cuda")), SPEC)
    assert all((a - b).abs().max() < 1.5 for a, b in zip(found, want, strict=True))  # float16's rounding, solarise


def test_full_size_batch_is_finite():
    """512 views of 224 pixels: the size training uses."""
    spec = byol_asymmetric(size=224)
    batch = batch_of(spec, images(32, low=300, high=500) * 8, device="cuda")
    out = on_cuda("triton", spec, dtype=torch.bfloat16)(batch).groups[0].pixels
    assert out.shape == (512, 3, 224, 224) and bool(out.isfinite().all())
