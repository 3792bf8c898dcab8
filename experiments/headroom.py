"""What a policy could move on a model, measured before anybody rents GPUs for RL.

    python -m experiments.headroom                                            the demo model
    python -m experiments.headroom --ckpt adair5d.ckpt --data-root data       yours
    python -m experiments.headroom --ckpt runs/NAME                           a run, too

On crops that no head is trained on, per task and in PSNR and reward, gains over the model's own
output: the best of 4, 16 and 64 sampled actions; each of the 12 controls swept alone; the best
gates of every single image, by gradient ascent. On the whole images: what heads learn when they are
trained by backpropagation of the reward on other images, which sees more than any policy gradient
does. The first ones know the truth of the image; only the last could be had in use.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

import report
import rewards
import runs
from config import DEMO_MODEL
from data import Crops, DataError, in_draws, list_training, load_pair, split_usable, task_names
from metrics import multiple_of_16, psnr, psnrs
from model import CheckpointError, load_adair, load_pretrained, read_checkpoint, restore
from policy import (
    CONTROLS,
    GATE_MEAN,
    USUAL,
    PolicyError,
    load_policy,
    observe,
    policy_for,
    states_on,
)

BEST_OF = (4, 16, 64)
RATES = (0.05, 0.15, 0.4, 0.6, 0.8, 0.95)  # that a rate is swept over
GATES = (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)  # and a gate, as a factor
ENOUGH = 4  # photographs of every task for a verdict
AT_ONCE = 16  # actions of one image that are decoded together


@dataclass
class Config:
    """Measure what a policy could move on a model."""

    ckpt: str = str(DEMO_MODEL)
    """pre-trained AdaIR, official or ours, or the folder of a run"""
    data_root: str | None = None
    """AdaIR's data folder, or a folder of photos; without it, what a run was trained on, and for a
    checkpoint the demo's photographs"""
    images: int = 4
    """images per task to measure on, of those set aside for validation (six, of the demo four);
    at least 2"""
    draws: int = 3
    """draws of every degradation per training photo, as for train.py"""
    crop: int = 128
    """px, of all images"""
    rewards: str | None = None
    """terms, as for train.py; without it, those of a run, and for a checkpoint the default ones"""
    weights_dir: str | None = None
    """where clip, lpips and aes find their weights; without it, torch's cache"""
    concentration: float = 30.0
    """α + β that the sampled gates have"""
    ascent: int = 30
    """steps of gradient ascent on the gates of an image"""
    learning: int = 80
    """steps in which heads learn by backpropagation, of one image a task"""
    out: str = "runs/headroom"
    """folder of headroom.md, .json and .png"""
    seed: int = 0
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


def check(config):
    """Raises RunError, in one sentence, for values that cannot work."""
    counts = dict.fromkeys(("draws", "ascent", "learning"), "[1, inf)")
    runs.check_ranges(
        config, **counts, images="[2, inf)", concentration="(2, 3000]", seed="[0, inf)"
    )
    runs.check_multiple_of_8("--crop", config.crop)
    runs.check_device(config.device)


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
    return psnrs(restored, gt) - crop.psnr, values - crop.reward


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
    """The best value of each control, the other eleven as they are; never less than none."""
    start, found = start_of(model).to(crop.gt.device), {}
    for level in range(3):
        for k, name in enumerate(CONTROLS):
            values = RATES if k < 2 else [GATE_MEAN * factor for factor in GATES]
            actions = start.repeat(len(values), 1, 1)
            actions[:, level, k] = torch.tensor(values)
            best = (gain.max().item() for gain in score(model, reward, crop, actions))
            found[f"{level + 1}.{name}"] = tuple(max(0.0, gain) for gain in best)
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
        alpha, beta = policy.level(level, *observe(f, y))
        action = alpha / (alpha + beta)
        return torch.cat((action[:, :2], action[:, 2:] / GATE_MEAN), dim=1)

    return controller


