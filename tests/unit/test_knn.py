import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from eval import extract as extract_module
from eval import knn as knn_module
from eval.accuracy import NO_RANK, truth_rank
from eval.features import Bank
from eval.knn import evaluate
from eval.neighbours import search
from eval.protocols import KNN_PROTOCOLS, LewelMonitor
from eval.results import write_result
from eval.votes import keep_index, knn, lewel_monitor, majority_knn, votes
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def bank(features, labels=None) -> Bank:
    features = torch.as_tensor(features)
    labels = torch.zeros(len(features), dtype=torch.long) if labels is None else torch.as_tensor(labels)
    return Bank(features, labels, torch.arange(len(features)))


# ------------------------------------------------------------------------------------------------ search


def test_chunks_and_tiles_do_not_show():
    torch.manual_seed(0)
    memory, queries = bank(torch.randn(301, 33)), bank(torch.randn(57, 33))
    whole = search(memory, queries, k=11, dist=ALONE)
    for chunk, tile in ((1, 7), (13, 64), (100, 300)):
        parts = search(memory, queries, k=11, dist=ALONE, chunk=chunk, tile=tile)
        for name in ("value", "index", "label"):
            assert torch.equal(getattr(parts, name), getattr(whole, name)), (name, chunk, tile)
    normal = [torch.nn.functional.normalize(b.features.double(), dim=1) for b in (queries, memory)]
    similarity = normal[0] @ normal[1].T
    torch.testing.assert_close(whole.value, similarity.gather(1, whole.index), rtol=0, atol=1e-7)
    assert torch.equal(whole.index, similarity.argsort(dim=1, descending=True)[:, :11])


def test_length_of_a_feature_does_not_count():
    torch.manual_seed(0)
    memory, queries = bank(torch.randn(40, 8)), bank(torch.randn(9, 8))
    scaled = bank(memory.features * torch.logspace(-8, 3, 40)[:, None])
    a, b = (search(m, queries, k=5, dist=ALONE) for m in (memory, scaled))
    assert torch.equal(a.index, b.index)


@pytest.mark.parametrize("squared_l2", [False, True])
def test_equal_images_are_ordered_by_sample_id(squared_l2):
    torch.manual_seed(0)
    few = torch.randn(3, 8)
    memory = bank(few.repeat(10, 1))
    shuffled = memory[torch.randperm(30)]
    near = search(shuffled, bank(few), k=14, dist=ALONE, squared_l2=squared_l2, tile=4)
    for i in range(3):
        assert near.index[i, :10].tolist() == list(range(i, 30, 3))
        nearest_other = near.index[i, 10:].tolist()
        assert nearest_other == list(range(nearest_other[0], 30, 3))[:4]
    if squared_l2:
        assert bool((near.value[:, :10] == 0).all())


def test_collapsed_features_give_the_first_samples():
    memory = bank(torch.ones(50, 6))
    near = search(memory[torch.arange(50).flip(0)], memory, k=7, dist=ALONE, tile=16)
    assert torch.equal(near.index, torch.arange(7).expand(50, 7))


def test_k_beyond_the_bank_takes_the_whole_bank():
    torch.manual_seed(0)
    memory, queries = bank(torch.randn(5, 4), [0, 1, 2, 0, 1]), bank(torch.randn(6, 4), [0, 1, 2, 0, 1, 2])
    assert search(memory, queries, k=99, dist=ALONE).index.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 6
    scores = knn(memory, queries, k=(5, 99), temperature=0.07, num_classes=3, dist=ALONE)
    assert scores["knn99_top1"] == scores["knn5_top1"]
    assert scores["knn99_top5"] == 100


# ------------------------------------------------------------------------------------------------ votes


def test_weighted_votes_by_hand():
    """Cosines .8, .6 and .6: one near neighbour outvotes two others at T = .07, and loses to them at T = 10."""
    memory = bank([[0.8, 0.6], [0.6, 0.8], [0.6, -0.8]], [0, 1, 1])
    queries = bank([[1.0, 0.0]], [0])
    sharp = knn(memory, queries, k=(1, 3), temperature=0.07, num_classes=2, dist=ALONE)
    assert sharp == {"knn1_top1": 100.0, "knn1_top5": 100.0, "knn3_top1": 100.0, "knn3_top5": 100.0}
    assert knn(memory, queries, k=(3,), temperature=10.0, num_classes=2, dist=ALONE)["knn3_top1"] == 0.0
    near = search(memory, queries, k=3, dist=ALONE)
    expected = [[np.exp(0.8 / 0.07), 2 * np.exp(0.6 / 0.07)]]
    np.testing.assert_allclose(votes(torch.exp(near.value / 0.07), near.label, 2), expected, rtol=1e-6)


