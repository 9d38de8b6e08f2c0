"""The whole of a run as frozen dataclasses, grouped by effect.

`method`, `model`, `views`, `optim`, `data` and `train` change results; `efficiency` must not, beyond stated tolerances;
`log` and `eval` orchestrate.  A preset (fastssl/presets) is a function that returns a full `RunConfig`; every leaf is a
dotted flag of train.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from fastssl.views import View

T = TypeVar("T")
NotDecayed = Literal["vectors", "norm_weights", "none"]


class ConfigError(ValueError):
    """The run cannot start as configured; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's Config: what its paper names (temperatures, widths, weights)."""

    name: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    arch: Literal[
        "resnet18",
        "resnet50",
        "vit_tiny_patch16",
        "vit_tiny_patch8",
        "vit_small_patch16",
        "vit_small_patch8",
        "vit_base_patch16",
        "vit_base_patch8",
        "vit_large_patch16",
        "vit_tiny_patch8_mocov3",
        "vit_small_patch16_mocov3",
        "vit_base_patch16_mocov3",
        "vit_conv_small_mocov3",
        "vit_conv_base_mocov3",
        "swin_tiny_patch4_window7",
        "swin_tiny_patch4_window14",
        "swin_small_patch4_window7",
        "swin_small_patch4_window14",
        "swin_base_patch4_window7",
        "swin_base_patch4_window14",
    ] = "resnet50"
    """Backbone, by its torchvision name, or timm's without the image size. *_mocov3: fixed positions, 12 heads, its initialisation."""
    image_size: int = 224
    """ViTs: pixels a side of the images whose patches the position table counts; other sizes interpolate in it. Swins: of those whose
    last maps are one window."""
    drop_path: float = 0.0
    """Transformers: probability that a sample skips a residual branch of the last block while training; it rises linearly over the
    blocks from 0."""
    layer_scale: float = 0.0
    """ViTs: what the learned factors of each channel of each residual branch start from (LayerScale). 0: no such factors."""
    zero_init_residual: bool = False
    """ResNets: every residual branch starts as zero (the weight of its last BatchNorm does)."""
    norm: Literal["local", "sync", "eman", "shuffle"] = "local"
    """BatchNorm policy. local: statistics of each rank; sync: of the global batch; eman: local online, the target
    normalises with an EMA of the online network's running statistics (rank 0's); shuffle (mocov2, lewel_m): local, the
    key network sees its images in a random order over all ranks."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Base of the optimizers."""

    base_lr: float
    """Peak learning rate: of `base_batch_size` images if that is given, else used as given."""
    base_batch_size: int | None = None
    """The peak learning rate is base_lr x global batch / base_batch_size. None: it is base_lr; scale it yourself with the batch."""
    min_lr: float = 0.0
    """Learning rate that the cosine ends at (schedule dino). As given: not scaled with the batch."""
    weight_decay: float = 0.0
    weight_decay_end: float | None = None
    """Weight decay that a cosine over all steps ends at. None: constant."""
    schedule: Literal["eman", "dino", "mocov3", "vicreg"] = "eman"
    """Learning rate after the warm-up. eman: a cosine to 0 over epochs, constant within each; dino: a cosine to min_lr over steps;
    mocov3: a cosine to 0 over steps, and a warm-up that starts from 0; vicreg: the same to 0.001 of the peak."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up, per iteration."""
    clip_grad: float = 0.0
    """Largest L2 norm of a gradient, for each parameter tensor by itself; longer ones are scaled down. 0: off."""

    def peak_lr(self, global_batch_size: int) -> float:
        """Learning rate at the end of the warm-up."""
        return self.base_lr if self.base_batch_size is None else self.base_lr * global_batch_size / self.base_batch_size

    def final_lr(self, global_batch_size: int) -> float:
        """Learning rate that the cosine ends at."""
        return 0.001 * self.peak_lr(global_batch_size) if self.schedule == "vicreg" else self.min_lr


