"""IRPO: GRPO post-training of an image restorer. The method is `post_train`, from top to bottom.

    python train.py --hard-ratio 0.3      post-trains the demo model, nothing downloaded

Its flags are in config.py.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import os
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import grpo
import mining
import report
import rewards
import runs
from config import parse
from data import (
    Crops,
    DataError,
    adair_repeats,
    in_draws,
    list_training,
    names_digest,
    split_usable,
    task_names,
)
from judge import Judge, JudgeError
from metrics import evaluate, evaluation_pair, psnr, psnrs
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

    @classmethod
    def attach(cls, config, pretrained, crops, checkpoint=None):
        """A policy attached to a copy of the pre-trained model, such that the deterministic output
        is the model's; or both as a checkpoint has them."""
        training = config.training
        torch.manual_seed(config.seed)
        model = copy.deepcopy(pretrained)
        model.config["mask_rule"] = config.policy.mask_rule
        model.requires_grad_(not training.freeze_backbone)
        policy = load_policy(checkpoint) or policy_for(model, config.policy.concentration)
        policy = policy.to(config.device)
        if not checkpoint:
            usual = (batch.degraded for batch in crops.batches_of_each_task(USUAL))
            policy.fit(states_on(model, policy, usual))
        policy.requires_grad_(not training.freeze_heads)
        groups = []
        for net, name in ((policy, "lr_heads"), (model, "lr")):
            learned = [p for p in net.parameters() if p.requires_grad]
            groups += [dict(params=learned, name=name)] if learned else []
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True)
        live = torch.nn.ModuleDict(dict(model=model, policy=policy))
        crops_a_step = training.batch_size * runs.processes()
        total = training.steps * crops_a_step or training.epochs * len(crops.samples)
        averaged = runs.averaged(live, training.ema)
        state = cls(live, averaged, policy.frozen_copy(), optimizer, total)
        try:
            if checkpoint:
                live.load_state_dict(checkpoint["live"])
                averaged.module["model"].load_state_dict(checkpoint["model"])
                averaged.module["policy"].load_state_dict(checkpoint["policy"])
                averaged.n_averaged += checkpoint["step"]
                state.reference.load_state_dict(checkpoint["ref"])
                optimizer.load_state_dict(checkpoint["optimizer"])
                for name in cls.COUNTERS:
                    setattr(state, name, checkpoint[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{error!r:.200}"
            raise CheckpointError(f"last.pt holds no run of this version ({reason})") from None
        return state

    def checkpoint(self):
        model, policy = self.averaged.module.values()
        weights = dict(model=model.state_dict(), config=model.config) | policy_state(policy)
        rest = dict(live=self.live.state_dict(), ref=self.reference.state_dict())
        rest |= dict(optimizer=self.optimizer.state_dict())
        return weights | rest | {name: getattr(self, name) for name in self.COUNTERS}

    @property
    def progress(self):
        """From 0 to 1 over the run."""
        return self.seen / self.total

    def begin_step(self, config):
        """Clears the gradients; sets the rates, which rise, and, if they are to, fall to 0."""
        training = config.training
        factor = min(1, (self.step + 1) / max(training.warm_up, 1))
        if training.schedule == "linear":
            factor *= 1 - self.progress
        rates = dict(lr=training.lr, lr_heads=training.lr * training.head_lr_factor)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * rates[group["name"]]
        self.optimizer.zero_grad()

    def restore(self, image):
        """The deterministic output of the averaged weights, for images of any size."""
        model, policy = self.averaged.module.values()
        return restore(model, image, controller=policy.mean())


def post_train(config, run, pretrained, reward, samples, val, judge=None, checkpoint=None):
    """IRPO: mines the samples, attaches a policy to the pre-trained model, trains both. Returns the
    State after the last step.

    run: runs.Run, entered; reward: rewards.Reward; val: samples that choose best.pt; judge:
    judge.Judge; checkpoint: what a run that goes on had saved.
    """
    # Sec. 3.2: the training images that the pre-trained model restores worst
    hard = hard_samples(config, run, pretrained, samples)
    crops = Crops(hard, config.samples.crop, config.seed)

    # Eq. 4: six heads that start where the pre-trained model is; π_ref stays there
    state = State.attach(config, pretrained, crops, checkpoint)
    (model, policy), reference = state.live.values(), state.reference
    weights = config.policy.clip, config.policy.kl_beta, config.policy.entropy_tau
    lambdas = config.policy.lambda_sup, config.policy.lambda_cons
    run.start(state, config.objective, shown=dict(reward="reward", psnr="psnr_det", kl="kl"))

    for batch in run.batches(crops, config.training.batch_size):
        validate_when_due(config, run, reward, val)
        state.begin_step(config)

        # Eq. 4, 5: encode once, decode G sampled actions without graph
        generators = action_generators(config, batch.numbers)
        with half_precision(config):
            encoding = model.encode(batch.degraded)
            group = grpo.rollout(model, policy, encoding, config.policy.group_size, generators)

        # Eq. 22, 8: reward every rollout, normalise within its group
        scores, terms = reward(group.restored, batch.degraded, batch.gt, batch.tasks, judge)
        advantages = grpo.group_advantages(scores)  # (B, G)
        if reward.is_judge_alone:  # NaN is what it could not score
            advantages = advantages.nan_to_num(nan=0.0)
        if config.policy.shuffle_advantages:
            advantages = grpo.shuffled(advantages, generators)

        # Eq. 1, 2: the best rollout and the mean action again, with graph, train the backbone
        chosen = grpo.best_of_group(scores)
        if config.policy.supervise == "random":
            chosen = grpo.random_of_group(scores, generators)
        best_actions = grpo.pick(group.actions, chosen)
        with half_precision(config):
            best, mean = grpo.decode_best_and_mean(model, policy, encoding, best_actions)
        weight_rl, weight_sup = None, None
        if config.policy.weighting == "difficulty":
            weight_rl, weight_sup = grpo.difficulty_weights(psnrs(mean.detach(), batch.gt))
        loss_sup, loss_cons = grpo.supervised_losses(best, mean, batch.gt, weight_sup)

        # Eq. 6, 9–11: the stored states and actions train the heads
        with torch.no_grad():
            old, *_ = policy.evaluate(group.states, group.actions)  # log π_old
            ref, *_ = reference.evaluate(group.states, group.actions)
        metrics = describe(batch, scores, terms, best, mean, judge)
        for _ in range(config.policy.inner_epochs):  # above 1 the clip can bind
            log_prob, entropy, statistics = policy.evaluate(group.states, group.actions)
            exact = policy.kl(reference, group.states) if config.policy.kl == "exact" else None
            given = log_prob, old, ref, advantages, entropy
            loss_rl, learned = grpo.grpo_loss(*given, *weights, exact, weight_rl)

            # Eq. 7: one objective, one backward pass, one step
            loss = grpo.total_loss(loss_rl, loss_sup, loss_cons, state.progress, *lambdas)
            state.optimizer.zero_grad()
            loss.backward()
            metrics |= {"loss/sup": loss_sup, "loss/cons": loss_cons, **learned, **statistics}
            metrics |= run.step([state.optimizer], loss)
            loss_sup, loss_cons = loss_sup.detach(), loss_cons.detach()  # again: the heads alone

        state.averaged.update_parameters(state.live)
        run.finish(metrics)
    validate_when_due(config, run, reward, val)
    return state


def fine_tune(config, run, pretrained, reward, samples, val, checkpoint=None):
    """The controls: the same samples, steps and rates, no rollouts and no RL. The deterministic
    output learns from L1 (sft), from the gradient of the reward itself, which RL does without
    (reward), or from both (reward+sft). Returns the State after the last step."""
    hard = hard_samples(config, run, pretrained, samples)
    crops = Crops(hard, config.samples.crop, config.seed)
    state = State.attach(config, pretrained, crops, checkpoint)
    model, policy = state.live.values()
    parts = config.objective.split("+")
    run.start(state, config.objective, shown=dict(psnr="psnr_det"))
    for batch in run.batches(crops, config.training.batch_size):
        validate_when_due(config, run, reward, val)
        state.begin_step(config)
        with half_precision(config):
            mean = model(batch.degraded, policy.mean())
        losses = {}
        if "sft" in parts:
            losses["loss/l1"] = (mean - batch.gt).abs().mean()
        if "reward" in parts:
            of_images = reward.differentiable(mean.float(), batch.gt, batch.tasks)
            losses["loss/reward"] = -of_images.mean()
        loss = sum(losses.values())
        loss.backward()
        metrics = losses | run.step([state.optimizer], loss)
        metrics["psnr_in"] = batch_psnr(batch.degraded, batch.gt)
        metrics["psnr_det"] = batch_psnr(mean, batch.gt)
        state.averaged.update_parameters(state.live)
        run.finish(metrics)
    validate_when_due(config, run, reward, val)
    return state


def hard_samples(config, run, pretrained, samples):
    """D_hard, which is mined unless the run folder has it already; leaves hard.json there."""
    digest, path = model_digest(pretrained), run.folder / "hard.json"
    if runs.gather(path.exists())[0]:
        hard = mining.load_hard(path, digest, samples)
    else:
        pixels = mining.BATCH_PIXELS if runs.on_gpu(config.device) else 0
        known = mining.known_scores(config.samples.scores, digest)
        rows, problems = mining.mine(
            partial(restore, pretrained), samples, config.samples.crop, known, pixels, run.stop
        )
        runs.say_skipped(problems)
        if not rows:
            where = config.samples.data_root or "the demo's photographs"
            crops = f"can be used with crops of {config.samples.crop} px"
            raise DataError(f"none of the training images of {where} {crops}")
        choice = config.samples.hard_ratio, config.samples.select, config.samples.hard_scope
        chosen = mining.select(rows, *choice, config.seed)
        hard = mining.save_hard(path, digest, rows, chosen, samples)
        runs.same_everywhere("set of hard images", names_digest(hard))
    how = f"{config.samples.select}, ratio {config.samples.hard_ratio}"
    how += f", scope {config.samples.hard_scope}"
    runs.say(f"D_hard: {len(hard)} of {len(samples)} training images ({how})")
    photos = any(s.box for s in hard)  # AdaIR's repeats are for its folders
    return adair_repeats(hard) if config.samples.select == "all" and not photos else hard


def action_generators(config, numbers):
    """One generator for the actions of each crop, which follow from the run's seed and the crop's
    number alone."""
    generators = [torch.Generator(config.device) for _ in numbers]
    # mixed, since a CPU's generator takes the low 32 bits of a seed
    seeds = [int(np.random.SeedSequence((config.seed, n)).generate_state(1)[0]) for n in numbers]
    return [g.manual_seed(seed) for g, seed in zip(generators, seeds)]


def half_precision(config):
    """Autocast of the backbone to bfloat16 under --amp bf16. What the policy computes is float32
    all the same."""
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.training.amp == "bf16")


def validate_when_due(config, run, reward, val):
    """Every --eval-every steps, at the start and at the end: PSNR and reward of the deterministic
    output on `val`, against the start. Its mean PSNR over tasks chooses best.pt."""
    state, history = run.state, run.state.history
    is_due = state.step % config.training.eval_every == 0 or state.seen >= state.total
    if not (val and is_due) or (history and history[-1]["step"] == state.step):
        return
    rows = report.by_task(measure(run, reward, state.restore, val, "validate"))
    found = {
        key: {task: report.mean(of_task, key) for task, of_task in rows.items()}
        for key in ("psnr", "reward")
    }
    best = max((report.mean_of(past["psnr"]) for past in history), default=-math.inf)
    history.append({"step": state.step, **found})
    if report.mean_of(found["psnr"]) > best:
        run.save("best.pt")
    gains = report.gains_since_start(history)[-1]
    words = f"{gains['psnr']['mean']:+.3f} dB, reward {gains['reward']['mean']:+.5f}"
    named = {f"val/{key}/{task}": v for key, of in gains.items() for task, v in of.items()}
    run.tell(named, f"{config.objective} (validation {words})")


def measure(run, reward, restoring, samples, desc):
    """AdaIR's protocol and the reward over `samples`, by all processes: rows."""

    def also(sample, degraded, restored, gt):
        return dict(reward=reward.of_image(restored, gt, sample.task))

    mapper = partial(runs.parallel_map, desc=desc, stop=run.stop)
    return evaluate(restoring, samples, also, mapper)


def batch_psnr(restored, gt):
    """Mean PSNR in dB over a batch."""
    return psnrs(restored.detach(), gt).mean()


def describe(batch, scores, terms, best, mean, judge):
    """What the log says of a group's rewards and outputs: {name: scalar}."""
    metrics = {
        "psnr_in": batch_psnr(batch.degraded, batch.gt),
        "psnr_best": batch_psnr(best, batch.gt),
        "psnr_det": batch_psnr(mean, batch.gt),
    }
    scored = scores[scores.isfinite().all(dim=1)]  # the judge may have failed a group
    if len(scored):
        deviation = scored.std(dim=1, correction=0)  # (B,)
        metrics |= {"reward": scored.mean(), "reward_std": deviation.mean()}
        metrics["frac_reward_zero_std"] = (deviation < 1e-7).float().mean()
    for name, value in terms.items():
        value = value[value.isfinite().all(dim=1)]
        if len(value):
            metrics[f"rewards/{name}/mean"] = value.mean()
            metrics[f"rewards/{name}/std"] = value.std(dim=1, correction=0).mean()
    if judge and judge.problem:
        tqdm.write(f"judge: {judge.problem}")
    return metrics | (judge.metrics if judge else {})


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
    reward = make_reward(config, judge)
    samples, val, held_out = usable_samples(config.samples, rewards.smallest_side(reward.weights))
    step = checkpoint["step"] if checkpoint else None
    runs.same_everywhere("model or checkpoint", [model_digest(pretrained), step])

    folder.mkdir(parents=True, exist_ok=True)
    if judge:
        start_judge(judge, val[0], config)
    device = config.device if runs.processes() == 1 else torch.device(config.device).type
    training = dataclasses.replace(config.training, max_minutes=None)
    stored = dataclasses.replace(config, resume=None, device=device, training=training)
    runs.save_json(folder / "config.json", dataclasses.asdict(stored))  # now --resume goes on
    expert = config.expert
    name = judge and f"{expert.judge_model or expert.judge}, {expert.judge_mode}"
    describe_reward(reward, name, folder)

    again, training = f"--resume {folder}", config.training
    shell = config.device, config.samples.workers, training.save_every, training.keep_every, ERRORS
    with runs.Run(folder, stop, again, *shell) as run:
        given = config, run, pretrained, reward, samples, val
        if config.objective == "irpo":
            state = post_train(*given, judge, checkpoint)
        else:
            state = fine_tune(*given, checkpoint)
        run.save("last.pt")
        if len(set(runs.gather(model_digest(state.live["model"])))) > 1:
            runs.say(
                "note: the processes' weights are not equal to the bit; the first one's are kept"
            )
        write_report(config, run, pretrained, reward, held_out)


def make_reward(config, judge):
    """The composite reward that --rewards asks for. Raises RewardError, and RunError where the
    crops are too small."""
    weights = rewards.parse_terms(config.scoring.rewards, judge is not None)
    side = rewards.smallest_side(weights)
    if config.samples.crop < side:
        crops = f"crops of {config.samples.crop} px are too small for these rewards"
        raise runs.RunError(f"{crops}: they need {side}")
    reward = rewards.Reward(weights, config.device, config.scoring.weights_dir)
    if reward.is_judge_alone and not config.training.freeze_backbone:
        hint = "a group that the judge cannot score would have no best rollout"
        raise runs.RunError(f"--rewards with qwen alone goes with --freeze-backbone: {hint}")
    return reward


def describe_reward(reward, judge, folder):
    """Prints and stores the table of terms; judge: what to call it."""
    rows = rewards.describe_terms(reward.weights, judge)
    table = report.markdown(rows[0], [row.values() for row in rows])
    runs.say("reward, Eq. 22: weights are renormalised over the terms that are on (--rewards)")
    runs.say(f"{table}\n")
    runs.save_json(folder / "rewards.json", rows)


def usable_samples(config, side):
    """(training, validation, held-out) samples; those to measure on are decoded once and have
    `side` px or more a side, those to train on are looked at when they are mined. Raises DataError
    when nothing is left to measure on."""
    tasks = task_names(config.tasks) if config.tasks else ()
    split = list_training(config.data_root, tasks=tasks, listed=config.listed)
    samples = in_draws(split.train, config.draws, config.crop)
    runs.same_everywhere("list of images", names_digest([*samples, *split.val, *split.held_out]))
    val, broken = split_usable(split.val, max(16, side))
    held_out, more = split_usable(split.held_out, max(16, side))
    runs.say_skipped(split.problems + broken + more)
    if not (val and held_out):
        words = "none of the images set aside to measure on can be read"
        raise DataError(f"{words}: {(broken + more)[0]}")
    counts = ", ".join(f"{task} {n}" for task, n in Counter(s.task for s in samples).items())
    aside = f"{len(val)} to choose on, {len(held_out)} to report on"
    runs.say(f"training images: {counts}; set aside: {aside}")
    return samples, val, held_out


def make_judge(config, stop):
    """The judge --judge asks for, not yet started, in a context that ends it; or of None."""
    expert = config.expert
    if expert.judge == "none":
        return contextlib.nullcontext()
    size = str(config.training.batch_size * config.policy.group_size)
    command = [sys.executable, str(JUDGE), "--parent", str(os.getpid())]
    command += ["--mode", expert.judge_mode, "--batch-size", size]
    if expert.judge_prompt:
        command += ["--prompt", expert.judge_prompt]
    if runs.is_url(expert.judge):
        # a little less time than we wait for it, so that it can say which request failed
        seconds = str(0.9 * expert.judge_timeout)
        command += ["--server", expert.judge, "--model", expert.judge_model]
        command += ["--timeout", seconds, "--device", "cpu"]
    else:
        device = expert.judge_device or judge_device(config.device)
        command += ["--model", expert.judge, "--device", device]
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
    there = torch.cuda.device_count()
    if wanted >= there:
        raise runs.RunError(
            f"the judge wants a GPU of its own, cuda:{wanted}, and this machine has {there}: name "
            f"one with --judge-device ({device} would be shared with the training), "
            "or a server with --judge"
        )
    return f"cuda:{wanted}"


def start_judge(judge, sample, config):
    """Starts it, and has it score a batch of a step's size: what it cannot do shows before anything
    is computed."""
    side, n = config.samples.crop, config.training.batch_size
    images = [F.interpolate(t[None], (side, side)) for t in evaluation_pair(sample)]
    degraded, gt = (t.repeat(n, 1, 1, 1) for t in images)
    runs.say(f"starting the judge {config.expert.judge}, whose log is {judge.log}")
    judge.start(degraded, gt, config.policy.group_size)


def write_report(config, run, pretrained, reward, held_out):
    """The last step against the start, on images that were looked at by nobody before: report.md,
    report.json, curves.png, samples.png."""
    state, folder = run.state, run.folder
    before = measure(run, reward, partial(restore, pretrained), held_out, "before")
    after = measure(run, reward, state.restore, held_out, "after")
    if runs.rank():
        return
    gains = [new["psnr"] - old["psnr"] for old, new in zip(before, after)]
    rows = []
    for i in report.typical_and_worst(before, gains):
        degraded, gt = evaluation_pair(held_out[i])
        images = dict(input=degraded, before=restore(pretrained, degraded))
        images["after"] = state.restore(degraded)
        captions = [(f"{name}  {psnr(image, gt):.2f} dB", image) for name, image in images.items()]
        captions[0] = f"{held_out[i].task}: {captions[0][0]}", degraded
        rows.append([*captions, (f"truth  ({gains[i]:+.2f} dB)", gt)])
    runs.write_atomic(folder / "samples.png", report.plot_samples(rows))
    steps = lost = failures = 0
    for row in runs.read_metrics(folder):  # of a long run too many to hold
        steps, lost = steps + 1, lost + row["skipped"]
        failures += int(row.get("judge/failures", 0))
    every = 1 + steps // 10_000  # what a plot can show
    shown = list(itertools.islice(runs.read_metrics(folder), 0, None, every))
    report.plot_curves(folder / "curves.png", shown, state.history)

    hard = mining.select(before, 0.3)
    table = report.before_after_table(before, after, hard)
    notes = f" In {lost} steps loss or gradient were not finite; they were skipped." if lost else ""
    without = "the reward without the judge's part"
    if reward.is_judge_alone:
        without = "the reward that of --rewards default, not the judge's, which trained"
    if config.expert.judge != "none":
        notes += f" The judge left {failures} rollouts without a score in {steps} steps."
    text = f"""# {config.objective}: before and after, {len(before)} held-out images

{table}

Seed {config.seed}, torch {torch.__version__}, {config.device}. PSNR and SSIM by AdaIR's protocol,
deterministic output of the last step; {without}. Hard are the 30 % of each task with the lowest
PSNR before.{notes}
Command: `{config.command}`

![curves](curves.png)
![samples](samples.png)

The last row of the samples is the image of lowest gain, the others are of median gain.
"""
    runs.write_atomic(folder / "report.md", text.encode())
    stored = dict(before=before, after=after, hard=hard, validation=state.history)
    runs.save_json(folder / "report.json", stored)
    files = "report.md, curves.png, samples.png, last.pt, metrics.jsonl"
    runs.say(f"\n{table}\n\neverything of this run lies in {folder}: {files}")


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
