"""SFRIK (arXiv 2208.00789).  Values: the commands of the official README.

All: LARS, momentum 0.9, weight decay 1e-6, learning rates per 256 images, 10 warm-up epochs, SyncBN, the last BatchNorm of each
residual branch from 0, global batch 2048, the last partial batch of an epoch kept, kernel weights 1-40-40, fp16 (ours: bf16 where
the device has it).  IN20%: the first 260 images of each class of ImageNet.  The accuracies of the ResNet-18 runs are in a table of
the paper that the specification does not quote.
"""

from __future__ import annotations

from dataclasses import replace

from fastssl.config import BarlowLars, DataConfig, EvalConfig, LogConfig, MethodConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.methods.sfrik import SFRIK
from fastssl.recipes import auh, obow, swav, vicreg
from fastssl.views import ViewSpec

IN20 = DataConfig(subset="first:260", last_batch="keep")
R18_MLP = "8192-8192-8192"


def published(
    name: str, arch: str, method: MethodConfig, views: ViewSpec, data: DataConfig, *, lr: float, epochs: int = 100, batch: int = 2048
) -> RunConfig:
    """What all published runs of SFRIK, SimCLR, AUH and VICReg share."""
    return RunConfig(
        preset=name,
        method=method,
        model=ModelConfig(arch=arch, norm="sync", zero_init_residual=True),
        views=views,
        optim=BarlowLars(base_lr=lr, base_batch_size=256, weight_decay=1e-6, schedule="vicreg", warmup_epochs=10),
        train=TrainConfig(epochs=epochs, global_batch_size=batch),
        data=data,
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=10),
    )


def mini(name: str, method: MethodConfig) -> RunConfig:
    """ResNet-18 on 64 px crops: minutes on two CPU cores.  All values ours."""
    return RunConfig(
        preset=name,
        method=method,
        model=ModelConfig(arch="resnet18", norm="sync", zero_init_residual=True),
        views=vicreg(size=64),
        optim=BarlowLars(base_lr=1.2, weight_decay=1e-6, schedule="vicreg", warmup_epochs=1),
        train=TrainConfig(epochs=8, global_batch_size=64),
        log=LogConfig(every_steps=5),
        eval=EvalConfig(knn_every_epochs=1, resize=64, crop=64),
    )


def sfrik_r50_200ep() -> RunConfig:
    """SFRIK, ResNet-50, 200 epochs, 8 ranks x 256: 70.3 linear top-1 (official README, not measured by us).  Peak learning rate 3.2."""
    return published("sfrik_r50_200ep", "resnet50", SFRIK.Config(), vicreg(), DataConfig(last_batch="keep"), lr=0.4, epochs=200)


def sfrik_r18_100ep_in20() -> RunConfig:
    """SFRIK, ResNet-18, IN20%, 100 epochs, 4 ranks x 512.  Peak learning rate 9.6."""
    return published("sfrik_r18_100ep_in20", "resnet18", SFRIK.Config(mlp=R18_MLP, sim_coeff=4000.0), vicreg(), IN20, lr=1.2)


def sfrik_r18_100ep_in20_obow() -> RunConfig:
    """SFRIK on OBoW's multi-crop: the original, two crops of 160 px and five patches of 96 px; else as `sfrik_r18_100ep_in20`."""
    method = SFRIK.Config(mlp=R18_MLP, sim_coeff=4000.0, general_indices=(0,), reg_small=True)
    return published("sfrik_r18_100ep_in20_obow", "resnet18", method, obow(), IN20, lr=1.2)


def sfrik_r18_100ep_in20_swav() -> RunConfig:
    """SFRIK on SwAV's multi-crop: two crops of 224 px and six of 96 px, which only the former spread; else as `sfrik_r18_100ep_in20`."""
    method = SFRIK.Config(mlp=R18_MLP, sim_coeff=4000.0, general_indices=(0, 1), reg_small=False)
    return published("sfrik_r18_100ep_in20_swav", "resnet18", method, swav(), IN20, lr=1.2)


def sfrik_r18_100ep_stl10() -> RunConfig:
    """SFRIK, ResNet-18 on the 100,000 unlabelled images of STL-10, 64 px, 100 epochs, one rank x 2048.  Peak learning rate 9.6.

    Convert stl10_binary/ to data/stl10, or give --data.path.
    """
    data = DataConfig(path="data/stl10/unlabeled.beton", last_batch="keep")
    cfg = published("sfrik_r18_100ep_stl10", "resnet18", SFRIK.Config(mlp=R18_MLP, sim_coeff=4000.0), auh(), data, lr=1.2)
    return replace(cfg, eval=EvalConfig(resize=96, crop=96))  # its file is unlabelled; evaluations take the images as they are


def sfrik_mini() -> RunConfig:
    """SFRIK, ResNet-18, 64 px: minutes on two CPU cores.  All values ours; with --method.weights 1 40 the paper's truncation L = 2.

    A weight of |x - y|^2 in the published proportion to the width (500) learned less on the demo's tiles: the views hardly came closer.
    """
    return mini("sfrik_mini", SFRIK.Config(mlp="512-512-1024", sim_coeff=2000.0))
