"""The benches of a training step: what they measure, count and calculate, and what is made of the numbers."""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock

from fastssl.bench import kernels, roof, step, step_report, train, training
from fastssl.bench.step_plot import save_plot
from fastssl.bench.training import one_rank, per_rank
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.hooks import GarbageCollection
from fastssl.models.backbones import RESNETS, build_backbone
from fastssl.models.norm import SyncBatchNorm
from fastssl.presets import PRESETS
from loaders.errors import DataError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ------------------------------------------------------------------------------------------------ one small run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two rounds on four images of 48 px and half a ResNet-18; the result and its files."""
    cfg = PRESETS["lewel_mini"]()
    views = tuple(replace(v, crop=replace(v.crop, size=48)) for v in cfg.views)
    method = replace(cfg.method, hidden=64, dim=32)
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", lambda: replace(cfg, preset="tiny", views=views, method=method))
        patch.setitem(RESNETS, "resnet18", (BasicBlock, (1, 1, 1, 1)))
        patch.setattr(step, "copy_rate", lambda device: 10e9)
        patch.setattr(step, "gemm_rate", lambda device, dtype: 50e9)
        step.bench("tiny", batch=4, device="cpu", rounds=2, steps=2, out=folder)
    return json.loads((folder / "step_tiny.json").read_text()), folder


def test_parts_add_up_to_the_step(small):
    result, _ = small
    parts = result["phases_ms_rounds"]
    assert set(parts) == {"augment", *step_report.PHASES}
    assert parts["communication"] == [0.0, 0.0], "one rank"
    assert min(min(parts[name]) for name in ("augment", "student_forward", "target_forward", "backward")) > 0
    for r in range(2):
        whole = sum(ms[r] for name, ms in parts.items() if name != "augment")
        assert whole >= result["step_ms_rounds"][r] * 0.999, "differences that noise makes negative count as 0"
    assert result["step_ms_p5"] <= result["step_ms"] <= result["step_ms_p95"] <= result["step_ms_p99"]


def test_rates_and_shares_belong_together(small):
    r, _ = small
    assert (r["batch"], r["views"], r["sizes"]) == (4, 2, "2x48")
    assert r["images_per_s"] == pytest.approx(4e3 / r["step_ms"]) and r["views_per_s"] == pytest.approx(8e3 / r["step_ms"])
    flops = 4e9 * r["gflop_per_image"]
    assert r["share_of_gemm"] == pytest.approx(flops / 50e9 / (r["step_ms"] / 1e3)) == pytest.approx(r["share_of_compute_roof"])
    assert r["memory_roof_ms"] == pytest.approx(4e6 * r["moved_mb_per_image"] / 10e9 * 1e3)
    assert r["mfu"] is None and r["datasheet"] is None and r["kernels"] is None and r["host_syncs"] is None
    assert r["operators"] > 300 and r["recompiles"] == 0 and r["idle_ms"] is None
    assert r["norm_collectives_left_out"] == 0 and not r["samples_left_out"], "local BatchNorm"
    # 4.9 M weights of either network, and the online one's momentum; more while the step runs
    assert r["peak_mib"] > r["held_mib"] > 3 * 4.9e6 * 4 / 2**20


def test_files_and_table(small):
    result, folder = small
    with Image.open(folder / "step_tiny.png") as picture:
        assert picture.format == "PNG" and len(np.unique(np.asarray(picture.convert("L")))) > 20, "an empty page"
    text = step_report.table(result)
    for part in result["phases_ms"]:
        assert step_report.title(part) in text
    assert "What binds: no roof" in text and "clip + optimizer + EMA" in text


def test_kinds_of_kernels_are_costs_and_a_bar(small, tmp_path):
    result = {**small[0], "idle_ms": 0.0, "kernel_ms": {"convolutions": 0.5 * small[0]["step_ms"], "attention": 0.1 * small[0]["step_ms"]}}
    assert step_report.costs(result) == "convolutions 50%, attention 10%"
    assert "nothing runs for" in step_report.table(result)
    pictures = []
    for name, r in (("without", small[0]), ("with", result)):
        save_plot(r, tmp_path / name)
        pictures.append(np.asarray(Image.open(tmp_path / name).convert("RGB")))
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).mean() > 0.02


# ------------------------------------------------------------------------------------------------ what is calculated


def test_traffic_of_a_resnet50():
    """research/perf.md A.7 and B.1, in 16 bits at 224 px: 353 MB an image forward and backward, 121 and 55 forward with BatchNorm in
    training and in evaluation mode."""
    with torch.device("meta"):
        backbone, image = build_backbone("resnet50"), torch.empty(1, 3, 224, 224)
    calls: list[roof.Call] = []
    handles = list(roof._watch(backbone, calls))
    backbone(image)
    with torch.no_grad():
        backbone(image)
        backbone.eval()(image)
    for handle in handles:
        handle.remove()
    assert [round(2 * c.moved() / 1e6) for c in calls] == [353, 121, 55]
    assert [(c.grad, c.training) for c in calls] == [(True, True), (False, True), (False, False)]


def test_a_step_is_counted_without_being_computed():
    """As many operations as its plain pass has, and nothing of it stays; a million images take no memory."""
    rank = one_rank(PRESETS["lewel_mini"](), Dist(0, 1, 0, 1, CPU), 4)
    method, sched, (group,) = rank.state.method, rank.state.schedules.at(0), rank.views.groups
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    found = roof.record(rank)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method.forward(rank.views, sched).loss.backward()
    assert found.flops == counter.get_total_flops() > 0
    with_inputs = roof.record(rank, inputs=True)
    assert with_inputs.moved() == found.moved() > 0
    assert torch.equal(with_inputs.student[0].args[0], group.pixels[: len(with_inputs.student[0].args[0])])
    rank.views = replace(rank.views, groups=(replace(group, pixels=group.pixels[:1].expand(2_000_000, -1, -1, -1)),))
    assert roof.record(rank).flops > 1e5 * found.flops


def test_exchanges_of_statistics_are_counted():
    """Student and target of 20 convolutions' norms and two in each head; W2SSL's student, predictors' among them, also backward."""
    rank = one_rank(PRESETS["w2ssl_mini"](), Dist(0, 1, 0, 1, CPU), 4)
    passes = []
    for module in rank.state.method.modules():
        if isinstance(module, SyncBatchNorm):
            module.register_forward_hook(lambda module, args, out: passes.append(1 + out.requires_grad))
    found = roof.record(rank).norm_collectives
    assert found == sum(passes) > 2 * 20


