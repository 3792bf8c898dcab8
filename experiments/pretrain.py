"""Supervised pre-training of AdaIR, which the demo model came from: L1 on crops whose degradation,
strength, exposure and colour vary; Muon for the matrices, Adam for the rest; warm-up, a constant
rate, and a decay at the end, so that the length need not be known at the start; the result,
model.pt, is an average of the weights. The same of a diffusion chain, by the error of what it
predicts at a random step.

    python -m experiments.pretrain --data-root data --out runs/pretrain
    python -m experiments.pretrain --data-root data --out runs/pretrain-chain --model chain

Killed, the same command goes on where it stopped (bit for bit on the same machine).
"""

import math
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from tqdm import tqdm

import report
import runs
from data import (
    TASKS,
    Crops,
    DataError,
    list_training,
    names_digest,
    read_image,
    split_listed,
    split_usable,
)
from degradations import camera, quantise
from diffusion import Chain
from metrics import evaluation_pair, psnr
from model import (
    AdaIR,
    CheckpointError,
    Encoding,
    load_pretrained,
    load_restorer,
    model_digest,
    read_checkpoint,
    restore,
)

NEW_MODEL = dict(dim=48, blocks=(4, 6, 6, 8), refinement=4)  # Table 6
RATE = 0.25  # its constant r_h, r_l
WARM_UP = 200  # steps
EMA = 0.999  # decay of the averaged weights, less while there are few
TURN = 50  # steps, after which the next crop size has its turn
MARGIN = 16  # px around a crop, context for blur and streaks
WEAKEST = {"lowlight": 0.8, "dehaze": 0.8}  # what is a little dark or hazy may be meant so
REAL = 0.5  # share of real pairs in the crops of a task that has real and synthesised ones
# How often black is raised in a truth, and by how much at most: a blurred pale scene is most like
# haze; of haze and low light black stays black.
PALE = {"deblur": (0.4, 0.6), "dehaze": (0, 0), "lowlight": (0, 0)}
USUALLY_PALE = (0.2, 0.35)
IN_MEMORY = 4e9  # bytes of decoded images that are kept
# What is drawn in turn: tasks, and photographs as a camera gives them.
CYCLE = (
    "denoise15 derain dehaze deblur denoise25 derain lowlight deblur dehaze denoise50 derain "
    "dehaze deblur lowlight camera"
)
FIXED = "data_root photos val_list model init seed".split()  # and the model, within a run


