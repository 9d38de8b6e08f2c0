"""views.png and curves.png: what is on them, and that no half-written file is left."""

import json
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from fastssl import pictures
from fastssl.augment import Augmenter
from fastssl.batch import Group, ImageBatch
from fastssl.pictures import CAPTION, CELL, COLOURS, FRAME, GAP, MARGIN, save_curves, save_views
from fastssl.views import Crop, Photometric, View

SPEC = (View(crop=Crop(size=16), photometric=Photometric(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))), View(crop=Crop(size=8)))


@pytest.fixture
def batch():
    """Two plain images of different sizes, the second taller than wide; view 2 of the first is mirrored."""
    one, two = np.full((40, 60, 3), (200, 40, 90), np.uint8), np.full((80, 30, 3), (20, 160, 250), np.uint8)
    one[:, 40:] = (0, 200, 0)
    boxes = [[[4, 4, 30, 30], [0, 0, 40, 60]], [[0, 0, 80, 30], [79, 29, 1, 1]]]
    return ImageBatch.of([one, two], boxes, [[False, True], [False, False]], index=[7, 1281166])


def cell(page, row, view, source_width):
    """One view with its frame, as an array."""
    left, top = MARGIN + source_width + GAP + view * (CELL + GAP), MARGIN + row * (CELL + CAPTION + GAP) + CAPTION
    return np.asarray(page)[top : top + CELL, left : left + CELL].astype(int)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_show_sources_boxes_and_views(batch, tmp_path, dtype):
    views = Augmenter(SPEC, device="cpu", dtype=dtype, seed=0)(batch)
    save_views(batch, views, SPEC, tmp_path / "views.png")
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"]
    page = Image.open(tmp_path / "views.png").convert("RGB")
    source_width = 240  # 60 x 40 scaled to the cell's height
    assert page.size == (2 * MARGIN + source_width + 2 * (CELL + GAP), 2 * MARGIN + 2 * (CELL + CAPTION) + GAP)

    tolerance = 2 if dtype == torch.float32 else 4
    for row, view, where, colour in [
        (0, 0, (0.5, 0.5), (200, 40, 90)),
        (0, 1, (0.5, 0.8), (200, 40, 90)),  # mirrored: green comes first
        (0, 1, (0.5, 0.1), (0, 200, 0)),
        (1, 0, (0.5, 0.5), (20, 160, 250)),
        (1, 1, (0.5, 0.5), (20, 160, 250)),
    ]:
        shown = cell(page, row, view, source_width)
        y, x = (int(t * CELL) for t in where)
        assert np.abs(shown[y, x] - colour).max() <= tolerance
        assert (shown[: FRAME - 1] == ImageColor.getrgb(COLOURS[view])).all()

    source = np.asarray(page)[MARGIN + CAPTION : MARGIN + CAPTION + CELL, MARGIN : MARGIN + source_width].astype(int)
    assert (source[4 * 4, 40:100] == ImageColor.getrgb(COLOURS[0])).all()  # upper edge of box 1, drawn four times as large
    assert (source[0] == ImageColor.getrgb(COLOURS[1])).all()
    caption = np.asarray(page.convert("L"))[MARGIN : MARGIN + CAPTION]
    assert (caption[:, MARGIN : MARGIN + source_width] < 128).any()


def test_views_of_fewer_samples(batch, tmp_path):
    views = Augmenter(SPEC, device="cpu", dtype=torch.float32, seed=0)(batch)
    save_views(batch, views, SPEC, tmp_path / "one.png", samples=1)
    assert Image.open(tmp_path / "one.png").height == 2 * MARGIN + CELL + CAPTION


def test_patches_stand_next_to_each_other(batch, tmp_path):
    """A view handed out as patches has a column for each, normalised as the view and framed in its colour."""
    views = Augmenter(SPEC, device="cpu", dtype=torch.float32, seed=0)(batch)
    first, second = views.groups
    grey = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(2).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (SPEC[0].photometric.mean, SPEC[0].photometric.std))
    views.groups = (Group(4, first.views * 3, (grey - mean) / std), second)
    save_views(batch, views, SPEC, tmp_path / "views.png")
    page = Image.open(tmp_path / "views.png").convert("RGB")
    assert page.width == 2 * MARGIN + 240 + 4 * (CELL + GAP)
    for row in range(2):
        for column, (level, view) in enumerate([(26, 0), (128, 0), (230, 0), (None, 1)]):
            shown = cell(page, row, column, 240)
            assert (shown[: FRAME - 1] == ImageColor.getrgb(COLOURS[view])).all()
            assert level is None or (np.abs(shown[FRAME:-FRAME, FRAME:-FRAME] - level) <= 1).all()


