"""A foreign restorer to try lrpo.py on: a small NAFNet that learns to remove noise of sigma 25 by
ℓ1, written as NAFNet's authors write theirs. Its architecture is spandrel's.

    python -m experiments.nafnet                          the demo's photographs; half an hour
    python lrpo.py --init runs/nafnet.pth --tasks denoise25
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import runs
from data import Crops, list_training
from metrics import evaluate_image
from model import load_restorer, restore
from study import ERRORS

SHAPE = dict(width=16, enc_blk_nums=[1, 1, 1], middle_blk_num=1, dec_blk_nums=[1, 1, 1])


@dataclass
class Config:
    """Pre-train a NAFNet on noise."""

    data_root: str | None = None
    """AdaIR's data folder, or a folder of photos; without it, the demo's photographs"""
    out: Path = Path("runs/nafnet.pth")
    """file to write"""
    steps: runs.Positive = 8000
    """updates"""
    lr: runs.NotNegative = 1e-3
    """Adam's rate, falling to 0 as a cosine"""
    batch_size: runs.Positive = 8
    """crops per update"""
    crop: runs.MultipleOf8 = 64
    """px a side"""
    seed: runs.Count = 0
    """of weights and crops"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


def run_program(argv):
    """The program with these flags."""
    config = runs.flags(Config, "experiments.nafnet", __doc__, argv)
    runs.check_device(config.device)
    from spandrel.architectures.NAFNet import NAFNet  # late: it knows some forty architectures

    torch.manual_seed(config.seed)
    net = NAFNet(**SHAPE).to(config.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.9))
    split = list_training(config.data_root, tasks=("denoise25",))
    crops = Crops(split.train, config.crop, config.seed)
    for step in (bar := tqdm(range(config.steps), unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        first = step * config.batch_size
        batch = crops.collate([crops[n] for n in range(first, first + config.batch_size)])
        loss = (net(batch.degraded.to(config.device)) - batch.gt.to(config.device)).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            bar.set_postfix(l1=f"{loss.item():.4f}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    runs.save_checkpoint(config.out, {"params": net.state_dict()})
    restoring = partial(restore, load_restorer(config.out).to(config.device))
    psnrs = [evaluate_image(restoring, sample)[0]["psnr"] for sample in split.val]
    print(f"{config.out}: {sum(psnrs) / len(psnrs):.2f} dB on {len(psnrs)} validation photographs")


def main(argv=None):
    return runs.program("experiments.nafnet", run_program, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