@dataclass
class Config:
    """Pre-train an AdaIR on pairs and on synthesised degradations."""

    data_root: str | None = None
    """AdaIR's data folder; without it and --photos, the demo's photographs"""
    photos: tuple[str, ...] = ()
    """folders of photos on which all tasks are synthesised besides"""
    val_list: str | None = None
    """text file that names the images to validate on, one a line; without it, the last of every
    task"""
    model: Literal["adair", "chain"] = "adair"
    """what is trained; chain: diffusion.py"""
    init: str | None = None
    """model to start from; without it, from scratch. An AdaIR's para2 stays as it is"""
    out: str = "runs/pretrain"
    """run folder, created or continued"""
    dim: runs.MultipleOf8 | None = None
    """channels of a new model, a multiple of 8 (Table 6: 48)"""
    blocks: tuple[runs.Positive, runs.Positive, runs.Positive, runs.Positive] | None = None
    """its transformer blocks (Table 6: 4 6 6 8)"""
    refinement: runs.Positive | None = None
    """its refinement blocks (Table 6: 4)"""
    crop: tuple[runs.MultipleOf8, ...] = (128, 176)
    """px, in turn"""
    batch_size: runs.Positive = 2
    """crops per step and process at the first crop size; at others as many pixels"""
    steps: runs.Positive = 10000
    """updates"""
    decay: runs.Count = 2000
    """the last of them, in which the rates fall to 0"""
    lr: runs.NotNegative = 5e-4
    """Adam's rate, for what is no matrix"""
    muon_lr: runs.NotNegative = 1e-2
    """Muon's rate, for 1×1 convolutions"""
    cycle: tuple[Literal[(*TASKS, "camera")], ...] = tuple(CYCLE.split())
    """what is drawn in turn: tasks, and photographs as a camera gives them"""
    pale: runs.NotNegative = 1.0
    """factor on the chance that black is raised in a truth (PALE); below 1 the model takes more
    haze away, also where a pale scene was meant"""
    drop_skip: Annotated[float, Field(ge=0, le=1)] = 0.3
    """chance that an image loses a level's skip connection, so that the level below has to restore
    it alone: else the deep levels, and with them the gates, fall silent early; AdaIR alone"""
    rooms: tuple[Literal[tuple(TASKS)], ...] = ()
    """tasks whose real pairs show what others lack, as dehaze lowlight deblur: their truths become
    photographs for all tasks, blurred frames for all but blur and haze; where rooms stand under
    haze alone, a blurred white wall is taken for haze"""
    eval_every: runs.Positive = 2000
    """steps between validations"""
    workers: runs.Workers | None = None
    """processes that load images; without it, 4 beside a GPU, else none"""
    max_minutes: runs.AboveZero | None = None
    """end with a checkpoint after so long"""
    seed: runs.Count = 0
    """of weights and crops"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


# ------------------------------------------------------------------------------------------- crops


def another_look(gt, rng, task, pale=1.0):
    """A function that shows an image as another camera may have taken it: a colour cast; one time
    in two a gamma, but for low light; and now and then a veil, which raises black: what is a little
    pale may be meant so, and is no haze (its usual chance times pale). All is drawn for the truth
    gt (3, h, w) and meant for both images of a pair. The veil is linear: what differs between the
    two stays the same but for its size."""
    cast = torch.from_numpy(rng.uniform(0.9, 1.0, (3, 1, 1)).astype(np.float32))
    power = 1.0
    if task != "lowlight" and rng.random() < 0.5:
        # at most so dark that a mean of 0.12 remains: what is darker is left to low light
        mean = min(max(float(gt.mean()), 0.05), 0.95)
        darkest = min(max(math.log(0.12) / math.log(mean), 1.0), 2.0)
        power = math.exp(rng.uniform(math.log(0.6), math.log(darkest)))
    chance, most = PALE.get(task, USUALLY_PALE)
    veil = rng.uniform(0.05, most) if rng.random() < pale * chance else 0.0
    light = rng.uniform(0.6, 1.0)
    return lambda image: (1 - veil) * cast * image**power + veil * light


def draw_strength(task, rng):
    """How much of a degradation an input shows: mostly all, sometimes less, sometimes nothing."""
    kind = rng.random()
    return 1.0 if kind < 0.8 else rng.uniform(WEAKEST.get(task, 0.0), 1) if kind < 0.95 else 0.0


class VariedCrops(Crops):
    """Crop number n of a pre-training, of the task whose turn it is: real and synthesised pairs, a
    new degradation every time, of any strength, in varied exposure and colour."""

    def __init__(self, samples, crop, seed, cycle, pale=1.0):
        super().__init__(samples, crop, seed)
        self.pale = pale
        photos = {s.gt: s for s in samples if not s.degraded}
        self.cycle, self.kinds = cycle, {"camera": [list(photos.values())]}
        for task in TASKS:
            kinds = [
                [s for s in samples if s.task == task and bool(s.degraded) == k] for k in (0, 1)
            ]
            self.kinds[task] = [kind for kind in kinds if kind]
        self.images, free = {}, IN_MEMORY
        files = dict.fromkeys((file, s.box) for s in samples for file in s.files)
        for file, box in tqdm(files, desc="decode", leave=False, disable=runs.rank() > 0):
            if free > 0:
                self.images[file, box] = (read_image(file, box) * 255).round().byte()
                free -= self.images[file, box].numel()

    def read(self, *file):
        """The image of (path, box) as (3, H, W), in [0, 255] or, if it is decoded anew, [0, 1]."""
        return self.images[file] if file in self.images else read_image(*file)

    def __getitem__(self, n):
        rng = np.random.default_rng((self.seed, n, 1))
        task = self.cycle[n % len(self.cycle)]
        kind = self.kinds[task][-1 if rng.random() < REAL else 0]
        sample = kind[rng.integers(len(kind))]
        pair = [self.read(file, sample.box) for file in sample.files]
        top, left = self.corner(sample, pair[0], rng)
        up, back = min(top, MARGIN), min(left, MARGIN)
        rows = slice(top - up, top + self.crop + MARGIN)
        columns = slice(left - back, left + self.crop + MARGIN)
        pair = [image[:, rows, columns] for image in pair]
        pair = [image / 255 if image.dtype == torch.uint8 else image for image in pair]
        gt, *degraded = map(another_look(pair[0], rng, task, self.pale), pair)
        degrade = camera if task == "camera" else TASKS[task].degrade
        degraded = degraded[0] if degraded else degrade(gt, rng)
        strength = draw_strength(task, rng)
        degraded = quantise(gt + strength * (degraded - gt))
        flips = [d for d in (1, 2) if rng.random() < 0.5]
        inner = slice(None), slice(up, up + self.crop), slice(back, back + self.crop)
        degraded, gt = degraded[inner].flip(flips), gt[inner].flip(flips)
        return degraded, gt, task, sample.name, n


# ---------------------------------------------------------------------------------------- training


def optimizers_of(net, config):
    """(Muon, Adam): Muon for the 1×1 convolutions, as matrices that share their memory, Adam for
    the rest (Jordan et al. 2024, "Muon").

    para2, AdaIR's weight of the latent in an AFLB, stays 1: learned, it falls towards 0 while the
    deep levels know nothing yet, and without gradient they never will.
    """
    named = net.named_parameters()
    learned = {n: p for n, p in named if ".rate_conv." not in n and not n.endswith(".para2")}
    matrices = [p for p in learned.values() if p.shape[2:] == (1, 1) and min(p.shape[:2]) >= 8]
    taken = set(map(id, matrices))
    rest = [p for p in learned.values() if id(p) not in taken]
    views = [torch.nn.Parameter(p.detach().flatten(1)) for p in matrices]
    for view, p in zip(views, matrices):
        p.register_post_accumulate_grad_hook(partial(share_gradient, view))
    muon = [dict(params=views, lr=config.muon_lr, name="lr/muon")]
    adam = [dict(params=rest, lr=config.lr, name="lr/adam")]
    return (
        torch.optim.Muon(muon, weight_decay=0.01),
        torch.optim.Adam(adam, betas=(0.9, 0.99), fused=True),
    )


def share_gradient(view, parameter):
    """Gives a matrix the gradient of the weight (O, I, 1, 1) that it shares its memory with."""
    view.grad = parameter.grad.flatten(1)


@dataclass
class State:
    """What a training is at a step: all that a checkpoint holds."""

    live: torch.nn.Module
    averaged: torch.nn.Module  # exponential moving average of the weights
    optimizers: tuple
    settings: dict
    total: int  # crops of the whole training
    step: int = 0
    seen: int = 0  # crops

    def checkpoint(self):
        return dict(
            model=self.averaged.module.state_dict(),
            config=self.live.config,
            net=self.live.state_dict(),
            ema=self.averaged.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            settings=self.settings,
            step=self.step,
            seen=self.seen,
        )

    def load(self, checkpoint, folder):
        """Goes on where a checkpoint of the same settings stopped. Raises RunError."""
        if checkpoint.get("config") != self.live.config or "settings" not in checkpoint:
            raise runs.RunError(f"{folder} holds another model's training: choose another --out")
        for name, value in self.settings.items():
            if checkpoint["settings"].get(name) != value:
                raise runs.RunError(f"{folder} began with other {name}: choose another --out")
        self.live.load_state_dict(checkpoint["net"])
        self.averaged.load_state_dict(checkpoint["ema"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        self.step, self.seen = checkpoint["step"], checkpoint["seen"]
        runs.say(f"{folder} goes on at step {self.step}")


def make_model(config):
    """A new model, or that of --init. Raises RunError for flags of a new AdaIR beside --init or
    --model chain."""
    torch.manual_seed(config.seed)
    given = {name: getattr(config, name) for name in NEW_MODEL if getattr(config, name) is not None}
    if config.model == "chain":
        for name in given:
            raise runs.RunError(f"--{name} is of AdaIR, not of --model chain")
        if config.drop_skip != Config.drop_skip:
            raise runs.RunError("--drop-skip is of AdaIR, not of --model chain")
        net = load_restorer(config.init) if config.init else Chain()
        if not isinstance(net, Chain):
            raise runs.RunError(f"{config.init} holds no chain: leave --model chain out")
        return net
    if not config.init:
        sizes = NEW_MODEL | given
        return AdaIR(*sizes.values(), mask_rule="fraction", rates=(RATE, RATE))
    for name in given:
        raise runs.RunError(f"--{name} goes with a new model: that of --init brings its own")
    net = load_pretrained(config.init, "fraction")
    net.config["mask_rule"] = "fraction"
    return net


def adair_loss(net, batch, config, rngs):
    """ℓ1 of an AdaIR's output, skip connections dropped."""
    encoding = drop_skips(net.encode(batch.degraded), config.drop_skip, rngs)
    return (net.decode(encoding) - batch.gt).abs().mean()


