"""LRPO: RL whose actions are pixels, so that its gradient reaches every weight of a restorer. The
method is `post_train`, from top to bottom.

    python lrpo.py                       post-trains the demo model, nothing downloaded
    python lrpo.py --init restorer.pth   any restorer that spandrel knows, or an AdaIR
    python lrpo.py --policy chain        a diffusion restorer, whose policy is its own steps

After LRPO (arXiv 2509.23339), whose policy is a diffusion chain: `diffusion.Steps`. `Pixels` works
for every restorer: a single Gaussian step around its output.
"""

import copy
import math
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from pydantic import Field

import grpo
import mining
import runs
import study
from config import DEMO_CHAIN, DEMO_MODEL, Samples, Scoring, Training, parse_over, refuse_idle
from config import Config as IrpoConfig
from data import Crops
from diffusion import Chain, Steps
from model import load_restorer
from runs import AboveZero, AbsolutePath, Count, NotNegative, Positive

# --------------------------------------------------------------------------------------- the policy


@dataclass
class PixelPath:
    """What rollouts went through: all that log π needs."""

    degraded: torch.Tensor  # (B, 3, H, W)
    block: int  # px a side
    sigma: float
    actions: torch.Tensor  # (B, G, 3, H/b, W/b)
    computed: dict  # by the weights as they are now, with graph


class Pixels:
    """One Gaussian step around the output f(x) of any restorer.

    The action is the mean of every b × b block: a ~ N(pool_b f(x), σ²). The restored image is
    f(x) + up(a − pool_b f(x)). So a rollout costs an addition.

    What RL estimates by it is Jᵀ P ∇R: J the Jacobian of the output in the weights, ∇R the gradient
    of the reward in the pixels, P the projection on blocks, the rest f − up(pool_b f) held. For
    b = 1 that is the reward's gradient; for b > 1 the part that blocks can express, with less
    variance; block sizes in turn average over them.
    """

    def __init__(self, blocks, sigmas):
        """blocks: px, one size a step in turn; sigmas: of each, in units of [0, 1]."""
        self.steps = list(zip(blocks, sigmas))

    def rollout(self, restorer, degraded, group_size, generators, turn):
        """(restored (B, G, 3, H, W) without graph, PixelPath) of images (B, 3, H, W). Noise comes
        in pairs of opposite sign (of an odd G one has no partner): its mean in a group is zero, and
        what the reward has of even order cancels. turn: which block size."""
        block, sigma = self.steps[turn % len(self.steps)]
        output = restorer(degraded)
        means = F.avg_pool2d(output.detach(), block)  # (B, 3, H/b, W/b)
        shape = (-(-group_size // 2), *means.shape[1:])
        half = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])
        noise = sigma * torch.cat((half, -half), dim=1)[:, :group_size]  # (B, G, 3, H/b, W/b)
        restored = output.detach()[:, None] + enlarged(noise, block)
        actions = means[:, None] + noise
        return restored, PixelPath(degraded, block, sigma, actions, computed=dict(output=output))

    def output(self, restorer, path):
        """f(x) (B, 3, H, W), with graph; runs the restorer where it changed."""
        if "output" not in path.computed:
            path.computed["output"] = restorer(path.degraded)
        return path.computed["output"]

    def means(self, restorer, path):
        """The density's means, for all rollouts: (B, 1, 3, H/b, W/b)."""
        return F.avg_pool2d(self.output(restorer, path), path.block)[:, None]

    def log_prob(self, restorer, path, patch=0):
        """log π(a | x) of the one step, the mean over the entries of an action, those of a patch of
        so many px or all: (B, G, 1, h, w)."""
        patch = patch // path.block
        return log_normal(path.actions, self.means(restorer, path), path.sigma, patch)

    def kl(self, restorer, reference, path):
        """KL(π ‖ π_ref), the mean over entries, exact: (B, 1, 1, 1, 1)."""
        with torch.no_grad():
            start = F.avg_pool2d(reference(path.degraded), path.block)[:, None]
        off = grpo.over_patches((self.means(restorer, path) - start).square(), patch=0)
        return off[:, :, None] / (2 * path.sigma**2)

    def log_likelihood(self, restorer, path, gt):
        """ℓ, the mean log-density of the truth (B, 3, H, W) as an action:
        (B, 1, 1, 1, 1)."""
        truth = F.avg_pool2d(gt, path.block)[:, None]
        return log_normal(truth, self.means(restorer, path), path.sigma)

    def noise_level(self, path):
        """σ_j / mean σ over the steps: what LRPO multiplies advantages by. A preconditioner."""
        return path.sigma / (sum(sigma for _, sigma in self.steps) / len(self.steps))