def whole_gain(model, reward, crop, trained, policy):
    """What a trained policy gains on the whole image that a crop is of: there it would be used."""
    degraded, gt = crop.whole
    images = restore(model, degraded), restore(trained, degraded, controller=policy.mean())
    in_psnr, in_reward = (
        [value(image) for image in images]
        for value in (lambda y: psnr(y, gt), lambda y: reward.of_image(y, gt, crop.task))
    )
    return in_psnr[1] - in_psnr[0], in_reward[1] - in_reward[0]


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
    stored = runs.load_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if policy is None or not {"init", "samples", "scoring"} <= stored.keys():
        raise runs.RunError(f"{folder} is no run of train.py: give its folder, or a checkpoint")
    samples, scoring = stored["samples"], stored["scoring"]
    if config.data_root:
        split = list_training(config.data_root)
    else:  # what the run saw, so that what it did not see is the same
        tasks = task_names(samples["tasks"]) if samples["tasks"] else ()
        config.data_root = samples["data_root"]
        split = list_training(config.data_root, tasks=tasks, listed=samples["listed"])
    if not config.rewards:
        terms = scoring["rewards"].split(",")
        unjudged = [term for term in terms if term.partition("=")[0] != "qwen"]
        config.rewards = ",".join(unjudged) or "default"
        if unjudged != terms:
            runs.say(f"measured without the judge, by --rewards {config.rewards}")
    config.weights_dir = config.weights_dir or scoring["weights_dir"]
    trained = load_adair(folder / "last.pt", checkpoint)
    model = load_adair(stored["init"])
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
        values = psnrs(restored, gt).item(), value
        crops.append(Crop(sample.task, sample.gt, whole, gt, encoding, *values))
    few = [task for task in seen if len({c.photo for c in crops if c.task == task}) < 2]
    if few or not crops:
        hint = "two are needed: a larger --data-root has more"
        raise DataError(f"there is one validation image for {', '.join(few) or 'no task'}; {hint}")
    return crops


def minutes(model, reward, crop, config, n_crops, n_tasks):
    """How long it will take, from one batch of actions and one step of ascent."""
    actions = start_of(model).to(crop.gt.device).repeat(AT_ONCE, 1, 1)
    score(model, reward, crop, actions), gate_oracle(model, reward, crop, 1)  # the first are slower
    begin = time.perf_counter()
    score(model, reward, crop, actions)
    of_batch, begin = time.perf_counter() - begin, time.perf_counter()
    gate_oracle(model, reward, crop, 1)
    of_step = (time.perf_counter() - begin) / 2
    per_crop = max(BEST_OF) / AT_ONCE + 12 * len(RATES) / AT_ONCE
    total = n_crops * (per_crop * of_batch + 2 * config.ascent * of_step)
    height, width = crop.whole[0].shape[1:]
    of_whole = 2 * of_batch / AT_ONCE * height * width / config.crop**2
    return (total + 1.5 * config.learning * n_tasks * of_step + 2 * n_crops * of_whole) / 60


