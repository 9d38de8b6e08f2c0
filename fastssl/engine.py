"""fit(): the training loop, and the step it repeats.  The same code runs alone, under torchrun, on CUDA and on a CPU."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from fastssl.batch import ImageBatch, Views
from fastssl.config import ConfigError, RunConfig
from fastssl.distributed import Dist, data_parallel
from fastssl.method import Method, StepOutput
from fastssl.metrics import Metrics, Record
from fastssl.models.features import Backbone
from fastssl.models.norm import RunningStatistics
from fastssl.optim.build import build_optimizer, build_schedules, set_scalars
from fastssl.optim.clip import clip_each_
from fastssl.optim.schedules import Sched, Schedules
from fastssl.precision import DTYPES, autocast
from fastssl.rng import STEP, random_u32

if TYPE_CHECKING:
    from fastssl.hooks import Hook

log = logging.getLogger("fastssl")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the device computes it natively; else fp16 on GPUs (before Ampere), and fp32 on CPUs (before AVX-512), whose
    16-bit convolutions are ten times slower than fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def compiles(cfg: RunConfig, device: torch.device) -> bool:
    """Whether the forward pass and the colour chain are compiled.  Inductor needs a C++ compiler and Python's headers."""
    wanted = cfg.efficiency.compile == "on" or (cfg.efficiency.compile == "auto" and device.type == "cuda")
    if not wanted:
        return False
    missing = [] if shutil.which("g++") or shutil.which("clang++") else ["a C++ compiler (g++)"]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python's headers (python3-dev)")
    if missing and cfg.efficiency.compile == "on":
        raise ConfigError(f"--efficiency.compile on needs {' and '.join(missing)}. Install them, or take --efficiency.compile off.")
    if missing:
        log.warning(f"running without torch.compile: {' and '.join(missing)} not found")
    return not missing


def compile_mode(cfg: RunConfig) -> str | None:
    """torch.compile's `mode`; reduce-overhead is its name for CUDA graphs."""
    return "reduce-overhead" if cfg.efficiency.cuda_graphs else None


@dataclass
class State:
    """Everything that changes while training, and what hooks may look at."""

    cfg: RunConfig
    dist: Dist
    method: Method
    model: nn.Module
    """The method, wrapped in DDP when there are several ranks."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: Schedules
    dtype: torch.dtype
    steps_per_epoch: int
    statistics: RunningStatistics
    compiled: bool = False
    """Whether the first steps compile."""
    step: int = 0
    """Optimizer steps done."""
    data: str = ""
    """What identifies the training data and their order of storage; empty: unknown."""
    samples: int = 0
    """Training images; 0: unknown."""
    metrics: Metrics = field(default_factory=Metrics)
    record: Record | None = None
    """The log record of this step; None between log steps."""
    images: ImageBatch | None = None
    """The last micro-batch and its views, for pictures."""
    views: Views | None = None
    stop: str = ""
    """Why the loop should end after this step; empty: go on."""

    @property
    def total_steps(self) -> int:
        planned = self.cfg.train.epochs * self.steps_per_epoch
        return min(planned, self.cfg.train.max_steps or planned)

    @property
    def at_epoch_end(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step >= self.total_steps


def prepare(method: Method, cfg: RunConfig, dist: Dist, steps_per_epoch: int) -> State:
    """Place, lay out, compile and wrap the method; build optimizer and schedules."""
    dtype = resolve_dtype(cfg.efficiency.dtype, dist.device)
    method.to(device=dist.device, dtype=torch.float64 if dtype is torch.float64 else None)
    if cfg.efficiency.channels_last:
        method.to(memory_format=torch.channels_last)
    method.train()
    method.global_batch_size = cfg.train.global_batch_size
    recompute = cfg.efficiency.checkpointing == "stages"
    for backbone in (m for m in method.modules() if isinstance(m, Backbone)):
        backbone.recompute = recompute
    for pair in method.ema:
        pair.collect()
    optimizer = build_optimizer(method, cfg)
    compiled = compiles(cfg, dist.device)
    if cfg.efficiency.cuda_graphs and not (compiled and dist.device.type == "cuda"):
        raise ConfigError(
            "--efficiency.cuda-graphs True replays compiled code on a GPU: it needs one, and --efficiency.compile on or auto."
        )
    if compiled:
        # In place and before DDP: state-dict keys stay clean.  One graph per batch length, the full one and a kept last one;
        # with several ranks Dynamo cuts it at DDP's buckets, which are exchanged while the rest is computed.
        method.compile(dynamic=False, mode=compile_mode(cfg))
        if recompute:
            torch._dynamo.config.optimize_ddp = False  # torch 2.7 cannot cut a graph that recomputes parts
    model: nn.Module = method
    if dist.world > 1:
        # A static graph loses gradients of the micro-batches that are not exchanged (no_sync).
        static = cfg.train.accumulation_steps == 1
        # The one norm policy that needs rank 0's statistics has its own flat broadcast.
        model = data_parallel(method, gradient_as_bucket_view=True, static_graph=static)
        if cfg.efficiency.gradient_dtype == "bf16":
            model.register_comm_hook(None, bf16_compress_hook)
    # One mechanism finds non-finite gradients for every dtype; only fp16 needs a scale other than 1.
    fp16 = dtype is torch.float16
    scaler = torch.amp.GradScaler(dist.device.type, init_scale=2.0**16 if fp16 else 1.0, growth_interval=2000 if fp16 else 2**31 - 1)
    schedules = build_schedules(cfg, steps_per_epoch)
    return State(
        cfg, dist, method, model, optimizer, scaler, schedules, dtype, steps_per_epoch, RunningStatistics(method), compiled=compiled
    )


def train_step(state: State, micro_batches: Sequence[Views] | Iterator[Views]) -> StepOutput:
    """One optimizer step on this rank's `accumulation_steps` micro-batches.  No host synchronisation."""
    sched = state.schedules.at(state.step)
    # What a forward pass draws (drop path) follows from the step and the rank: a resumed run needs no generator's state.
    torch.manual_seed(random_u32(state.cfg.train.seed, STEP, state.step, state.dist.rank, 0))
    set_scalars(state.optimizer, sched)
    state.method.before_step(sched)
    update_targets(state.method, sched, "before_forward")
    state.statistics.keep()
    if state.dist.world > 1 and state.cfg.model.norm in ("eman", "shuffle"):
        state.statistics.take_rank_zeros()
    out = forward_backward(state, iter(micro_batches), sched)
    state.statistics.mend()
    state.scaler.unscale_(state.optimizer)
    state.metrics.add_skipped(state.scaler, state.optimizer)
    if state.cfg.optim.clip_grad:
        clip_each_((p for group in state.optimizer.param_groups for p in group["params"]), state.cfg.optim.clip_grad)
    for p in state.method.dropped_gradients(sched):
        p.grad = None
    state.scaler.step(state.optimizer)
    # Only fp16 has a scale to find; for the others every skipped step would halve it for good.
    state.scaler.update(None if state.dtype is torch.float16 else 1.0)
    state.optimizer.zero_grad(set_to_none=True)
    update_targets(state.method, sched, "after_step")
    state.method.enqueue(out.keys)
    state.method.after_step(sched)
    state.step += 1
    return out