@dataclass(frozen=True, kw_only=True)
class Lars(OptimConfig):
    """LARS-SGD as in the EMAN and LEWEL code (methods: lewel, byol)."""

    sgd_momentum: float = 0.9
    eta: float = 0.001
    """Trust coefficient."""
    exclude: tuple[str, ...] = ("bn", "downsample.1", "bias")
    """Parameters whose name contains one of these: no weight decay, no trust ratio. "mlp.1" adds the first BatchNorm of the heads."""


@dataclass(frozen=True, kw_only=True)
class BarlowLars(OptimConfig):
    """LARS-SGD as in the Barlow Twins code and those that took it over (methods: dino, scfs, mocov3, w2ssl, sfrik,
    simclr, auh, vicreg). Biases and one-dimensional tensors: no weight decay, no trust ratio."""

    sgd_momentum: float = 0.9
    eta: float = 0.001
    """Trust coefficient."""


@dataclass(frozen=True, kw_only=True)
class Sgd(OptimConfig):
    """SGD with momentum; weight decay is part of the gradient."""

    sgd_momentum: float = 0.9
    not_decayed: NotDecayed = "vectors"
    """Parameters without weight decay. vectors: biases and one-dimensional tensors; norm_weights: one-dimensional tensors that are no
    biases (SERE); none: everything decays (MoCo)."""


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimConfig):
    """Adam with decoupled weight decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    not_decayed: NotDecayed = "vectors"
    """Parameters without weight decay. vectors: biases and one-dimensional tensors; norm_weights: one-dimensional tensors that are no
    biases (SERE); none: everything decays (MoCo)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = "data/imagenet"
    """Folder with train.beton and val.beton, or train/ and val/ class folders; or one .beton file (training only)."""
    order: Literal["shuffle", "chunks", "balanced", "sequential"] = "shuffle"
    """shuffle: a new permutation each epoch. chunks: pieces of the file in a new order, mixed within about 1 GB; for files larger than
    the memory. balanced: classes in turn, so that all come equally often. sequential: the stored order, for debugging. The same for
    any number of ranks."""
    last_batch: Literal["drop", "keep"] = "drop"
    """What to do with the last images of an epoch that fill no batch: leave them out (others each epoch), or train on a smaller batch,
    filled up to a multiple of the ranks with images of the epoch's beginning."""
    subset: str = ""
    """Part of the training images. 1percent, 10percent: ImageNet's lists; first:N: the first N of each class (first:260: IN20%);
    after:N: the N of each class that follow first:N and one left out; random:N or random:N:SEED: N of each class; PATH: a text file
    of image names. Empty: all."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    epochs: int = 200
    global_batch_size: int = 1024
    """Images per optimizer step over all ranks and accumulation steps."""
    ema_momentum: float = 0.98
    """Momentum of the target network at step 0."""
    ema_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: the momentum rises to 1 over all steps; constant: it stays."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step. BatchNorm statistics are then those of a micro-batch."""
    published_rank_batch: int | None = None
    """Images per rank in the published run: a run whose local BatchNorm sees another number is warned about."""
    seed: int = 0
    max_steps: int | None = None
    """Stop after this many steps; schedules still span `epochs`."""
    resume: str = ""
    """'auto' (the run folder's checkpoint, if any; an error where numbered runs of the name make it ambiguous) or a checkpoint file:
    everything is restored."""
    init_from: str = ""
    """Whose weights start a new run: all of a checkpoint of this method, the backbone of any other file that evaluations read; optimizer,
    schedules and step start afresh. With --train.resume auto: unless the run has
    a checkpoint of its own."""
    max_bad_steps: int = 20
    """Stop with a dump after this many consecutive steps with non-finite gradients (each is skipped and counted)."""