def measure(config):
    """All measurements: ([task of a crop], [its photograph], {column: (n, 2) gains in dB and
    reward}, a sentence on the states)."""
    model, run, split = load(config)
    model = model.to(config.device, memory_format=torch.channels_last).requires_grad_(False)
    weights = rewards.parse_terms(config.rewards)
    side = rewards.smallest_side(weights)
    if config.crop < side:
        raise runs.RunError(f"--crop is {config.crop}; these rewards need {side} px")
    reward = rewards.Reward(weights, config.device, config.weights_dir)
    train = in_draws(split.train, config.draws, config.crop)
    train, problems = split_usable(train, config.crop, decode=False)  # few of them will be read
    val, more = split_usable(split.val, max(16, config.crop))
    runs.say_skipped(problems + more)
    crops = crops_to_measure(model, reward, val, config)
    tasks = [crop.task for crop in crops]
    guess = minutes(model, reward, crops[0], config, len(crops), len(set(tasks)))
    runs.say(f"{len(crops)} crops of {config.crop} px: about {math.ceil(guess)} minutes")

    policy = policy_for(model, config.concentration).to(config.device)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    rows = []
    for crop in tqdm(crops, desc="measuring"):
        row = best_of_sampled(model, reward, policy, crop, generator) | swept(model, reward, crop)
        of_gates = [row[name] for name in row if name.endswith(("g_f", "g_o"))]
        known = (max(gains) for gains in zip(*of_gates))  # of what was tried before
        rows.append(row | gate_oracle(model, reward, crop, config.ascent, known))

    training = Crops([s for s in train if s.task in tasks], config.crop, config.seed)
    if not training.samples:
        raise DataError("none of the training images can be used")
    usual = (batch.degraded for batch in training.batches_of_each_task(USUAL))
    policy.fit(states_on(model, policy, usual))
    learn(model, reward, policy, training, config)
    learned = {"learnable": (model, policy)} | ({"this run": run} if run else {})
    for name, (net, heads) in learned.items():
        net, heads = net.to(config.device), heads.to(config.device)
        for crop, row in zip(tqdm(crops, desc=name, leave=False), rows):
            row[name] = whole_gain(model, reward, crop, net, heads)
    found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    on_crops = policy.clipped(states_on(model, policy, (crop.encoding.x for crop in crops)))
    on_whole = policy.clipped(states_on(model, policy, (crop.whole[0][None] for crop in crops)))
    clipped = f"Of the states {on_crops:.1%} on these crops and {on_whole:.1%} on the whole images"
    photos = [crop.photo for crop in crops]
    return tasks, photos, found, f"{clipped} lie beyond the deviations that heads see."


# ------------------------------------------------------------------------------- what is said of it

CONTROL_COLUMNS = [f"{level}.{name}" for level in (1, 2, 3) for name in CONTROLS]


def fewest(tasks, photos):
    """How many photographs the task with the fewest has."""
    return min(len({p for t, p in zip(tasks, photos) if t == task}) for task in set(tasks))


def average(values, tasks, photos, k):
    """The mean over tasks, and its standard error over photographs, of column k (0 dB, 1 reward):
    a photograph may stand under several tasks, so that its crops are no independent ones."""
    names, tasks, photos = list(dict.fromkeys(tasks)), np.array(tasks), np.array(photos)
    means = {task: values[tasks == task, k].mean() for task in names}
    # each photograph's share in how far the mean over tasks is off
    off = np.zeros(len(values))
    for task, mean in means.items():
        mine = tasks == task
        n = len(set(photos[mine]))
        small_sample = math.sqrt(n / (n - 1))  # the mean is that of these few
        off[mine] = small_sample * (values[mine, k] - mean) / mine.sum() / len(names)
    shares = np.array([off[photos == photo].sum() for photo in dict.fromkeys(photos)])
    return np.mean(list(means.values())), math.sqrt((shares**2).sum())


def table(tasks, photos, found, columns, k, unit):
    """Gains per task, and their mean with its standard error; k: 0 dB, 1 reward in 1e-4."""
    scale, digits = ((1, 3), (1e4, 1))[k]
    rows = []
    for task in dict.fromkeys(tasks):
        mine = [t == task for t in tasks]
        rows.append([task, *(f"{scale * found[c][mine, k].mean():+.{digits}f}" for c in columns)])
    means = [average(found[c], tasks, photos, k) for c in columns]
    rows.append(["mean of tasks", *(f"{scale * mean:+.{digits}f}" for mean, _ in means)])
    rows.append(["standard error", *(f"{scale * error:.{digits}f}" for _, error in means)])
    return report.markdown([unit, *columns], rows)


