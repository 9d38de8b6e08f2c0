"""python -m eval.visualize: the maps are those the networks use, they lie where they should, and what is refused."""

from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFont
from torch import nn

from eval import attention_maps, visualize
from eval.attention_maps import CELL, SIDE, STRENGTH, aligned_maps, attention_weights, box_in_view, choose_maps, cls_attention, heat
from fastssl.augment import Augmenter
from fastssl.augment.show import as_batch
from fastssl.batch import ImageBatch
from fastssl.checkpoint import FORMAT
from fastssl.config import EvalConfig, to_dict
from fastssl.methods import METHODS, scfs
from fastssl.methods.lewel import LEWEL, AlignedNet, aligned_pooling
from fastssl.models.backbones import build_backbone
from fastssl.models.stage_heads import feature_search
from fastssl.models.vit import ViT
from fastssl.optim.schedules import Sched
from fastssl.pictures import CAPTION, COLOURS, FRAME, GAP, MARGIN, denormalise
from fastssl.presets import PRESETS
from fastssl.views import Crop, Photometric, View
from tests.golden.toy import ToyBackbone

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "out_dim": 64, "bottleneck": 16, "stage_bottleneck": 16, "stage_hidden": 32, "stage_dim": 16, "dim": 16}


def small(preset, data):
    """What a checkpoint of the preset with narrow heads would hold, but for its weights."""
    config = to_dict(PRESETS[preset]())
    config["data"]["path"] = str(data)
    config["method"] |= {k: v for k, v in SMALL.items() if k in config["method"]}
    config["eval"] |= {"resize": 72, "crop": 64}
    return {"format": FORMAT, "method": config["method"]["name"], "preset": preset, "config": config, "step": 12}


def scramble(module):
    """Statistics of BatchNorm that are not the first ones."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


@pytest.fixture(scope="module")
def runs(class_folders, tmp_path_factory):
    """Folder with a checkpoint of every kind, and the methods they hold.  That of a plain ResNet is refused before its weights."""
    folder, methods = tmp_path_factory.mktemp("runs"), {}
    torch.manual_seed(0)
    for name in ("scfs_mini", "lewel_mini", "lewel_m_mini", "dino_vit_mini"):
        saved = small(name, class_folders)
        cfg = visualize.saved_config(saved, name)
        backbone = partial(build_backbone, cfg.model.arch, image_size=cfg.model.image_size)
        methods[name] = METHODS[cfg.method.name](cfg.method, backbone, cfg.model.norm).eval()
        scramble(methods[name])
        torch.save(saved | {"model": methods[name].state_dict()}, folder / f"{name}.pt")
    torch.save(small("dino_mini", class_folders), folder / "dino_mini.pt")
    return folder, methods


# ------------------------------------------------------------------------------------------------ the maps


@pytest.fixture
def vit():
    """Attention far from even."""
    torch.manual_seed(0)
    vit = ViT(24, 3, 2, 4, image_size=16).double().eval()
    for block in vit.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.7)
    return vit


def test_attention_is_the_fused_ones(vit):
    """softmax(q k^T / sqrt(d)) v through the projection is what the block computes."""
    attention = vit.blocks[0].attn
    assert attention.fused_attn
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    weights = attention_weights(attention, x, 9)
    v = attention.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 12)).transpose(1, 2)
    torch.testing.assert_close(attention.proj((weights @ v).transpose(1, 2).flatten(2)), attention(x), rtol=0, atol=1e-12)
    assert weights.shape == (2, 2, 9, 9) and weights.max() > 0.5
    torch.testing.assert_close(attention_weights(attention, x, 1), weights[:, :, :1], rtol=0, atol=1e-14)


def test_cls_attention_is_of_the_last_block(vit):
    """Patches row by row, on an image that is not square and has another size than the position table."""
    seen = []
    vit.blocks[-1].attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    vit(x)
    maps = cls_attention(vit, x)
    assert maps.shape == (2, 2, 5, 7)
    expected = attention_weights(vit.blocks[-1].attn, seen[0], 36)[:, :, 0]
    torch.testing.assert_close(maps.flatten(2), expected[:, :, 1:], rtol=0, atol=1e-14)


def test_alignment_maps_are_those_that_pool():
    torch.manual_seed(0)
    net = AlignedNet(ToyBackbone(4, 8), LEWEL.Config(hidden=16, dim=12, heads=2, scale=0.3)).double().eval()
    scramble(net)
    x = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    maps = aligned_maps(net, x)
    assert maps.shape == (3, 12, 4, 6)
    pixels = net.backbone(x).map.flatten(2).transpose(1, 2)
    aligned = net.aligned_projector.rows(aligned_pooling(pixels, maps.flatten(2).transpose(1, 2), 2))
    torch.testing.assert_close(aligned, net(x).aligned, rtol=0, atol=1e-12)


def test_the_most_peaked_maps_come_first_then_the_farthest():
    def peak(at, height):
        p = torch.full((4, 4), (1 - height) / 15)
        p[at] = height
        return p

    # Group 1: map 1, then what is far from it and from one another; 2 nearly repeats 1, and 4 nearly 3.  Group 2: alike but for the last.
    first = [peak((0, 0), h) for h in (0.2, 0.9, 0.8)] + [peak((3, 3), 0.6), peak((3, 3), 0.58), peak((1, 2), 0.5)]
    second = [peak((2, 2), 0.3)] * 5 + [peak((2, 2), 0.25)]
    maps = torch.stack(first + second).expand(2, -1, -1, -1)
    assert choose_maps(maps, 2, 1) == [[1], [6]]
    assert choose_maps(maps, 2, 3) == [[1, 3, 5], [6, 11, 7]]
    assert [sorted(group) for group in choose_maps(maps, 2, 99)] == [list(range(6)), list(range(6, 12))]
    # Over the images: a peak on one of two counts for less than a lower one on both.
    once = torch.stack((maps[0, [0, 3]], maps[0, [2, 3]]))
    assert choose_maps(once, 1, 1) == [[1]]


def test_the_search_is_that_of_the_training(runs, monkeypatch):
    """On the same crops, the attention is what SCFS's forward searches with."""
    method = runs[1]["scfs_mini"]
    spec = tuple(View(crop=Crop(size=64 if v < 2 else 32)) for v in range(5))
    views = Augmenter(spec, device="cpu", dtype=torch.float32, seed=0)(batch_of(2, spec))
    searched = []

    def search(queries, maps):
        searched.append(feature_search(queries, maps))
        return searched[-1]

    monkeypatch.setattr(scfs, "feature_search", search)
    with torch.no_grad():
        method(views, Sched(epoch=0, lr=0.0, weight_decay=0.0, ema_momentum=0.0))
        globals_, locals_ = (group.pixels for group in views.groups)
        found = attention_maps.searched_attention(method.student, method.teacher, globals_[:2], locals_)
    assert list(found) == ["layer2", "layer3", "layer4"] and found["layer2"].shape == (3, 2, 8, 8)
    for maps, expected in zip(found.values(), searched, strict=True):
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)


