"""The augmentation bench: that everybody does the same work, what is measured of it, and what is made of the numbers."""

import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.bench import augment, augment_report, augment_step, machine
from fastssl.bench import augment_work as work
from fastssl.bench.augment_clock import Time, clock
from fastssl.bench.augment_plot import save_plot
from fastssl.bench.augment_rivals import RIVALS, Rival, Unfit
from fastssl.bench.augment_work import SOURCE, Task, material
from fastssl.bench.files import write
from fastssl.bench.machine import one_thread
from fastssl.bench.parity import Error
from fastssl.presets import PRESETS
from fastssl.recipes import byol_asymmetric, dino, obow
from fastssl.views import IMAGENET_STD
from loaders.errors import DataError
from tests.conftest import ROOT
from tests.unit.test_layout import OURS, imported

CPU = torch.device("cpu")
SIZE = 32
RECIPE = Task("lewel", byol_asymmetric(size=SIZE), ("cut", "colour", "finish"))
MULTICROP = Task("dino", dino(size=48, local_size=SIZE, local_crops=1), ("cut", "colour", "finish"))
OPERATIONS = {task.name: task for task in work.operations(SIZE)}
SETTING = {"rounds": 2, "seconds": 0.001, "images": 2, "threads": 1}


# ------------------------------------------------------------------------------------------------ one small run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two rounds on two images; the result and its JSON file."""
    tasks = [*(OPERATIONS[name] for name in ("crop bilinear", "blur", "normalise")), RECIPE, MULTICROP]
    some = ("pillow", "torchvision", "torchvision_batch")
    with one_thread(CPU):
        rows = augment.measure(tasks, CPU, images=2, seconds=0.001, rounds=2, others=some)
    errors = {"blur": Error(0.25, 2.9, 7), "flip": Error(0.5, 1.0, 7)}
    result = augment_report.result(rows, errors, "left out", CPU, torch.float32, 1e10, SETTING)
    file = tmp_path_factory.mktemp("bench") / "augment.json"
    write(result, file, save_plot)
    return result, file


def test_who_is_measured(small):
    rows = {row["name"]: row for row in small[0]["rows"]}
    assert list(rows) == ["crop bilinear", "blur", "normalise", "lewel", "dino"]
    for name in ("crop bilinear", "blur"):
        assert list(rows[name]["results"]) == ["numba", "torch", "pillow", "torchvision", "torchvision_batch"], "ours come first"
    assert list(rows["normalise"]["results"]) == ["pillow", "torchvision", "torchvision_batch"], "part of our crop"
    for name in ("lewel", "dino"):
        assert list(rows[name]["results"]) == ["numba", "torch", "pillow", "torchvision"]
        assert "torchvision_batch" in rows[name]["absent"] and rows[name]["kind"] == "recipe"
        assert set(rows[name]["parts_ms_per_batch"]) == {"draws", "crops"}
    assert rows["dino"]["sizes"] == f"2x48 + 1x{SIZE}" and rows["dino"]["views_per_image"] == 3
    assert rows["blur"]["parity_grey_levels"] == {"mean": 0.25, "max": 2.9, "views": 7} and rows["lewel"]["parity_grey_levels"] is None


def test_numbers_belong_together(small):
    for row in small[0]["rows"]:
        views = row["views_per_image"] * row["images"]
        ours = row["results"].get("numba")
        for one in row["results"].values():
            rounds = one["ms_per_512_views_rounds"]
            assert len(rounds) == 2 and one["ms_per_512_views"] == pytest.approx(np.median(rounds))
            assert one["time_over_floor"] == pytest.approx(one["ms_per_512_views"] / row["floor_ms_per_512_views"])
            assert one["ms_per_batch"] == pytest.approx(one["ms_per_512_views"] * views / 512)
            if one["views_per_s"]:
                assert one["views_per_s"] * one["ms_per_512_views"] == pytest.approx(512e3)
            if one["time_over_ours"]:
                ratios = [a / b for a, b in zip(rounds, ours["ms_per_512_views_rounds"], strict=True)]
                assert one["time_over_ours"] == pytest.approx(np.median(ratios))
    lewel = small[0]["rows"][3]
    assert lewel["results"]["numba"]["time_over_ours"] == 1.0
    assert 0 < lewel["parts_ms_per_batch"]["crops"] and 0 < lewel["parts_ms_per_batch"]["draws"]