def test_flips_are_marked(batch, tmp_path):
    """The caption of a mirrored view differs from that of the same view as it is."""
    views = Augmenter(SPEC, device="cpu", dtype=torch.float32, seed=0)(batch)
    save_views(batch, views, SPEC, tmp_path / "a.png")
    views.flips = ~views.flips
    save_views(batch, views, SPEC, tmp_path / "b.png")
    a, b = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("a.png", "b.png"))
    rows = np.abs(a - b).max((1, 2)) > 0
    captions = np.zeros(len(rows), bool)
    for row in range(2):
        top = MARGIN + row * (CELL + CAPTION + GAP)
        assert rows[top : top + CAPTION].any()
        captions[top : top + CAPTION] = True
    assert not rows[~captions].any()


def test_a_failed_picture_leaves_the_old_one(batch, tmp_path, monkeypatch):
    path = tmp_path / "views.png"
    path.write_bytes(b"old")

    def fails(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fails)
    views = Augmenter(SPEC, device="cpu", dtype=torch.float32, seed=0)(batch)
    with pytest.raises(OSError, match="disk full"):
        save_views(batch, views, SPEC, path)
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"] and path.read_bytes() == b"old"


# ------------------------------------------------------------------------------------------------ curves


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], matplotlib.figure.Figure.savefig

    def spy(self, *args, **options):
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", spy)
    return figures


def records(*, knn=True, ema=True, terms=("embed_std",), steps=8):
    for step in range(50, 50 * steps + 1, 50):
        line = {
            "step": step,
            "epoch": step / 125,
            "train/loss": 3 / step,
            "train/skipped_steps": 0.0,
            "sched/lr": 0.1,
            "perf/img_per_s": 800.0,
        }
        line |= {f"train/{name}": 0.01 * step for name in terms}
        yield line | ({"sched/ema": 0.98} if ema else {})
        if knn and step % 200 == 0:
            yield {"step": step, "epoch": step / 125, "eval/knn10_top1": 42.0, "eval/knn20_top1": 43.2}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def panels(figure):
    """title -> lines as (x, y) lists."""
    out = {}
    for ax in figure.axes:
        title = ax.get_title(loc="left") or ax.get_title(loc="right")
        out[title] = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]
    return out


def test_curves_show_what_was_logged(tmp_path, drawn):
    source = write(tmp_path / "metrics.jsonl", records())
    save_curves(source, tmp_path / "curves.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    width, height = Image.open(tmp_path / "curves.png").size
    assert width == 1200 and 600 <= height <= 900
    shown = panels(drawn[0])
    assert set(shown) == {"loss", "learning rate", "EMA momentum", "images/s", "k-NN top-1, %", "embed_std"}
    steps = list(range(50, 401, 50))
    assert shown["loss"] == [(steps, [3 / s for s in steps])]
    assert shown["k-NN top-1, %"] == [([200, 400], [42.0, 42.0]), ([200, 400], [43.2, 43.2])]
    (epochs,) = drawn[0].axes[0].child_axes
    assert epochs._functions[0](250) == pytest.approx(2.0)


def test_curves_of_a_method_with_many_terms_and_without_evaluation(tmp_path, drawn):
    terms = [f"term{i}" for i in range(6)]
    source = write(tmp_path / "metrics.jsonl", records(knn=False, ema=False, terms=terms))
    save_curves(source, tmp_path / "curves.png")
    assert set(panels(drawn[0])) == {"loss", "learning rate", "images/s", *terms}
    boxes = [ax.get_position() for ax in drawn[0].axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_values_that_were_not_finite_are_gaps(tmp_path, drawn):
    lines = list(records(knn=False))
    lines[2]["train/loss"] = None
    source = write(tmp_path / "metrics.jsonl", lines)
    with source.open("a") as f:
        f.write('{"step": 450, "train/lo')  # a run that is writing, or was killed
    save_curves(source, tmp_path / "curves.png")
    ((steps, _),) = panels(drawn[0])["loss"]
    assert steps == [50, 100, 200, 250, 300, 350, 400]


def test_evaluation_before_the_first_step(tmp_path, drawn):
    source = write(tmp_path / "metrics.jsonl", [{"step": 0, "epoch": 0.0, "eval/knn20_top1": 40.0}])
    save_curves(source, tmp_path / "curves.png")
    assert panels(drawn[0])["k-NN top-1, %"] == [([0], [40.0])]


def test_nothing_logged_gives_no_picture(tmp_path):
    save_curves(tmp_path / "missing.jsonl", tmp_path / "curves.png")
    save_curves(write(tmp_path / "metrics.jsonl", []), tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_curves_leave_pyplot_alone(tmp_path):
    import subprocess
    import sys

    source = write(tmp_path / "metrics.jsonl", records(steps=2))
    code = (
        "import sys; from pathlib import Path; from fastssl.pictures import save_curves; "
        f"assert 'matplotlib' not in sys.modules; save_curves(Path({str(source)!r}), Path({str(tmp_path / 'c.png')!r})); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(pictures.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
    assert (tmp_path / "c.png").exists()