def ramp(width=120, height=100):
    """Red grows to the right, green downwards: a colour tells where a pixel comes from."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack((2 * x, 2 * y, np.full_like(x, 60)), -1).astype(np.uint8))


def batch_of(count, spec, seed=0) -> ImageBatch:
    return as_batch([ramp(120, 100 + i) for i in range(count)], spec, seed=seed, epoch=0, device=CPU)


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_local_crops_place_in_a_global_one(flip):
    """What the global crop shows inside the outline is what the local crop shows, wherever both were cut."""
    photometric = Photometric()
    spec = tuple(
        View(crop=Crop(size=96, scale=scale, flip=f), photometric=photometric)
        for scale, f in (((0.8, 1.0), flip), ((0.05, 0.1), 0.0), ((0.05, 0.1), 1.0))
    )
    views = Augmenter(spec, device="cpu", dtype=torch.float32, seed=0)(batch := batch_of(8, spec))
    crops = denormalise(views.groups[0].pixels, photometric).unflatten(0, (3, 8))
    compared = 0
    for i in range(8):
        boxes = batch.boxes[i].tolist()
        for v in (1, 2):
            place = box_in_view(boxes[v], boxes[0], bool(batch.flips[i, 0]))
            if place is None or place[2] * place[3] * boxes[0][2] * boxes[0][3] < boxes[v][2] * boxes[v][3] - 1e-3:
                continue  # not wholly in it
            top, left, height, width = (96 * t for t in place)
            y, x = round(top + height / 2), round(left + width / 2)
            shown = crops[0, i, y - 1 : y + 1, x - 1 : x + 1].mean((0, 1))
            assert (shown - crops[v, i].mean((0, 1))).abs().max() < 2
            compared += 1
    assert compared >= 8


def test_places_that_are_cut_off():
    view = (10, 20, 40, 80)
    assert box_in_view((0, 0, 30, 40), view, False) == (0, 0, 0.5, 0.25)
    assert box_in_view((0, 0, 30, 40), view, True) == (0, 0.75, 0.5, 0.25)
    assert box_in_view((40, 80, 100, 100), view, False) == (0.75, 0.75, 0.25, 0.25)
    assert box_in_view((0, 0, 100, 200), view, True) == (0, 0, 1, 1)
    assert box_in_view((10, 0, 40, 20), view, False) is None and box_in_view((50, 30, 9, 9), view, True) is None


def test_a_map_is_drawn_position_by_position():
    """Lowest and highest value in the scale's first and last colour, over the image in grey; rows are rows."""
    white = torch.full((28, 28, 3), 255.0)
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    shown = np.asarray(heat(white, 0.01 * values - 7)).astype(float)
    colours = 255 * matplotlib.colormaps[attention_maps.SCALE](values.numpy() / 5)[..., :3]
    for row in range(2):
        for column in range(3):
            y, x = (2 * row + 1) * SIDE // 4, (2 * column + 1) * SIDE // 6
            expected = STRENGTH * colours[row, column] + (1 - STRENGTH) * 255
            assert np.abs(shown[y - 40 : y + 40, x - 25 : x + 25] - expected).max() <= 2
    # A map that is the same everywhere, and an image that is dark on the left
    half = torch.cat((torch.zeros(28, 14, 3), white[:, :14]), 1)
    flat = np.asarray(heat(half, torch.full((7, 7), 0.25))).astype(float)
    dark, bright = flat[:, :60].mean((0, 1)), flat[:, -60:].mean((0, 1))
    assert np.abs(bright - dark - (1 - STRENGTH) * 255).max() < 3