def test_memory_floor(small):
    """Bytes of two images (of an operation: of four crops) in, four float views out, at the 10 GB/s that the fixture claims."""
    crop, blur, _, lewel, multicrop = (row["floor_mb_per_512_views"] * 1e6 for row in small[0]["rows"])
    image, view = 3 * SOURCE[0] * SOURCE[1], 3 * SIZE * SIZE
    assert crop == lewel == pytest.approx((2 * image + 4 * 4 * view) * 512 / 4)
    assert blur == pytest.approx((4 * view + 4 * 4 * view) * 512 / 4)
    assert multicrop == pytest.approx((2 * image + 4 * (4 * 3 * 48 * 48 + 2 * view)) * 512 / 6)
    assert small[0]["rows"][0]["floor_ms_per_512_views"] == pytest.approx(crop / 1e10 * 1e3)


def test_json_and_plot(small):
    result, file = small
    assert json.loads(file.read_text()) == result
    assert {"device", "dtype", "threads", "copy_gb_per_s", "rounds", "binds", "versions", "step_not_measured"} <= result.keys()
    with Image.open(file.with_suffix(".png")) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20, "an empty page"
    assert not list(file.parent.glob("*.partial"))


def test_table_names_everything(small):
    result, _ = small
    text = augment_report.table(result)
    for row in result["rows"]:
        assert sum(line.startswith(row["name"]) for line in text.splitlines()) >= 2
        for one in row["results"].values():
            assert f"{one['ms_per_512_views']:,.2f}" in text
    for name in ("numba", "torch", "pillow", "torchvision_batch"):
        assert result["titles"][name] in text
    assert "flip 0.50 mean, 1.0 max" in text and "0.25   2.9" in text and "left out" in text and "What binds: lewel: " in text
    assert max(map(len, text.splitlines())) < 200


# ------------------------------------------------------------------------------------------------ the same work for everybody


def test_a_recipe_is_the_same_for_us_and_for_pillow():
    """Same boxes, flips and draws: otherwise an occasional blur would be compared with none."""
    for task in (RECIPE, MULTICROP):
        m = material(task.spec, 4, CPU)
        theirs = RIVALS["pillow"].make(m, task.stages, torch.float32)()
        for reference in (False, True):
            views = augment.augmentation(m, task.spec, torch.float32, reference=reference, draws=True)[1]().per_view()
            for ours, pillows in zip(views, theirs, strict=True):
                grey_levels = (ours - pillows).abs() * 255 * torch.tensor(IMAGENET_STD)[:, None, None]
                assert grey_levels.mean((1, 2, 3)).max() < 4


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_torchvision_does_what_pillow_does(name):
    """On noise, in grey levels (0..255) or normalised; blur is another filter in another window: only that it smoothes."""
    task = OPERATIONS[name]
    m = material(task.spec, 3, CPU)
    pillows, tensors = (RIVALS[library].make(m, task.stages, torch.float32)() for library in ("pillow", "torchvision"))
    for v in range(2):
        for i in range(3):
            theirs, before = pillows[v][i], m.crops()[v, i].float()
            theirs = theirs if torch.is_tensor(theirs) else torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
            a, b = theirs.float(), tensors[v][i].float()
            assert a.shape == b.shape == (3, SIZE, SIZE)
            if name == "blur":
                assert a.std() < before.std() and b.std() < before.std()
            else:
                assert (a - b).abs().mean() < (3 if name in ("hue", "jitter") else 1)
            assert "crop" in name or not torch.equal(b, before), "nothing was done"


def test_a_single_operation_leaves_the_others_of_the_jitter_out():
    """Neutral factors cost others time that nobody would spend."""
    task = OPERATIONS["brightness"]
    m = material(task.spec, 2, CPU)
    crops = m.crops()
    for library in ("pillow", "torchvision"):
        out = RIVALS[library].make(m, task.stages, torch.float32)()
        for v in range(2):
            for i in range(2):
                x = torch.from_numpy(np.array(out[v][i])) if library == "pillow" else out[v][i].permute(1, 2, 0)
                expected = (crops[v, i].permute(1, 2, 0) * float(m.params.brightness[v, i])).clamp(0, 255)
                assert (x - expected).abs().max() <= 1, "a hue turn by 0 moves more than that"


@pytest.mark.parametrize("name", ["brightness", "jitter", "grey", "blur", "solarise"])
def test_what_is_taken_off_an_operation_is_the_crop(name):
    task = OPERATIONS[name]
    m = material(task.spec, 2, CPU)

    def pixels(spec):
        return augment.augmentation(m, spec, torch.float32, reference=False, draws=False)[1]().groups[0].pixels

    assert torch.equal(pixels(task.base), pixels(OPERATIONS["crop bilinear"].spec))
    assert not torch.equal(pixels(task.spec), pixels(task.base))