def enlarged(blocks, size):
    """Block values (…, h, w) as an image (…, size h, size w)."""
    return blocks.repeat_interleave(size, dim=-2).repeat_interleave(size, dim=-1)


def log_normal(x, mean, sigma, patch=0):
    """log N(x; mean, σ²) of (B, G, 3, H, W), the mean over entries: (B, G, 1, h, w)."""
    off = grpo.over_patches((x - mean).square(), patch)[:, :, None]
    return -off / (2 * sigma**2) - math.log(sigma) - 0.5 * math.log(2 * math.pi)


# --------------------------------------------------------------------------------------- the method


def post_train(config, run, pretrained, reward, samples, val, judge=None, checkpoint=None):
    """LRPO: mines the samples, trains a copy of the pre-trained restorer by RL on its output.
    Returns the study.State after the last step. The parameters are those of train.post_train."""
    settings = config.policy
    hard = mining.hard_samples(config, run, pretrained, samples)
    crops = Crops(hard, config.samples.crop, config.seed)
    state, policy = attach(config, pretrained, crops, checkpoint)
    restorer, reference = state.live["model"], pretrained  # π_ref is where it starts
    run.start(state, "lrpo", shown=dict(reward="reward", psnr="psnr_det"))

    for batch in run.batches(crops, config.training.batch_size):
        study.validate_when_due(config, run, reward, val)
        state.set_rates(config.training)

        # G versions of every image, each rewarded, normalised within its group or the whole batch
        generators = study.generators_of(config, batch.numbers)
        restored, path = policy.rollout(
            restorer, batch.degraded, settings.group_size, generators, turn=state.step
        )
        patch = settings.advantage_patch
        scores, terms, credit = reward.in_patches(  # credit: (B, G, h, w)
            restored, batch.degraded, batch.gt, batch.tasks, judge, patch
        )
        advantages = study.advantages(credit, settings, generators)[:, :, None]
        metrics = study.describe(scores, terms, judge)

        # Noise-level advantage assignment, one for every step of a path: (B, G, S, h, w)
        if settings.noise_levels:
            advantages = (advantages * policy.noise_level(path)).clamp(-5, 5)
        output = policy.output(restorer, path)
        weight_rl, weight_sup = study.image_weights(output, batch.gt, settings)
        advantages = weight_rl[:, None, None, None, None] * advantages
        metrics |= {"psnr_in": study.batch_psnr(batch.degraded, batch.gt)}
        metrics |= {"psnr_det": study.batch_psnr(output, batch.gt)}

        old = None  # log π_old
        for left in reversed(range(settings.inner_epochs)):
            logp = policy.log_prob(restorer, path, patch)
            old = logp.detach() if old is None else old
            ratio = (logp - old).exp()  # (B, G, S, h, w)
            surrogate = grpo.clipped_surrogate(ratio, advantages, settings.clip)
            likelihood = policy.log_likelihood(restorer, path, batch.gt)  # ℓ
            loss = -surrogate + settings.likelihood * (1 - (likelihood / 40).exp()).mean()
            if settings.lambda_sup:  # of a chain it takes all steps, with graph
                off = policy.output(restorer, path) - batch.gt
                metrics["loss/sup"] = (off.abs().mean(dim=(1, 2, 3)) * weight_sup).mean()
                loss = loss + settings.lambda_sup * metrics["loss/sup"]
            if settings.kl_beta:  # it takes a forward of the reference
                metrics["kl"] = policy.kl(restorer, reference, path).mean()
                loss = loss + settings.kl_beta * metrics["kl"]
            state.optimizer.zero_grad()
            loss.backward()
            path.computed.clear()  # the weights change now
            if left:
                run.descend([state.optimizer], loss, max_norm=1.0)
        metrics |= {"loss/rl": -surrogate, "log_likelihood": likelihood.mean()}
        metrics |= {"ratio": ratio.mean(), "advantage_rms": advantages.square().mean().sqrt()}
        run.update([state.optimizer], loss, metrics, max_norm=1.0)
    study.validate_when_due(config, run, reward, val)
    return state


