"""Whether RL of lrpo.py can see its way: the cosine between its gradient and the reward's own, in
the space of a restorer's weights, before anything is trained.

    python -m experiments.cosine [--init restorer.pth] [--rewards psnr,ssim,task] [--data-root data]

Crops of the training images, one at a time. A cosine of 0.1 is usable: the gradients of many images
add up, noise does not (last row). Near 0, more rollouts, another block or more images a step are
needed. A reward without gradient cannot be looked at like this.
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from tqdm import tqdm

import grpo
import report
import runs
import study
from config import DEMO_MODEL
from data import TASK_WORDS, Crops, list_training, task_names
from lrpo import Pixels
from model import load_restorer
from rewards import Reward, parse_terms


@dataclass
class Config:
    """Compare gradients."""

    init: str = str(DEMO_MODEL)
    """restorer: AdaIR, or any file that spandrel loads"""
    data_root: str | None = None
    """AdaIR's data folder, or a folder of photos; without it, the demo's photographs"""
    tasks: tuple[Literal[TASK_WORDS], ...] = ()
    """tasks to look at; without it, all"""
    rewards: str = "default"
    """terms, as for lrpo.py"""
    weights_dir: str | None = None
    """where clip, lpips and aes find their weights; without it, torch's cache"""
    block: tuple[runs.Positive, ...] = (1, 2, 8, 32)
    """px a side of the blocks that are drawn; they divide --crop"""
    sigma: runs.AboveZero = 0.02
    """deviation of what is drawn, in [0, 1]"""
    group_size: runs.Positive = 32
    """G, rollouts per image"""
    advantage_patch: runs.Count = 0
    """px a side of patches that have an advantage each; a multiple of every --block, 0: none"""
    images: runs.Positive = 2
    """crops of each task"""
    crop: runs.MultipleOf8 = 128
    """px a side"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """of crops and rollouts"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


def gradient(value, net):
    """∇ value in the weights, as one vector."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(found, parameters)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def rl_gradient(net, policy, reward, batch, group_size, generators, turn, patch=0):
    """What one step of LRPO would follow on a batch of one crop, without KL and ℓ1."""
    restored, path = policy.rollout(net, batch.degraded, group_size, generators, turn)
    if patch:
        *_, credit = reward.in_patches(restored, batch.degraded, batch.gt, batch.tasks, None, patch)
    else:
        scores, _ = reward(restored, batch.degraded, batch.gt, batch.tasks)
        credit = scores[:, :, None, None]
    advantages = grpo.group_advantages(credit.movedim(1, -1), 1e-12).movedim(-1, 1)
    return gradient((advantages[:, :, None] * policy.log_prob(net, path, patch)).mean(), net)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def run_program(argv):
    """The program with these flags."""
    config = runs.flags(Config, "experiments.cosine", __doc__, argv)
    runs.check_device(config.device)
    net = load_restorer(config.init).to(config.device)
    reward = Reward(parse_terms(config.rewards), config.device, config.weights_dir)
    for block in config.block:
        if config.crop % block:
            raise runs.RunError(f"--block {block} does not divide --crop {config.crop}")
        if config.advantage_patch % block:
            raise runs.RunError(f"--advantage-patch is no multiple of --block {block}")
    tasks = task_names(config.tasks) if config.tasks else ()
    samples = list_training(config.data_root, tasks=tasks).train
    crops, policy = (
        Crops(samples, config.crop, config.seed),
        Pixels(config.block, [config.sigma] * len(config.block)),
    )
    rows, total = {}, torch.zeros(1 + len(config.block), 1)
    for task, numbers in tqdm(crops.of_each_task(config.images).items(), desc="tasks"):
        rows[task] = torch.zeros(len(config.block))
        for n in numbers:
            batch = crops.collate([crops[n]])
            batch = batch._replace(
                degraded=batch.degraded.to(config.device), gt=batch.gt.to(config.device)
            )
            value = reward.differentiable(net(batch.degraded), batch.gt, batch.tasks).mean()
            found = [gradient(value, net)]
            for turn in range(len(config.block)):
                generators = study.generators_of(config, batch.numbers)
                found.append(
                    rl_gradient(
                        net,
                        policy,
                        reward,
                        batch,
                        config.group_size,
                        generators,
                        turn,
                        config.advantage_patch,
                    )
                )
            rows[task] += torch.tensor([cosine(found[0], g) for g in found[1:]]) / len(numbers)
            total = total + torch.stack([g / g.norm() for g in found])  # each image counts alike
    lines = [[task, *(f"{v:.2f}" for v in values)] for task, values in rows.items()]
    lines.append(["all images together", *(f"{cosine(total[0], g):.2f}" for g in total[1:])])
    print(
        f"cosine of RL's gradient to the reward's, G = {config.group_size}, one image at a time\n"
    )
    print(report.markdown(["", *(f"b = {b}" for b in config.block)], lines))


def main(argv=None):
    return runs.program("experiments.cosine", run_program, argv, study.ERRORS)


if __name__ == "__main__":
    sys.exit(main())
