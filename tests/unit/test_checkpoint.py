"""Checkpoints appear whole or not at all, and fit or are refused with a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from fastssl import checkpoint, hooks, runs
from fastssl.checkpoint import CheckpointError
from fastssl.config import AdamW, EfficiencyConfig, Lars, OptimConfig, Sgd
from fastssl.distributed import Dist
from fastssl.engine import State, prepare, train_step
from fastssl.methods import METHODS
from fastssl.presets import PRESETS
from tests.golden.toy import ToyBackbone, two_views


def new_state(preset: str = "byol_mini", steps_per_epoch: int = 3, optim: OptimConfig | None = None) -> State:
    cfg = dataclasses.replace(PRESETS[preset](), efficiency=EfficiencyConfig(dtype="fp64", compile="off"))
    cfg = dataclasses.replace(cfg, optim=optim or cfg.optim)
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](cfg.method, lambda: ToyBackbone(4, 8), cfg.model.norm)
    return prepare(method, cfg, Dist(0, 1, 0, 1, torch.device("cpu")), steps_per_epoch)


def step(state: State, *, bad: bool = False) -> float:
    x, y = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(state.step)).numpy()
    if bad:
        x[0] = float("inf")
    out = train_step(state, [two_views(x, y)])
    state.metrics.add(out, 12)
    return out.loss.item()


def test_a_restored_run_continues_bit_for_bit(tmp_path: Path):
    whole, first = new_state(), new_state()
    expected = [step(whole) for _ in range(6)]
    losses = [step(first) for _ in range(3)]
    path = checkpoint.save(first, tmp_path, keep=True)
    second = new_state()
    checkpoint.restore(second, path)
    losses += [step(second) for _ in range(3)]
    assert losses == expected
    for (name, a), b in zip(second.method.state_dict().items(), whole.method.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "checkpoint_ep0001.pt").exists()


def test_means_of_a_begun_window_go_on(tmp_path: Path):
    """Also those of older checkpoints, which had no counts."""
    state, loader = new_state(), SimpleNamespace(wait_s=0.0)
    losses = [step(state) for _ in range(2)]
    path = checkpoint.save(state, tmp_path)
    losses.append(step(state))
    saved = checkpoint.load(path)
    del saved["metrics"]["counts"]
    torch.save(saved, tmp_path / "older.pt")
    for file in (path, tmp_path / "older.pt"):
        resumed = new_state()
        checkpoint.restore(resumed, file)
        step(resumed)
        assert resumed.metrics.read(resumed, loader)["train/loss"] == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_weights_alone_start_a_new_run(tmp_path: Path):
    trained = new_state()
    step(trained)
    path = checkpoint.save(trained, tmp_path)
    fresh = new_state()
    assert runs.initialise(fresh, path) == f"all networks of {path}, step 1"
    assert fresh.step == 0 and not fresh.optimizer.state
    torch.testing.assert_close(fresh.method.state_dict(), trained.method.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("part", ["checkpoint", "backbone"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch, part):
    state = new_state()
    step(state)
    path = checkpoint.save(state, tmp_path)
    before = path.read_bytes()
    step(state)

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    def full_for_safetensors(value, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if part == "checkpoint":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(checkpoint, "save_file", full_for_safetensors)
    weights = (tmp_path / "backbone.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="No space left.*previous checkpoint is untouched"):
        checkpoint.save(state, tmp_path)
    assert (tmp_path / "backbone.safetensors").read_bytes() == weights and not list(tmp_path.glob("*.partial"))
    assert part == "backbone" or path.read_bytes() == before


def test_little_space_is_noticed_before_the_first_step(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(CheckpointError, match="--log.dir"):
        checkpoint.check_free_space(new_state(), tmp_path)


def test_adamw_needs_more_space(tmp_path: Path, monkeypatch):
    """It keeps two values a weight."""
    state = new_state(optim=AdamW(base_lr=0.1))
    step(state)
    size = checkpoint.save(state, tmp_path).stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * size * 0.9))
    with pytest.raises(CheckpointError, match="--log.dir"):
        checkpoint.check_free_space(state, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.unlink(), "There is no checkpoint"),
        (lambda p: p.write_bytes(p.read_bytes()[:1000]), "cannot be read"),
        (lambda p: torch.save({"model": {}}, p), "not a fastssl training checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints(change, says: str, tmp_path: Path):
    path = checkpoint.save(new_state(), tmp_path)
    change(path)
    with pytest.raises(CheckpointError, match=says):
        checkpoint.load(path)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    path = checkpoint.save(new_state(), tmp_path)
    with pytest.raises(CheckpointError, match="method 'byol'.*this run trains 'lewel'"):
        checkpoint.restore(new_state("lewel_mini"), path)
    with pytest.raises(CheckpointError, match="3 steps per epoch, this run has 5"):
        checkpoint.restore(new_state(steps_per_epoch=5), path)
    saved = checkpoint.load(path)
    del saved["model"]["predictor.mlp.0.weight"]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="does not fit this model.*predictor.mlp.0.weight"):
        checkpoint.restore(new_state(), path)


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (("a", 48), ("b", 52), "48 images, this run has 52"),
        (("", 48), ("b", 52), "48 images, this run has 52"),
        (("a", 48), ("b", 48), r"other images \(also 48\).*--train.init-from"),
        (("a", 0), ("b", 0), "other images, or"),
        (("a", 48), ("a", 48), ""),
        (("a", 48), ("", 0), ""),
        (None, ("b", 52), ""),
    ],
)
def test_other_data_is_refused(before: tuple[str, int] | None, now: tuple[str, int], says: str, tmp_path: Path):
    """Checkpoints that do not know their data are resumed."""
    state, resumed = new_state(), new_state()
    state.data, state.samples = before or ("", 0)
    resumed.data, resumed.samples = now
    path = checkpoint.save(state, tmp_path)
    if before is None:  # an older checkpoint
        saved = checkpoint.load(path)
        torch.save({k: v for k, v in saved.items() if k not in ("data", "samples")}, path)
    if says:
        with pytest.raises(CheckpointError, match=says):
            checkpoint.restore(resumed, path)
    else:
        checkpoint.restore(resumed, path)


@pytest.mark.parametrize(
    ("optim", "changed"),
    [
        (Lars(base_lr=0.1), {"sgd_momentum": 0.3, "exclude": ("bias",)}),  # BatchNorm moves into the adapted group
        (AdamW(base_lr=0.1), {"betas": (0.5, 0.6), "eps": 1e-5}),
    ],
    ids=["lars", "adamw"],
)
def test_optimizer_flags_of_the_resuming_run_hold(optim: OptimConfig, changed: dict, tmp_path: Path):
    state = new_state(optim=optim)
    step(state)
    resumed = new_state(optim=dataclasses.replace(optim, **changed))
    checkpoint.restore(resumed, checkpoint.save(state, tmp_path))
    for group in resumed.optimizer.param_groups:
        assert {name: group[name] for name in changed if name in group} == {k: v for k, v in changed.items() if k != "exclude"}
    # Every parameter keeps its own state, whichever group it is in now.
    saved, found = ({n: s.optimizer.state[p] for n, p in s.method.named_parameters() if p.requires_grad} for s in (state, resumed))
    torch.testing.assert_close(found, saved, rtol=0, atol=0)
    sizes = [[len(g["params"]) for g in s.optimizer.param_groups] for s in (state, resumed)]
    assert (sizes[0] != sizes[1]) == ("exclude" in changed)


def test_another_optimizer_is_refused(tmp_path: Path):
    path = checkpoint.save(new_state(), tmp_path)
    with pytest.raises(CheckpointError, match="written by a run with Lars, this one has Sgd.*--preset byol_mini"):
        checkpoint.restore(new_state(optim=Sgd(base_lr=0.1)), path)
    saved = checkpoint.load(path)
    saved["optimizer"]["param_groups"][0]["names"][0] = "a.weight"
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"other parameters \(a.weight\).*--train.init-from"):
        checkpoint.restore(new_state(), path)


def test_a_scale_for_other_numbers_is_not_taken_over(tmp_path: Path):
    path, resumed = checkpoint.save(new_state(), tmp_path), new_state()
    resumed.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)  # as in a run that goes on in fp16
    checkpoint.restore(resumed, path)
    assert (resumed.scaler.get_scale(), resumed.scaler.get_growth_interval()) == (2.0**16, 2000)


def test_a_scale_that_skipped_steps_halved_is_not_taken_over(tmp_path: Path):
    """Checkpoints of other types than fp16 with a scale that is not 1 exist."""
    state = new_state()
    step(state)
    state.scaler.update(2.0**-100)
    resumed = new_state()
    checkpoint.restore(resumed, checkpoint.save(state, tmp_path))
    assert resumed.scaler.get_scale() == 1


def test_the_exported_backbone_says_what_it_is(tmp_path: Path):
    state = new_state("dino_mini")
    metadata = checkpoint.description(state)
    assert {k: metadata[k] for k in ("method", "network", "mean")} == {"method": "dino", "network": "target", "mean": "0.485 0.456 0.406"}


@pytest.mark.parametrize(("every", "keep_every", "kept", "last"), [(4, 2, [2], 6), (2, 3, [3], 9), (1, 0, [], 9)])
def test_numbered_copies_do_not_depend_on_the_other_checkpoints(every: int, keep_every: int, kept: list[int], last: int, tmp_path: Path):
    """After three epochs of 3 steps."""
    state, hook = new_state(), hooks.Checkpointer(tmp_path, every_epochs=every, keep_every=keep_every)
    hook.start(state)
    for _ in range(9):
        step(state)
        hook.after_step(state)
    assert sorted(path.name for path in tmp_path.glob("checkpoint_ep*")) == [f"checkpoint_ep{epoch:04d}.pt" for epoch in kept]
    assert saved_step(tmp_path) == last


def trained(folder: Path, bad_steps: set[int], steps: int, *, finish: bool = False) -> State:
    """Steps 1 to `steps`, 3 an epoch, with a Checkpointer after each."""
    state, hook = new_state(), hooks.Checkpointer(folder, every_epochs=1, keep_every=1)
    hook.start(state)
    for number in range(1, steps + 1):
        step(state, bad=number in bad_steps)
        hook.after_step(state)
    if finish:
        hook.finish(state)
    return state


def saved_step(folder: Path) -> int:
    return checkpoint.load(folder / "checkpoint_last.pt")["step"]


def test_a_skipped_step_is_not_saved_but_the_next_good_one(tmp_path: Path, caplog):
    trained(tmp_path, {5, 6, 7}, 7)
    assert saved_step(tmp_path) == 3
    assert [r.message for r in caplog.records] == ["step 6 is not saved, the last checkpoint stays: its last steps were skipped (2)"]
    trained(tmp_path, {5, 6, 7}, 8)
    assert saved_step(tmp_path) == 8 and torch.load(tmp_path / "checkpoint_ep0003.pt", weights_only=True)["step"] == 8


@pytest.mark.parametrize(("bad_steps", "saved"), [({5}, 5), ({4, 5}, 3)])
def test_the_end_of_a_run_after_skipped_steps(bad_steps: set[int], saved: int, tmp_path: Path):
    """One says nothing about the state; after several it goes to another file, which can be resumed."""
    state = trained(tmp_path, bad_steps, 5, finish=True)
    assert saved_step(tmp_path) == saved and (tmp_path / "bad_step.pt").exists() == (saved == 3)
    if saved == 3:
        resumed = new_state()
        checkpoint.restore(resumed, tmp_path / "bad_step.pt")
        assert resumed.step == state.step


@pytest.mark.parametrize("where", ["target.backbone", "optimizer."])
def test_a_state_that_is_not_finite_replaces_no_checkpoint(where: str, tmp_path: Path, caplog):
    state, hook = new_state(), hooks.Checkpointer(tmp_path, every_epochs=1, keep_every=0)
    hook.start(state)
    for number in range(1, 7):
        step(state)
        if number == 6:
            momentum = next(iter(state.optimizer.state.values()))["momentum_buffer"]
            tensor = momentum if where == "optimizer." else next(state.method.target.backbone.parameters())
            tensor.fill_(float("inf"))
        hook.after_step(state)
    assert saved_step(tmp_path) == 3
    assert len(caplog.records) == 1 and where in caplog.text and "is not finite" in caplog.text
