"""python -m fastssl.augment.show: what is on the sheet, that a wrong view is seen on it, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFont
from skimage import data as photographs

from fastssl.augment import Augmenter, pillow, show
from fastssl.augment.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColourDraws
from fastssl.pictures import CAPTION, COLOURS, FRAME, GAP, MARGIN
from fastssl.recipes import RECIPES
from fastssl.views import Crop, PatchCrop, Photometric, View

PHOTO = Photometric(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2, blur=0.5, solarize=0.2)
SIZE = 224  # shown one to one
SEED, EPOCH = 5, 3
# Ours and Pillow's on the 0..255 scale, mean and largest of a picture; measured over every recipe, four images, four epochs.
NEAR = (4.0, 17.0)  # 3.5, 14.9
SEEN = 10.0  # mean of the worst picture when something is wrong
TWO = (View(crop=Crop(size=SIZE), photometric=PHOTO), View(crop=Crop(size=SIZE, interpolation="bicubic", flip=1.0), photometric=PHOTO))


@pytest.fixture(scope="module")
def images():
    """A wide and a tall photograph."""
    astronaut = photographs.astronaut()
    return [Image.fromarray(astronaut[:150, 100:350]), Image.fromarray(astronaut[:200, 180:280])]


@pytest.fixture
def files(tmp_path, images):
    paths = [tmp_path / "wide.png", tmp_path / "tall.png"]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return [str(path) for path in paths]


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setitem(RECIPES, "two", lambda: TWO)


def augmenter(spec, seed=SEED):
    return Augmenter(spec, device="cpu", dtype=torch.float32, seed=seed)


def batch_of(images, spec):
    return show.as_batch(images, spec, seed=SEED, epoch=EPOCH, device=torch.device("cpu"))


def cards_of(images, spec, *, ours=SEED):
    """Batch and cards; our colours from the seed `ours`."""
    batch = batch_of(images, spec)
    return batch, show.cards(images, batch, spec, augmenter(spec, ours), SEED)


def assert_near(card):
    mean, largest = float(card.difference.mean()), float(card.difference.max())
    assert mean <= NEAR[0] and largest <= NEAR[1], f"{card.name}: mean {mean:.2f}, largest {largest:.1f}"


def test_the_batch_holds_the_images(images):
    batch = batch_of(images, TWO)
    assert batch.epoch == EPOCH and batch.boxes.shape == (2, 2, 4) and batch.flips[:, 1].all()
    for i, image in enumerate(images):
        assert (batch.image(i).numpy() == np.asarray(image)).all()


def test_the_sheet_shows_ours_pillows_and_the_difference(files, images, two, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    show.main([*files, "--recipe", "two", "--out", str(out), "--seed", str(SEED), "--epoch", str(EPOCH)])
    assert capsys.readouterr().out.startswith(f"{out}: 4 pictures;")
    page = Image.open(out)
    # One column: two views one below the other are higher than the sources.
    block = CAPTION + 2 * show.CARD[1] + GAP
    assert page.size == (2 * MARGIN + show.SOURCE + 2 * GAP + show.CARD[0], 2 * MARGIN + CAPTION + 2 * (2 * GAP + block))

    batch, of_images = cards_of(images, TWO)
    shown = np.asarray(page).astype(int)
    for i, of_image in enumerate(of_images):
        assert [card.name for card in of_image] == ["1", "2"]
        for v, card in enumerate(of_image):
            top = MARGIN + CAPTION + 2 * GAP + i * (block + 2 * GAP) + CAPTION + v * (show.CARD[1] + GAP) + 4 * CAPTION
            left = MARGIN + show.SOURCE + 2 * GAP
            for n, levels in enumerate((card.ours, card.theirs, 16 * card.difference)):
                cell = shown[top : top + show.CELL, left + n * (show.CELL + FRAME) :][:, : show.CELL]
                assert (cell[:FRAME] == ImageColor.getrgb(COLOURS[v])).all()
                assert np.abs(cell[FRAME:-FRAME, FRAME:-FRAME] - levels.numpy().clip(0, 255)).max() <= 0.5
    # Ours are the augmenter's, theirs the Pillow reference's.
    expected = augmenter(TWO)(batch).groups[0].pixels.unflatten(0, (2, 2))
    back = expected * torch.tensor(PHOTO.std).view(3, 1, 1) + torch.tensor(PHOTO.mean).view(3, 1, 1)
    params = ColourDraws(TWO, device=torch.device("cpu"), seed=SEED)(EPOCH, batch.index)
    for i, image in enumerate(images):
        for v, view in enumerate(TWO):
            assert (of_images[i][v].ours / 255 - back[v, i].permute(1, 2, 0)).abs().max() < 1e-5
            theirs = pillow.colour(pillow.cut(image, view.crop, batch.boxes[i, v].tolist(), bool(batch.flips[i, v])), params, v, i)
            assert (of_images[i][v].theirs.numpy() == np.asarray(theirs)).all()


@pytest.mark.parametrize("recipe", ["lewel", "dino", "w2ssl", "obow", "eval"])
def test_differences_are_small_unless_something_is_wrong(images, recipe):
    """Of a picture in the mean, and anywhere; the colours of another seed and a moved source are seen."""
    spec = RECIPES[recipe]()
    batch, of_images = cards_of(images, spec)
    for card in (card for of_image in of_images for card in of_image):
        assert_near(card)
    if recipe != "eval":
        assert max(card.difference.mean() for of_image in cards_of(images, spec, ours=1)[1] for card in of_image) > SEEN
    moved = show.cards([Image.fromarray(np.roll(np.asarray(im), 9, 1)) for im in images], batch, spec, augmenter(spec), SEED)
    assert max(card.difference.mean() for card in moved[0]) > SEEN


def test_patches_are_compared_one_by_one(images):
    patched = PatchCrop(size=128, scale=(0.6, 1.0), patch_size=48, patches=4, flip=1.0)
    spec = (View(crop=Crop(size=64), photometric=PHOTO), View(crop=patched, photometric=PHOTO))
    _, of_images = cards_of(images, spec)
    for of_image in of_images:
        assert [card.name for card in of_image] == ["1", "2.1", "2.2", "2.3", "2.4"]
        for card in of_image:
            assert_near(card)
        assert all(card.ours.shape == (48, 48, 3) for card in of_image[1:])
        assert len({card.drawn[0] for card in of_image}) == 5


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_patchs_box_is_where_it_comes_from(flip):
    """On a picture whose red grows to the right and green downwards, the mean colour of a patch is that of its box's middle."""
    y, x = np.mgrid[:200, :250]
    ramp = Image.fromarray(np.stack((x, y, 0 * x), -1).astype(np.uint8))
    spec = (View(crop=PatchCrop(size=128, scale=(0.5, 0.8), patch_size=48, patches=9, flip=flip)),)
    _, (of_image,) = cards_of([ramp], spec)
    for card in of_image:
        top, left, height, width = card.box
        middle = card.ours.mean((0, 1))
        assert abs(middle[0] - (left + width / 2 - 0.5)) < 0.2 and abs(middle[1] - (top + height / 2 - 0.5)) < 0.2


