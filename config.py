"""The flags of train.py: a field with its range and default, and under it the sentence with the
equation or table it comes from.

Flags win over the preset. config.json of a run is its `Config`.
"""

import dataclasses
import json
import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import AfterValidator, Field

import runs
from data import TASK_WORDS
from runs import AboveZero, AbsolutePath, Count, MultipleOf8, NotNegative, Positive

DEMO_MODEL = Path(__file__).parent / "weights" / "demo.pt"
DEMO_CHAIN = DEMO_MODEL.with_name("chain.pt")


def absolute_plugs(text):
    """--rewards with absolute paths of the user's files, FILE.py:NAME=WEIGHT."""
    items = (item.strip() for item in text.split(","))
    return ",".join(os.path.abspath(item) if ".py:" in item else item for item in items)


@dataclass
class Samples:
    """which images are trained on: D_hard, Sec. 3.2"""

    data_root: AbsolutePath | None = None
    """AdaIR's data folder, or a folder of photos; without it, the demo's photographs"""
    tasks: tuple[Literal[TASK_WORDS], ...] = ()
    """tasks to train on: denoise derain dehaze is Table 7, one alone Table 1; without it, all"""
    listed: Annotated[AbsolutePath | None, tyro.conf.arg(name="list")] = None
    """file that names the training images to use, one a line, by the last parts of its path"""
    hard_ratio: Annotated[float, Field(gt=0, le=1)] = 0.3
    """share of the training set in D_hard, Table 6; of what is ranked together at least one"""
    select: Literal["hard", "random", "easy", "all"] = "hard"
    """which samples, Fig. 5"""
    hard_scope: Literal["task", "global"] = "task"
    """what is ranked by itself: each task and noise level, or all together"""
    repeats: Literal["none", "adair"] = "none"
    """adair: D_hard, however it was selected, holds an image as often as AdaIR's own training list
    repeats its task (rain 120 times); the paper states no repeats"""
    scores: tuple[AbsolutePath, ...] = ()
    """hard.json of earlier runs of the same model, whose scores are taken over for unchanged
    files, and from the report.json beside it what was measured before training"""
    draws: Annotated[int, Field(ge=1, le=1000)] = 2
    """draws of every degradation per photo (train.py 2, lrpo.py 3, preset paper 1); AdaIR's folders
    stay as they are"""
    crop: MultipleOf8 = 128
    """px, a multiple of 8, Table 6"""
    measure_crop: Annotated[int, Field(ge=32)] | None = None
    """px a side of the middle of validation and held-out images that is measured; without it, all
    of them"""
    workers: runs.Workers | None = None
    """processes that load images; without it, 4 beside a GPU, else none"""


@dataclass
class Training:
    """how long and how fast: Table 6"""

    steps: Count = 90
    """updates; 0: by --epochs"""
    epochs: Count = 0
    """passes over D_hard, Table 6: 30; who gives them means them, not --steps"""
    batch_size: Positive = 2
    """images per update and process, each with a group of its own, Table 6: 1"""
    lr: NotNegative = 3e-5
    """Adam's rate for the backbone, Table 6: 3e-5"""
    warm_up: Count = 10
    """updates in which the rates rise from 0"""
    schedule: Literal["constant", "linear"] = "linear"
    """the rates after that; linear: falling to 0"""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.97
    """decay of the averaged weights, which are what is measured and kept; of n updates at most
    (1 + n) / (10 + n); 0: the last ones"""
    amp: Literal["fp32", "bf16"] = "fp32"
    """bf16: the backbone in bfloat16 autocast, for GPUs; the policy stays float32"""
    eval_every: Positive = 45
    """steps between validations, which choose best.pt"""
    save_every: Positive = 50
    """steps between checkpoints, last.pt"""
    keep_every: Count = 0
    """steps between checkpoints that are kept, step-N.pt; 0: none"""
    max_minutes: AboveZero | None = None
    """end with a checkpoint after so long; --resume takes another"""