def fine_tune(config, run, pretrained, reward, samples, val, judge=None, checkpoint=None):
    """The controls: `study.fine_tune` of the output."""
    hard = mining.hard_samples(config, run, pretrained, samples)
    crops = Crops(hard, config.samples.crop, config.seed)
    state, _ = attach(config, pretrained, crops, checkpoint)
    return study.fine_tune(config, run, state, crops, reward, val, forward=state.live["model"])


def attach(config, pretrained, crops, checkpoint):
    """(study.State, policy): a copy of the pre-trained restorer to train."""
    torch.manual_seed(config.seed)
    live = torch.nn.ModuleDict(dict(model=copy.deepcopy(pretrained).requires_grad_()))
    state = study.begin(config, live, dict(model=config.training.lr), crops)
    if checkpoint:
        state.load(checkpoint)
    return state, policy_of(config, pretrained)


def policy_of(config, restorer):
    if isinstance(restorer, Chain):
        return Steps(restorer)
    return Pixels(config.policy.block, config.policy.sigma)


def four_rollouts(config, state, degraded, generators):
    """Of an image (1, 3, H, W), for rollouts.png: restored (4, 3, H, W), and as actions what was
    drawn, ten times as much: by how much the output was moved; of a chain the first step."""
    restorer = state.averaged.module["model"]
    policy = policy_of(config, restorer)
    restored, path = policy.rollout(restorer, degraded, 4, generators, turn=0)
    if isinstance(restorer, Chain):
        return restored[0], (path.after[0, :, 0] + 1) / 2
    return restored[0], 0.5 + 10 * (path.actions - policy.means(restorer, path))[0]


# ---------------------------------------------------------------------------------------- the flags


@dataclass
class Policy:
    """the policy and its loss"""

    group_size: Annotated[int, Field(ge=2)] = 32
    """G, rollouts per image; a rollout costs an addition and a reward, of a chain T forwards.
    LRPO: 9"""
    block: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2)
    """px a side of the blocks whose means are drawn, one size a step in turn; they divide --crop"""
    sigma: tuple[AboveZero, ...] = (0.01, 0.01)
    """deviation of what is drawn, of each block size, in [0, 1]"""
    noise_levels: bool = True
    """advantages × σ / mean σ, clamped to ±5: LRPO's noise-level advantage assignment"""
    advantage_scale: Literal["group", "batch"] = "batch"
    """what advantages are divided by: the deviation of the whole batch, LRPO's, which keeps how
    much more one image or patch has to gain than another (of patches mostly the spread between
    them: advantages are then some 0.05, and what --kl-beta, --likelihood and --lambda-sup weigh
    counts for more), or of a group"""
    advantage_patch: Count = 8
    """px a side of patches that have an advantage each, by what they contribute to the reward; a
    multiple of every --block, divides --crop. Of a term of wider blocks, such as piqe's of 16 px,
    a patch is credited its own part alone. 0: one advantage an image, the papers'"""
    advantage_eps: AboveZero = 1e-12
    """ε under the root of a group's deviation"""
    clip: NotNegative = 1e-4
    """ϵ of the clipped ratio; log π is a mean over pixels, so ratios stay near 1; with one update a
    group they are 1. LRPO: 1e-4"""
    inner_epochs: Positive = 1
    """updates per group; above 1 the clip can bind"""
    kl_beta: NotNegative = 0.0
    """β of the exact KL to the start, of a chain with its last step. LRPO: none"""
    likelihood: NotNegative = 0.0
    """c of LRPO's likelihood regularisation, c (1 − exp(ℓ/40)); LRPO: 0.001"""
    lambda_sup: NotNegative = 0.0
    """weight of ℓ1 beside RL; its gradient is coherent and soon drowns that of RL"""
    weighting: Literal["none", "difficulty"] = "none"
    """difficulty: RL weighs more on images far from the truth, ℓ1 on close ones; after DA-RL"""
    shuffle_advantages: bool = False
    """the control of RL: advantages in random order within each group"""


@dataclass
class Config(IrpoConfig):
    """Post-train any restorer by RL whose actions are pixels, or by its control."""

    preset: Annotated[Literal["demo", "chain", "paper"], tyro.conf.arg(aliases=["--policy"])] = (
        "demo"
    )
    """demo: minutes on two CPU cores; chain: more of them, of the demo's diffusion chain; paper:
    LRPO's values, as far as the policy of --init has them"""
    init: AbsolutePath = str(DEMO_MODEL)
    """restorer to start from: AdaIR, official or ours, a chain of ours, or any file that spandrel
    loads"""
    objective: Literal["lrpo", "sft", "reward"] = "lrpo"
    """lrpo: RL; its controls: sft: ℓ1; reward: gradient ascent of the reward"""
    samples: Samples = field(default_factory=lambda: Samples(select="all", draws=3))
    training: Training = field(
        default_factory=lambda: Training(steps=80, batch_size=4, lr=1e-4, eval_every=40)
    )
    policy: Policy = field(default_factory=Policy)