def test_boxes_and_tags_on_the_source():
    """Four cards with one box: their tags stand side by side, within the picture's height."""
    card = show.Card("1", 0, (150, 0, 50, 100), ("", "", ""), torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))
    of_image = [replace(card, name=str(v + 1), view=v) for v in range(4)]
    source = Image.new("RGB", (100, 151), "white")
    show.tag_boxes(source, 1.0, of_image)
    shown = np.asarray(source)[151 - show.TAG[1]]
    found = [np.flatnonzero((shown == ImageColor.getrgb(COLOURS[v])).all(1)) for v in range(4)]
    at = 0
    for card, columns in zip(of_image, found, strict=True):
        assert columns[0] == at and columns[-1] == at + show.tag_width(card) - 1
        at += show.tag_width(card)


def test_captions_tell_what_was_drawn():
    params = ColourDraws(TWO, device=torch.device("cpu"), seed=SEED)(EPOCH, torch.tensor([0]))
    params.order[0, 0] = torch.tensor([HUE, SATURATION, BRIGHTNESS, CONTRAST])
    for name, value in dict(jitter=True, brightness=1.3, contrast=0.71, saturation=0.9, hue=-0.05, grey=True, sigma=1.234).items():
        getattr(params, name)[0, 0] = value
    params.solarize[0, 0] = False
    assert show.colour_text(params, 0, 0) == (
        "hue -0.050, saturation x 0.90, brightness x 1.30, contrast x 0.71",
        "grey, blur 1.23 px, not solarised",
    )
    params.jitter[0, 0], params.sigma[0, 0] = False, 0.0
    assert show.colour_text(params, 0, 0) == ("no jitter", "grey, no blur, not solarised")


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_captions_fit(recipe, images):
    """Every recipe's lines end inside their card."""
    font = ImageFont.load_default(size=show.FONT)
    _, (of_image,) = cards_of(images[:1], RECIPES[recipe]())
    for card in of_image:
        widths = [font.getlength(line) for line in card.drawn]
        assert show.tag_width(card) + show.TAG[0] + widths[0] <= show.CARD[0] and max(widths[1:]) <= show.CARD[0]


def test_seed_and_epoch_change_the_sheet(files, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages = []
    for flags in ([], ["--seed", "1"], ["--epoch", "1"], []):
        show.main([files[0], "--recipe", "two", *flags])
        pages.append((tmp_path / "views_two.png").read_bytes())
    assert pages[0] == pages[3] and len(set(pages)) == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["wide.png", "--recipe", "towo"], "There is no recipe 'towo'. Did you mean two"),
        (["wide.png", "missing.jpg", "--recipe", "two"], "missing.jpg does not exist. Name one or more image files"),
        (["broken.jpg", ".", "--recipe", "two"], r"broken.jpg cannot be read as an image \(.*\); \. is a folder. Name one"),
        (["cut.jpg", "--recipe", "two"], "cut.jpg cannot be read as an image"),
        (["--recipe", "two"], "No image was given. Name one or more image files"),
        (["wide.png", "--recipe", "two", "--out", "sheet.jpg"], "choose another file with --out FILE.png"),
        (["wide.png", "--recipe", "two", "--out", "wide.png"], "cannot be wide.png: .* not one of the images"),
        (["wide.png", "--recipe", "two", "--out", "no/such/sheet.png"], "its folder is missing or read-only"),
        (["wide.png", "--recipe", "two", "--device", "cuda"], "no CUDA device .* take --device cpu"),
    ],
)
def test_what_is_refused_is_refused_before_any_work(files, two, tmp_path, monkeypatch, images, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(show, "Augmenter", lambda *a, **k: pytest.fail("work was done"))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 this is no JPEG")
    images[0].save(tmp_path / "cut.jpg", quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        show.main(flags)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
