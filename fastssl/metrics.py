"""Training metrics that stay on the device until a log step, and the files they end in."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import Tensor

if TYPE_CHECKING:
    from fastssl.engine import State
    from fastssl.method import StepOutput

Record = dict[str, float]


class Metrics:
    """Sums on the device; `read` brings their means over steps and ranks to the host in one transfer.

    Values that are not finite are left out: a skipped step must not hide what the others of its window say.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        """[2, names]: sums and counts of the finite values."""
        self._steps = 0
        self._timed_steps = self._timed_images = 0
        self._skipped: Tensor | None = None
        self._bad_run: Tensor | None = None
        self._since = time.perf_counter()
        self._data_wait = 0.0

    def add(self, out: StepOutput, images: int) -> None:
        """Count a step of so many images on all ranks."""
        names = ("loss", *out.logs)
        values = torch.stack([value.detach().double() for value in (out.loss, *out.logs.values())])
        found = torch.stack((values.nan_to_num(0.0, 0.0, 0.0), values.isfinite().double()))
        # A checkpoint of other code may have begun the window with other names.
        self._names, self._sums = names, found if self._sums is None or names != self._names else self._sums + found
        self._steps += 1
        self._timed_steps += 1
        self._timed_images += images

    def add_skipped(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """Count a step whose gradients are not finite (to be called after `scaler.unscale_`); it will change no weight."""
        found = sum(scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()).double()
        if self._skipped is None:
            self._skipped, self._bad_run = torch.zeros_like(found), torch.zeros_like(found)
        self._skipped += found
        self._bad_run = (self._bad_run + found) * found

    def skips(self) -> tuple[int, int]:
        """-> (skipped steps, how many of them were the last ones in a row).  Synchronises with the device."""
        if self._skipped is None:
            return 0, 0
        skipped, bad_run = torch.stack((self._skipped, self._bad_run)).tolist()
        return round(skipped), round(bad_run)

    def read(self, state: State, loader) -> Record:
        """The record of the steps since the last one; resets the sums.  Synchronises with the device, once."""
        packed = torch.cat((self._sums.flatten(), torch.stack((self._skipped, self._bad_run))))
        if state.dist.world > 1:
            torch.distributed.all_reduce(packed)
            packed /= state.dist.world
        *found, skipped, bad_run = packed.tolist()
        sums, counts = found[: len(self._names)], found[len(self._names) :]
        elapsed, steps = time.perf_counter() - self._since, self._steps
        wait, self._data_wait = loader.wait_s - self._data_wait, loader.wait_s
        sched = state.schedules.at(state.step - 1)
        record = {"step": state.step, "epoch": state.step / state.steps_per_epoch}
        record |= {f"train/{name}": s / n if n else math.nan for name, s, n in zip(self._names, sums, counts, strict=True)}
        record |= {
            "train/skipped_steps": skipped,
            "train/bad_run": bad_run,
            "sched/lr": sched.lr,
            "sched/ema": sched.ema_momentum,
            "perf/img_per_s": self._timed_images / elapsed,
            "perf/step_ms": 1000 * elapsed / self._timed_steps,
            "perf/data_wait_ms": 1000 * wait / steps,
        }
        if state.dtype is torch.float16:
            record["train/loss_scale"] = state.scaler.get_scale()
        if state.dist.device.type == "cuda":
            record["perf/mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._sums, self._steps = None, 0
        self.restart_clock()
        return record

    def restart_clock(self) -> None:
        """Leave what happened until now (a checkpoint, an evaluation, compilation, and the steps before it) out of the next rates."""
        self._since = time.perf_counter()
        self._timed_steps = self._timed_images = 0

    def share(self, world: int) -> None:
        """Every rank takes the mean of all ranks' sums: those that rank 0 saves then stand for all.  To be called on all ranks."""
        if world > 1 and self._sums is not None:
            torch.distributed.all_reduce(self._sums)
            self._sums /= world

    def state_dict(self) -> dict:
        """Running sums since the last log step, so that a resumed run logs what an uninterrupted one does."""
        tensors = {"skipped": self._skipped, "bad_run": self._bad_run}
        sums, counts = ({}, {}) if self._sums is None else (dict(zip(self._names, row, strict=True)) for row in self._sums)
        return {"sums": sums, "counts": counts, "steps": self._steps, **{k: v for k, v in tensors.items() if v is not None}}

    def load_state_dict(self, saved: dict, device: torch.device) -> None:
        sums = saved["sums"]
        counts = saved.get("counts", {k: torch.full_like(v, saved["steps"]) for k, v in sums.items()})  # older checkpoints left none out
        self._names = tuple(sums)
        self._sums = torch.stack([*sums.values(), *(counts[k] for k in sums)]).view(2, -1).to(device) if sums else None
        self._steps = saved["steps"]
        if "skipped" in saved:
            self._skipped, self._bad_run = saved["skipped"].to(device), saved["bad_run"].to(device)


class RunLog:
    """metrics.jsonl (always) and TensorBoard event files of one run; only the main rank writes.

    A resumed run continues its metrics.jsonl: lines after the checkpoint's step belong to the interrupted end and are dropped; one that
    starts anew in a used folder drops them all.
    """

    def __init__(self, folder: Path, *, from_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_jsonl(self.path) if line["step"] <= from_step] if from_step else []
        temporary = self.path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1 if from_step else 0)

    def write(self, record: Record) -> None:
        # JSON has no NaN: a reader gets null.
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n")
        for name, value in record.items():
            if "/" in name:
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_jsonl(path: Path) -> list[Record]:
    """Complete lines of a metrics.jsonl; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