def test_dali():
    pytest.importorskip("nvidia.dali", exc_type=ImportError)
    make = RIVALS["dali"].make
    for name in ("grey", "solarise"):
        m = material(OPERATIONS[name].spec, 3, CPU)
        out, crops = make(m, ("colour",), torch.float32)(), m.crops().permute(0, 1, 3, 4, 2).numpy().astype(int)
        for v in range(2):
            x = np.array(out[v].as_array()).astype(int)
            if name == "grey":
                assert np.ptp(x, axis=-1).max() <= 1
            else:
                np.testing.assert_array_equal(x, np.where(crops[v] >= 128, 255 - crops[v], crops[v]))
    m = material(MULTICROP.spec, 3, CPU)
    shapes = [np.array(x.as_array()).shape for x in make(m, MULTICROP.stages, torch.float32)()]
    assert shapes == [(3, 3, 48, 48), (3, 3, 48, 48), (3, 3, SIZE, SIZE)]


def test_kornia():
    pytest.importorskip("kornia")
    make = RIVALS["kornia"].make
    m = material(OPERATIONS["solarise"].spec, 3, CPU)
    crops = m.crops().float() / 255
    for x, before in zip(make(m, ("colour",), torch.float32)(), crops, strict=True):
        torch.testing.assert_close(x, torch.where(before >= 0.5, 1 - before, before))
    m = material(MULTICROP.spec, 3, CPU)
    shapes = [tuple(x.shape) for x in make(m, MULTICROP.stages, torch.float32)()]
    assert shapes == [(3, 3, 48, 48), (3, 3, 48, 48), (3, 3, SIZE, SIZE)]


def test_first_images_of_a_material():
    m = material(RECIPE.spec, 4, CPU)
    few = m.first(2)
    assert torch.equal(few.sources(), m.sources()[:2]) and len(few.batch) == 2
    assert torch.equal(few.params.order, m.params.order[:, :2]) and torch.equal(few.batch.boxes, m.batch.boxes[:2])
    assert m.sources().float().std() > 70, "random bytes, not a constant that memory could compress"


def test_who_cannot_says_why(monkeypatch):
    def broken(m, stages, dtype):
        raise RuntimeError("another version\nand more")

    def missing(m, stages, dtype):
        raise ImportError("No module named 'nowhere'")

    for name, make in (("broken", broken), ("missing", missing)):
        monkeypatch.setitem(RIVALS, name, Rival(name, "", make, by_sample=False))
    task = Task("obow", obow(crop_size=SIZE), ("cut", "colour", "finish"))
    row = augment.assemble(task, CPU, torch.float32, 1, ("broken", "missing", "pillow"))
    assert [one.name for one in row.contestants] == ["numba", "torch"]
    assert row.absent["broken"] == "RuntimeError: another version" and "nowhere" in row.absent["missing"]
    assert "patches" in row.absent["pillow"]
    assert row.views == 8 and row.sizes == f"1x224 + 2x{SIZE} + 5x96"
    with pytest.raises(Unfit, match="whole image"):
        RIVALS["kornia" if "kornia" in sys.modules else "dali"].make(material(task.spec, 1, CPU), task.stages, torch.float32)


# ------------------------------------------------------------------------------------------------ time


def test_clock_counts_processor_time_of_a_call():
    calls = []

    def spin():
        calls.append(1)
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    found = clock(spin, CPU, 0.02)
    assert len(calls) > 5 and 1.9 < found.ms < 4 and found.host_ms <= found.ms
    calls.clear()
    assert clock(spin, CPU, 1e-6).ms > 1.9 and len(calls) == 1, "at least one call"
    assert clock(lambda: time.sleep(0.02), CPU, 1e-6).ms < 10, "waiting costs a core nothing"


def test_share_of_a_step(monkeypatch):
    """The code that a GPU is asked to run, on a small network."""
    monkeypatch.setattr(augment_step, "WARM_UP", 1)
    cfg = PRESETS["lewel_mini"]()
    train, efficiency = replace(cfg.train, global_batch_size=64, published_rank_batch=4), replace(cfg.efficiency, dtype="fp32")
    cfg = replace(cfg, views=byol_asymmetric(size=SIZE), train=train, efficiency=efficiency)
    step = augment_step.step_share(cfg, CPU, seconds=1e-6, rounds=1)
    assert step["images"] == 4 and step["size"] == SIZE and step["dtype"] == "float32" and not step["compiled"]
    assert step["share_of_step"] == pytest.approx(step["augment_ms"] / step["step_ms"]) and 0 < step["augment_ms"] < step["step_ms"]
    assert step["added_to_step"] == pytest.approx(step["step_and_augment_ms"] / step["step_ms"] - 1)


