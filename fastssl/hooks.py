"""What happens around training steps: progress, checkpoints, pictures, preemption.  The engine calls each hook after every step."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from fastssl import checkpoint, collapse, pictures
from fastssl.engine import State
from fastssl.metrics import Record, RunLog
from fastssl.models.norm import statistics_of_rank_zero

log = logging.getLogger("fastssl")


class Diverged(RuntimeError):
    """Gradients stayed non-finite; the message says where the dump is and what to try."""


class Hook:
    """All do nothing by default.  `close` also runs after an error."""

    def start(self, state: State) -> None: ...

    def after_step(self, state: State) -> None: ...

    def finish(self, state: State) -> None: ...

    def close(self) -> None: ...


class Progress(Hook):
    """Log records: metrics.jsonl and TensorBoard files, one bar on a terminal, plain lines elsewhere.  Main rank only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bar: tqdm | None = None
        self.runlog: RunLog | None = None
        self.started: float | None = None

    def start(self, state: State) -> None:
        if not state.dist.is_main:
            return
        self.started = time.perf_counter()
        self.runlog = RunLog(self.folder, from_step=state.step)
        if sys.stderr.isatty():
            self.bar = tqdm(total=state.total_steps, initial=state.step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def write(self, record: Record) -> None:
        """Add a record of any hook to the run's files."""
        if self.runlog is not None:
            self.runlog.write(record)

    def after_step(self, state: State) -> None:
        if not state.dist.is_main:
            return
        if self.started is not None:  # the host compiles before it returns from the first step: no synchronisation is needed here
            seconds, self.started = time.perf_counter() - self.started, None
            if state.compiled:
                folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "a temporary folder; TORCHINDUCTOR_CACHE_DIR sets one that stays")
                log.info(f"first step after {seconds:.0f} s, most of it compilation; kernels are kept in {folder}")
                state.metrics.restart_clock()
        if self.bar is not None:
            self.bar.update()
        if state.record is None:
            return
        r = state.record
        self.write(r)
        rates = f"{r['perf/img_per_s']:.0f} img/s | data {r['perf/data_wait_ms']:.1f} ms"
        if self.bar is not None:
            self.bar.set_description(f"ep {r['epoch']:.2f} loss {r['train/loss']:.3f} lr {r['sched/lr']:.4g} {rates}", refresh=False)
            return
        remaining = (state.total_steps - state.step) * r["perf/step_ms"] / 1000
        memory = f" | mem {r['perf/mem_gib']:.1f} G" if "perf/mem_gib" in r else ""
        log.info(
            f"ep {r['epoch']:.2f} | step {state.step}/{state.total_steps} | loss {r['train/loss']:.4f} | lr {r['sched/lr']:.4g} | "
            f"{rates}{memory} | eta {timedelta(seconds=round(remaining))}"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.runlog is not None:
            self.runlog.close()


class Checkpointer(Hook):
    """checkpoint_last.pt every few epochs and at the end, numbered copies every `keep_every` epochs.

    A bad state never replaces a checkpoint.  After a skipped step it may be one: then the next step that is not skipped is saved.  A run
    that ends before is saved if only its last step was skipped; otherwise bad_step.pt takes its state.
    """

    def __init__(self, folder: Path, *, every_epochs: int, keep_every: int):
        self.folder, self.every_epochs, self.keep_every = folder, every_epochs, keep_every
        self.saved_step = -1
        self.late = self.keep = False

    def start(self, state: State) -> None:
        self.saved_step = state.step

    def after_step(self, state: State) -> None:
        epoch, rest = divmod(state.step, state.steps_per_epoch)
        self.keep |= rest == 0 and self.keep_every > 0 and epoch % self.keep_every == 0
        if rest == 0 and (self.keep or epoch % self.every_epochs == 0):
            self.save(state)
        elif self.late:
            self.save(state)

    def finish(self, state: State) -> None:
        if state.step != self.saved_step and (doubt := self.save(state, tolerated=1)):
            dump = self.folder / "bad_step.pt"
            if state.dist.is_main:
                checkpoint.atomic_save(checkpoint.contents(state), dump)
                log.warning(f"the end of the run, step {state.step}, is in {dump} only: {doubt}")
            state.dist.barrier()

    def save(self, state: State, *, tolerated: int = 0) -> str:
        """-> why the state was not saved, the same on all ranks; empty: it was.  tolerated: skipped last steps."""
        run, bad = state.dist.broadcast_object(self.look(state, tolerated) if state.dist.is_main else None)
        doubt = f"its last steps were skipped ({run})" if run > tolerated else f"{bad} is not finite" if bad else ""
        if doubt:
            if state.dist.is_main and not self.late:
                log.warning(f"step {state.step} is not saved, the last checkpoint stays: {doubt}")
            self.late = run > tolerated  # what is not finite stays so: the next look is at the next checkpoint's time
            return doubt
        state.metrics.share(state.dist.world)
        if state.dist.is_main:
            checkpoint.save(state, self.folder, keep=self.keep)
            if self.late:
                log.info(f"step {state.step} is saved")
        self.saved_step, self.late, self.keep = state.step, False, False
        state.dist.barrier()
        state.metrics.restart_clock()
        return ""

    def look(self, state: State, tolerated: int) -> tuple[int, str]:
        """-> (skipped last steps, a tensor that is not finite)."""
        _, run = state.metrics.skips()
        return run, "" if run > tolerated else checkpoint.not_finite(state)


class NonFinite(Hook):
    """Ends a run whose gradients stay non-finite, leaving bad_step.pt for inspection: the main rank's state, and `index`, the ids of
    every rank's last images.  All ranks see the same gradients, and end together."""

    def __init__(self, folder: Path, *, max_bad_steps: int):
        self.folder, self.max_bad_steps = folder, max_bad_steps
        self.counted = 0

    def start(self, state: State) -> None:
        self.counted, _ = state.metrics.skips()

    def after_step(self, state: State) -> None:
        if state.record is None:
            return
        skipped, bad_run = state.record["train/skipped_steps"], state.record["train/bad_run"]
        if skipped - self.counted > self.normal(state) and state.dist.is_main:
            log.warning(f"step {state.step}: {skipped - self.counted:.0f} steps with non-finite gradients were skipped since the last line")
        self.counted = skipped
        if bad_run >= self.max_bad_steps:
            dump, index = self.folder / "bad_step.pt", state.dist.gather_objects(state.images.index.cpu())
            if state.dist.is_main:
                checkpoint.atomic_save({**checkpoint.contents(state), "index": index}, dump)
            state.dist.barrier()  # a launcher ends all ranks with the first
            raise Diverged(
                f"The last {bad_run:.0f} steps had non-finite gradients; training stopped at step {state.step}. State and sample ids "
                f"are in {dump}. Lower --optim.base-lr, lengthen --optim.warmup-epochs or take --efficiency.dtype bf16, and "
                f"{checkpoint.how_to_continue(self.folder)}."
            )

    def normal(self, state: State) -> int:
        """Skipped steps between two lines that fp16 has anyway: it finds its first scale by halving 2**16, and later tries larger ones."""
        if state.dtype is not torch.float16:
            return 0
        return 16 if state.step <= state.cfg.log.every_steps else 1


class GarbageCollection(Hook):
    """Python's collector runs at epoch ends and every `every_steps`, on all ranks in the same step, instead of whenever one has made enough
    objects: the others would wait for it.  What exists at the start is never looked at again."""

    def __init__(self, *, every_steps: int = 1000):
        self.every_steps = every_steps

    def start(self, state: State) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self, state: State) -> None:
        if state.at_epoch_end or state.step % self.every_steps == 0:
            gc.collect()

    def close(self) -> None:
        gc.enable()
        gc.unfreeze()