def paper():
    """Preset paper: LRPO's official values."""
    length = Training(
        steps=0,
        epochs=160,
        batch_size=24,
        lr=1e-6,
        warm_up=0,
        schedule="constant",
        ema=0.0,
        eval_every=1000,
        save_every=500,
    )
    policy = Policy(group_size=9, advantage_patch=0, likelihood=0.001)
    return Config(
        preset="paper", samples=Samples(draws=1, select="all"), training=length, policy=policy
    )


def chain():
    """Preset chain: the demo's diffusion chain, and a reward whose terms have alike spread over
    rollouts; PIQE has no gradient. The KL holds the last step, which RL does not train."""
    return Config(
        preset="chain",
        init=str(DEMO_CHAIN),
        samples=Samples(select="all", draws=3, crop=64, measure_crop=192),
        training=Training(steps=200, batch_size=4, lr=5e-5, eval_every=100),
        policy=Policy(group_size=8, likelihood=0.001, kl_beta=5e-4),
        scoring=Scoring(rewards="piqe=0.1,ssim=0.5,lowpass=0.4"),
    )


PRESETS = dict(demo=Config(), chain=chain(), paper=paper())


def check_blocks(blocks, patch, crop):
    """Raises RunError unless blocks divide patches, and both divide crops."""
    for block in blocks:
        if crop % block:
            raise runs.RunError(f"--block {block} does not divide --crop {crop}")
        if patch % block:
            said = f"--advantage-patch {patch} is no multiple of --block {block}"
            raise runs.RunError(f"{said}: give a multiple, or 0")
    if patch and crop % patch:
        raise runs.RunError(f"--advantage-patch {patch} does not divide --crop {crop}")


def check_crop(restorer, crop):
    """Raises RunError for crops that a restorer cannot take."""
    if crop % restorer.multiple or crop < restorer.minimum:
        need = f"a multiple of {restorer.multiple}, {restorer.minimum} or more"
        raise runs.RunError(f"--crop is {crop}: this restorer needs {need}")


def check(config):
    """Raises RunError, in one sentence, for values that cannot work together."""
    policy, usual = config.policy, PRESETS[config.preset].policy
    if len(policy.block) != len(policy.sigma):
        raise runs.RunError("--sigma takes one value for each --block")
    if policy.advantage_scale == "batch":
        refuse_idle(policy, usual, ["advantage_eps"], "--advantage-scale batch")
    if config.objective == "lrpo":
        if config.training.amp != "fp32":
            raise runs.RunError("--amp bf16 is for the controls: log π needs float32")
        return
    refuse_idle(policy, usual, vars(usual), f"--objective {config.objective}")
    if config.expert.judge != "none":
        raise runs.RunError(f"--objective {config.objective} can learn from no judge")


# ------------------------------------------------------------------------------------- the program


def load(config, reward):
    """The restorer that --init names, whatever the reward. Raises RunError for crops that it cannot
    take, and for flags that do nothing for it."""
    restorer, policy = load_restorer(config.init), config.policy
    is_chain = isinstance(restorer, Chain)
    if config.preset == "chain" and not is_chain:
        raise runs.RunError(f"--policy chain needs a diffusion chain, {config.init} holds none")
    if is_chain:
        usual = PRESETS[config.preset].policy
        refuse_idle(policy, usual, ["block", "sigma"], "a diffusion chain")
    blocks = (1,) if is_chain else policy.block
    check_blocks(blocks, policy.advantage_patch, config.samples.crop)
    check_crop(restorer, config.samples.crop)
    return restorer.to(config.device, memory_format=torch.channels_last)


def run_program(argv):
    """The program with these flags, until it is done or asked to end."""
    about = "RL whose actions are pixels, for any restorer."
    flags = parse_over("lrpo.py", about, PRESETS, argv)
    check(flags)
    if flags.objective == "lrpo":
        study.carry_out(flags, load, post_train, four_rollouts)
    else:
        study.carry_out(flags, load, fine_tune)


def main(argv=None):
    return runs.program("lrpo.py", run_program, argv, study.ERRORS)


if __name__ == "__main__":
    sys.exit(main())