def conclusion(tasks, photos, found):
    """One sentence: what the gates could do if they knew the truth, and what heads can learn."""
    of_gates, of_heads = (
        [average(found[name], tasks, photos, k) for k in (0, 1)]
        for name in ("best gates", "learnable")
    )
    (psnr, _), (value, _) = of_gates
    (learned_psnr, _), (learned, error) = of_heads
    pays = f"heads that see the states alone learned {1e4 * learned:+.1f} ± {1e4 * error:.1f}e-4"
    pays += f" ({learned_psnr:+.3f} dB) of it on other images"
    n = fewest(tasks, photos)
    if n < ENOUGH:
        pays += f": too few photographs ({n} of a task) to say whether RL of the heads can pay"
    elif learned > scipy.stats.t.ppf(0.975, n - 1) * error:
        pays += ": RL of the heads can pay"
    else:
        pays += ": RL of the heads will hardly pay here"
    known = f"the best gates of each image would gain {1e4 * value:+.1f}e-4 of reward, or"
    return f"If the truth were known, {known} {psnr:+.3f} dB; {pays}."


def plot(path, tasks, found, columns):
    """Bars per task of every column, in dB and reward, and the best dB of each control."""
    plt = report.pyplot()
    names = list(dict.fromkeys(tasks))
    members = [[t == name for t in tasks] for name in names]
    figure, axes = plt.subplots(3, 1, figsize=(10, 10))
    units = (("PSNR gain (dB)", 0, 1), ("reward gain (1e-4)", 1, 1e4))
    for axis, (title, k, scale) in zip(axes, units):
        for i, column in enumerate(columns):
            heights = [scale * found[column][mine, k].mean() for mine in members]
            axis.bar(np.arange(len(names)) + i / (len(columns) + 1), heights, 0.15, label=column)
        axis.set_xticks(np.arange(len(names)) + 0.3, names, fontsize=8)
        axis.set_ylabel(title, fontsize=9)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.legend(fontsize=7)
    values = [[found[c][mine, 0].mean() for c in CONTROL_COLUMNS] for mine in members]
    image = axes[2].imshow(values, aspect="auto", cmap="viridis")
    axes[2].set_xticks(range(12), CONTROL_COLUMNS, fontsize=8)
    axes[2].set_yticks(range(len(names)), names, fontsize=8)
    half = np.max(values) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            how = dict(ha="center", va="center", color="black" if value > half else "white")
            axes[2].text(x, y, f"{value:.3f}", fontsize=6, **how)
    figure.colorbar(image, ax=axes[2], label="best value of one control (dB)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run_program(argv):
    config = runs.flags(Config, "headroom.py", __doc__, argv)
    check(config)
    begin = time.perf_counter()
    tasks, photos, found, clipped = measure(config)
    columns = [name for name in found if name not in CONTROL_COLUMNS]
    parts = [(columns, 0, "gain, dB"), (columns, 1, "gain, 1e-4 of reward")]
    parts.append((CONTROL_COLUMNS, 0, "best value of one control, dB"))
    tables = [table(tasks, photos, found, *part) for part in parts]
    text = "\n\n".join([*tables, clipped, conclusion(tasks, photos, found)])
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    details = f"{len(tasks)} crops of {config.crop} px of "
    details += f"{config.data_root or 'the demo photographs'}, rewards {config.rewards}, "
    details += f"seed {config.seed}, {config.device}, "
    details += f"torch {torch.__version__}, {(time.perf_counter() - begin) / 60:.1f} minutes"
    report_text = f"# Headroom of {config.ckpt}\n\n{text}\n\n{details}\n\n![](headroom.png)\n"
    runs.write_atomic(folder / "headroom.md", report_text.encode())
    rows = {name: gains.tolist() for name, gains in found.items()}
    runs.save_json(folder / "headroom.json", dict(tasks=tasks, photos=photos, gains=rows))
    plot(folder / "headroom.png", tasks, found, columns)
    runs.say(f"{text}\n\n{details}; in {folder}: headroom.md, headroom.json, headroom.png")


def main(argv=None):
    errors = (DataError, CheckpointError, PolicyError, rewards.RewardError)
    return runs.program("headroom.py", run_program, argv, errors)


if __name__ == "__main__":
    sys.exit(main())
