"""Whether RL of lrpo.py can see its way: the cosine between its gradient and the reward's own, in
the space of a restorer's weights, before anything is trained.

    python -m experiments.cosine [--init restorer.pth] [--rewards psnr,ssim,task] [--data-root data]

Crops of the training images, one at a time. A cosine of 0.1 is usable: the gradients of many images
add up, noise does not (last row). Near 0, more rollouts, another block or more images a step are
needed. Of a reward without gradient two estimates of RL's can be compared: --against itself.

Of a diffusion chain the gradient is that of the expected reward through all steps that have noise,
the last step held: the mean over walks, differentiated along their path.
"""

import copy
import dataclasses
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
from diffusion import Chain, Steps
from lrpo import Pixels, check_blocks, check_crop
from model import load_restorer
from rewards import Reward, parse_terms, smallest_side


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
    against: Literal["true", "itself"] = "true"
    """the reward's own gradient, or RL's from other noise: that cosine is about the square of the
    one to what they are on average; it needs no gradient of the reward, and no --walks"""
    weights_dir: str | None = None
    """where clip, lpips and aes find their weights; without it, torch's cache"""
    block: tuple[runs.Positive, ...] = (1, 2, 8)
    """px a side of the blocks that are drawn; they divide --crop; of a chain they do nothing"""
    sigma: runs.AboveZero = 0.01
    """deviation of what is drawn, in [0, 1]; of a chain it is its own"""
    group_size: Annotated[int, Field(ge=2)] = 32
    """G, rollouts per image"""
    advantage_patch: tuple[runs.Count, ...] = (8,)
    """px a side of patches that have an advantage each, a multiple of every --block; 0: one
    advantage an image"""
    walks: runs.Positive = 64
    """of a chain: half as many as the gradient of its expected reward is the mean of"""
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


def rl_gradient(net, policy, reward, batch, group_size, generators, turn, patch):
    """What one step of LRPO follows on a batch of one crop, by its reward alone."""
    restored, path = policy.rollout(net, batch.degraded, group_size, generators, turn)
    _, _, credit = reward.in_patches(
        restored, batch.degraded, batch.gt, batch.tasks, judge=None, patch=patch
    )
    advantages = grpo.batch_advantages(credit.movedim(1, -1)).movedim(-1, 1)[:, :, None]
    advantages = (advantages * policy.noise_level(path)).clamp(-5, 5)
    return gradient((advantages * policy.log_prob(net, path, patch)).mean(), net)


def rl_gradients(config, net, policy, reward, batch, ways):
    """The same for every way, a (block size's turn, patch), from the noise of --seed."""
    return [
        rl_gradient(
            net,
            policy,
            reward,
            batch,
            group_size=config.group_size,
            generators=study.generators_of(config, batch.numbers),
            turn=turn,
            patch=patch,
        )
        for turn, patch in ways
    ]


def expected_gradient(net, reward, batch, generator, walks):
    """The gradient of a batch of one crop that RL estimates: of the reward itself, or of a chain's
    expected reward, by the path of its walks."""
    if not isinstance(net, Chain):
        return gradient(reward.differentiable(net(batch.degraded), batch.gt, batch.tasks)[0], net)
    y = 2 * batch.degraded - 1
    last = copy.deepcopy(net).requires_grad_(False)  # the step that RL does not train
    total = 0
    for _ in range(walks):
        *_, (t, x, _) = net.walk(
            y, lambda: torch.randn(y.shape, generator=generator, device=y.device)
        )
        restored = (last.predict(x, y, torch.full((1,), t, device=y.device)) + 1) / 2
        total = total + gradient(reward.differentiable(restored, batch.gt, batch.tasks)[0], net)
    return total / walks


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def load(config):
    """(restorer, reward, crops) of the flags. Raises RunError for what cannot be looked at."""
    net = load_restorer(config.init).to(config.device)
    blocks = (1,) if isinstance(net, Chain) else config.block
    for patch in config.advantage_patch:
        check_blocks(blocks, patch, config.crop)
    check_crop(net, config.crop)
    reward = Reward(parse_terms(config.rewards), config.device, config.weights_dir)
    if config.crop < (side := smallest_side(reward.weights)):
        raise runs.RunError(f"--crop is {config.crop}: these rewards need {side} or more")
    tasks = task_names(config.tasks) if config.tasks else ()
    crops = Crops(list_training(config.data_root, tasks=tasks).train, config.crop, config.seed)
    reward.try_plugs(crops[0][1], has_gradient=config.against == "true")
    return net, reward, crops


def run_program(argv):
    """The program with these flags."""
    config = runs.flags(Config, "experiments.cosine", __doc__, argv)
    runs.check_device(config.device)
    net, reward, crops = load(config)
    if isinstance(net, Chain):
        policy, blocks = Steps(net), [None]
    else:
        policy, blocks = Pixels(config.block, [config.sigma] * len(config.block)), config.block
    ways = [(turn, patch) for turn in range(len(blocks)) for patch in config.advantage_patch]
    # of a single step the true one is known exactly
    is_estimated = isinstance(net, Chain) and config.against == "true"
    rows, total = {}, 0
    for task, numbers in tqdm(crops.of_each_task(config.images).items(), desc="tasks"):
        rows[task] = torch.zeros(len(ways) + is_estimated)
        for n in numbers:
            batch = crops.collate([crops[n]])
            degraded, gt = (t.to(config.device) for t in (batch.degraded, batch.gt))
            batch = batch._replace(degraded=degraded, gt=gt)
            found = rl_gradients(config, net, policy, reward, batch, ways)
            if config.against == "itself":
                other = dataclasses.replace(config, seed=config.seed + 1)
                wanted, known = rl_gradients(other, net, policy, reward, batch, ways), []
            else:  # by other walks than the rollouts'; of a chain twice: how well is it known?
                generator = torch.Generator(config.device).manual_seed(n)
                halves = [
                    expected_gradient(net, reward, batch, generator, config.walks)
                    for _ in range(1 + is_estimated)
                ]
                wanted, known = [sum(halves)] * len(ways), [cosine(*halves)] if is_estimated else []
            cosines = [cosine(*pair) for pair in zip(found, wanted)] + known
            rows[task] += torch.tensor(cosines) / len(numbers)
            both = torch.stack([torch.stack(found), torch.stack(wanted)])  # (2, ways, weights)
            total = total + torch.nn.functional.normalize(both, dim=-1)  # each image counts alike
    lines = [[task, *(f"{v:.2f}" for v in values)] for task, values in rows.items()]
    together = [f"{cosine(*pair):.2f}" for pair in zip(*total)]
    lines.append(["all images together", *together, *[""] * is_estimated])
    names = [f"patch {p}" if blocks[turn] is None else f"b {blocks[turn]}, {p}" for turn, p in ways]
    names += ["of half the walks to the other"] * is_estimated
    other = "the true one" if config.against == "true" else "another of its own"
    print(f"cosine of RL's gradient to {other}, one image at a time; G = {config.group_size}")
    print(f"{'' if blocks[0] is None else 'b: px of a block; '}then px of a patch, 0: the image\n")
    print(report.markdown(["", *names], lines))


def main(argv=None):
    return runs.program("experiments.cosine", run_program, argv, study.ERRORS)


if __name__ == "__main__":
    sys.exit(main())
