"""BYOL on lightly 1.6, the way its documentation's BYOL example writes it; the other side of benchmarks/compare_byol.py.

    .venv-lightly/bin/python benchmarks/lightly_byol.py --data data/demo/tiles/train --images 3200

Lightly's own data set, transforms, heads, loss and momentum update; torchvision's ResNet-18, SGD, fp32.  Set to what
fastssl's byol_mini has: crop size and range, batch, widths of the heads.  Generous to it: workers stay alive between epochs,
and the momentum follows its cosine per step.  Prints one JSON line every few seconds and one at the end; rates leave out the
first batch, which waits for the workers to start.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import psutil
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.utils.scheduler import cosine_schedule
from safetensors.torch import save_file
from torch import nn


class BYOL(nn.Module):
    def __init__(self, backbone: nn.Module, features: int, hidden: int, dim: int):
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(features, hidden, dim)
        self.prediction_head = BYOLPredictionHead(dim, hidden, dim)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()


def batches(args: argparse.Namespace):
    """Endless pairs of views."""
    common = {"input_size": args.size, "min_scale": 0.2}
    transform = BYOLTransform(view_1_transform=BYOLView1Transform(**common), view_2_transform=BYOLView2Transform(**common))
    loader = torch.utils.data.DataLoader(
        LightlyDataset(str(args.data), transform=transform),
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    while True:
        for views, _, _ in loader:
            yield views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="one folder of images per class")
    until = parser.add_mutually_exclusive_group(required=True)
    until.add_argument("--images", type=int, help="stop after so many images")
    until.add_argument("--wall-clock", type=float, help="stop when this process is so many seconds old")
    parser.add_argument("--out", type=Path, help="backbone with torchvision's names (.safetensors)")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.06)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dim", type=int, default=128)
    args = parser.parse_args()

    born = psutil.Process().create_time()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    resnet = torchvision.models.resnet18()
    model = BYOL(nn.Sequential(*list(resnet.children())[:-1]), resnet.fc.in_features, args.hidden, args.dim).to(device)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    for step, (x0, x1) in enumerate(batches(args)):
        done = step * args.batch / args.images if args.images else (time.time() - born) / args.wall_clock
        momentum = cosine_schedule(min(int(1000 * done), 999), 1000, 0.996, 1)
        update_momentum(model.backbone, model.backbone_momentum, m=momentum)
        update_momentum(model.projection_head, model.projection_head_momentum, m=momentum)
        x0, x1 = x0.to(device), x1.to(device)
        p0, z0 = model(x0), model.forward_momentum(x0)
        p1, z1 = model(x1), model.forward_momentum(x1)
        loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        now, images = time.perf_counter(), (step + 1) * args.batch
        if step == 0:
            first = reported = now
            continue
        finished = images >= args.images if args.images else time.time() - born >= args.wall_clock
        if finished or now - reported > 5:
            record = {"images": images, "loss": loss.item(), "img_per_s": step * args.batch / (now - first), "elapsed": time.time() - born}
            print(json.dumps(record), flush=True)
            reported = now
        if finished:
            break
    if args.out:
        save_file({name: t.contiguous() for name, t in resnet.state_dict().items() if not name.startswith("fc.")}, args.out)


if __name__ == "__main__":
    main()
