"""The flags of train.py: a field, its default, and under it the sentence with the equation or table
it comes from.

Flags win over the preset; config.json of a run is `Config`.
"""

import dataclasses
import os
import shlex
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

import runs
from data import TASK_WORDS

DEMO_MODEL = Path(__file__).parent / "weights" / "demo.pt"

# What a preset decides where no flag does: (demo, paper).
PRESETS = {
    "draws": (3, 1),
    "crop": (128, 128),
    "steps": (120, 0),
    "epochs": (0, 30),
    "batch_size": (2, 1),
    "lr": (1e-5, 3e-5),
    "head_lr_factor": (210.0, 6.0),
    "warm_up": (10, 0),
    "schedule": ("linear", "constant"),
    "ema": (0.97, 0.0),
    "eval_every": (60, 5000),
    "save_every": (50, 500),
    "rewards": ("default", "paper"),
}


@dataclass
class Samples:
    """which images are trained on: D_hard, Sec. 3.2"""

    data_root: str | None = None
    """AdaIR's data folder, or a folder of photos; without it, the demo's photographs"""
    tasks: tuple[Literal[TASK_WORDS], ...] = ()
    """tasks to train on: denoise derain dehaze is Table 7, one alone Table 1; without it, all"""
    listed: Annotated[str | None, tyro.conf.arg(name="list")] = None
    """file that names the training images to use, one a line, by the last parts of its path"""
    hard_ratio: float = 0.3
    """share of the training set in D_hard, Table 6; of what is ranked together at least one"""
    select: Literal["hard", "random", "easy", "all"] = "hard"
    """which samples, Fig. 5"""
    hard_scope: Literal["task", "global"] = "task"
    """what is ranked by itself: each task and noise level, or all together"""
    repeats: Literal["none", "adair"] = "none"
    """adair: D_hard, however it was selected, holds an image as often as AdaIR's own training list
    repeats its task (rain 120 times); the paper states no repeats"""
    scores: tuple[str, ...] = ()
    """hard.json of earlier runs of the same model, whose scores are taken over for unchanged
    files"""
    draws: int | None = None
    """draws of every degradation per photo; AdaIR's folders stay as they are (preset demo: 3,
    paper: 1)"""
    crop: int | None = None
    """px, a multiple of 8 (both presets: 128, Table 6)"""
    workers: int | None = None
    """processes that load images; without it, 4 beside a GPU, else none"""


@dataclass
class Training:
    """how long and how fast: Table 6"""

    steps: int | None = None
    """updates; 0: by --epochs (preset demo: 120)"""
    epochs: int | None = None
    """passes over D_hard (preset paper: 30)"""
    batch_size: int | None = None
    """images per update and process, each with a group of its own (preset demo: 2, paper: 1)"""
    lr: float | None = None
    """Adam's rate for the backbone (preset demo: 1e-5, paper: 3e-5, Table 6)"""
    head_lr_factor: float | None = None
    """the heads' rate over --lr; the paper's 6 is made for 10⁵ updates (preset demo: 210,
    paper: 6)"""
    warm_up: int | None = None
    """updates in which the rates rise from 0 (preset demo: 10, paper: 0)"""
    schedule: Literal["constant", "linear"] | None = None
    """the rates after that; linear: falling to 0 (preset demo: linear, paper: constant)"""
    ema: float | None = None
    """decay of the averaged weights, which are what is measured and kept; of n updates at most
    (1 + n) / (10 + n); 0: the last ones (preset demo: 0.97, paper: 0)"""
    freeze_backbone: bool = False
    """train the heads alone, without Eq. 1 and 2"""
    freeze_heads: bool = False
    """train the backbone alone, on the best of G rollouts of the first policy, without Eq. 6"""
    amp: Literal["fp32", "bf16"] = "fp32"
    """bf16: the backbone in bfloat16 autocast, for GPUs; the policy stays float32"""
    eval_every: int | None = None
    """steps between validations, which choose best.pt (preset demo: 60, paper: 5000)"""
    save_every: int | None = None
    """steps between checkpoints, last.pt (preset demo: 50, paper: 500)"""
    keep_every: int = 0
    """steps between checkpoints that are kept, step-N.pt; 0: none"""
    max_minutes: float | None = None
    """end with a checkpoint after so long; --resume takes another"""