def test_datasheets():
    assert roof.datasheet("NVIDIA H100 80GB HBM3").tflop_per_s == 989
    assert roof.datasheet("NVIDIA A100-SXM4-80GB").tb_per_s == 2.04
    for name in ("NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla V100-FHHL-16GB", "NVIDIA A100-SXM4-40GB"):
        assert roof.datasheet(name) is None
    assert roof.datasheet("NVIDIA H100 PCIe") is None and roof.datasheet("AMD EPYC") is None


def test_a_difference_below_zero_counts_as_zero():
    times = {"augment": [[1.0]], "student": [[4.0]], "target": [[3.0]], "forward": [[6.0]], "backward": [[20.0]], "step": [[25.0]]}
    found = {name: ms[0] for name, ms in step_report.phases(times).items()}
    assert found == {
        **{"augment": 1.0, "student_forward": 4.0, "target_forward": 3.0, "heads_and_loss": 0.0, "backward": 14.0},
        **{"communication": 0.0, "update": 5.0},
    }
    times["exchange"] = [[22.0]]
    found = {name: ms[0] for name, ms in step_report.phases(times).items()}
    assert (found["communication"], found["update"]) == (2.0, 3.0)


def test_without_parts_the_step_alone_is_timed(tmp_path):
    step.bench("simclr_mini", batch=4, device="cpu", parts=False, rounds=1, steps=1, out=tmp_path)
    r = json.loads((tmp_path / "step_simclr_mini.json").read_text())
    assert "One rank: without 88 exchanges of SyncBatchNorm and the samples of other ranks" in step_report.table(r)
    assert set(r["phases_ms"]) == {"augment", "step"} and r["phases_ms"]["step"] == pytest.approx(r["step_ms"])
    assert "--no-parts" in r["command"] and "most of the time" not in r["binds"] and "  step  " in step_report.table(r)
    assert (tmp_path / "step_simclr_mini.png").stat().st_size > 0