class CollapseAlarm(Hook):
    """Warns, at most once an epoch, when a value that the method watches leaves its range; not before the warm-up is over."""

    def __init__(self) -> None:
        self.quiet_until = 0

    def start(self, state: State) -> None:
        self.quiet_until = max(state.cfg.optim.warmup_epochs, 1) * state.steps_per_epoch

    def after_step(self, state: State) -> None:
        if state.record is None or state.step < self.quiet_until or not state.dist.is_main:
            return
        for line in collapse.signs(state.method.watches, state.record):
            log.warning(f"step {state.step}: this run may have collapsed: {line}")
            self.quiet_until = state.step + state.steps_per_epoch


class Pictures(Hook):
    """views.png of the first batch; curves.png, refreshed every epoch.  A picture that fails is reported, never fatal."""

    def __init__(self, folder: Path):
        self.folder = folder

    def after_step(self, state: State) -> None:
        if not state.dist.is_main:
            return
        if not (self.folder / "views.png").exists():
            self.draw(pictures.save_views, state.images, state.views, state.cfg.views, self.folder / "views.png")
        if state.at_epoch_end:
            self.curves()

    def finish(self, state: State) -> None:
        if state.dist.is_main:
            self.curves()

    def curves(self) -> None:
        self.draw(pictures.save_curves, self.folder / "metrics.jsonl", self.folder / "curves.png")

    def draw(self, function: Callable, *args) -> None:
        try:
            function(*args)
        except (OSError, ValueError) as error:
            log.warning(f"no {args[-1].name}: {error}")


