"""What a policy could move on a model, measured before anybody rents GPUs for RL.

    python -m experiments.headroom                                       the demo model
    python -m experiments.headroom --ckpt adair5d.ckpt --data-root data  yours

Gains over the model's own output, in PSNR and reward, per task, on images that no head is trained
on. On their central crops: the best of 4, 16 and 64 sampled actions, and the best gates of every
single image, by gradient ascent; both know the truth. On the whole images: what heads learn when
they are trained by backpropagation of the reward on other images, which sees more than any policy
gradient does. Only that could be had in use. (The rates become whole numbers of pixels: they have
no gradient here.)
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
import torch
from pydantic import Field
from tqdm import tqdm

import report
import rewards
import runs
from config import DEMO_MODEL
from data import Crops, DataError, in_draws, list_training, load_pair, split_usable
from experiments import tables
from metrics import multiple_of_16, psnr
from model import CheckpointError, load_pretrained, restore
from policy import GATE_MEAN, USUAL, observe, policy_for, states_on

BEST_OF = (4, 16, 64)
DRAWS = 3  # of every degradation of a photograph
AT_ONCE = 16  # actions of one image that are decoded together
UNITS = {"psnr": "dB", "reward": "1e-4 of reward"}


@dataclass
class Config:
    """Measure what a policy could move on a model."""

    ckpt: str = str(DEMO_MODEL)
    """pre-trained AdaIR, official or ours"""
    data_root: str | None = None
    """AdaIR's data folder, or a folder of photos; without it, the demo's photographs"""
    images: Annotated[int, Field(ge=2)] = 4
    """images per task to measure on, of those set aside for validation"""
    crop: runs.MultipleOf8 = 128
    """px, of all crops"""
    rewards: str = "default"
    """terms, as for train.py"""
    weights_dir: str | None = None
    """where clip, lpips and aes find their weights; without it, torch's cache"""
    ascent: runs.Positive = 30
    """steps of gradient ascent on the gates of an image"""
    learning: runs.Positive = 80
    """steps in which heads learn by backpropagation, of one image a task"""
    out: str = "runs/headroom"
    """folder of headroom.md and headroom.csv"""
    seed: runs.Count = 0
    """of the sampled actions, the heads and the training crops"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


class Crop(NamedTuple):
    """An image to measure on, and what the model makes of it."""

    task: str
    photo: str  # the file of the truth
    whole: tuple  # the degraded image and its truth (3, H, W) that it is cut from
    gt: torch.Tensor  # (1, 3, S, S)
    encoding: tuple
    psnr: float  # of the deterministic output
    reward: float


# --------------------------------------------------------------------------- the three measurements
# Each returns (gain in dB, gain in reward) for one crop.


def gains(reward, crop, restored):
    """(PSNR, reward) gains of restored (N, 3, S, S) over the deterministic output of a crop, (N,)
    each."""
    gt = crop.gt.expand_as(restored)
    values = reward.differentiable(restored, gt, [crop.task] * len(restored))
    return psnr(restored, gt) - crop.psnr, values - crop.reward


@torch.no_grad()
def best_of_sampled(model, reward, policy, crop, generator):
    """{column: gains} of the best of N sampled actions, in the mean over as many groups of N as
    were drawn."""
    draw = partial(model.decode, crop.encoding, policy.sample([generator]), copies=AT_ONCE)
    restored = torch.cat([draw() for _ in range(max(BEST_OF) // AT_ONCE)])
    found = gains(reward, crop, restored)

    def best(n):
        return tuple(gain.view(-1, n).max(dim=1).values.mean().item() for gain in found)

    return {f"best of {n}": best(n) for n in BEST_OF}


def best_gates(model, reward, crop, steps):
    """The best six gates in a policy's reach that gradient ascent finds for this one image: one
    ascent of its PSNR, one of its reward; at least nothing."""
    rates, best = torch.tensor([model.config["rates"]] * 3, device=crop.gt.device), []
    for objective in (0, 1):
        raw, highest = torch.zeros(3, 2, device=crop.gt.device, requires_grad=True), 0.0
        optimizer = torch.optim.Adam([raw], lr=0.06)
        for _ in range(steps):
            controls = torch.cat((rates, raw.sigmoid() / GATE_MEAN), dim=1)  # gates in (0, 1)
            restored = model.decode(crop.encoding, lambda level, f, y, c=controls: c[None, level])
            gain = gains(reward, crop, restored)[objective].sum()
            highest = max(highest, gain.item())
            optimizer.zero_grad()
            (-gain).backward()
            optimizer.step()
        best.append(highest)
    return tuple(best)


def with_graph(policy):
    """The deterministic policy, differentiable in its heads."""

    def controller(level, f, y):
        alpha, beta = policy.densities_at(level, *observe(f, y))
        rates, gates = (alpha / (alpha + beta)).chunk(2, dim=1)
        return torch.cat((rates, gates / GATE_MEAN), dim=1)

    return controller


def learn(model, reward, policy, crops, config):
    """Trains heads by backpropagation of the reward through the deterministic output, on training
    crops, one of every task a step."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    numbers = crops.of_each_task(config.learning)
    for step in tqdm(range(config.learning), desc="learnable", leave=False):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / config.learning)
        batch = crops.collate([crops[of_task[step]] for of_task in numbers.values()])
        degraded, gt = batch.degraded.to(config.device), batch.gt.to(config.device)
        with torch.no_grad():
            encoding = model.encode(degraded)
        restored = model.decode(encoding, with_graph(policy))
        loss = -reward.differentiable(restored, gt, batch.tasks).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole_gain(model, reward, policy, crop):
    """What trained heads gain on the whole image that a crop is of: there they would be used."""
    degraded, gt = crop.whole
    before, after = restore(model, degraded), restore(model, degraded, controller=policy.mean())
    start, end = (reward.of_image(image, gt, crop.task) for image in (before, after))
    return (psnr(after, gt) - psnr(before, gt)).item(), end - start


