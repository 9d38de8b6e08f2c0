"""The loader bench: what it measures on, what it measures, and what it makes of the numbers."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.bench import data, files, loader, pagecache, plot, recipe, report, yardsticks
from fastssl.bench.clock import Rate, clock, cpu_seconds
from fastssl.bench.data import Material, Variant
from fastssl.bench.yardsticks import Failed, Yardstick
from loaders.beton import RAW, Beton
from loaders.errors import DataError
from tests.conftest import write_class_folders

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")


# ------------------------------------------------------------------------------------------------ one small run


@pytest.fixture(scope="module")
def small(beton_data, tmp_path_factory):
    """A whole run of two rounds without yardsticks, on 48 small JPEGs and on the same decoded; its result and its files."""
    folder = tmp_path_factory.mktemp("bench")
    raw = folder / "raw.beton"
    data.repeat(Beton.open(beton_data / "train.beton"), raw, RAW)
    material = Material("48 small images", [Variant("JPEG", beton_data / "train.beton"), Variant("raw", raw)])
    result = loader.measure(material, seconds=0.05, rounds=2, batch=16, threads=1, others=())
    files.write(result, folder / "loader.json", plot.save_plot)
    return result, folder


def test_every_usable_back_end_on_every_form(small):
    result, _ = small
    assert "torchvision" in result["forms"][0]["backends"]
    for form in result["forms"]:
        assert set(form["backends"]) | set(result["unusable_backends"]) >= {"ffcv", "dali", "torchvision"}
        for row in form["backends"].values():
            warm = row["warm"]
            assert len(warm["images_per_s_rounds"]) == len(warm["cpu_ms_per_image_rounds"]) == 2
            assert warm["images_per_s"] == pytest.approx(np.median(warm["images_per_s_rounds"])) and warm["cpu_ms_per_image"] > 0
            # one thread decodes; another hands over
            assert 0 < warm["images_per_s"] * warm["cpu_ms_per_image"] / 1e3 < 4
            if form["ceiling"]:
                assert warm["share_of_ceiling"] == pytest.approx(warm["images_per_s"] / form["ceiling"]["images_per_s"])
            assert (row["cold"] is not None) == form["page_cache"]["dropped"]
    assert [form["kind"] for form in result["forms"]] == ["jpeg", "raw"]


def test_bound_of_either_kind(small):
    result, _ = small
    if "ffcv" in result["unusable_backends"]:
        pytest.skip(result["unusable_backends"]["ffcv"])
    jpeg, raw = (form["ceiling"] for form in result["forms"])
    assert jpeg["what"] == "bare libjpeg-turbo" and raw["what"] == "memcpy"
    assert raw["images_per_s"] > jpeg["images_per_s"] > 0


def test_json_and_plot(small):
    result, folder = small
    assert json.loads((folder / "loader.json").read_text()) == result
    assert {"cpu", "cores", "threads", "rounds", "seconds", "binds", "versions", "origin", "views", "device"} <= result.keys()
    with Image.open(folder / "loader.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20, "an empty page"
    assert not list(folder.glob("*.partial"))


def test_table_names_every_row(small):
    result, _ = small
    text = report.table(result)
    for form in result["forms"]:
        assert f"{form['name']}: {form['samples']:,} samples" in text
        for name, row in form["backends"].items():
            assert f"loader, {name}" in text and f"{row['warm']['images_per_s']:,.0f}" in text
    assert f"What binds: {result['binds']}" in text and max(map(len, text.splitlines())) < 400


# ------------------------------------------------------------------------------------------------ what it measures on


def test_own_files_are_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTSSL_DATA", raising=False)
    monkeypatch.setattr(data, "write_tiles", lambda out: write_class_folders(out, classes=2, per_class=4))
    monkeypatch.setattr(data, "_SAMPLES", 20)
    material = data.prepare()
    assert [v.name for v in material.variants] == ["JPEG max 500 q90", "JPEG max 400 q90", "raw max 500"]
    jpeg, _, raw = (Beton.open(v.path) for v in material.variants)
    assert len(jpeg) == len(raw) == 24, "8 images, repeated up to at least 20"
    for i in (0, 7, 8, 23):
        pixels = np.asarray(Image.open(BytesIO(jpeg.sample(i).tobytes())))
        np.testing.assert_array_equal(raw.sample(i).reshape(pixels.shape), pixels)
        np.testing.assert_array_equal(jpeg.sample(i), jpeg.sample(i % 8))
    before = {p: p.stat().st_mtime_ns for p in Path("data/bench").rglob("*")}
    data.prepare()
    assert {p: p.stat().st_mtime_ns for p in Path("data/bench").rglob("*")} == before


def test_nothing_half_made_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTSSL_DATA", raising=False)

    def fail(out):
        raise DataError("no photographs")

    monkeypatch.setattr(data, "write_tiles", fail)
    with pytest.raises(DataError, match="no photographs"):
        data.prepare()
    assert list(Path("data/bench").iterdir()) == []


def test_repeats_stay_below_the_limit(beton_data, tmp_path, monkeypatch):
    once = Beton.open(beton_data / "train.beton")
    monkeypatch.setattr(data, "_BYTES", int(2.5 * once.size.sum()))
    data.repeat(once, tmp_path / "x.beton", 0)
    assert len(Beton.open(tmp_path / "x.beton")) == 2 * len(once)


class Sized:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return len(self.size)


def test_large_files_are_sampled_evenly():
    ids = data.measured_ids(Sized(np.full(1_281_167, 110_000, np.uint64)))
    assert 9_000 < len(ids) < 10_000 and ids[0] == 0 and ids[-1] == 1_281_166
    assert np.ptp(np.diff(ids)) <= 1
    np.testing.assert_array_equal(data.measured_ids(Sized(np.full(300, 110_000, np.uint64))), np.arange(300))


def test_no_data_is_said_before_anything_is_measured(tmp_path):
    with pytest.raises(DataError, match="leave --path out"):
        loader.bench(str(tmp_path / "nothing.beton"), out=tmp_path)
    with pytest.raises(DataError, match="Nothing would be measured"):
        loader.bench(rounds=0, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_stock_copies_are_the_same_bytes(beton_data):
    samples = Beton.open(beton_data / "train.beton")
    with data.stock(samples) as folder:
        files = sorted(folder.glob("files/*/*.jpg"), key=lambda p: p.name)
        copy = Beton.open(folder / "stock.beton")
        assert len(files) == len(copy) == len(samples)
        for i, file in enumerate(files):
            assert file.read_bytes() == samples.sample(i).tobytes() == copy.sample(i).tobytes()
            assert int(file.parent.name) == samples.label[i]
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------ clocks and caches


def test_cpu_time_of_children_counts():
    before = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", "print(sum(range(10**7)), flush=True)\ninput()"], stdin=-1, stdout=-1)
    try:
        child.stdout.readline()
        assert cpu_seconds() - before > 0.05
    finally:
        child.kill()
        child.communicate()


def test_clock_counts_whole_bursts():
    calls = []
    rate = clock(lambda: calls.append(1), batch=8, seconds=0.01, multiple=3)
    assert len(calls) % 3 == 0 and rate.images_per_s > 0
    calls.clear()
    clock(lambda: calls.append(1), batch=8, seconds=0.0)
    assert len(calls) == 2, "one not counted, one that is"


def test_a_mapped_file_is_dropped_and_reads_the_same(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 4 << 20, np.uint8)
    (tmp_path / "control").write_bytes(content.tobytes())
    with open(tmp_path / "control", "rb") as control:
        os.fsync(control.fileno())
        os.posix_fadvise(control.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pagecache.resident(tmp_path / "control") > pagecache.DROPPED:
        pytest.skip("the file system here keeps a file's pages, whoever asks")
    (tmp_path / "mapped").write_bytes(content.tobytes())
    mapped = np.memmap(tmp_path / "mapped", np.uint8, mode="r")
    assert (mapped == content).all() and pagecache.resident(tmp_path / "mapped") == 1
    pagecache.evict(tmp_path / "mapped")
    assert pagecache.resident(tmp_path / "mapped") <= pagecache.DROPPED
    assert (mapped == content).all()


# ------------------------------------------------------------------------------------------------ what it makes of the numbers


def form(*, kind="jpeg", rate=950.0, cpu=1.0, bound=1000.0, stalled=0.0, name="X"):
    warm = {"images_per_s": rate, "cpu_ms_per_image": cpu, "share_of_ceiling": rate / bound}
    disk = {"stalled_share": stalled, "megabytes_per_s": 100.0}
    slow = {"warm": {**warm, "images_per_s": rate / 2}, "cold": disk}
    what = "memcpy" if kind == "raw" else "bare libjpeg-turbo"
    ceiling = {"what": what, "images_per_s": bound, "cpu_ms_per_image": 1e3 / bound}
    return {"name": name, "kind": kind, "backends": {"slow": slow, "quick": {"warm": warm, "cold": disk}}, "ceiling": ceiling}


@pytest.mark.parametrize(
    "numbers, expected",
    [
        ({}, "X: JPEG decoding (quick at 95% of bare libjpeg-turbo), cold: the same"),
        ({"kind": "raw"}, "X: memory copy (quick at 95% of memcpy)"),
        ({"rate": 500.0, "cpu": 1.0}, "X: waiting, not work (quick's threads are busy 50% of the time)"),
        ({"rate": 500.0, "cpu": 1.9}, "X: quick's own work (1.90 ms of CPU time per image, bare libjpeg-turbo 1.00)"),
        ({"stalled": 0.4}, "cold: the disk (40% of the time, at 100 MB/s)"),
    ],
)
def test_what_binds(numbers, expected):
    assert expected in report.binds([form(**numbers)], threads=1)


def test_ratios_are_taken_within_rounds():
    rates = [Rate(1000.0, 1.0), Rate(500.0, 2.0), Rate(1000.0, 1.0)]
    ours = {"warm": {**report.series(rates, 1), "share_of_ceiling": None}, "cold": None}
    row = report.yardstick("ffcv", 2, [Rate(100.0, 9.0), Rate(50.0, 18.0), Rate(100.0, 12.0)], 70.0)
    forms = [{"name": "X", "kind": "jpeg", "backends": {"torchvision": ours, "ffcv": ours}, "ceiling": None}]
    setting = {"threads": 1, "rounds": 3, "seconds": 1.0, "device": "cpu", "views": recipe.VIEWS}
    result = report.result(origin="x", forms=forms, unusable={}, yardsticks=[row], failed={}, setting=setting)
    assert result["reference"]["backend"] == "ffcv"
    assert result["yardsticks"][0]["cpu_time_of_ours"] == pytest.approx(9)
    assert result["yardsticks"][0]["rate_of_ours_to_this"] == pytest.approx(10)


def test_name_of_the_result(tmp_path):
    assert report.file(tmp_path / "x.json") == tmp_path / "x.json"
    name = report.file(tmp_path).name
    assert name.startswith(f"loader_{len(os.sched_getaffinity(0))}cores_") and name.replace("_", "").replace(".", "").isalnum()


# ------------------------------------------------------------------------------------------------ yardsticks


def test_workers_are_swept():
    assert yardsticks.sweep(1) == [0, 1] and yardsticks.sweep(2) == [0, 1, 2] and yardsticks.sweep(12) == [0, 1, 2, 4, 8, 12]


def test_a_yardstick_that_fails_says_why(tmp_path):
    yardstick = Yardstick("unheard-of", tmp_path, 1)
    try:
        with pytest.raises(Failed, match="unheard-of"):
            yardstick.ready()
    finally:
        yardstick.close()


def test_views_are_dinos():
    sizes = [view.crop.size for view in recipe.spec()]
    assert sizes == [224] * 2 + [96] * 6 and recipe.VIEWS == "2x224 + 6x96"


@pytest.mark.slow  # FFCV compiles eight pipelines
def test_the_whole_bench_from_the_command_line(beton_data, tmp_path):
    command = [sys.executable, "-m", "fastssl.bench", "loader", "--path", str(beton_data), "--out", str(tmp_path), "--seconds", "0.2"]
    done = subprocess.run([*command, "--rounds", "1", "--batch", "16"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("loader_*.json")
    result = json.loads(file.read_text())
    assert file.with_suffix(".png").is_file() and "What binds: " in done.stdout
    measured = {row["name"] for row in result["yardsticks"]}
    assert measured | set(result["yardsticks_not_measured"]) == {"ffcv", "dali", "pillow"} and "pillow" in measured
    if "ffcv" not in result["unusable_backends"]:
        assert "ffcv" in measured
    # They decode, crop and resize eight views; ours decodes once.
    assert all(row["cpu_time_of_ours"] > 1 for row in result["yardsticks"])
