"""IRPO: GRPO post-training of an image restorer. The method is `post_train`, from top to bottom.

    python train.py --hard-ratio 0.3      post-trains the demo model, nothing downloaded

Its flags are in config.py.
"""

import contextlib
import copy
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import grpo
import rewards
import runs
import study
from config import parse
from data import Crops, DataError
from judge import Judge, JudgeError
from metrics import evaluation_pair
from model import CheckpointError, load_pretrained, model_digest, read_checkpoint, restore
from policy import USUAL, PolicyError, load_policy, policy_for, policy_state, states_on

JUDGE = Path(__file__).with_name("judge.py")
ERRORS = (DataError, CheckpointError, PolicyError, rewards.RewardError, JudgeError)


# -------------------------------------------------------------------------------------- the method


@dataclass
class State:
    """What a run is at a step: all that a checkpoint holds."""

    live: torch.nn.ModuleDict  # model and policy, that are trained
    averaged: torch.nn.Module  # of both, that are measured and kept
    reference: torch.nn.Module  # π_ref
    optimizer: torch.optim.Optimizer
    total: int  # crops of the whole run
    step: int = 0
    seen: int = 0  # crops
    history: list = field(default_factory=list)  # what validations found, the first at step 0

    COUNTERS = ("total", "step", "seen", "history")

    def checkpoint(self):
        model, policy = self.averaged.module.values()
        counters = {name: getattr(self, name) for name in self.COUNTERS}
        return dict(
            model=model.state_dict(),
            config=model.config,
            live=self.live.state_dict(),
            ref=self.reference.state_dict(),
            optimizer=self.optimizer.state_dict(),
            **policy_state(policy),
            **counters,
        )

    def load(self, checkpoint):
        """Goes on where a checkpoint of this run stopped. Raises CheckpointError."""
        try:
            self.live.load_state_dict(checkpoint["live"])
            self.averaged.module["model"].load_state_dict(checkpoint["model"])
            self.averaged.module["policy"].load_state_dict(checkpoint["policy"])
            self.averaged.n_averaged += checkpoint["step"]
            self.reference.load_state_dict(checkpoint["ref"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            for name in self.COUNTERS:
                setattr(self, name, checkpoint[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"last.pt holds no run of this version ({error!r:.200})"
            ) from None

    @property
    def progress(self):
        """From 0 to 1 over the run."""
        return self.seen / self.total

    def set_rates(self, training):
        """The rates of the next step, which rise, and, if they are to, fall to 0."""
        factor = min(1, (self.step + 1) / max(training.warm_up, 1))
        if training.schedule == "linear":
            factor *= 1 - self.progress
        rates = dict(lr=training.lr, lr_heads=training.lr * training.head_lr_factor)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * rates[group["name"]]

    def restore(self, image):
        """The deterministic output of the averaged weights, for images of any size."""
        model, policy = self.averaged.module.values()
        return restore(model, image, controller=policy.mean())


def attach(config, pretrained, crops, checkpoint=None):
    """The State in which a policy is attached to a copy of the pre-trained model, so that the
    deterministic output is the model's; or that of a checkpoint."""
    training = config.training
    torch.manual_seed(config.seed)
    model = copy.deepcopy(pretrained)
    model.config["mask_rule"] = config.policy.mask_rule
    policy = load_policy(checkpoint) or policy_for(model, config.policy.concentration)
    policy = policy.to(config.device)
    if not checkpoint:
        usual = (batch.degraded for batch in crops.batches_of_each_task(USUAL))
        policy.fit(states_on(model, policy, usual))
    model.requires_grad_(not training.freeze_backbone)
    policy.requires_grad_(not training.freeze_heads)
    groups = []
    for net, name in ((policy, "lr_heads"), (model, "lr")):
        learned = [p for p in net.parameters() if p.requires_grad]
        groups += [dict(params=learned, name=name)] if learned else []
    live = torch.nn.ModuleDict(dict(model=model, policy=policy))
    crops_a_step = training.batch_size * runs.processes()
    state = State(
        live=live,
        averaged=runs.averaged(live, training.ema),
        reference=policy.frozen_copy(),
        optimizer=torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True),
        total=training.steps * crops_a_step or training.epochs * len(crops.samples),
    )
    if checkpoint:
        state.load(checkpoint)
    return state


def post_train(config, run, pretrained, reward, samples, val, judge=None, checkpoint=None):
    """IRPO: mines the samples, attaches a policy to the pre-trained model, trains both. Returns the
    State after the last step.

    run: runs.Run, entered; reward: rewards.Reward; val: samples that choose best.pt; judge:
    judge.Judge; checkpoint: what a run that goes on had saved.
    """
    # Sec. 3.2: the training images that the pre-trained model restores worst
    hard = study.hard_samples(config, run, pretrained, samples)
    crops = Crops(hard, config.samples.crop, config.seed)

    # Eq. 4: six heads that start where the pre-trained model is; π_ref stays there
    state = attach(config, pretrained, crops, checkpoint)
    model, policy = state.live.values()
    run.start(state, config.objective, shown=dict(reward="reward", psnr="psnr_det", kl="kl"))

    for batch in run.batches(crops, config.training.batch_size):
        study.validate_when_due(config, run, reward, val)
        state.set_rates(config.training)

        # Eq. 4, 5: encode once, decode G sampled actions without graph
        generators = study.generators_of(config, batch.numbers)
        with half_precision(config):
            encoding = model.encode(batch.degraded)
            group = grpo.rollout(model, policy, encoding, config.policy.group_size, generators)

        # Eq. 22, 8: reward every rollout, normalise within its group
        scores, terms = reward(group.restored, batch.degraded, batch.gt, batch.tasks, judge)
        advantages = study.advantages(scores, config.policy, generators)  # (B, G)

        # Eq. 1, 2: the best rollout and the mean action again, with graph, train the backbone
        chosen = study.chosen_rollout(scores, config.policy, generators)  # g*
        best_actions = grpo.pick(group.actions, chosen)
        with half_precision(config):
            best, mean = grpo.decode_best_and_mean(model, policy, encoding, best_actions)
        weight_rl, weight_sup = study.image_weights(mean, batch.gt, config.policy)
        loss_sup, loss_cons = grpo.supervised_losses(best, mean, batch.gt, weight_sup)

        # Eq. 6, 9–11: the stored states and actions train the heads
        with torch.no_grad():
            old, *_ = policy.evaluate(group.states, group.actions)  # log π_old
        for _ in range(config.policy.inner_epochs - 1):  # then ρ leaves 1, and the clip can bind
            loss_rl, _ = heads_loss(config.policy, state, group, old, advantages, weight_rl)
            state.optimizer.zero_grad()
            loss_rl.backward()
            run.descend([state.optimizer], loss_rl)
        loss_rl, learned = heads_loss(config.policy, state, group, old, advantages, weight_rl)

        # Eq. 7: one objective, one backward pass, one step
        loss = grpo.total_loss(
            loss_rl,
            loss_sup,
            loss_cons,
            state.progress,
            sup_weights=config.policy.lambda_sup,
            cons_weights=config.policy.lambda_cons,
        )
        state.optimizer.zero_grad()
        loss.backward()
        metrics = study.describe(scores, terms, judge) | learned
        metrics |= {"loss/sup": loss_sup, "loss/cons": loss_cons}
        metrics |= {"psnr_in": study.batch_psnr(batch.degraded, batch.gt)}
        metrics |= {"psnr_best": study.batch_psnr(best, batch.gt)}
        metrics |= {"psnr_det": study.batch_psnr(mean, batch.gt)}
        run.update([state.optimizer], loss, metrics)
    study.validate_when_due(config, run, reward, val)
    return state


def heads_loss(settings, state, group, old, advantages, weights):
    """Eq. 6 on the stored states and actions of a `grpo.Group`, and its metrics. old: log π_old,
    advantages: (B, G); weights: (B,), of the images, or None for 1."""
    policy, reference = state.live["policy"], state.reference
    log_prob, entropy, statistics = policy.evaluate(group.states, group.actions)
    with torch.no_grad():
        ref, *_ = reference.evaluate(group.states, group.actions)
    exact_kl = policy.kl(reference, group.states) if settings.kl == "exact" else None
    loss, metrics = grpo.grpo_loss(
        log_prob,
        old,
        ref,
        advantages,
        entropy,
        clip=settings.clip,
        beta=settings.kl_beta,
        tau=settings.entropy_tau,
        exact_kl=exact_kl,
        weights=weights,
    )
    return loss, metrics | statistics


def fine_tune(config, run, pretrained, reward, samples, val, checkpoint=None):
    """The controls: the same samples, steps and rates, no rollouts and no RL. The deterministic
    output learns from L1 (sft), from the gradient of the reward itself, which RL does without
    (reward), or from both (reward+sft). Returns the State after the last step."""
    hard = study.hard_samples(config, run, pretrained, samples)
    crops = Crops(hard, config.samples.crop, config.seed)
    state = attach(config, pretrained, crops, checkpoint)
    model, policy = state.live.values()
    run.start(state, config.objective, shown=dict(psnr="psnr_det"))
    for batch in run.batches(crops, config.training.batch_size):
        study.validate_when_due(config, run, reward, val)
        state.set_rates(config.training)
        with half_precision(config):
            mean = model(batch.degraded, policy.mean())
        losses = {}
        if "sft" in config.objective:
            losses["loss/l1"] = (mean - batch.gt).abs().mean()
        if "reward" in config.objective:
            of_images = reward.differentiable(mean.float(), batch.gt, batch.tasks)
            losses["loss/reward"] = -of_images.mean()
        loss = sum(losses.values())
        state.optimizer.zero_grad()
        loss.backward()
        metrics = losses | {"psnr_in": study.batch_psnr(batch.degraded, batch.gt)}
        metrics |= {"psnr_det": study.batch_psnr(mean, batch.gt)}
        run.update([state.optimizer], loss, metrics)
    study.validate_when_due(config, run, reward, val)
    return state


def half_precision(config):
    """Autocast of the backbone to bfloat16 under --amp bf16. What the policy computes is float32
    all the same."""
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.training.amp == "bf16")


# -------------------------------------------------------------------------------- around the method


def train(config, stop, judge=None):
    """A run from its files to its report: what it is made of, the method, before against after."""
    folder = Path(config.resume or config.out)
    if not config.resume and runs.rank() == 0:
        runs.refuse_existing(folder)
    last = folder / "last.pt"
    checkpoint = read_checkpoint(last) if config.resume and last.exists() else None
    if checkpoint is not None and not (isinstance(checkpoint, dict) and "step" in checkpoint):
        raise CheckpointError(f"{last} is not the last.pt of a run")

    # The three things a run is made of: a pre-trained model, a reward, samples.
    pretrained = load_pretrained(config.init, config.policy.mask_rule)
    pretrained = pretrained.to(config.device, memory_format=torch.channels_last)
    reward = study.make_reward(config, judge is not None)
    side = rewards.smallest_side(reward.weights)
    samples, val, held_out = study.usable_samples(config.samples, side)
    study.try_reward(config, reward, val[0])
    step = checkpoint["step"] if checkpoint else None
    runs.same_everywhere("model or checkpoint", [model_digest(pretrained), step])

    folder.mkdir(parents=True, exist_ok=True)
    if judge:
        start_judge(judge, val[0], config)
    study.store_config(config, folder)  # now --resume goes on
    expert = config.expert
    name = judge and f"{expert.judge_model or expert.judge}, {expert.judge_mode}"
    study.describe_reward(reward, name, folder)

    with runs.Run(
        folder,
        stop,
        again=f"--resume {folder}",
        device=config.device,
        workers=config.samples.workers,
        save_every=config.training.save_every,
        keep_every=config.training.keep_every,
        failures=ERRORS,
    ) as run:
        if config.objective == "irpo":
            state = post_train(
                config, run, pretrained, reward, samples, val, judge=judge, checkpoint=checkpoint
            )
        else:
            state = fine_tune(config, run, pretrained, reward, samples, val, checkpoint=checkpoint)
        run.save("last.pt")
        if len(set(runs.gather(model_digest(state.live["model"])))) > 1:
            runs.say(
                "note: the processes' weights are not equal to the bit; the first one's are kept"
            )
        study.write_report(config, run, pretrained, reward, held_out)


def make_judge(config, stop):
    """The judge --judge asks for, not yet started, in a context that ends it; or of None."""
    expert = config.expert
    if expert.judge == "none":
        return contextlib.nullcontext()
    batch = config.training.batch_size * config.policy.group_size
    command = [sys.executable, str(JUDGE), f"--parent={os.getpid()}", f"--batch-size={batch}"]
    command += [f"--mode={expert.judge_mode}", f"--model={expert.judge_model or expert.judge}"]
    if runs.is_url(expert.judge):
        # a little less time than we wait for it, so that it can say which request failed
        timeout = 0.9 * expert.judge_timeout
        command += [f"--server={expert.judge}", f"--timeout={timeout}", "--device=cpu"]
    else:
        command.append(f"--device={expert.judge_device or judge_device(config.device)}")
    if expert.judge_prompt:
        command.append(f"--prompt={expert.judge_prompt}")
    command += shlex.split(expert.judge_args)
    name = f"judge-{runs.rank()}.log" if runs.rank() else "judge.log"
    log = Path(config.resume or config.out) / name
    judge = Judge(command, log, expert.judge_timeout, expert.judge_patience, stop.check)
    return contextlib.closing(judge)


def judge_device(device):
    """Where a trainer's judge goes: behind the trainers' GPUs, rank i's to cuda:(world + i); beside
    a CPU trainer to the CPU. Raises RunError if there is no such GPU."""
    if not runs.on_gpu(device):
        return "cpu"
    world, taken = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.device(device).index or 0
    wanted = 0 if world == 1 and taken else world + runs.local_rank()
    if wanted >= torch.cuda.device_count():
        raise runs.RunError(
            f"the judge wants a GPU of its own, cuda:{wanted}, and this machine has "
            f"{torch.cuda.device_count()}: name one with --judge-device ({device} would be shared "
            "with the training), or a server with --judge"
        )
    return f"cuda:{wanted}"


def start_judge(judge, sample, config):
    """Has it score a batch of a step's size: what it cannot do shows before anything is
    computed."""
    runs.say(f"starting the judge {config.expert.judge}, whose log is {judge.log}")
    n, side = config.training.batch_size, config.samples.crop
    degraded, gt = (
        F.interpolate(image[None], (side, side)).repeat(n, 1, 1, 1)
        for image in evaluation_pair(sample)
    )
    judge.start(degraded, gt, config.policy.group_size)


def run_program(argv):
    """The program with these flags, until it is done or asked to end."""
    if argv[:1] == ["pretrain"]:
        raise runs.RunError("pre-training is a program of its own, python -m experiments.pretrain")
    config = parse(argv)
    config.device = runs.join(config.device)
    config.out = runs.gather(config.out)[0]  # its default has the time in it
    folder = Path(config.resume or config.out)
    with runs.Stop(config.training.max_minutes) as stop:
        try:
            with make_judge(config, stop) as judge:
                train(config, stop, judge)
        except runs.Stopped as stopped:
            begun = (folder / "config.json").exists()
            again = f"--resume {folder}" if begun else "the same command"
            runs.say(f"stopped by {stopped}; {again} goes on")


def main(argv=None):
    return runs.program("train.py", run_program, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