def chain_loss(net, batch, config, rngs):
    """The root of the squared error of every image's x̂_0, at a random step. Without the root, haze
    and darkness, whose errors are large, outweigh noise.

    Five crops in eight are at t = T, where x_T is drawn around y, as the chain starts: later steps
    keep what the first one made of haze. Of the others half have x_t ~ q(x_t | x_0, y), half less
    noise and, in the place of x_0, what the network predicts at t = T: about what the chain without
    noise meets.
    """
    x0, y = 2 * batch.gt - 1, 2 * batch.degraded - 1
    times = []
    for rng in rngs:
        any_step, first = rng.integers(1, net.steps + 1), rng.integers(2)
        times.append(net.steps if first else any_step)
    t = torch.tensor(times, device=y.device)
    draws = [rng.standard_normal(y.shape[1:], dtype=np.float32) for rng in rngs]
    shares = [min(1, 2 * rng.random()) for rng in rngs]  # of the noise
    noise = torch.from_numpy(np.stack(draws)).to(y)
    shares = torch.tensor(shares).to(y)[:, None, None, None]
    with torch.no_grad():
        predicted = net.predict(y, y, torch.full_like(t, net.steps))
    mean, deviation = net.marginal(torch.where(shares < 1, predicted, x0), y, t)
    mean = torch.where((t == net.steps)[:, None, None, None], y, mean)
    off = net.predict(mean + deviation * shares * noise, y, t) - x0
    return (off.square().mean(dim=(1, 2, 3)) + 1e-8).sqrt().mean()


