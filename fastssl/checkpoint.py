"""Checkpoints: written atomically, of raw modules, and refused with a reason when they do not fit."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastssl.config import AdamW, to_dict

if TYPE_CHECKING:
    from fastssl.engine import State

FORMAT = "fastssl-1"
LAST = "checkpoint_last.pt"


class CheckpointError(RuntimeError):
    """The checkpoint cannot be written or used; the message says what to do."""


@functools.cache  # of the code that runs: a checkout may change during a run
def versions() -> dict[str, str]:
    """Versions and commit that a result depends on."""
    import torchvision

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "cuda": str(torch.version.cuda),
        "commit": commit or "unknown",
        "device": device,
    }


def contents(state: State) -> dict:
    """What a checkpoint holds; readable with torch.load(weights_only=True)."""
    method = state.method
    return {
        "format": FORMAT,
        "method": state.cfg.method.name,
        "preset": state.cfg.preset,
        "config": to_dict(state.cfg),
        "versions": versions(),
        "step": state.step,
        "steps_per_epoch": state.steps_per_epoch,
        "data": state.data,
        "samples": state.samples,
        "backbone_prefix": method.backbone_prefix,
        "target_backbone_prefix": method.target_backbone_prefix,
        "evaluated": method.evaluated,
        "model": method.state_dict(),
        "optim": type(state.cfg.optim).__name__,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "metrics": state.metrics.state_dict(),
    }


def save(state: State, folder: Path, *, keep: bool = False) -> Path:
    """Write checkpoint_last.pt and backbone.safetensors; with `keep` also checkpoint_epNNNN.pt (a hard link where possible).

    The file appears under its name only when complete.  Raises CheckpointError, and leaves the previous checkpoint, when the
    disk is full.
    """
    last = folder / LAST
    try:
        atomic_save(contents(state), last)
        backbone = {k: v.contiguous() for k, v in state.method.backbone.state_dict().items()}
        temporary = folder / "backbone.partial"
        save_file(backbone, temporary, metadata=description(state))
        temporary.chmod(last.stat().st_mode)  # the library lets nobody else read it
        temporary.replace(folder / "backbone.safetensors")
        if keep:
            kept = folder / f"checkpoint_ep{round(state.step / state.steps_per_epoch):04d}.pt"
            kept.unlink(missing_ok=True)
            try:
                os.link(last, kept)
            except OSError:
                shutil.copyfile(last, kept)
    except (OSError, SafetensorError) as error:
        for left in folder.glob("*.partial"):
            left.unlink(missing_ok=True)
        raise CheckpointError(
            f"Could not write a checkpoint of step {state.step} to {folder}: {error}. The previous checkpoint is untouched. "
            f"Free some space and {how_to_continue(folder)}."
        ) from error
    return last


def not_finite(state: State) -> str:
    """Name of a tensor of the state with NaN or infinities, empty if there is none.  Reads from the device, once."""
    tensors = dict(state.method.state_dict())
    tensors |= {f"optimizer.{i}.{name}": v for i, found in state.optimizer.state_dict()["state"].items() for name, v in found.items()}
    tensors = {name: v for name, v in tensors.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    finite = torch.stack([v.isfinite().all().to(state.dist.device) for v in tensors.values()]).tolist()
    return next((name for name, ok in zip(tensors, finite, strict=True) if not ok), "")


def how_to_continue(folder: Path) -> str:
    """Names the file: `auto` may find another run's, since a name that is taken gets a number."""
    last = folder / LAST
    return f"continue with --train.resume {last}" if last.exists() else "start again: the run has no checkpoint yet"


def description(state: State) -> dict[str, str]:
    """What an evaluation of backbone.safetensors has to know, in the file's metadata: text only."""
    colours = state.cfg.views[0].photometric
    return {
        **{"arch": state.cfg.model.arch, "preset": state.cfg.preset, "step": str(state.step)},
        **{"method": state.cfg.method.name, "network": state.method.evaluated},
        **{name: " ".join(map(str, getattr(colours, name))) for name in ("mean", "std")},
    }