def test_rank_of_the_truth():
    count = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).expand(5, 4)
    assert truth_rank(count[None], torch.tensor([0, 1, 2, 3, 9])).tolist() == [[2, 0, 1, 3, NO_RANK]]


def test_a_class_the_bank_does_not_know_is_a_miss():
    memory, queries = bank(torch.eye(3), [0, 1, 2]), bank(torch.eye(3)[:2], [0, 7])
    assert knn(memory, queries, k=(1,), temperature=0.07, num_classes=3, dist=ALONE) == {"knn1_top1": 50.0, "knn1_top5": 50.0}


def test_diverged_features_are_nan_not_a_number():
    memory, queries = bank(torch.eye(3)), bank(torch.full((2, 3), float("nan")))
    assert all(np.isnan(v) for v in knn(memory, queries, k=(1,), temperature=0.07, num_classes=3, dist=ALONE).values())
    assert np.isnan(lewel_monitor(queries, np.zeros(2, int), protocol=LewelMonitor(), dist=ALONE)["knn20_top1"])


# ------------------------------------------------------------------------------------------------ LEWEL's monitor


def test_keep_index_by_hand():
    labels = np.array([1, 0, 0, 1, 0, 0, 0, 3])  # class 0 five times, 1 twice, 2 never, 3 once
    assert keep_index(labels, 4, 0.5).tolist() == [1, 2, 0, 7]  # round(2.5) = 2, round(1.0) = 1, round(.5) = 0 -> 1
    assert keep_index(labels, 4, 0.3).tolist() == [1, 2, 0, 7]  # round(1.5) = 2
    assert keep_index(labels, 4, 0.01).tolist() == [1, 0, 7]
    assert keep_index(labels, 4, 1.0).tolist() == [1, 2, 4, 5, 6, 0, 3, 7]


def test_majority_ties_go_to_the_smallest_label():
    angle = torch.tensor([0.1, 0.2, 0.3, 0.4])
    memory = bank(torch.stack((angle.cos(), angle.sin()), 1), [2, 1, 1, 2])
    near, prediction, accuracy = majority_knn(memory, bank([[1.0, 0.0]], [1]), k=4, num_classes=3, dist=ALONE)
    assert near.index.tolist() == [[0, 1, 2, 3]]
    assert (prediction.tolist(), accuracy) == ([1], 100.0)
    np.testing.assert_allclose(near.value[0], 2 - 2 * angle.double().cos(), atol=1e-7)


def test_monitor_takes_memory_and_queries_from_the_validation_set():
    """Ten images per class: one in the memory, five ask.  Features: class axis, but images 1 and 2 of class 0 look like class 1."""
    labels = np.repeat([0, 1, 2], 10)
    features = torch.eye(3)[labels].clone()
    features[1:3] = torch.tensor([0.1, 1.0, 0.0])
    protocol = LewelMonitor(k=(1,))
    assert lewel_monitor(bank(features, labels), labels, protocol=protocol, dist=ALONE) == {"knn1_top1": pytest.approx(100 * 13 / 15)}