def test_captions_fit_their_cells():
    font = ImageFont.load_default(size=visualize.FONT)
    for line in (
        "224 px of a shorter side of 256",
        "local, 100% of it in view 1",
        "view 10   224 px   flipped",
        "0.00 to 3601.00   (100.0%)",
    ):
        assert font.getlength(line) <= CELL


# ------------------------------------------------------------------------------------------------ the command


def run(*flags):
    visualize.main([str(flag) for flag in flags])


def cell(page, column, line, lines, image):
    """A picture of the image's block, with its frame.  lines: of pictures per image."""
    down = 2 * CAPTION + CELL + GAP
    top = MARGIN + (head_lines(page) + 1) * CAPTION + 2 * GAP + image * (CAPTION + lines * down + GAP) + CAPTION + line * down + 2 * CAPTION
    left = MARGIN + column * (CELL + GAP)
    return np.asarray(page.crop((left, top, left + CELL, top + CELL))).astype(int)


def head_lines(page):
    """Lines of text before the bar of colours, which is the first that is not grey."""
    coloured = np.ptp(np.asarray(page.crop((0, 0, page.width, 200))).astype(int), axis=2).max(1) > 60
    return (int(np.flatnonzero(coloured)[0]) - 3 - MARGIN) // CAPTION


def assert_margins_are_white(page, columns):
    """No text or picture reaches the page's border or, below the head, the space between two columns."""
    shown = np.asarray(page)
    assert (shown[:, -MARGIN:] == 255).all() and (shown[-MARGIN:] == 255).all()
    below = shown[MARGIN + (head_lines(page) + 1) * CAPTION + 2 * GAP + CAPTION :]
    for column in range(1, columns):
        right = MARGIN + column * (CELL + GAP)
        assert (below[: 2 * CAPTION + CELL, right - GAP : right] == 255).all()


@pytest.fixture
def photos(tmp_path):
    for name, size in (("wide.png", (120, 70)), ("tall.png", (80, 110))):
        ramp(*size).save(tmp_path / name)
    return [tmp_path / "wide.png", tmp_path / "tall.png"]