def drop_skips(encoding, chance, rngs):
    """An `Encoding` whose skip connections are 0, each of each image with this chance; rngs: a
    generator for every image."""
    x, *skips, latent = encoding
    kept = torch.tensor(np.array([rng.random(3) >= chance for rng in rngs])).to(x)  # (B, 3)
    kept = kept.T[..., None, None, None]
    return Encoding(x, *(skip * k for skip, k in zip(skips, kept)), latent)


def find_samples(config, stop):
    """(training, validation) samples of all folders, every image decoded once, by all processes.
    Raises DataError."""
    train, val, problems = [], [], []
    for root in [root for root in (config.data_root, *config.photos) if root] or [None]:
        split = list_training(root)
        train, val = train + split.train, val + split.val + split.held_out
        problems += split.problems
    if config.val_list:
        train, val = split_listed(train + val, config.val_list)
    if config.data_root and config.photos:  # they stand there under every task: too many
        val = [s for s in val if Path(config.data_root) in Path(s.gt).parents and not s.box]
    runs.same_everywhere("list of images", names_digest(train + val))
    mapper = partial(runs.parallel_map, desc="check", stop=stop)
    train, broken = split_usable(train, max(config.crop), mapper=mapper)
    val, more = split_usable(val, 16, mapper=mapper)
    runs.say_skipped(problems + broken + more)
    pairs = [s for s in train if s.degraded and s.task in config.rooms]
    for sample in {s.gt: s for s in pairs}.values():
        train += [sample._replace(task=task, degraded="") for task in TASKS]
    for sample in pairs:
        if sample.task == "deblur":  # what is blurred is not dark, nor is it hazy
            frame = sample._replace(gt=sample.degraded, degraded="")
            others = [task for task in TASKS if task not in ("deblur", "dehaze")]
            train += [frame._replace(task=task) for task in others]
    if not val:
        raise DataError("no image is left to validate on: name some with --val-list")
    there = {s.task for s in train} | ({"camera"} if any(not s.degraded for s in train) else set())
    if missing := [task for task in config.cycle if task not in there]:
        raise DataError(f"no training images for {missing[0]}: --photos, or another --cycle")
    return train, val


def rate_factor(step, config):
    """What the rates are multiplied by: it rises, stays at 1, and falls to 0 at the end."""
    left = (config.steps - step) / max(config.decay, 1)
    return min(1, (step + 1) / WARM_UP, left)


def source_of(sample):
    """What a file's name begins with, before its first digit: GOPR of GOPR0374_11_00.png."""
    return re.match(r"\D*", Path(sample.name).stem)[0].strip("-_ ")


def pale(image):
    """The image with black raised, as under a quarter of a bright veil."""
    return 0.75 * image + 0.25 * 0.9