# ------------------------------------------------------------------------------------- the program


def crops_to_measure(model, reward, samples, config):
    """The centres of the first `images` images of every task."""
    crops = []
    for sample in samples:
        if sum(crop.task == sample.task for crop in crops) == config.images:
            continue
        degraded, gt = load_pair(sample)
        whole = multiple_of_16(degraded), multiple_of_16(gt)
        top, left = ((side - config.crop) // 2 for side in gt.shape[1:])
        window = (slice(None), slice(top, top + config.crop), slice(left, left + config.crop))
        x, gt = (image[window][None].to(config.device) for image in (degraded, gt))
        with torch.no_grad():
            encoding = model.encode(x)
            restored = model.decode(encoding)
            value = reward.differentiable(restored, gt, [sample.task]).item()
        values = psnr(restored, gt).item(), value
        crops.append(Crop(sample.task, sample.gt, whole, gt, encoding, *values))
    for task in {sample.task for sample in samples}:
        if len({crop.photo for crop in crops if crop.task == task}) < 2:
            raise DataError(f"{task} has one validation image, needs two: more --data-root images")
    return crops


def measure(config):
    """All measurements: rows with task, photo, what was measured, and the gains psnr in dB and
    reward."""
    model = load_pretrained(config.ckpt, "fraction")
    model.config["mask_rule"] = "fraction"  # as in training: rates act at every size
    model = model.to(config.device, memory_format=torch.channels_last).requires_grad_(False)
    weights = rewards.parse_terms(config.rewards)
    side = rewards.smallest_side(weights)
    if config.crop < side:
        raise runs.RunError(f"--crop is {config.crop}; these rewards need {side} px")
    reward = rewards.Reward(weights, config.device, config.weights_dir)
    split = list_training(config.data_root)
    train, problems = split_usable(in_draws(split.train, DRAWS), config.crop, decode=False)
    val, more = split_usable(split.val, max(16, config.crop))
    runs.say_skipped(problems + more)
    crops = crops_to_measure(model, reward, val, config)
    tasks = {crop.task for crop in crops}
    training = Crops([s for s in train if s.task in tasks], config.crop, config.seed)
    if not (crops and training.samples):
        raise DataError(f"no image of {config.data_root} can be used with --crop {config.crop}")

    torch.manual_seed(config.seed)
    policy = policy_for(model).to(config.device)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    found = []
    for crop in tqdm(crops, desc="measuring"):
        found.append(best_of_sampled(model, reward, policy, crop, generator))
        found[-1]["best gates"] = best_gates(model, reward, crop, config.ascent)
    usual = (batch.degraded for batch in training.batches_of_each_task(USUAL))
    policy.fit(states_on(model, policy, usual))
    learn(model, reward, policy, training, config)
    rows = []
    for crop, gained in zip(crops, found):
        gained["learnable"] = whole_gain(model, reward, policy, crop)
        for what, (db, value) in gained.items():
            rows.append(dict(task=crop.task, photo=crop.photo, what=what, psnr=db, reward=value))
    return pd.DataFrame(rows)


def table(rows, key):
    """Gains per task, and their mean over tasks with its interval over photographs: one may stand
    under several tasks, so that its crops are no independent ones. key: psnr or reward."""
    names = rows["what"].unique()
    means = rows.pivot_table(index="task", columns="what", values=key, sort=False)[names]
    lines = [[t, *(tables.shown(key, v) for v in of_task)] for t, of_task in means.iterrows()]
    last = ["mean of tasks"]
    for _, of_what in rows.assign(seed=0).groupby("what", sort=False):
        last.append(tables.shown(key, *tables.interval(of_what, key, over=["photo"])))
    return report.markdown([f"gain, {UNITS[key]}", *names], [*lines, last])


def run_program(argv):
    config = runs.flags(Config, "experiments.headroom", __doc__, argv)
    runs.check_device(config.device)
    rows, folder = measure(config), Path(config.out)
    photos = rows.groupby("task")["photo"].nunique().min()
    text = f"""# Headroom of {config.ckpt}

{table(rows, "psnr")}

{table(rows, "reward")}

Best of N and best gates know the truth of an image; learnable is what heads that see the states
alone learned on other images. 95 % intervals over photographs, of which a task has {photos} or
more. The rates have no gradient here.

Crops of {config.crop} px of {config.data_root or "the demo photographs"}, rewards
{config.rewards}, seed {config.seed}, {config.device}, torch {torch.__version__}
"""
    folder.mkdir(parents=True, exist_ok=True)
    tables.write_csv(folder / "headroom.csv", rows)
    runs.write_atomic(folder / "headroom.md", text.encode())
    runs.say(f"{text}\nin {folder}: headroom.md, headroom.csv")


def main(argv=None):
    errors = (DataError, CheckpointError, rewards.RewardError)
    return runs.program("experiments.headroom", run_program, argv, errors)


if __name__ == "__main__":
    sys.exit(main())