def forward_backward(state: State, micro_batches: Iterator[Views], sched: Sched) -> StepOutput:
    """Accumulate the gradients of the step's micro-batches; ranks exchange them once, in the last backward."""
    n = state.cfg.train.accumulation_steps
    outputs = []
    for k in range(n):
        last = k == n - 1
        with contextlib.nullcontext() if last or state.dist.world == 1 else state.model.no_sync():
            begin_pass(state)
            with autocast(state.dist.device, state.dtype):
                out = state.model(state.method.arrange(next(micro_batches), sched), sched)
            state.scaler.scale(out.loss / n if n > 1 else out.loss).backward()
        outputs.append(StepOutput(out.loss.detach(), out.logs, out.keys))
    if n == 1:
        return outputs[0]
    mean = {k: torch.stack([o.logs[k] for o in outputs]).mean(0) for k in outputs[0].logs}
    keys = {k: torch.cat([o.keys[k] for o in outputs]) for k in outputs[0].keys}
    return StepOutput(torch.stack([o.loss for o in outputs]).mean(0), mean, keys)


def begin_pass(state: State) -> None:
    """To be called before each forward pass: a replayed CUDA graph may now overwrite what the last pass returned."""
    if state.cfg.efficiency.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()


def update_targets(method: Method, sched: Sched, when: str) -> None:
    for pair in method.ema:
        if pair.when == when:
            pair.update_(sched.ema_momentum)


def fit(state: State, loader, augment, hooks: Sequence[Hook]) -> State:
    """Train until the planned steps are done or a hook asks to stop.  `loader` yields decoded ImageBatches, `augment` makes Views."""
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(loader.from_step(state.step)))
        for hook in hooks:
            stack.callback(hook.close)
            hook.start(state)

        def micro_batches() -> Iterator[Views]:
            while True:
                state.images = next(batches)
                state.views = augment(state.images)
                yield state.views

        views = micro_batches()
        while state.step < state.total_steps and not state.stop:
            out = train_step(state, views)
            # The micro-batches of a step are equal on all ranks; a kept last batch is smaller than the others.
            state.metrics.add(out, len(state.images) * state.cfg.train.accumulation_steps * state.dist.world)
            state.record = None
            if state.step % state.cfg.log.every_steps == 0 or state.step >= state.total_steps:
                state.record = state.metrics.read(state, loader)  # the only host synchronisation
            for hook in hooks:
                hook.after_step(state)
        for hook in hooks:
            hook.finish(state)
    return state