def test_kernels_by_kind():
    """Names as torch 2.11 gives them on an H100."""
    names = {
        "sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolutions",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8>": "convolutions",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0": "attention",
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN": "matrix products",
        "triton_red_fused_native_layer_norm_3": "fused reductions (norms, softmax, losses)",
        "triton_red_fused_add_convolution_backward_native_batch_norm_backward_4": "fused reductions (norms, softmax, losses)",
        "triton_poi_fused_gelu_gelu_backward_view_52": "fused elementwise",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>": "optimizer, clipping, EMA",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
        "Memcpy DtoD (Device -> Device)": "copies and fills",
        "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>": "other",
    }
    assert {name: kernels.kind(name) for name in names} == names
    found = kernels.totals(
        [(name, 1000.0 * (i + 1)) for i, name in enumerate(names)] + [("triton_poi_fused_gelu_gelu_backward_view_52", 500.0)]
    )
    assert list(found["kernel_ms"].items())[:2] == [("fused reductions (norms, softmax, losses)", 11.0), ("other", 11.0)]
    assert found["kernel_ms"]["convolutions"] == 3.0 and sum(found["kernel_ms"].values()) == pytest.approx(66.5)
    gelu = next(k for k in found["largest_kernels"] if "gelu" in k["name"])
    assert (gelu["calls"], gelu["ms"]) == (2, 7.5)


def test_operators_are_those_that_python_calls():
    a = torch.ones(4, 4)
    # addmm is one, whatever it calls
    assert kernels.launches(lambda: torch.addmm(a, a, a) + 1, CPU) == {"kernels": None, "operators": 2, "host_syncs": None}


@pytest.mark.parametrize(
    "changed, text",
    [
        ({"idle_ms": 1.1}, "launching from the host (nothing runs for 1.1 of 10.0 ms)"),
        ({"idle_ms": None}, "no roof"),
        ({"share_of_memory_roof": 0.9}, "memory (90% of its roof)"),
        ({"share_of_compute_roof": 0.86}, "arithmetic (86% of its roof)"),
        ({}, "no roof: 30% of the compute roof, 40% of the memory roof; most of the time in backward 60%, target forward 30%, update 10%"),
    ],
)
def test_what_binds_a_step(changed: dict, text: str):
    parts = {"augment": 99.0, "target_forward": 3.0, "backward": 6.0, "update": 1.0, "student_forward": 0.5}
    r = {"phases_ms": parts, "step_ms": 10.0, "idle_ms": 0.2, "share_of_compute_roof": 0.3, "share_of_memory_roof": 0.4, **changed}
    assert step_report.binds(r).replace("clip + optimizer + EMA", "update").startswith(text)


@pytest.mark.parametrize(
    "loader, real, stall, text",
    [(110, 100, 0.4, "the loader: alone"), (300, 100, 0.4, "both together: the loader alone is 3.0 x"), (300, 100, 0.05, "the step: 80%")],
)
def test_what_binds_training(loader: float, real: float, stall: float, text: str):
    assert train.binds({"loader": loader, "end to end": real}, stall, 0.2, "cpu").startswith(text)


# ------------------------------------------------------------------------------------------------ as train.py has it