def atomic_save(value: dict, path: Path) -> None:
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as f:
        try:
            torch.save(value, f)
        except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
            raise OSError(str(error).splitlines()[0]) from error
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def check_free_space(state: State, folder: Path) -> None:
    """Raise CheckpointError before the first step when two checkpoints would not fit."""
    weights = sum(t.numel() * t.element_size() for t in state.method.state_dict().values())
    moments = 2 if isinstance(state.cfg.optim, AdamW) else 1
    need = 2 * (weights + moments * sum(p.numel() * p.element_size() for p in state.method.parameters() if p.requires_grad))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{folder} has {free / 2**30:.1f} GiB free, and two checkpoints of this run need {need / 2**30:.1f} GiB. "
            f"Free some space or choose another disk with --log.dir DIR."
        )


def load(path: Path) -> dict:
    """Read a checkpoint of ours.  CheckpointError when it is missing, cut short or something else."""
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}. Give the path of a checkpoint_last.pt, or --train.resume auto.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}). Use an older one.") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a fastssl training checkpoint. Evaluations read foreign weights; training does not.")
    return saved


def check_method(saved: dict, path: Path, name: str) -> None:
    if saved["method"] != name:
        raise CheckpointError(
            f"{path} is a checkpoint of the method '{saved['method']}' (preset {saved['preset']}), this run trains "
            f"'{name}'. Resume it with --preset {saved['preset']}, or start this run in another folder (--log.name)."
        )


def check_data(state: State, saved: dict, path: Path) -> None:
    """CheckpointError when both sides know their data and these differ: steps would take other images, some twice and some never."""
    before, now = saved.get("samples", 0), state.samples
    if before and now and before != now:
        difference = f"{before} images, this run has {now}"
    elif saved.get("data") and state.data and saved["data"] != state.data:
        difference = f"other images{f' (also {now})' if now else ''}, or the same in another order"
    else:
        return
    raise CheckpointError(
        f"{path} was written by a run on {difference}. Give it the same --data.path and --data.subset, or start a new run from its "
        f"weights with --train.init-from."
    )


def load_weights(method: torch.nn.Module, saved: dict, path: Path) -> None:
    try:
        method.load_state_dict(saved["model"])
    except RuntimeError as error:
        first = "; ".join(line.strip()[:150] for line in str(error).splitlines()[1:3])
        raise CheckpointError(
            f"{path} does not fit this model ({first}). Its architecture was set by preset {saved['preset']}: use the same model and "
            f"method flags, or start a new run."
        ) from error


def load_optimizer(state: State, saved: dict, path: Path) -> None:
    """The saved state of every parameter, by its name; groups, momentum, decay and betas are those of this run's flags."""
    ours = type(state.cfg.optim).__name__
    if saved.get("optim", ours) != ours:  # checkpoints of before this key had the preset's optimizer
        raise CheckpointError(
            f"{path} was written by a run with {saved['optim']}, this one has {ours}. Resume it with --preset {saved['preset']}, or start "
            f"a new run from its weights with --train.init-from."
        )
    groups = saved["optimizer"]["param_groups"]
    index = {name: i for group in groups for name, i in zip(group["names"], group["params"], strict=True)}
    now = state.optimizer.state_dict()["param_groups"]
    different = {name for group in now for name in group["names"]} ^ set(index)
    if different:
        raise CheckpointError(
            f"{path} was written by a run that trained other parameters ({min(different)}): use its method and model flags, or start a new "
            f"run from its weights with --train.init-from."
        )
    found = saved["optimizer"]["state"]
    pairs = [(i, index[name]) for group in now for name, i in zip(group["names"], group["params"], strict=True)]
    state.optimizer.load_state_dict({"state": {i: found[old] for i, old in pairs if old in found}, "param_groups": now})


def restore(state: State, path: Path) -> None:
    """Continue exactly where `path` was written.  Flags that were changed since are those of the rest of the run."""
    saved = load(path)
    check_method(saved, path, state.cfg.method.name)
    if saved["steps_per_epoch"] != state.steps_per_epoch:
        raise CheckpointError(
            f"{path} was written with {saved['steps_per_epoch']} steps per epoch, this run has {state.steps_per_epoch}: data set or "
            f"--train.global-batch-size differ. Resume with the same data and batch, or use --train.init-from for a new run."
        )
    check_data(state, saved, path)
    load_weights(state.method, saved, path)
    load_optimizer(state, saved, path)
    # The scale of another type says nothing about the one that fp16 needs; other types keep theirs, 1.
    if state.dtype is torch.float16 and saved["scaler"].get("growth_interval") == state.scaler.get_growth_interval():
        state.scaler.load_state_dict(saved["scaler"])
    state.metrics.load_state_dict(saved["metrics"], state.dist.device)
    state.step = saved["step"]
