"""What a policy could move on a model, measured before anybody rents GPUs for RL.

    python -m experiments.headroom                                       the demo model
    python -m experiments.headroom --ckpt adair5d.ckpt --data-root data  yours
    python -m experiments.headroom --ckpt runs/NAME                      a run: also what it reached

On crops that no head is trained on, per task and in PSNR and reward, gains over the model's own
output: the best of 4, 16 and 64 sampled actions; each gate swept alone; the best gates of every
single image, by gradient ascent. (The rates become whole numbers of pixels: they have no gradient
here.) On the whole images: what heads learn when they are
trained by backpropagation of the reward on other images, which sees more than any policy gradient
does. The first ones know the truth of the image; only the last could be had in use.
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
from data import Crops, DataError, in_draws, list_training, load_pair, split_usable, task_names
from experiments import tables
from metrics import multiple_of_16, psnr
from model import CheckpointError, load_adair, load_pretrained, read_checkpoint, restore
from policy import (
    GATE_MEAN,
    USUAL,
    PolicyError,
    load_policy,
    observe,
    policy_for,
    states_on,
)

BEST_OF = (4, 16, 64)
FACTORS = (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)  # that a gate is swept over
GATES = [f"{level}.{name}" for level in (1, 2, 3) for name in ("g_f", "g_o")]
AT_ONCE = 16  # actions of one image that are decoded together


@dataclass
class Config:
    """Measure what a policy could move on a model."""

    ckpt: str = str(DEMO_MODEL)
    """pre-trained AdaIR, official or ours, or the folder of a run"""
    data_root: str | None = None
    """AdaIR's data folder, or a folder of photos; without it, what a run was trained on, and for a
    checkpoint the demo's photographs"""
    images: Annotated[int, Field(ge=2)] = 4
    """images per task to measure on, of those set aside for validation (six, of the demo four);
    at least 2"""
    draws: runs.Positive = 3
    """draws of every degradation per training photo, as for train.py"""
    crop: runs.MultipleOf8 = 128
    """px, of all images"""
    rewards: str | None = None
    """terms, as for train.py; without it, those of a run, and for a checkpoint the default ones"""
    weights_dir: str | None = None
    """where clip, lpips and aes find their weights; without it, torch's cache"""
    concentration: Annotated[float, Field(gt=2, le=3000)] = 30.0
    """α + β that the sampled gates have"""
    ascent: runs.Positive = 30
    """steps of gradient ascent on the gates of an image"""
    learning: runs.Positive = 80
    """steps in which heads learn by backpropagation, of one image a task"""
    out: str = "runs/headroom"
    """folder of headroom.md, .csv and .png"""
    seed: runs.Count = 0
    """of the sampled actions and the training crops"""
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


# ---------------------------------------------------------------------------------- what is scored


def controls_of(actions):
    """Actions (B, 3, 4) in (0, 1) as a controller; the gates act divided by their mean."""
    factors = torch.cat((actions[..., :2], actions[..., 2:] / GATE_MEAN), dim=-1)
    return lambda level, f, y: factors[:, level]


def gains(reward, crop, restored):
    """(PSNR, reward) gains of restored (N, 3, S, S) over the deterministic output of a crop, (N,)
    each."""
    gt = crop.gt.expand_as(restored)
    values = reward.differentiable(restored, gt, [crop.task] * len(restored))
    return psnr(restored, gt) - crop.psnr, values - crop.reward


@torch.no_grad()
def score(model, reward, crop, actions):
    """The gains of actions (N, 3, 4) on one crop."""
    decode = partial(model.decode, crop.encoding)
    parts = [decode(controls_of(part), copies=len(part)) for part in actions.split(AT_ONCE)]
    return gains(reward, crop, torch.cat(parts))


def start_of(model):
    """The action (3, 4) that leaves the model as it is."""
    return torch.tensor([[*model.config["rates"], GATE_MEAN, GATE_MEAN]] * 3)