@dataclass
class Policy:
    """the policy and its loss: Eq. 4–11"""

    group_size: int = 4
    """G, rollouts per image, Table 5"""
    concentration: float = 30.0
    """α + β that the gates start with"""
    clip: float = 0.2
    """ϵ of Eq. 10"""
    kl_beta: float = 0.04
    """β of Eq. 6"""
    entropy_tau: float = 0.01
    """τ of Eq. 6, Table 6"""
    kl: Literal["sample", "exact"] = "sample"
    """Eq. 11, or the closed form"""
    inner_epochs: int = 1
    """updates of the heads per group; above 1 the clip can bind"""
    shuffle_advantages: bool = False
    """the control of RL: advantages in random order within each group; g* stays the best"""
    supervise: Literal["best", "random"] = "best"
    """which rollout the backbone learns from, Eq. 1 and 2; random: the control of choosing"""
    lambda_sup: tuple[float, float] = (0.35, 0.1)
    """λ_sup of Eq. 7 at the start and at the end, Table 6"""
    lambda_cons: tuple[float, float] = (0.2, 0.05)
    """λ_cons of Eq. 7 at the start and at the end, Table 6; 0 0: without L_cons"""
    weighting: Literal["none", "difficulty"] = "none"
    """difficulty: RL weighs more on images far from the truth, L_sup on close ones; not of the
    paper"""
    mask_rule: Literal["fraction", "adair"] = "fraction"
    """how rates become masks; under adair they do nothing at 128 px"""


@dataclass
class Scoring:
    """the reward: Eq. 22"""

    rewards: str | None = None
    """terms: default, paper, or a list as psnr,ssim=0.3,task (preset demo: default, paper:
    paper)"""
    weights_dir: str | None = None
    """where clip, lpips and aes find their weights; without it, torch's cache"""


@dataclass
class Expert:
    """the judge behind R_qwen: Appendix B.2"""

    judge: str = "none"
    """Qwen2.5-VL (hub name or folder), or a server: http://HOST:PORT/v1"""
    judge_model: str | None = None
    """what a server calls the judge's model"""
    judge_device: str | None = None
    """the judge's device; without it, cuda:(number of trainers + rank), or cpu beside a CPU"""
    judge_mode: Literal["logits", "generate"] = "logits"
    """expectation over the score's tokens, or generate: the paper's written answer"""
    judge_prompt: str | None = None
    """file with a prompt of your own: <gt>, <degraded>, <restored> mark the images"""
    judge_args: str = ""
    """further flags of judge.py: --judge-args='--min-pixels 50176 --dtype fp16'"""
    judge_timeout: float = 60.0
    """seconds that a step waits for the judge before it is started again"""
    judge_patience: int = 5
    """failures in a row after which the run stops"""