def test_noise_gets_no_rate():
    """A fused operation whose cost drowns in its crop's."""
    for cost, resolved in ((0.1, False), (-3.0, False), (5.0, True)):
        ours = augment.Contestant("numba", None, 4, times=[Time(cost, 0)], whole=[Time(100 + cost, 0)])
        theirs = augment.Contestant("pillow", None, 2, times=[Time(10.0, 0)], whole=[Time(10.0, 0)])
        row = augment.Row(OPERATIONS["grey"], 2, 4, "2x32", 10, 10, [ours, theirs], [], {})
        results = augment_report.result([row], {}, "left out", CPU, torch.float32, 1e10, SETTING)["rows"][0]["results"]
        assert results["numba"]["ms_per_512_views"] == pytest.approx(cost * 128)
        assert results["numba"]["views_per_s"] == (pytest.approx(4e3 / cost) if resolved else None)
        assert results["pillow"]["time_over_ours"] == (pytest.approx(4.0) if resolved else None), "10 ms for half as many views"
        assert results["pillow"]["views_per_s"] == pytest.approx(200)


@pytest.mark.parametrize(
    "device, host, ms, floor, said",
    [
        ("cuda", 0.9, 1.0, 0.1, "launching from the host"),
        ("cuda", 0.2, 1.0, 0.9, "memory"),
        ("cuda", 0.2, 1.0, 0.25, "4.0 x the memory floor (crops 60%, colours 30%, draws 10% of the time)"),
        ("cpu", 1.0, 1.0, 0.1, "10.0 x the memory floor"),
    ],
)
def test_what_binds(device, host, ms, floor, said):
    one = {"ms_per_512_views": ms, "host_ms_per_512_views": host, "time_over_floor": ms / floor, "ms_per_batch": 2.0}
    parts = {"draws": 0.2, "crops": 1.2}
    row = {"name": "lewel", "kind": "recipe", "results": {"ours": one}, "floor_ms_per_512_views": floor, "parts_ms_per_batch": parts}
    assert said in augment_report.binds([row, {"name": "grey", "kind": "operation"}], device)


# ------------------------------------------------------------------------------------------------ the command


def test_whole_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "operations", lambda: [OPERATIONS["grey"]])
    monkeypatch.setattr(augment, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(machine, "cpu_name", lambda: "Fast(R) Processor CPU 9 @ 3 GHz")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        augment.bench(device="cpu", recipes=("eval",), out=tmp_path / "new", seconds=0.001, rounds=1, images=1, parity=8)
        assert torch.get_num_threads() == 2, "given back"
    finally:
        torch.set_num_threads(before)
    file = tmp_path / "new" / "augment_fast_9.json"
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["rows"]] == ["grey", "eval"] and result["threads"] == 1
    assert result["parity_grey_levels"]["grey"]["mean"] < 1 and "CPU" in result["step_not_measured"]
    assert "--device cpu --recipes eval --seconds 0.001 --rounds 1 --images 1 --parity 8 --step" in result["command"]
    assert str(file) in capsys.readouterr().out and file.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    "flags, said",
    [({"recipes": ("nosuch",)}, "no recipe 'nosuch'.*lewel"), ({"rounds": 0}, "--rounds"), ({"seconds": 0.0}, "--seconds")],
)
def test_wrong_flags(flags, said, tmp_path):
    with pytest.raises(DataError, match=said):
        augment.bench(device="cpu", out=tmp_path, **flags)


def test_needs_no_decoder():
    """A machine that only augments has none of what the loader bench compares with.  All modules of ours that are imported count."""
    to_do, read, found = ["fastssl.bench.__main__", "fastssl.bench.augment"], set(), set()
    while to_do:
        parts = to_do.pop().split(".")
        for file in (ROOT.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)):
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            if file.is_file() and file not in read:
                read.add(file)
                names = imported(file.read_text(), module_level=True)
                found |= {name.split(".")[0] for name in names}
                to_do += [name for name in names if name.split(".")[0] in OURS]
    assert len(read) > 20 and {"torch", "torchvision"} <= found
    assert not {"simplejpeg", "webdataset", "kornia", "nvidia", "ffcv", "triton", "convert"} & found


@pytest.mark.gpu
def test_cuda():
    cuda = torch.device("cuda")
    rows = augment.measure([OPERATIONS["blur"], MULTICROP], cuda, images=4, seconds=0.001, rounds=1)
    for row in rows:
        assert {"torch", "torchvision"} <= {one.name for one in row.contestants} and "pillow" not in row.absent
        assert all(t.ms >= t.host_ms for one in row.contestants for t in one.whole)
    result = augment_report.result(rows, {}, "left out", cuda, augment.dtype_on(cuda), augment.copy_rate(cuda), SETTING)
    assert result["copy_gb_per_s"] > 100 and "dino: " in augment_report.table(result)
