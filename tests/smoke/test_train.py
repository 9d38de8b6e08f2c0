"""train.py as a user runs it: the whole path on a tiny .beton, its errors, its signals."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fastssl.metrics import read_jsonl
from tests.conftest import SMALL, environment, run_train, train_command


@pytest.fixture(scope="module")
def trained(beton_data: Path, tmp_path_factory) -> Path:
    """A finished run of lewel_mini with two epochs, k-NN and pictures."""
    cwd = tmp_path_factory.mktemp("run")
    done = run_train("--preset", "lewel_mini", *SMALL, "--train.epochs", "2", "--data.path", str(beton_data), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "lewel_mini"


def test_run_folder(trained: Path):
    records = read_jsonl(trained / "metrics.jsonl")
    steps = [r["step"] for r in records if "train/loss" in r]
    assert steps == list(range(1, 9))  # 48 images, batch 12, two epochs
    assert [r["step"] for r in records if "eval/knn20_top1" in r] == [0, 4, 8]
    for name in ("checkpoint_last.pt", "backbone.safetensors", "config.json", "views.png", "curves.png", "tensorboard"):
        assert (trained / name).exists(), name
    assert not list(trained.glob("*.partial"))
    config = json.loads((trained / "config.json").read_text())
    assert config["config"]["train"]["epochs"] == 2 and config["versions"]["torch"] == torch.__version__


def test_exported_backbone_is_torchvisions(trained: Path):
    import torchvision
    from safetensors.torch import load_file

    missing, unexpected = torchvision.models.resnet18().load_state_dict(load_file(trained / "backbone.safetensors"), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected


def test_checkpoint_has_raw_names(trained: Path):
    saved = torch.load(trained / "checkpoint_last.pt", weights_only=True)
    assert not [k for k in saved["model"] if "module." in k or "_orig_mod" in k]


def test_knn_command(trained: Path, beton_data: Path):
    out = trained / "knn.json"
    arguments = [
        "--checkpoint",
        str(trained / "checkpoint_last.pt"),
        "--data",
        str(beton_data),
        "--resize",
        "32",
        "--crop",
        "32",
        "--k",
        "20",
    ]
    command = train_command()[:-1] + ["-m", "eval.knn", *arguments, "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "knn/dino" in done.stdout and json.loads(out.read_text())["protocol"] == "knn/dino"


def test_two_ranks_see_the_global_order(beton_data: Path, tmp_path: Path, trained: Path):
    done = run_train("--preset", "lewel_mini", *SMALL, "--train.max-steps", "3", "--data.path", str(beton_data), cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in read_jsonl(tmp_path / "runs/lewel_mini/metrics.jsonl") if "train/loss" in r] == [1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method", "lewel"], "make convert-imagenet"),
        (["--method", "lewl"], "Did you mean lewel"),
        (["--preset", "lewel_mini", *SMALL, "--train.resume", "nowhere.pt", "--data.path", "{data}"], "There is no checkpoint"),
        (["--preset", "byol_mini", *SMALL, "--train.init-from", "nowhere.pt", "--data.path", "{data}"], "There is no checkpoint"),
        (["--preset", "lewel_mini", "--train.global-batch-size", "64", "--data.path", "{data}"], "batch"),
    ],
)
def test_errors_are_one_paragraph(flags: list[str], says: str, beton_data: Path, trained: Path, tmp_path: Path):
    done = run_train(*(f.format(data=beton_data, run=trained) for f in flags), cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert says in last and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.partial"))


def test_sigterm_saves_and_auto_resumes(beton_data: Path, tmp_path: Path):
    flags = ("--preset", "byol_mini", *SMALL, "--data.path", str(beton_data), "--eval.knn-every-epochs", "0", "--log.pictures", "False")
    process = subprocess.Popen(
        train_command(*flags, "--train.epochs", "500"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "runs/byol_mini/metrics.jsonl"
    wait_for_step(log, 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM" in err
    step = torch.load(log.parent / "checkpoint_last.pt", weights_only=True)["step"]
    assert step == read_jsonl(log)[-1]["step"]
    done = run_train(*flags, "--train.epochs", "500", "--train.resume", "auto", "--train.max-steps", str(step + 2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in read_jsonl(log)] == list(range(1, step + 3))


@pytest.mark.slow
def test_a_requeued_run_starts_from_weights_once(beton_data: Path, tmp_path: Path, trained: Path):
    """As under Slurm, where every start has --train.resume auto: the first takes the weights, the next its own checkpoint."""
    flags = ("--preset", "lewel_mini", *SMALL, "--data.path", str(beton_data), "--eval.knn-every-epochs", "0", "--log.pictures", "False")
    flags += ("--train.resume", "auto", "--train.init-from", str(trained / "checkpoint_last.pt"))
    for until in (1, 2):
        done = run_train(*flags, "--train.epochs", "2", "--train.max-steps", str(until), cwd=tmp_path)
        assert done.returncode == 0 and f"step {until - 1} -> {until}" in done.stderr, done.stderr
    assert [r["step"] for r in read_jsonl(tmp_path / "runs/lewel_mini/metrics.jsonl")] == [1, 2]


def wait_for_step(log: Path, step: int, process: subprocess.Popen, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not any(r["step"] >= step for r in read_jsonl(log)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no step {step} within {timeout} s"
        time.sleep(0.05)


def test_a_diverging_run_ends_with_a_dump(beton_data: Path, tmp_path: Path):
    flags = ("--preset", "byol_mini", *SMALL, "--data.path", str(beton_data), "--eval.knn-every-epochs", "0", "--log.pictures", "False")
    done = run_train(*flags, "--train.epochs", "50", "--optim.base-lr", "1e30", "--train.max-bad-steps", "3", cwd=tmp_path)
    assert done.returncode == 1
    assert "non-finite gradients" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    dump = torch.load(tmp_path / "runs/byol_mini/bad_step.pt", weights_only=True)
    assert [len(ids) for ids in dump["index"]] == [12] and dump["step"] >= 3
