"""W2SSL (DOI 10.1109/TCSVT.2023.3298937).  Values: the released code, its README's commands and the published log (methods/w2ssl.md).

All: ImageNet-1k, ResNet-50, SyncBN, patches of 112 px in montages of 224 px, heads 4096 wide, K = 256, temperatures 0.3 and 0.07,
LARS with momentum 0.9, trust coefficient 0.001 and weight decay 1e-6 on tensors of two dimensions or more, learning rate 0.6 per 256
*images*, target momentum 0.99 rising to 1, fp16 in the published runs (ours: bf16 where the device has it).  The README's "BS" counts
montages a view; `global_batch_size` counts images.  Linear top-1: the official README's, not measured by us.
"""

from __future__ import annotations

from fastssl.config import BarlowLars, EvalConfig, LogConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.methods.w2ssl import W2SSL
from fastssl.recipes import w2ssl, w2ssl_quad, w2ssl_windows
from fastssl.views import ViewSpec


def _r50(name: str, *, batch: int, ranks: int, views: ViewSpec, method: W2SSL.Config, warmup_epochs: int = 10) -> RunConfig:
    """What all ImageNet presets of this file share."""
    return RunConfig(
        preset=name,
        method=method,
        model=ModelConfig(arch="resnet50", norm="sync"),
        views=views,
        optim=BarlowLars(base_lr=0.6, base_batch_size=256, weight_decay=1e-6, schedule="mocov3", warmup_epochs=warmup_epochs),
        train=TrainConfig(epochs=200, global_batch_size=batch, ema_momentum=0.99, published_rank_batch=batch // ranks),
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=5),
    )


def w2ssl_r50_200ep_bs256() -> RunConfig:
    """W2SSL, ResNet-50, 200 epochs, 512 images = 256 montages a view, 4 ranks: 70.8 linear top-1 (official README and log).

    Peak learning rate 1.2.  The location loss stays at chance (0.6905 at the end, ln 2 = 0.6931), as published.
    """
    return _r50("w2ssl_r50_200ep_bs256", batch=512, ranks=4, views=w2ssl(), method=W2SSL.Config())


def w2ssl_r50_200ep_bs1024() -> RunConfig:
    """W2SSL, ResNet-50, 200 epochs, 2048 images = 1024 montages a view, 8 ranks: 72.8 linear top-1 (official README).  Peak learning
    rate 4.8."""
    return _r50("w2ssl_r50_200ep_bs1024", batch=2048, ranks=8, views=w2ssl(), method=W2SSL.Config())


def w2ssl_windows_r50_200ep_bs256() -> RunConfig:
    """`w2ssl_r50_200ep_bs256` with view 2 as windows of one crop of the whole image.  No number is published.

    Inferred: the sampler is known from compiled caches in the official repository, older than the released code; which of the two
    gave 70.8 cannot be told.
    """
    return _r50("w2ssl_windows_r50_200ep_bs256", batch=512, ranks=4, views=w2ssl_windows(), method=W2SSL.Config())


def w2ssl_quad_r50_200ep() -> RunConfig:
    """W2SSL with four quadrants, ResNet-50, 200 epochs, 256 images = 256 montages a view, 2 ranks, no warm-up (the official
    repository's ablation for detection, for which no number is published).  Peak learning rate 0.6."""
    return _r50("w2ssl_quad_r50_200ep", batch=256, ranks=2, views=w2ssl_quad(), method=W2SSL.Config(parts=4), warmup_epochs=0)


def w2ssl_mini() -> RunConfig:
    """W2SSL, ResNet-18, strips of 48 px in montages of 96 px (a map of 3 x 3): for tests and comparisons on CPUs.  All values ours."""
    return RunConfig(
        preset="w2ssl_mini",
        method=W2SSL.Config(hidden=512, dim=128),
        model=ModelConfig(arch="resnet18", norm="sync"),
        views=w2ssl(size=48),
        optim=BarlowLars(base_lr=1.0, weight_decay=1e-6, schedule="mocov3", warmup_epochs=1),
        train=TrainConfig(epochs=8, global_batch_size=64, ema_momentum=0.98),
        log=LogConfig(every_steps=5),
        eval=EvalConfig(knn_every_epochs=1, resize=64, crop=64),
    )
