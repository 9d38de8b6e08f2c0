"""Fine-tuning a vision transformer end to end, on the data it was pretrained on or on small ones.

torchrun --nproc-per-node 8 -m eval.finetune --checkpoint runs/ibot/checkpoint_last.pt --data data/imagenet --protocol finetune/mae
torchrun --nproc-per-node 8 -m eval.finetune --checkpoint ... --data data/cifar100 --protocol transfer/mocov3-cifar100
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval import command
from eval.tuning_command import TuningArgs, run


@dataclass(frozen=True, kw_only=True)
class Args(TuningArgs):
    """Accuracy after fine-tuning a ViT.  The settings default to the protocol's; transfer/mocov3 has those of CIFAR-10."""

    protocol: Literal[
        "finetune/mae",
        "finetune/ibot",
        "finetune/mocov3",
        "transfer/mocov3",
        "transfer/mocov3-cifar100",
        "transfer/mocov3-flowers",
        "transfer/mocov3-pets",
    ] = "finetune/mae"
    """Whose settings."""


def main(argv: Sequence[str] | None = None) -> None:
    command.main(Args, run, "eval.finetune", argv)


if __name__ == "__main__":
    main()