@dataclass
class Config:
    """Post-train a restorer by IRPO, or by its control."""

    preset: Literal["demo", "paper"] = "demo"
    """demo: minutes on two CPU cores; paper: Table 6"""
    init: str = str(DEMO_MODEL)
    """pre-trained AdaIR to start from, official or ours"""
    out: str | None = None
    """run folder to create; without it, runs/OBJECTIVE-DATE-TIME-seedSEED"""
    resume: str | None = None
    """run folder to continue, with its own settings"""
    objective: Literal["irpo", "sft", "reward", "reward+sft"] = "irpo"
    """irpo: Eq. 7; controls on the deterministic output, without rollouts: sft: L1; reward:
    gradient ascent of the reward's differentiable terms; reward+sft: L1 − R"""
    seed: int = 0
    """seed of crops and actions"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""
    samples: Samples = field(default_factory=Samples)
    training: Training = field(default_factory=Training)
    policy: Policy = field(default_factory=Policy)
    scoring: Scoring = field(default_factory=Scoring)
    expert: Expert = field(default_factory=Expert)
    command: Annotated[str, tyro.conf.Suppress] = ""


def parse(argv):
    """The Config that flags ask for: over the preset, or over that of the run that goes on. Raises
    RunError for flags that cannot work."""
    flags = partial(
        runs.flags, Config, "train.py", "GRPO post-training of an image restorer.", argv
    )
    config = flags()
    if config.resume:
        stored = load_config(config.resume)
        config = resumed(flags(default=stored), stored)
    else:
        fill(config)
        config.command = shlex.join(["python", "train.py", *argv])
    make_absolute(config)
    check(config)
    return config


def fill(config):
    """What the preset decides, and the default of --out."""
    if config.training.epochs and config.training.steps is None:
        config.training.steps = 0  # whoever names epochs means epochs
    for name, values in PRESETS.items():
        groups = config.samples, config.training, config.scoring
        group = next(group for group in groups if hasattr(group, name))
        if getattr(group, name) is None:
            setattr(group, name, values[config.preset == "paper"])
    name = f"{config.objective}-{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
    config.out = config.out or f"runs/{name}"


def make_absolute(config):
    """Makes paths absolute, so that --resume works from any folder."""

    def absolute(path):
        return path and str(Path(path).resolve())

    samples, expert = config.samples, config.expert
    config.init, expert.judge_prompt = absolute(config.init), absolute(expert.judge_prompt)
    samples.data_root, samples.listed = absolute(samples.data_root), absolute(samples.listed)
    samples.scores = tuple(map(absolute, samples.scores))
    config.scoring.weights_dir = absolute(config.scoring.weights_dir)
    if Path(expert.judge).is_dir():
        expert.judge = absolute(expert.judge)


def load_config(folder):
    """The Config in a run folder's config.json. Raises RunError."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise runs.RunError(f"{folder} is no run folder: it has no config.json")
    stored = runs.load_json(path)
    try:
        for group in dataclasses.fields(Config):
            if dataclasses.is_dataclass(group.default_factory):
                values = stored[group.name].items()
                values = {k: tuple(v) if isinstance(v, list) else v for k, v in values}
                absent = {f.name for f in dataclasses.fields(group.default_factory)} - values.keys()
                if absent:
                    raise KeyError(", ".join(sorted(absent)))
                stored[group.name] = group.default_factory(**values)
        return Config(**stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise runs.RunError(f"{path} is not of this version ({error})") from None


def resumed(config, stored):
    """The configuration of a run that goes on, where only --max-minutes and the judge's flags may
    be given besides. Raises RunError for others."""
    free = dataclasses.replace(
        config,
        resume=stored.resume,
        expert=stored.expert,
        training=dataclasses.replace(config.training, max_minutes=stored.training.max_minutes),
    )
    if free != stored:
        hint = "give --resume RUN alone, or with --max-minutes and --judge… flags"
        raise runs.RunError(f"a resumed run keeps its settings: {hint}")
    if (config.expert.judge == "none") != (stored.expert.judge == "none"):
        hint = "a run cannot gain or lose its judge"
        raise runs.RunError(f"{config.resume} keeps its reward: {hint}")
    if (
        not runs.is_url(config.expert.judge)
        and config.expert.judge_model == stored.expert.judge_model
    ):
        config.expert.judge_model = None  # that of a server
    if "WORLD_SIZE" in os.environ:
        config.device = config.device.split(":")[0]
    return config


# Flags of the policy that do nothing where the heads, or the backbone, are not trained.
OF_HEADS = ("clip", "kl_beta", "entropy_tau", "kl", "inner_epochs", "shuffle_advantages")
OF_BACKBONE = ("supervise", "lambda_sup", "lambda_cons")


def check(config):
    """Raises RunError, in one sentence, for values that cannot work."""
    training, expert = config.training, config.expert
    runs.check_ranges(config, seed="[0, 2147483647]")
    runs.check_ranges(config.samples, hard_ratio="(0, 1]", draws="[1, 1000]", workers="[0, 256]")
    runs.check_ranges(
        training,
        **dict.fromkeys(("steps", "epochs", "lr", "head_lr_factor", "keep_every"), "[0, inf)"),
        warm_up="[0, inf)",
        ema="[0, 1)",
        **dict.fromkeys(("batch_size", "eval_every", "save_every"), "[1, inf)"),
        max_minutes="(0, inf)",
    )
    runs.check_ranges(
        config.policy,
        **dict.fromkeys(("group_size", "inner_epochs"), "[1, inf)"),
        **dict.fromkeys(("clip", "kl_beta", "entropy_tau"), "[0, inf)"),
        **dict.fromkeys(("lambda_sup", "lambda_cons"), "[0, inf)"),
        concentration="(2, 3000]",
    )
    runs.check_ranges(expert, judge_timeout="(0, inf)", judge_patience="[1, inf)")
    runs.check_multiple_of_8("--crop", config.samples.crop)
    runs.check_device(config.device)
    if not config.resume:  # a run that goes on has its D_hard
        for path in config.samples.scores:
            runs.check_file("--scores", path)
        runs.check_file("--list", config.samples.listed)
    runs.check_file("--judge-prompt", expert.judge_prompt)
    try:
        shlex.split(expert.judge_args)
    except ValueError as error:
        raise runs.RunError(f"--judge-args: {error}") from None
    if not training.steps and not training.epochs:
        raise runs.RunError("--steps and --epochs are both 0: nothing would be trained")
    if training.freeze_backbone and training.freeze_heads:
        raise runs.RunError("--freeze-backbone with --freeze-heads would train nothing")
    if config.objective != "irpo":
        check_control(config)
    elif training.freeze_heads:
        refuse_idle(config, OF_HEADS, "--freeze-heads")
    elif training.freeze_backbone:
        refuse_idle(config, OF_BACKBONE, "--freeze-backbone")
    if runs.is_url(expert.judge) != bool(expert.judge_model):
        hint = "it goes with --judge http://… and only with that"
        raise runs.RunError(f"--judge-model names the model of a server: {hint}")


def refuse_idle(config, names, where):
    """Raises RunError for a flag of the policy that would do nothing."""
    for name in names:
        if getattr(config.policy, name) != getattr(Policy(), name):
            flag = f"--{name.replace('_', '-')}"
            raise runs.RunError(f"{flag} does nothing under {where}: leave it out")


def check_control(config):
    """Raises RunError for flags of RL beside an --objective that has none."""
    control = f"--objective {config.objective}"
    if config.training.freeze_backbone:
        raise runs.RunError(f"{control} with --freeze-backbone would train nothing")
    if config.training.freeze_heads:
        raise runs.RunError(f"{control} trains no heads: leave --freeze-heads out")
    if config.expert.judge != "none":
        raise runs.RunError(f"{control} can learn from no judge: leave --judge out")
    refuse_idle(config, (*OF_HEADS, *OF_BACKBONE, "weighting", "group_size"), control)