@dataclass
class Policy:
    """the policy and its loss: Eq. 4–11"""

    group_size: Positive = 4
    """G, rollouts per image, Table 5"""
    concentration: Annotated[float, Field(gt=2, le=3000)] = 30.0
    """α + β that the gates start with"""
    advantage_scale: Literal["group", "batch"] = "group"
    """what advantages are divided by: the deviation of a group, Eq. 8, or of a process's batch
    (LRPO)"""
    advantage_eps: AboveZero = 1e-12
    """ε of Eq. 8, inside the root: groups whose rewards deviate by less than √ε are damped;
    Appendix B: 1e-6"""
    head_lr_factor: NotNegative = 15.0
    """the heads' rate over --lr; the paper's 6 is made for 10⁵ updates"""
    freeze_backbone: bool = False
    """train the heads alone, without Eq. 1 and 2"""
    freeze_heads: bool = False
    """train the backbone alone, on the best of G rollouts of the first policy, without Eq. 6"""
    clip: NotNegative = 0.2
    """ϵ of Eq. 10"""
    kl_beta: NotNegative = 0.04
    """β of Eq. 6"""
    entropy_tau: NotNegative = 0.01
    """τ of Eq. 6, Table 6"""
    kl: Literal["sample", "exact"] = "sample"
    """Eq. 11, or the closed form"""
    inner_epochs: Positive = 1
    """updates of the heads per group; above 1 the clip can bind"""
    shuffle_advantages: bool = False
    """the control of RL: advantages in random order within each group; g* stays the best"""
    supervise: Literal["best", "random"] = "best"
    """which rollout the backbone learns from, Eq. 1 and 2; random: the control of choosing"""
    lambda_sup: tuple[NotNegative, NotNegative] = (0.35, 0.1)
    """λ_sup of Eq. 7 at the start and at the end, Table 6"""
    lambda_cons: tuple[NotNegative, NotNegative] = (0.2, 0.05)
    """λ_cons of Eq. 7 at the start and at the end, Table 6; 0 0: without L_cons"""
    weighting: Literal["none", "difficulty"] = "none"
    """difficulty: RL weighs more on images far from the truth, L_sup on close ones; not of the
    paper"""
    mask_rule: Literal["fraction", "adair"] = "fraction"
    """how rates become masks; under adair they do nothing at 128 px"""


@dataclass
class Scoring:
    """the reward: Eq. 22"""

    rewards: Annotated[str, AfterValidator(absolute_plugs)] = "default"
    """terms: default, paper, or a list as psnr,ssim=0.3,task,my_rewards.py:niqe=0.2, where the last
    is your own Python function (restored, gt) -> (B,) in [0, 1]"""
    weights_dir: AbsolutePath | None = None
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
    judge_prompt: AbsolutePath | None = None
    """file with a prompt of your own: <gt>, <degraded>, <restored> mark the images"""
    judge_args: str = ""
    """further flags of judge.py: --judge-args='--min-pixels 50176 --dtype fp16'"""
    judge_timeout: AboveZero = 60.0
    """seconds that a step waits for the judge before it is started again"""
    judge_patience: Positive = 5
    """failures in a row after which the run stops"""


@dataclass
class Config:
    """Post-train a restorer by IRPO, or by its control."""

    preset: Literal["demo", "paper"] = "demo"
    """demo: minutes on two CPU cores; paper: Table 6. --preset paper --help shows its defaults"""
    init: AbsolutePath = str(DEMO_MODEL)
    """pre-trained AdaIR to start from, official or ours"""
    out: str | None = None
    """run folder to create; without it, runs/OBJECTIVE-DATE-TIME-seedSEED"""
    resume: str | None = None
    """run folder to continue, with its own settings"""
    objective: Literal["irpo", "sft", "reward", "reward+sft"] = "irpo"
    """irpo: Eq. 7; controls on the deterministic output, without rollouts: sft: L1; reward:
    gradient ascent of the reward's differentiable terms; reward+sft: L1 − R"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """seed of crops and actions"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""
    samples: Samples = field(default_factory=Samples)
    training: Training = field(default_factory=Training)
    policy: Policy = field(default_factory=Policy)
    scoring: Scoring = field(default_factory=Scoring)
    expert: Expert = field(default_factory=Expert)
    command: Annotated[str, tyro.conf.Suppress] = ""
    plugs: Annotated[dict[str, str], tyro.conf.Suppress] = field(default_factory=dict)


def paper():
    """Preset paper, Table 6; what it does not state stays as in the demo."""
    return Config(
        preset="paper",
        samples=Samples(draws=1),
        training=Training(
            steps=0,
            epochs=30,
            batch_size=1,
            lr=3e-5,
            warm_up=0,
            schedule="constant",
            ema=0.0,
            eval_every=5000,
            save_every=500,
        ),
        policy=Policy(advantage_eps=1e-6, head_lr_factor=6.0),
        scoring=Scoring(rewards="paper"),
    )


def parse(argv):
    """The Config of train.py that flags ask for. Raises RunError for flags that cannot work."""
    about = "GRPO post-training of an image restorer."
    config = parse_over("train.py", about, dict(demo=Config(), paper=paper()), argv)
    check(config)
    return config