@pytest.mark.parametrize("network", ["target", "online"])
def test_scfs_sheet(runs, photos, tmp_path, capsys, network):
    folder, methods = runs
    out = tmp_path / "sheet.png"
    run(
        "--checkpoint",
        folder / "scfs_mini.pt",
        *photos,
        "--out",
        out,
        "--seed",
        3,
        *(["--network", "online"] if network == "online" else []),
    )
    assert f"16 pictures of each of 2 images; scfs, resnet18, step 12, {network} network" in capsys.readouterr().out
    page = Image.open(out)
    assert_margins_are_white(page, 9)

    method = methods["scfs_mini"]
    spec = tuple(View(crop=view.crop) for view in PRESETS["scfs_mini"]().views)
    images = [Image.open(path) for path in photos]
    batch = as_batch(images, spec, seed=3, epoch=0, device=CPU)
    views = Augmenter(spec, device="cpu", dtype=torch.float32, seed=3)(batch)
    pixels = views.per_view()
    searched = method.teacher if network == "target" else method.student
    differ = 0
    for i, k, n, stage in ((0, 0, 0, "layer2"), (1, 1, 1, "layer3"), (0, 3, 2, "layer4"), (1, 2, 0, "layer2")):
        v = k + 2
        with torch.no_grad():
            query = method.student.backbone(pixels[v][i : i + 1]).stages[stage].mean((2, 3))
            attention = feature_search(query, searched.backbone(pixels[0][i : i + 1]).stages[stage])[0, 0]
        column, line = 4 * (k % 2) + 1, k // 2
        local = cell(page, column, line, 2, i)
        assert (local[:FRAME] == ImageColor.getrgb(COLOURS[v])).all()
        grey = denormalise(pixels[v][i : i + 1], Photometric())[0].mean((0, 1)).numpy()
        assert np.abs(local[FRAME:-FRAME, FRAME:-FRAME].mean((0, 1)) - grey).max() < 4
        shown = cell(page, column + 1 + n, line, 2, i)
        assert (shown[:FRAME] == ImageColor.getrgb(COLOURS[v])).all()
        expected = heat(denormalise(pixels[0][i : i + 1], Photometric())[0], attention)
        different = np.abs(shown[FRAME:-FRAME, FRAME:-FRAME] - np.asarray(expected).astype(int)).max(-1) > 2
        place = box_in_view(batch.boxes[i, v].tolist(), batch.boxes[i, 0].tolist(), bool(batch.flips[i, 0]))
        if place is None:
            assert not different.any()
            continue
        rows, columns = np.flatnonzero(different.any(1)), np.flatnonzero(different.any(0))
        drawn = (rows[0], columns[0], rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0])
        assert np.abs(np.array(drawn) - SIDE * np.array(place)).max() <= 4  # the outline and nothing else
        assert different.mean() < 0.1
        differ += 1
    assert differ


def small_eval():
    return EvalConfig(resize=72, crop=64)


def centre_views(images, spec):
    return Augmenter(spec, device="cpu", dtype=torch.float32, seed=0)(as_batch(images, spec, seed=0, epoch=0, device=CPU))


