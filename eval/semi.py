"""Semi-supervised evaluation: the whole network trained on 1 % or 10 % of the labels.

python -m eval.semi --checkpoint runs/lewel/checkpoint_last.pt --data data/imagenet --protocol semi/lewel-1pct
torchrun --nproc-per-node 4 -m eval.semi --checkpoint ... --protocol semi/sfrik-10pct
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval import command
from eval.tuning_command import TuningArgs, run


@dataclass(frozen=True, kw_only=True)
class Args(TuningArgs):
    """Accuracy after training backbone and classifier on a part of the labels.

    Data that are not ImageNet have no lists of 1 % and 10 %: give a part with --subset, random:N or first:N.  The settings default
    to the protocol's.
    """

    protocol: Literal["semi/lewel-1pct", "semi/lewel-10pct", "semi/sfrik-1pct", "semi/sfrik-10pct"] = "semi/lewel-1pct"
    """Whose settings."""


def main(argv: Sequence[str] | None = None) -> None:
    command.main(Args, run, "eval.semi", argv)


if __name__ == "__main__":
    main()
