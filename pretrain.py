"""Supervised pre-training of AdaIR, which the demo model came from: L1, Adam with warm-up and
cosine decay; the result, model.pt, is an average of the weights.

    python pretrain.py --data-root data --out runs/pretrain

Killed, the same command goes on where it stopped (bit for bit on the same machine).
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import report
import runs
from data import TASKS, Crops, DataError, list_training, names_digest, split_usable
from metrics import evaluate
from model import (
    EMPTY_RATE,
    AdaIR,
    CheckpointError,
    load_pretrained,
    model_digest,
    read_checkpoint,
    restore,
)

NEW_MODEL = dict(dim=48, blocks=(4, 6, 6, 8), refinement=4, rate=0.25)  # Table 6
WARM_UP = 200  # steps
LAST_STAGE = 0.75  # of the steps are done with the first crop size
# Whoever goes on with a run may change these.
FREE = ("out", "steps", "save_every", "workers", "max_minutes", "device", "amp")


@dataclass
class Config:
    """Pre-train an AdaIR on pairs and on synthesised degradations."""

    data_root: str | None = None
    """AdaIR's data folder; without it, photographs inside scikit-image"""
    photos: str | None = None
    """folder of photos on which all tasks are synthesised besides"""
    init: str | None = None
    """AdaIR to start from; without it, from scratch"""
    out: str = "runs/pretrain"
    """run folder, created or continued"""
    dim: int | None = None
    """channels of a new model, a multiple of 8 (Table 6: 48)"""
    blocks: tuple[int, int, int, int] | None = None
    """its transformer blocks (Table 6: 4 6 6 8)"""
    refinement: int | None = None
    """its refinement blocks (Table 6: 4)"""
    rate: float | None = None
    """its constant r_h, r_l under --mask-rule fraction (0.25)"""
    mask_rule: Literal["fraction", "adair"] = "fraction"
    """how rates become masks"""
    crop: tuple[int, int] = (64, 128)
    """px, at first and in the last quarter"""
    batch_size: int = 8
    """crops per step and process at the first crop size; later as many pixels"""
    steps: int = 4200
    """updates"""
    lr: float = 1e-3
    """Adam's peak rate"""
    ema: float = 0.998
    """decay of the averaged weights"""
    cycle: tuple[Literal[tuple(TASKS)], ...] = tuple(TASKS)
    """tasks drawn in turn"""
    save_every: int = 100
    """steps between checkpoints"""
    amp: Literal["fp32", "bf16"] = "fp32"
    """bf16: bfloat16 autocast, for GPUs"""
    workers: int | None = None
    """processes that load images; without it, 4 beside a GPU, else none"""
    max_minutes: float | None = None
    """end with a checkpoint after so long"""
    seed: int = 0
    """of weights and crops"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


def check(config):
    """Raises RunError, in one sentence, for values that cannot work."""
    counts = dict.fromkeys(
        ("blocks", "refinement", "batch_size", "steps", "save_every"), "[1, inf)"
    )
    runs.check_ranges(config, **counts, lr="[0, inf)", ema="[0, 1]", rate="(0, 1)", seed="[0, inf)")
    runs.check_ranges(config, workers="[0, 256]", max_minutes="(0, inf)")
    runs.check_multiple_of_8("--crop", *config.crop)
    runs.check_multiple_of_8("--dim", *([config.dim] if config.dim else []))
    runs.check_device(config.device)
    given = [name for name in NEW_MODEL if getattr(config, name) is not None]
    if config.init and given:
        raise runs.RunError(f"--{given[0]} goes with a new model: that of --init brings its own")


@dataclass
class State:
    """What a training is at a step: all that a checkpoint holds."""

    net: torch.nn.Module
    averaged: torch.nn.Module  # exponential moving average of the weights
    optimizer: torch.optim.Optimizer
    settings: dict
    total: int  # crops of the whole training
    step: int = 0
    seen: int = 0  # crops

    def checkpoint(self):
        weights = dict(model=self.averaged.module.state_dict(), config=self.net.config)
        rest = dict(net=self.net.state_dict(), ema=self.averaged.state_dict())
        rest |= dict(optimizer=self.optimizer.state_dict(), settings=self.settings)
        return weights | rest | dict(step=self.step, seen=self.seen)

    def load(self, checkpoint, folder):
        """Goes on where a checkpoint of the same settings stopped. Raises RunError."""
        if checkpoint.get("config") != self.net.config or "settings" not in checkpoint:
            raise runs.RunError(
                f"{folder} holds the training of another model: choose another --out"
            )
        stored = checkpoint["settings"]
        other = [name for name, value in self.settings.items() if stored.get(name) != value]
        if other:
            flag = f"--{other[0].replace('_', '-')}"
            name = "number of processes" if other[0] == "processes" else flag
            hint = "give the same, or another --out"
            raise runs.RunError(f"{folder} was trained with another {name}: {hint}")
        self.net.load_state_dict(checkpoint["net"])
        self.averaged.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.seen = checkpoint["step"], checkpoint["seen"]
        runs.say(f"{folder} goes on at step {self.step}")


def make_model(config):
    """A new AdaIR, or that of --init."""
    torch.manual_seed(config.seed)
    if config.init:
        net = load_pretrained(config.init, config.mask_rule)
        net.config["mask_rule"] = config.mask_rule
        return net
    given = {name: getattr(config, name) for name in NEW_MODEL}
    shape = NEW_MODEL | {name: value for name, value in given.items() if value is not None}
    rate = shape["rate"] if config.mask_rule == "fraction" else EMPTY_RATE
    sizes = shape["dim"], shape["blocks"], shape["refinement"]
    return AdaIR(*sizes, mask_rule=config.mask_rule, rates=(rate, rate))


def find_samples(config, stop):
    """(training, validation) samples of both folders, every image decoded once, by all processes.
    Raises DataError."""
    roots = [root for root in (config.data_root, config.photos) if root] or [None]
    train, val, problems = map(sum, zip(*(list_training(root) for root in roots)), ([], [], []))
    runs.same_everywhere("list of images", names_digest(train + val))
    mapper = partial(runs.parallel_map, desc="check", stop=stop)
    train, broken = split_usable(train, max(config.crop), mapper=mapper)
    val, more = split_usable(val, 16, mapper=mapper)
    runs.say_skipped(problems + broken + more)
    missing = [task for task in config.cycle if task not in {s.task for s in train}]
    if missing:
        hint = "give --photos, or leave it out of --cycle"
        raise DataError(f"there are no training images for {', '.join(missing)}: {hint}")
    return train, val


def pretrain(config, stop):
    """Trains, and prints what the averaged weights gain on the validation images."""
    samples, val = find_samples(config, stop)
    net = make_model(config).train().to(config.device, memory_format=torch.channels_last)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=decay)
    groups = [dict(params=net.parameters(), lr=config.lr, name="lr")]
    optimizer = torch.optim.Adam(groups, fused=True)

    def stage(step):  # (crop, batch size): the last quarter sees larger crops, as many pixels
        late = step >= config.steps * LAST_STAGE
        crop = config.crop[late]
        return crop, max(1, config.batch_size * config.crop[0] ** 2 // crop**2)

    folder = Path(config.out)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    settings["processes"] = runs.processes()
    total = runs.processes() * sum(stage(step)[1] for step in range(config.steps))
    state = State(net, averaged, optimizer, settings, total)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "last.pt").exists():
        state.load(read_checkpoint(folder / "last.pt"), folder)
    runs.same_everywhere("model or state of training", [state.step, model_digest(net)])

    shell = config.device, config.workers, config.save_every
    errors = (DataError, CheckpointError)
    with runs.Run(folder, stop, "the same command", *shell, failures=errors) as run:
        run.start(state, "pretrain", shown=dict(l1="loss/total"))
        while state.step < config.steps:
            crop, size = stage(state.step)
            crops = Crops(samples, crop, config.seed, fresh=True, cycle=config.cycle)
            ahead = range(state.step, config.steps)
            same = next((s for s in ahead if stage(s) != (crop, size)), config.steps) - state.step
            until = state.seen + same * size * runs.processes()
            for batch in run.batches(crops, size, until):
                warm_up = min(1, (state.step + 1) / WARM_UP)
                cosine = 0.5 + 0.5 * math.cos(math.pi * state.step / config.steps)
                optimizer.param_groups[0]["lr"] = config.lr * warm_up * cosine + 1e-6
                kind = torch.device(config.device).type
                with torch.autocast(kind, torch.bfloat16, enabled=config.amp == "bf16"):
                    restored = net(batch.degraded)
                loss = (restored - batch.gt).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                metrics = run.step(optimizer, loss, max_norm=1.0)
                if run.is_updating:
                    averaged.update_parameters(net)
                run.finish(metrics | {"crop": crop})
        run.save("last.pt")
        model = averaged.module.eval()
        weights = dict(model=model.state_dict(), config=net.config)
        runs.save_checkpoint(folder / "model.pt", weights)
        mapper = partial(runs.parallel_map, desc="validate", stop=stop)
        rows = evaluate(partial(restore, model), val, also=tell_apart, mapper=mapper)
    for kind, name in ((True, "pairs of files"), (False, "synthesised")):
        part = [row for row in rows if row["paired"] == kind]
        runs.say(f"\nvalidation, {name}\n{report.gain_table(part)}" if part else "")
    runs.say(f"the model is {folder / 'model.pt'}")


def tell_apart(sample, *images):
    return dict(paired=bool(sample.degraded))


def run_program(argv):
    """The program with these flags, until it is done or asked to end."""
    config = runs.flags(Config, "pretrain.py", __doc__, argv)
    check(config)
    config.device = runs.join(config.device)
    with runs.Stop(config.max_minutes) as stop:
        try:
            pretrain(config, stop)
        except runs.Stopped as stopped:
            runs.say(f"stopped by {stopped}; the same command goes on")


def main(argv=None):
    return runs.program("pretrain.py", run_program, argv, (DataError, CheckpointError))


if __name__ == "__main__":
    sys.exit(main())