@pytest.mark.parametrize(("name", "network"), [("lewel_mini", "online"), ("lewel_m_mini", "query")])
def test_lewel_sheet(name, network, runs, photos, tmp_path):
    folder, methods = runs
    run("--checkpoint", folder / f"{name}.pt", *photos, "--out", tmp_path / "sheet.png", "--size", 128, "--maps", 3)
    page = Image.open(tmp_path / "sheet.png")
    assert_margins_are_white(page, 7)  # four groups of three, two groups in a line
    spec = visualize.centre_crop(128, small_eval(), Photometric())
    assert spec[0].crop.resize == 144
    views = Augmenter(spec, device="cpu", dtype=torch.float32, seed=0)(
        as_batch([Image.open(p) for p in photos], spec, seed=0, epoch=0, device=CPU)
    )
    with torch.no_grad():
        maps = aligned_maps(methods[name].get_submodule(network), views.groups[0].pixels)
    chosen = choose_maps(maps, 4, 3)
    crops = denormalise(views.groups[0].pixels, Photometric())
    for i, g, m in ((0, 0, 0), (1, 1, 2), (1, 2, 0), (0, 3, 1)):
        shown = cell(page, 1 + 3 * (g % 2) + m, g // 2, 2, i)
        assert (shown[:FRAME] == ImageColor.getrgb(COLOURS[g])).all()
        expected = np.asarray(heat(crops[i], maps[i, chosen[g][m]])).astype(int)
        assert np.abs(shown[FRAME:-FRAME, FRAME:-FRAME] - expected).max() <= 2


def test_vit_sheet_of_the_runs_own_data(runs, class_folders, tmp_path, monkeypatch):
    folder, methods = runs
    run("--checkpoint", folder / "dino_vit_mini.pt", "--count", 3)
    page = Image.open(folder / "dino_vit_mini.maps.png")
    assert_margins_are_white(page, 5)
    names, images = visualize.validation_images(str(class_folders), 3)
    assert [name.partition("   ")[2] for name in names] == ["class class0", "class class1", "class class2"]
    files = sorted((class_folders / "val").rglob("*.jpg"))
    assert [name.split()[2] for name in names] == ["0", "6", "11"]
    for n, image in zip((0, 6, 11), images, strict=True):
        assert (np.asarray(image) == np.asarray(Image.open(files[n]).convert("RGB"))).all()
    spec = visualize.centre_crop(None, small_eval(), Photometric())
    views = centre_views(images, spec)
    with torch.no_grad():
        maps = cls_attention(methods["dino_vit_mini"].teacher.backbone, views.groups[0].pixels)
    crops = denormalise(views.groups[0].pixels, Photometric())
    for i in range(3):
        for column, values in enumerate([*maps[i], maps[i].mean(0)], start=1):
            shown = cell(page, column, 0, 1, i)[FRAME:-FRAME, FRAME:-FRAME]
            assert np.abs(shown - np.asarray(heat(crops[i], values)).astype(int)).max() <= 2


def test_a_backbone_alone(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--checkpoint", "random:vit_tiny_patch16", photos[0], "--size", 96)
    first = (tmp_path / "random_vit_tiny_patch16.maps.png").read_bytes()
    torch.save(build_backbone("vit_tiny_patch16").state_dict(), "weights.pth")
    run("--checkpoint", "weights.pth", photos[0], "--size", 96)
    assert (tmp_path / "weights.maps.png").read_bytes() != first


def test_as_many_images_as_there_are(class_folders):
    names, images = visualize.validation_images(str(class_folders), 1000)
    assert len(names) == len(images) == len(set(names)) == 12


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["{runs}/dino_mini.pt", "wide.png"],
            "is a resnet18 trained with dino, which makes no maps. What can be drawn: runs of scfs",
        ),
        (["random:resnet18", "wide.png"], "is a resnet18 by itself, which makes no maps. What can be drawn"),
        (["nowhere.pt", "wide.png"], "There is no checkpoint at nowhere.pt"),
        (["wide.png", "tall.png"], "cannot be read as weights"),
        (["random:vit_tiny_patch16"], "does not say what it was trained on. Name image files, or a data set with --data DIR"),
        (["random:vit_tiny_patch16", "wide.png", "--size", "100"], "no whole number of patches of 16: take --size 96 or 112"),
        (["random:vit_tiny_patch16", "wide.png", "--size", "0"], "--size must be a positive number"),
        (["random:vit_tiny_patch16", "wide.png", "--maps", "3"], "--maps is for runs of lewel"),
        (["{runs}/lewel_mini.pt", "wide.png", "--maps", "0"], "--maps must be at least 1"),
        (["{runs}/scfs_mini.pt", "wide.png", "--size", "64"], "--size is for centre crops"),
        (["{runs}/dino_vit_mini.pt", "wide.png", "--data", "x"], "leave one of the two out"),
        (["{runs}/dino_vit_mini.pt", "--count", "0"], "--count must be at least 1"),
        (["{runs}/dino_vit_mini.pt", "--data", "x"], "There is no data at x.* Or name image files, or other data with --data DIR"),
        (["{runs}/dino_vit_mini.pt", "missing.png"], "missing.png does not exist"),
        (["{runs}/dino_vit_mini.pt", "wide.png", "--out", "a.jpg"], "choose another file with --out FILE.png"),
        (["{runs}/dino_vit_mini.pt", "wide.png", "--device", "cuda"], "no CUDA device"),
        (["unknown_method.pt", "wide.png"], "is of the method 'newer', which this version does not know"),
        (["unknown_preset.pt", "wide.png"], "is of the preset 'newer', which this version does not know"),
        (["unknown_option.pt", "wide.png"], "the saved configuration has 'model.newer', which this version does not know. Use the version"),
        (["unlike.pt", "wide.png"], "does not fit this model"),
        (["diverged.pt", "wide.png"], "weights that are not finite: the run diverged"),
    ],
)
def test_what_is_refused_is_refused_before_any_work(runs, photos, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(visualize, "Augmenter", lambda *a, **k: pytest.fail("work was done"))
    checkpoint = flags[0].format(runs=runs[0])
    changes = {
        "unknown_method.pt": lambda saved: saved.update(method="newer"),
        "unknown_preset.pt": lambda saved: saved.update(preset="newer"),
        "unknown_option.pt": lambda saved: saved["config"]["model"].update(newer=1),
        "unlike.pt": lambda saved: saved["config"]["method"].update(hidden=8),
        "diverged.pt": lambda saved: saved["model"]["student.backbone.cls_token"].fill_(torch.nan),
    }
    if checkpoint in changes:
        saved = torch.load(runs[0] / "dino_vit_mini.pt", weights_only=True)
        changes[checkpoint](saved)
        torch.save(saved, checkpoint)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run("--checkpoint", checkpoint, *flags[1:])
    assert {path.name for path in tmp_path.iterdir()} == before