def test_pythons_collector_rests_in_every_stage(monkeypatch):
    collecting = []

    def fit(state, loader, augment, hooks):
        collecting.append(gc.isenabled())
        assert any(isinstance(hook, GarbageCollection) for hook in hooks)
        hooks[0].seconds = 1.0

    monkeypatch.setattr(train, "timed", lambda *args, **numbers: collecting.append(gc.isenabled()) or 1.0)
    monkeypatch.setattr(train, "fit", fit)
    state = SimpleNamespace(step=0, cfg=PRESETS["byol_mini"](), dist=None)
    rank = SimpleNamespace(state=state, batch=1, augment=None)
    train.one_round(rank, SimpleNamespace(from_step=lambda step: (x for x in ())), warmup=0, steps=1)
    assert collecting == [False] * len(train.RATES) and gc.isenabled()


@pytest.mark.parametrize("compiled", [False, True])
def test_colours_are_compiled_as_the_network_is(compiled: bool, monkeypatch):
    made = {}
    monkeypatch.setattr(training, "prepare", lambda *args: SimpleNamespace(dtype=torch.bfloat16, compiled=compiled))
    monkeypatch.setattr(training, "Augmenter", lambda views, **how: made.update(how) or (lambda images: SimpleNamespace(masked=None)))
    training.one_rank(PRESETS["byol_mini"](), Dist(0, 1, 0, 1, CUDA), 4, images=())
    assert made["compile"] is compiled and made["dtype"] is torch.bfloat16


def test_steps_take_other_masks_in_turn(monkeypatch):
    taken = []
    monkeypatch.setattr(training, "prepare", lambda *args: SimpleNamespace(dtype=torch.float32, compiled=False))
    monkeypatch.setattr(step, "train_step", lambda state, micro_batches: taken.extend(micro_batches))
    rank = training.one_rank(PRESETS["ibot_mini"](), Dist(0, 1, 0, 1, CPU), 4)
    run = step.whole(rank)["step"]
    for _ in range(training.DRAWS + 1):
        run()
    assert taken[0] is rank.views is taken[-1]
    assert all(views.groups is rank.views.groups and views.masks.shape == rank.views.masks.shape for views in taken)
    assert len({int(views.masks.sum()) for views in taken}) > 1
    for views in taken:
        assert views.masks.swapaxes(0, 1).flatten().nonzero().flatten().tolist() == [i for i in views.masked.tolist() if i >= 0]
    rank = training.one_rank(PRESETS["dino_vit_mini"](), Dist(0, 1, 0, 1, CPU), 4)
    assert rank.turns == (rank.views,)


# ------------------------------------------------------------------------------------------------ what is asked for


def test_images_of_a_rank():
    assert per_rank(PRESETS["lewel_b_eman_r50_200ep"](), CUDA) == 128, "published"
    assert per_rank(PRESETS["dino_vits16_100ep"](), CUDA) == 64, "512 over 8 ranks"
    assert per_rank(PRESETS["dino_mini"](), CUDA) == 64
    assert per_rank(PRESETS["dino_mini"](), CPU) == 8


@pytest.mark.parametrize("bench", [step.bench, train.bench])
def test_refusals(bench):
    with pytest.raises(DataError, match="no preset 'dinosaur'"):
        bench("dinosaur")
    with pytest.raises(DataError, match="Nothing would be measured"):
        bench("dino_mini", rounds=0)
    with pytest.raises(ConfigError, match="do not fill montages"):
        bench("w2ssl_mini", batch=3, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="no CUDA device"):
            bench("dino_mini", device="cuda")


@pytest.mark.slow
def test_training_from_a_file(tmp_path, beton_data, capsys):
    train.bench("lewel_mini", path=str(beton_data), batch=4, device="cpu", dtype="fp32", rounds=2, steps=2, workers=1, out=tmp_path)
    result = json.loads((tmp_path / "train_lewel_mini.json").read_text())
    assert set(result["images_per_s"]) == set(train.RATES)
    assert result["dtype"] == "float32" and "--dtype fp32 --compile auto" in result["command"]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in result["images_per_s_rounds"].values())
    assert result["images_per_s"]["loader"] > result["images_per_s"]["end to end"]
    assert 0 <= result["data_stall"] < 1 and (tmp_path / "train_lewel_mini.png").exists()
    printed = capsys.readouterr().out
    assert "What binds: " in printed and all(name in printed for name in train.RATES)