# ------------------------------------------------------------------------------------------------ from images to JSON


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three classes of textures; each validation image is a copy of a training image."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for c, name in enumerate(("coarse", "fine", "plain")):
        for i in range(6):
            pixels = np.kron(rng.integers(0, 256, (72 // (24, 3, 72)[c],) * 2 + (3,)), np.ones(((24, 3, 72)[c],) * 2 + (1,)))
            for split in ("train", "val") if i < 3 else ("train",):
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)
    return root


def call(capsys, *flags) -> tuple[int, str, str]:
    code = 0
    try:
        knn_module.main([str(flag) for flag in flags])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = 1 if isinstance(stop.code, str) else stop.code
    out, err = capsys.readouterr()
    return code, out, err


SMALL = ("--resize", 72, "--crop", 64, "--forward", 5, "--workers", 1)


def test_command_line_writes_protocol_and_numbers(photographs, tmp_path, capsys):
    out = tmp_path / "result.json"
    code, shown, _ = call(capsys, "--checkpoint", "random:resnet18:1", "--data", photographs, "--out", out, "--k", 1, 18, *SMALL)
    assert code == 0
    assert "knn/dino, resize 72 instead of 256, crop 64 instead of 224  knn1_top1 100.00 %" in shown
    result = json.loads(out.read_text())
    assert result["knn1_top1"] == 100.0
    assert set(result) == {
        *("protocol", "run_as", "checkpoint", "data", "knn1_top1", "knn1_top5", "knn18_top1", "knn18_top5", "num_train", "num_val"),
        *("arch", "method", "step", "network", "output_checksum", "resize", "crop", "interpolation", "kind", "dtype", "k"),
        *("mean", "std", "normalisation"),
    }
    assert (result["protocol"], result["num_train"], result["num_val"], result["arch"], result["step"]) == (
        "knn/dino",
        18,
        9,
        "resnet18",
        0,
    )
    assert (result["resize"], result["crop"], result["interpolation"]) == (72, 64, "bicubic")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_the_normalisation_is_shown_and_can_be_set(photographs, tmp_path, capsys):
    flags = ("--checkpoint", "random:resnet18:1", "--data", photographs, "--k", 1, *SMALL, "--out", tmp_path / "r.json")
    half = ("0.5", "0.5", "0.5")
    code, shown, _ = call(capsys, *flags)
    assert code == 0 and "mean 0.485 0.456 0.406 and std 0.229 0.224 0.225: ImageNet's, it names none" in shown
    code, _, err = call(capsys, *flags, "--mean", *half, "--std", *half)
    assert code == 1 and "mean was [0.485, 0.456, 0.406] and is [0.5, 0.5, 0.5]" in err
    flags = (*flags[:-1], tmp_path / "half.json")
    code, shown, _ = call(capsys, *flags, "--mean", *half, "--std", *half)
    assert code == 0 and "mean 0.5 0.5 0.5 and std 0.5 0.5 0.5: --mean and --std" in shown
    result = json.loads((tmp_path / "half.json").read_text())
    assert (result["mean"], result["std"], result["normalisation"]) == ([0.5] * 3, [0.5] * 3, "--mean and --std")
    for wrong in (("--mean", *half), ("--mean", *half, "--std", "0.5", "0", "0.5")):
        code, _, err = call(capsys, *flags, *wrong)
        assert code == 1 and "go together" in err


def test_part_of_the_training_set_as_bank(photographs, tmp_path, capsys):
    out = tmp_path / "result.json"
    flags = ("--checkpoint", "random:resnet18:1", "--data", photographs, "--k", 1, *SMALL)
    code, shown, _ = call(capsys, *flags, "--out", out, "--subset", "first:3")
    result = json.loads(out.read_text())
    assert code == 0 and "crop 64 instead of 224, subset first:3, k = 1 |" in shown and result["data"] == str(photographs)
    assert (result["num_train"], result["num_val"], result["subset"], result["knn1_top1"]) == (9, 9, "first:3", 100.0)
    for flag, message in (("first:7", "coarse has 6"), ("2percent", "is no subset")):
        code, _, err = call(capsys, *flags, "--subset", flag)
        assert code == 1 and message in err
    code, _, err = call(capsys, *flags, "--protocol", "knn/lewel-monitor", "--subset", "first:3")
    assert code == 1 and "leave --subset out" in err


def test_a_separate_validation_set(photographs, tmp_path, capsys):
    """SFRIK's images for choosing hyper-parameters: behind the bank's in each class, one left out, and not those of val."""
    out = tmp_path / "result.json"
    flags = ("--checkpoint", "random:resnet18:1", "--data", photographs, "--k", 1, *SMALL, "--out", out, "--queries", "after:2")
    code, shown, _ = call(capsys, *flags, "--subset", "first:2")
    result = json.loads(out.read_text())
    assert code == 0 and "subset first:2, queries after:2" in shown
    assert (result["num_train"], result["num_val"], result["queries"]) == (6, 6, "after:2")
    code, _, err = call(capsys, *flags)
    assert code == 1 and "give them a part with --subset" in err
    code, _, err = call(capsys, *flags, "--subset", "first:2", "--k", 2)
    assert code == 1 and "k was [1] and is [2]. Write elsewhere with --out" in err
    flags = (*flags[:-4], *flags[-2:], "--out", tmp_path / "other.json")
    code, _, err = call(capsys, *flags, "--subset", "random:5")
    assert code == 1 and "(--queries) are also among those to learn from (--subset): they would find themselves" in err


def test_kept_features_and_a_picture(photographs, tmp_path, monkeypatch, capsys):
    flags = ("--checkpoint", "random:resnet18:1", "--data", photographs, "--k", 1, 3, *SMALL, "--protocol", "knn/sfrik")
    kept = ("--features", tmp_path / "features", "--picture", tmp_path / "near.png")
    code, shown, _ = call(capsys, *flags, *kept, "--out", tmp_path / "a.json")
    assert code == 0
    assert "| resnet18 online, step 0 | knn/sfrik, resize 72 instead of 256, crop 64 instead of 224, k = 1 | 100.00 |" in shown
    # the images that the features are of are not looked at again
    monkeypatch.setattr(extract_module, "extracted", lambda *args, **options: pytest.fail("extracted again"))
    code, _, _ = call(capsys, *flags, *kept[:2], "--out", tmp_path / "b.json")
    assert code == 0 and (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["protocol"], result["kind"], result["knn1_top5"]) == ("knn/sfrik", "pooled", result["knn1_top1"])
    with Image.open(tmp_path / "near.png") as page:
        assert page.width == 2 * 16 + 6 * (160 + 12) and page.height > 8 * 160
        near = np.asarray(page)[16 + 2 * 18 + 2 * 18 + 20, 16 + 172]  # the frame of the first query's nearest image: its copy
    assert near.tolist() == [0x2C, 0xA0, 0x2C]


def test_banks_that_are_too_small(photographs, tmp_path, capsys):
    flags = ("--checkpoint", "random:resnet18:1", *SMALL)
    code, _, err = call(capsys, *flags, "--data", photographs)
    assert code == 1 and "200 neighbours are asked for, and the bank has 18 images" in err
    code, _, err = call(capsys, *flags, "--data", photographs, "--protocol", "knn/lewel-monitor")
    assert code == 1 and "20 neighbours are asked for, and the bank has 3 images" in err
    (tmp_path / "names").write_text("coarse/0.jpg\nfine/0.jpg\n")
    code, _, err = call(capsys, *flags, "--data", photographs, "--k", 1, "--subset", tmp_path / "names")
    assert code == 1 and "1 classes of the images to classify have no image in the bank" in err and "plain first" in err


def test_command_line_of_the_monitor_writes_beside_the_checkpoint(photographs, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(build_backbone("resnet18").state_dict(), weights)
    code, shown, _ = call(capsys, "--checkpoint", weights, "--data", photographs, "--protocol", "knn/lewel-monitor", "--k", 1, *SMALL)
    result = json.loads((tmp_path / f"weights.knn-lewel-monitor.online.{photographs.name}.json").read_text())
    assert code == 0 and "knn/lewel-monitor" in shown
    assert result["protocol"] == "knn/lewel-monitor" and result["num_val"] == 9 and "num_train" not in result
    assert 0 <= result["knn1_top1"] <= 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--checkpoint", "nowhere.pt"), "no checkpoint at nowhere.pt"),
        (("--checkpoint", "random:resnet34"), "no random backbone"),
        (("--data", "no-such-folder"), "no data at no-such-folder"),
        (("--crop", 90), "does not fit"),
        (("--k", 0), "positive"),
        (("--out", "no-such-folder/x.json"), "cannot be written"),
    ],
)
def test_errors_are_one_paragraph(photographs, capsys, flags, message):
    given = {"--checkpoint": "random:resnet18", "--data": photographs} | dict([flags])
    code, out, err = call(capsys, *SMALL, *(word for pair in given.items() for word in pair))
    assert code == 1 and message in err and "Traceback" not in err and out == ""
    assert len(err.strip().splitlines()) == 1


def test_missing_validation_split_is_named(photographs, tmp_path, capsys):
    (tmp_path / "train").symlink_to(photographs / "train")
    code, _, err = call(capsys, "--checkpoint", "random:resnet18", "--data", tmp_path, *SMALL)
    assert code == 1 and "val" in err


def test_unlabelled_data_is_refused(photographs, monkeypatch, capsys):
    build = extract_module.build_eval_loader

    def unlabelled(*args, **kwargs):
        loader = build(*args, **kwargs)
        loader.labels = None
        return loader

    monkeypatch.setattr(extract_module, "build_eval_loader", unlabelled)
    code, _, err = call(capsys, "--checkpoint", "random:resnet18", "--data", photographs, *SMALL)
    assert code == 1 and "no labels" in err


def test_evaluation_leaves_a_live_network_as_it_was(photographs):
    torch.manual_seed(0)
    backbone = build_backbone("resnet18").train()
    backbone.layer2.eval()  # a mixed state must come back, too
    modes = {name: module.training for name, module in backbone.named_modules()}
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    state = torch.get_rng_state()
    scores = evaluate(backbone, str(photographs), dist=ALONE, k=(1, 3), resize=72, crop=64, forward=4, workers=1)
    assert set(scores) == {"knn1_top1", "knn1_top5", "knn3_top1", "knn3_top5"} and scores["knn1_top1"] == 100.0
    assert modes == {name: module.training for name, module in backbone.named_modules()}
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in backbone.parameters())


def test_protocol_settings():
    dino, monitor = KNN_PROTOCOLS["knn/dino"], KNN_PROTOCOLS["knn/lewel-monitor"]
    assert (dino.k, dino.temperature, dino.resize, dino.crop, dino.interpolation) == ((10, 20, 100, 200), 0.07, 256, 224, "bicubic")
    assert (monitor.k, monitor.memory, monitor.queries, monitor.interpolation) == ((20,), 0.1, 0.5, "bilinear")


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "r.json"
    write_result(path, {"a": 1})
    with pytest.raises(ValueError):
        write_result(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