@dataclass(frozen=True, kw_only=True)
class EfficiencyConfig:
    """How it runs, not what it computes."""

    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Autocast type; auto: bf16 where the device has it, else fp16 (with a GradScaler) on a GPU and fp32 on a CPU. fp64: everything in
    double, for checks."""
    gradient_dtype: Literal["auto", "bf16"] = "auto"
    """Type in which ranks exchange gradients. auto: that of the weights; bf16: rounded to 8 significant bits before they are added, which
    halves the traffic. SFRIK's ResNet-50 and projector have 376 M weights, 1.5 GB of gradients: in a ring of 8 ranks each sends 2.6 GB a
    step, in bf16 1.3 GB."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the method's forward; auto: on with CUDA, off on a CPU (where it gains nothing)."""
    cuda_graphs: bool = False
    """Replay the compiled forward and backward pass as CUDA graphs: their kernels are launched in one call each. For steps that the host
    cannot launch as fast as the GPU computes them (ViT-S, small batches); inputs are copied once more, and memory is set aside."""
    channels_last: bool = True
    checkpointing: Literal["off", "stages"] = "off"
    """stages: of what a backbone computes, only what enters each stage of a ResNet or Swin, or block of a ViT, is kept for the backward
    pass, which computes the rest again: less memory, about a third more computation of the online network."""
    find_batch: bool = False
    """Look for the largest batch that this GPU's memory holds, print it and stop. Each size that is tried is compiled anew."""
    loader: Literal["auto", "ffcv", "dali", "torchvision", "torchvision_cuda", "folder"] = "auto"
    """Decoder; auto: the first usable of ffcv, dali, torchvision for stored data, folder for folders."""
    workers: int = 0
    """Decoder threads per rank; 0: the cores of this machine divided by its ranks, at most 12."""
    prefetch: int = 3
    """Decoded batches kept ahead of the training step."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    dir: str = "runs"
    name: str = ""
    """Run folder below `dir`; default: the preset's name. A name that is taken gets a number, unless resuming."""
    every_steps: int = 50
    """Steps between log lines; the only host synchronisation of the loop."""
    checkpoint_every_epochs: int = 1
    keep_every: int = 0
    """Keep a numbered checkpoint every so many epochs; 0: only the last."""
    pictures: bool = True
    """Write views.png at step 0 and refresh curves.png."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    knn_every_epochs: int = 0
    """Online k-NN (protocol knn/dino) every so many epochs and at the end; 0: never."""
    knn_k: tuple[int, ...] = (10, 20)
    resize: int = 256
    """Shorter side before the centre crop of evaluations, pixels."""
    crop: int = 224


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Flags are grouped by effect: method, model, views, optim, data and train change the result; efficiency
    does not; log and eval watch."""

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress]
    method: MethodConfig
    model: ModelConfig
    views: tuple[View, ...]
    optim: OptimConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def flags(values: dict, path: str = "") -> dict[str, str]:
    """Every leaf of `to_dict`'s result by its flag, as it would be typed: {"--optim.base-lr": "0.3", ...}."""
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found |= flags(value, name)
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            found[f"--{name.replace('_', '-')}"] = text or "''"
    return found


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """Plain values only (tuples become lists), for JSON and checkpoints; the method's name stands beside its fields."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    out = plain(dataclasses.asdict(cfg))
    out["method"]["name"] = cfg.method.name
    return out


def from_dict(saved: dict[str, Any], preset: T) -> T:
    """`preset` with every leaf replaced by the saved value.  ConfigError names a leaf this version does not know."""

    def rebuild(default: Any, value: Any, path: str) -> Any:
        if dataclasses.is_dataclass(default):
            known = {f.name for f in dataclasses.fields(default)}
            unknown = set(value) - known - {"name"}
            if unknown:
                raise ConfigError(f"the saved configuration has '{path}{unknown.pop()}', which this version does not know.")
            return dataclasses.replace(
                default, **{k: rebuild(getattr(default, k), v, f"{path}{k}.") for k, v in value.items() if k in known}
            )
        if isinstance(default, tuple):
            items = default if default and dataclasses.is_dataclass(default[0]) else value
            return tuple(rebuild(d, v, path) for d, v in zip(items, value, strict=True))
        return value

    return rebuild(preset, saved, "")