def validate(model, val, stop):
    """Prints, per task and per source of its files, what the averaged weights gain over the input,
    and how well they return truths, in dB; and the same of pale images. Returns these rows."""
    model.eval()

    def measure(sample):
        row = dict(task=sample.task, source=source_of(sample))
        degraded, gt = evaluation_pair(sample)
        for name, x, truth in (("", degraded, gt), ("pale ", pale(degraded), pale(gt))):
            row[f"{name}input"] = psnr(x, truth).item()
            row[f"{name}gain"] = psnr(restore(model, x), truth).item() - row[f"{name}input"]
            row[f"{name}truth"] = psnr(restore(model, truth), truth).item()
        return row

    rows = pd.DataFrame(runs.parallel_map(measure, val, "validate", stop))
    columns, lines = [name for name in rows if name not in ("task", "source")], []
    for task, of_task in rows.groupby("task", sort=False):
        sources = [(f"{task}, {name}", part) for name, part in of_task.groupby("source")]
        for name, part in [(task, of_task), *(sources if len(sources) > 1 else [])]:
            lines.append([name, len(part), *(f"{mean:.2f}" for mean in part[columns].mean())])
    runs.say(f"\n{report.markdown(['dB', 'images', *columns], lines)}")
    return rows


def pretrain(config, stop):
    """Trains, and prints what the averaged weights gain on the validation images."""
    net = make_model(config).train().to(config.device, memory_format=torch.channels_last)
    loss_of = chain_loss if config.model == "chain" else adair_loss
    samples, val = find_samples(config, stop)
    averaged, optimizers = runs.averaged(net, EMA), optimizers_of(net, config)

    def crop_and_size(step):  # each crop in turn, as many pixels a step
        crop = config.crop[step // TURN % len(config.crop)]
        return crop, max(1, config.batch_size * config.crop[0] ** 2 // crop**2)

    settings = {name: getattr(config, name) for name in FIXED} | dict(photos=[*config.photos])
    settings["processes"] = runs.processes()
    total = runs.processes() * sum(crop_and_size(step)[1] for step in range(config.steps))
    state = State(net, averaged, optimizers, settings, total)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "last.pt").exists():
        state.load(read_checkpoint(folder / "last.pt"), folder)
    runs.same_everywhere("model or state of training", [state.step, model_digest(net)])
    crops = VariedCrops(samples, max(config.crop), config.seed, config.cycle, config.pale)

    again = "the same command"
    with runs.Run(folder, stop, again, config.device, config.workers, failures=(DataError,)) as run:
        run.start(state, "pretrain", shown=dict(loss="loss/total"), steps=config.steps)
        while state.step < config.steps:
            crops.crop, size = crop_and_size(state.step)
            # until this crop's turn is over, or a validation is due
            left = [n - state.step % n for n in (TURN, config.eval_every)]
            turn = min(*left, config.steps - state.step)
            for batch in run.batches(crops, size, state.seen + turn * size * runs.processes()):
                factor = rate_factor(state.step, config)
                for optimizer, lr in zip(optimizers, (config.muon_lr, config.lr)):
                    optimizer.param_groups[0]["lr"] = lr * factor
                rngs = [np.random.default_rng((config.seed, n, 2)) for n in batch.numbers]
                loss = loss_of(net, batch, config, rngs)
                net.zero_grad()
                loss.backward()
                run.update(optimizers, loss, {"crop": crops.crop}, max_norm=1.0)
            if state.step % config.eval_every == 0 and state.step < config.steps:
                validate(averaged.module, val, stop)
                run.start_clock()
        run.save("last.pt")
        weights = dict(model=averaged.module.state_dict(), config=net.config)
        runs.save_checkpoint(folder / "model.pt", weights)
        validate(averaged.module, val, stop)
    runs.say(f"the model is {folder / 'model.pt'}")


def run_program(argv):
    """The program with these flags, until it is done or asked to end."""
    config = runs.flags(Config, "experiments.pretrain", __doc__, argv)
    if config.decay > config.steps:
        raise runs.RunError(f"--decay is {config.decay}; it must be at most --steps")
    runs.check_device(config.device)
    config.device = runs.join(config.device)
    with runs.Stop(config.max_minutes) as stop:
        try:
            pretrain(config, stop)
        except runs.Stopped as stopped:
            runs.say(f"stopped by {stopped}; the same command goes on")


def main(argv=None):
    return runs.program("experiments.pretrain", run_program, argv, (DataError, CheckpointError))


if __name__ == "__main__":
    sys.exit(main())