def parse_over(program, about, presets, argv):
    """What flags ask for: over the preset of {name: configuration}, or over the run that goes on.
    Raises RunError for flags that cannot work."""
    words = [word for flag in argv for word in flag.split("=", 1)]
    named = [b for a, b in zip(words, words[1:]) if a in ("--preset", "--policy")]
    preset = presets.get(named[-1] if named else "demo", presets["demo"])
    config = runs.flags(type(preset), program, about, argv, default=preset)
    if config.resume:
        stored = load_config(type(preset), config.resume)
        config = runs.flags(type(preset), program, about, argv, default=stored)
        check_resumed(config, stored)
    else:
        choose_length(config.training, preset.training)
        name = f"{config.objective}-{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
        config.out = config.out or f"runs/{name}"
        config.command = shlex.join(["python", program, *argv])
    if config.samples.select == "all":
        idle = ["hard_ratio", "hard_scope"]
        refuse_idle(config.samples, preset.samples, idle, "--select all, unlike --select hard")
    if Path(config.expert.judge).is_dir():
        config.expert.judge = os.path.abspath(config.expert.judge)
    check_files(config)
    return config


def choose_length(training, preset):
    """--steps or --epochs: the one that was given counts. Raises RunError for both or none."""
    if training.steps and training.epochs:
        if training.epochs == preset.epochs:
            training.epochs = 0
        elif training.steps == preset.steps:
            training.steps = 0
        else:
            raise runs.RunError("--steps and --epochs both say how long: give one of them")
    if not training.steps and not training.epochs:
        raise runs.RunError("--steps and --epochs are both 0: nothing would be trained")


def load_config(kind, folder):
    """The configuration of class `kind` in a run folder's config.json. Raises RunError."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise runs.RunError(f"{folder} is no run folder: it has no config.json")
    stored = runs.load_json(path)
    try:
        config = runs.validated(kind, stored)
        is_whole = json.loads(json.dumps(dataclasses.asdict(config))) == stored
    except runs.RunError:
        is_whole = False
    if not is_whole:  # a field was added, renamed or taken away since
        raise runs.RunError(f"{path} is not of this program and version: start a new run")
    return config


def check_resumed(config, stored):
    """A run that goes on keeps its settings; --max-minutes and the judge's flags may be given
    besides. Raises RunError for others."""
    kept = dataclasses.replace(
        config,
        resume=stored.resume,
        expert=stored.expert,
        training=dataclasses.replace(config.training, max_minutes=stored.training.max_minutes),
    )
    if kept != stored:
        raise runs.RunError("a resumed run keeps its settings, but --max-minutes and --judge…")
    if (config.expert.judge == "none") != (stored.expert.judge == "none"):
        raise runs.RunError(f"{config.resume}: a run cannot gain or lose its judge")
    is_servers = runs.is_url(config.expert.judge)
    if not is_servers and config.expert.judge_model == stored.expert.judge_model:
        config.expert.judge_model = None
    if "WORLD_SIZE" in os.environ:
        config.device = config.device.split(":")[0]


# Flags of the policy that do nothing where the heads, or the backbone, are not trained.
OF_HEADS = "advantage_scale advantage_eps clip kl_beta entropy_tau kl inner_epochs".split()
OF_HEADS += ["shuffle_advantages"]
OF_BACKBONE = "supervise lambda_sup lambda_cons".split()


def check_files(config):
    """Raises RunError unless the device, the files and the judge that are named can be used."""
    expert = config.expert
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
    if runs.is_url(expert.judge) != bool(expert.judge_model):
        raise runs.RunError("--judge-model goes with --judge http://…, and only with that")


def check(config):
    """Raises RunError, in one sentence, for values that cannot work together."""
    policy, usual = config.policy, (paper() if config.preset == "paper" else Config()).policy
    if policy.advantage_scale == "batch":
        refuse_idle(policy, usual, ["advantage_eps"], "--advantage-scale batch")
    if policy.freeze_backbone and policy.freeze_heads:
        raise runs.RunError("--freeze-backbone with --freeze-heads would train nothing")
    if config.objective != "irpo":
        check_control(config, usual)
    elif policy.freeze_heads:
        refuse_idle(policy, usual, OF_HEADS, "--freeze-heads")
    elif policy.freeze_backbone:
        refuse_idle(policy, usual, OF_BACKBONE, "--freeze-backbone")


def refuse_idle(given, usual, names, where):
    """Raises RunError for a flag of a group that would do nothing; usual: the preset's."""
    for name in names:
        if getattr(given, name) != getattr(usual, name):
            flag = f"--{name.replace('_', '-')}"
            raise runs.RunError(f"{flag} does nothing under {where}: leave it out")


def check_control(config, usual):
    """Raises RunError for flags of RL beside an --objective that has none."""
    control = f"--objective {config.objective}"
    if config.policy.freeze_backbone:
        raise runs.RunError(f"{control} with --freeze-backbone would train nothing")
    if config.policy.freeze_heads:
        raise runs.RunError(f"{control} trains no heads: leave --freeze-heads out")
    if config.expert.judge != "none":
        raise runs.RunError(f"{control} can learn from no judge: leave --judge out")
    names = *OF_HEADS, *OF_BACKBONE, "weighting", "group_size"
    refuse_idle(config.policy, usual, names, control)