# --------------------------------------------------------------------------- the five measurements
# Each returns {column: (gain in dB, gain in reward)} for one crop.


@torch.no_grad()
def best_of_sampled(model, reward, policy, crop, generator):
    """The best of N sampled actions, in the mean over as many groups of N as were drawn."""
    draw = partial(model.decode, crop.encoding, policy.sample([generator]), copies=AT_ONCE)
    restored = torch.cat([draw() for _ in range(max(BEST_OF) // AT_ONCE)])
    found = gains(reward, crop, restored)

    def best(n):
        return tuple(gain.view(-1, n).max(dim=1).values.mean().item() for gain in found)

    return {f"best of {n}": best(n) for n in BEST_OF}


def swept(model, reward, crop):
    """The best value of each gate, the other controls as they are; never less than none."""
    start, found = start_of(model).to(crop.gt.device), {}
    for i, name in enumerate(GATES):
        actions = start.repeat(len(FACTORS), 1, 1)
        actions[:, i // 2, 2 + i % 2] = GATE_MEAN * torch.tensor(FACTORS)
        gains = score(model, reward, crop, actions)
        found[name] = tuple(max(0.0, gain.max().item()) for gain in gains)
    return found


def gate_oracle(model, reward, crop, steps, known=(0.0, 0.0)):
    """The best six gates in a policy's reach that gradient ascent finds for this one image: one
    ascent of its PSNR, one of its reward; at least the gains that are known."""
    start, best = start_of(model).to(crop.gt.device), []
    for objective, highest in zip(("psnr", "reward"), known):
        raw = torch.zeros(3, 2, device=crop.gt.device, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=0.06)
        for _ in range(steps):
            actions = torch.cat((start[:, :2], raw.sigmoid()), dim=1)[None]  # gates in (0, 1)
            restored = model.decode(crop.encoding, controls_of(actions))
            of_psnr, of_reward = gains(reward, crop, restored)
            gain = of_psnr.sum() if objective == "psnr" else of_reward.sum()
            highest = max(highest, gain.item())
            optimizer.zero_grad()
            (-gain).backward()
            optimizer.step()
        best.append(highest)
    return {"best gates": tuple(best)}


def with_graph(policy):
    """The deterministic policy, differentiable in its heads. (The rates become whole numbers of
    pixels: they have no gradient.)"""

    def controller(level, f, y):
        rate_state, fuse_state = observe(f, y)
        densities = policy.rate[level](rate_state), policy.fuse[level](fuse_state)
        rates, gates = (alpha / (alpha + beta) for alpha, beta in densities)
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


def whole_gain(model, reward, crop, trained, policy):
    """What a trained policy gains on the whole image that a crop is of: there it would be used."""
    degraded, gt = crop.whole
    before, after = restore(model, degraded), restore(trained, degraded, controller=policy.mean())
    of_psnr = float(psnr(after, gt)) - float(psnr(before, gt))
    start = reward.of_image(before, gt, crop.task)
    return of_psnr, reward.of_image(after, gt, crop.task) - start


# ------------------------------------------------------------------------------------- the program


def load(config):
    """(the pre-trained model, None or (model, policy) of a run, the Split of the images); fills in
    what the run was trained for. Raises CheckpointError, DataError, RunError."""
    folder = Path(config.ckpt)
    if not folder.is_dir():
        config.rewards = config.rewards or "default"
        model = load_pretrained(config.ckpt, "fraction")
        model.config["mask_rule"] = "fraction"  # as in training: rates act at every size
        return model, None, list_training(config.data_root)
    checkpoint = read_checkpoint(folder / "last.pt")
    policy = load_policy(checkpoint)
    if policy is None or not (folder / "config.json").exists():
        raise runs.RunError(f"{folder} is no run of train.py: give its folder, or a checkpoint")
    stored = runs.load_json(folder / "config.json")
    samples, scoring = stored["samples"], stored["scoring"]
    if config.data_root:
        split = list_training(config.data_root)
    else:  # what the run saw, so that what it did not see is the same
        config.data_root = samples["data_root"]
        tasks = task_names(samples["tasks"]) if samples["tasks"] else ()
        split = list_training(config.data_root, tasks=tasks, listed=samples["listed"])
    if not config.rewards:
        terms = scoring["rewards"].split(",")
        config.rewards = ",".join(t for t in terms if t.split("=")[0] != "qwen") or "default"
        if config.rewards != scoring["rewards"]:
            runs.say(f"measured without the judge, by --rewards {config.rewards}")
    config.weights_dir = config.weights_dir or scoring["weights_dir"]
    trained, model = load_adair(folder / "last.pt", checkpoint), load_adair(stored["init"])
    model.config["mask_rule"] = trained.config["mask_rule"]
    return model, (trained, policy), split


def crops_to_measure(model, reward, samples, config):
    """The centres of the first `images` images of every task."""
    crops, seen = [], {}
    for sample in samples:
        seen[sample.task] = seen.get(sample.task, 0) + 1
        if seen[sample.task] > config.images:
            continue
        degraded, gt = load_pair(sample)
        whole = multiple_of_16(degraded), multiple_of_16(gt)
        top, left = ((side - config.crop) // 2 for side in gt.shape[1:])
        window = (slice(None), slice(top, top + config.crop), slice(left, left + config.crop))
        x, gt = (image[window][None].to(config.device) for image in (degraded, gt))
        with torch.no_grad():
            encoding = model.encode(x)
            restored = model.decode(encoding, controls_of(start_of(model).to(x.device)[None]))
            value = reward.differentiable(restored, gt, [sample.task]).item()
        values = psnr(restored, gt).item(), value
        crops.append(Crop(sample.task, sample.gt, whole, gt, encoding, *values))
    few = [task for task in seen if len({c.photo for c in crops if c.task == task}) < 2]
    if few or not crops:
        raise DataError(
            f"there is one validation image for {', '.join(few) or 'no task'}; two are needed: a "
            "larger --data-root has more"
        )
    return crops


def measure(config):
    """All measurements: (rows with task, photo, what was measured, and the gains psnr in dB and
    reward; a sentence on the states)."""
    model, run, split = load(config)
    model = model.to(config.device, memory_format=torch.channels_last).requires_grad_(False)
    weights = rewards.parse_terms(config.rewards)
    side = rewards.smallest_side(weights)
    if config.crop < side:
        raise runs.RunError(f"--crop is {config.crop}; these rewards need {side} px")
    reward = rewards.Reward(weights, config.device, config.weights_dir)
    train = in_draws(split.train, config.draws)
    train, problems = split_usable(train, config.crop, decode=False)  # few of them will be read
    val, more = split_usable(split.val, max(16, config.crop))
    runs.say_skipped(problems + more)
    crops = crops_to_measure(model, reward, val, config)
    tasks = {crop.task for crop in crops}
    training = Crops([s for s in train if s.task in tasks], config.crop, config.seed)
    if not training.samples:
        raise DataError("none of the training images can be used")

    policy = policy_for(model, config.concentration).to(config.device)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    found = []
    for crop in tqdm(crops, desc="measuring"):
        sampled = best_of_sampled(model, reward, policy, crop, generator)
        alone = swept(model, reward, crop)
        known = [max(gains) for gains in zip(*alone.values())]
        best = gate_oracle(model, reward, crop, config.ascent, known)
        found.append(sampled | alone | best)

    usual = (batch.degraded for batch in training.batches_of_each_task(USUAL))
    policy.fit(states_on(model, policy, usual))
    learn(model, reward, policy, training, config)
    learned = {"learnable": (model, policy)} | ({"this run": run} if run else {})
    for name, (net, heads) in learned.items():
        net, heads = net.to(config.device), heads.to(config.device)
        for crop, gains in zip(tqdm(crops, desc=name, leave=False), found):
            gains[name] = whole_gain(model, reward, crop, net, heads)
    rows = [
        dict(task=crop.task, photo=crop.photo, what=what, psnr=psnr, reward=reward)
        for crop, gains in zip(crops, found)
        for what, (psnr, reward) in gains.items()
    ]
    on_crops = policy.clipped(states_on(model, policy, (crop.encoding.x for crop in crops)))
    on_whole = policy.clipped(states_on(model, policy, (crop.whole[0][None] for crop in crops)))
    states = (
        f"Of the states {on_crops:.1%} on these crops and {on_whole:.1%} on the whole images lie "
        "beyond the deviations that heads see."
    )
    return pd.DataFrame(rows), states


# ------------------------------------------------------------------------------- what is said of it


def table(rows, columns, key, unit):
    """Gains per task, and their mean over tasks with its interval; key: psnr or reward."""
    lines = []
    for task, of_task in rows.groupby("task", sort=False):
        means = of_task.groupby("what")[key].mean()
        lines.append([task, *(tables.shown(key, means[name]) for name in columns)])
    lines.append(["mean of tasks", *(mean_of_tasks(rows, name, key) for name in columns)])
    return report.markdown([unit, *columns], lines)


def mean_of_tasks(rows, what, key):
    """The mean over tasks with its interval over photographs: one may stand under several tasks, so
    that its crops are no independent ones."""
    of_what = rows[rows["what"] == what].assign(seed=0)
    return tables.shown(key, *tables.interval(of_what, key, over=["photo"]))


def conclusion(rows):
    """What the gates could do if they knew the truth, and what heads can learn of it."""
    known, learned = (
        f"{mean_of_tasks(rows, what, 'reward')} 1e-4 of reward and "
        f"{mean_of_tasks(rows, what, 'psnr')} dB"
        for what in ("best gates", "learnable")
    )
    photos = rows.groupby("task")["photo"].nunique().min()
    return (
        f"If the truth were known, the best gates of each image would gain {known}. Heads that see "
        f"the states alone learned {learned} of it on other images. (95 % intervals over "
        f"photographs, of which a task has {photos} or more.) The rates have no gradient here."
    )


def plot(path, rows, columns):
    """Bars per task of every column, in dB and reward."""
    plt = report.pyplot()
    figure, axes = plt.subplots(2, 1, figsize=(10, 7))
    for axis, key, unit in zip(axes, ("psnr", "reward"), ("PSNR gain (dB)", "reward gain")):
        means = rows.pivot_table(index="task", columns="what", values=key, sort=False)
        means[columns].plot.bar(ax=axis, rot=0, fontsize=8, xlabel="", ylabel=unit)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run_program(argv):
    config = runs.flags(Config, "experiments.headroom", __doc__, argv)
    runs.check_device(config.device)
    rows, states = measure(config)
    columns = [name for name in rows["what"].unique() if name not in GATES]
    parts = [
        table(rows, columns, "psnr", "gain, dB"),
        table(rows, columns, "reward", "gain, 1e-4 of reward"),
        table(rows, GATES, "psnr", "best value of one gate, dB"),
        f"{states} {conclusion(rows)}",
        f"{len(rows) // rows['what'].nunique()} crops of {config.crop} px of "
        f"{config.data_root or 'the demo photographs'}, rewards {config.rewards}, seed "
        f"{config.seed}, {config.device}, torch {torch.__version__}",
    ]
    text, folder = "\n\n".join(parts), Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    tables.write_csv(folder / "headroom.csv", rows)
    plot(folder / "headroom.png", rows, columns)
    written = f"# Headroom of {config.ckpt}\n\n{text}\n\n![](headroom.png)\n"
    runs.write_atomic(folder / "headroom.md", written.encode())
    runs.say(f"{text}; in {folder}: headroom.md, headroom.csv, headroom.png")


def main(argv=None):
    errors = (DataError, CheckpointError, PolicyError, rewards.RewardError)
    return runs.program("experiments.headroom", run_program, argv, errors)


if __name__ == "__main__":
    sys.exit(main())