class OnlineEvaluation(Hook):
    """Every few epochs and at the end: `evaluate(backbone) -> {name: value}`, written as eval/name."""

    def __init__(self, evaluate: Callable[[torch.nn.Module], dict[str, float]], write: Callable[[Record], None], *, every_epochs: int):
        self.evaluate, self.write, self.every_epochs = evaluate, write, every_epochs

    def start(self, state: State) -> None:
        if state.step == 0:
            self.run(state)  # the random backbone: what the curve has to rise from

    def after_step(self, state: State) -> None:
        epoch, rest = divmod(state.step, state.steps_per_epoch)
        if (rest == 0 and epoch % self.every_epochs == 0) or state.step >= state.total_steps:
            self.run(state)

    def run(self, state: State) -> None:
        backbone = state.method.backbone
        with statistics_of_rank_zero(backbone):  # all ranks evaluate the network of the checkpoint
            result = self.evaluate(backbone)
        if state.dist.is_main:
            epoch = state.step / state.steps_per_epoch
            self.write({"step": state.step, "epoch": epoch, **{f"eval/{k}": v for k, v in result.items()}})
            log.info(f"ep {epoch:.2f} | " + " | ".join(f"{k} {v:.2f}" for k, v in result.items()))
        state.metrics.restart_clock()


class Preemption(Hook):
    """SIGTERM, SIGUSR1 or one Ctrl-C: finish the step, let the other hooks save, end.  A second Ctrl-C ends at once.

    Ranks agree at log steps, where they synchronise anyway, and between them about every 5 seconds: torchrun kills what has not ended
    30 seconds after its signal.  A process alone stops after the current step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    EVERY_S = 5.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.received = ""
        self.previous: dict[signal.Signals, object] = {}
        self.next_step, self.met_step, self.met = 0, 0, 0.0
        self.step_s = math.inf

    def start(self, state: State) -> None:
        self.next_step, self.met_step, self.met = state.step + 1, state.step, time.perf_counter()
        for s in self.SIGNALS:
            self.previous[s] = signal.signal(s, self.on_signal)

    def on_signal(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def after_step(self, state: State) -> None:
        if state.dist.world == 1:
            state.stop = self.received
        elif state.record is not None or state.step >= self.next_step:
            self.agree(state)
        if state.stop and state.dist.is_main:
            log.info(f"{state.stop}: saving step {state.step} and ending; continue with --train.resume {self.folder / checkpoint.LAST}")

    def agree(self, state: State) -> None:
        """Whether to stop, and when to meet again: by the step time that rank 0 measured between the last two meetings."""
        answers = state.dist.gather_objects((self.received, self.step_s))
        state.stop = max(received for received, _ in answers)
        steps = int(self.EVERY_S / answers[0][1])
        self.next_step = state.step + min(max(steps, 1), state.cfg.log.every_steps)
        now = time.perf_counter()  # the ranks' devices are done with the step: they have just exchanged something
        self.step_s = (now - self.met) / (state.step - self.met_step)
        self.met_step, self.met = state.step, now

    def close(self) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)
