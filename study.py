"""What stands around the loop of a method, whichever it is: its samples and its reward, its
validations, the report of before against after, and the controls that take a part of it away."""

import dataclasses
import hashlib
import itertools
import math
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
from data import (
    DataError,
    in_draws,
    is_adair_layout,
    list_training,
    load_pair,
    middle,
    names_digest,
    split_usable,
    task_names,
    training_table,
)
from diffusion import Chain, Sampled
from judge import JudgeError, make_judge
from metrics import evaluate_image, evaluation_pair, psnr
from model import CheckpointError, model_digest, model_state, read_checkpoint, restore
from policy import PolicyError, policy_state

ERRORS = (DataError, CheckpointError, PolicyError, rewards.RewardError, JudgeError)

# ----------------------------------------------------------------------------------------- a run


def carry_out(config, load, method, rollouts=None):
    """A run from its flags to its report, until it is done or asked to end.

    load(config, reward) -> the pre-trained model. method(config, run, pretrained, reward, samples,
    val, judge=…, checkpoint=…) -> the State after the last step. rollouts(config, state, degraded,
    generators) -> what rollouts.png shows of an image (1, 3, H, W): the restored ones, the actions.
    """
    config.device = runs.join(config.device)
    config.out = runs.gather(config.out)[0]  # its default has the time in it
    folder = Path(config.resume or config.out)
    with runs.Stop(config.training.max_minutes) as stop:
        try:
            with make_judge(config, folder, stop) as judge:
                whole_run(config, folder, stop, judge, load, method, rollouts)
        except runs.Stopped as stopped:
            begun = (folder / "config.json").exists()
            again = f"--resume {folder}" if begun else "the same command"
            runs.say(f"stopped by {stopped}; {again} goes on")


def whole_run(config, folder, stop, judge, load, method, rollouts):
    """What a run is made of, the method, before against after."""
    if not config.resume and runs.rank() == 0:
        runs.refuse_existing(folder)
    last = folder / "last.pt"
    checkpoint = read_checkpoint(last) if config.resume and last.exists() else None
    if checkpoint is not None and not (isinstance(checkpoint, dict) and "step" in checkpoint):
        raise CheckpointError(f"{last} is not the last.pt of a run")

    # The three things a run is made of: a pre-trained model, a reward, samples.
    reward = make_reward(config, judge is not None)
    pretrained = load(config, reward)
    samples, val, held_out = usable_samples(config.samples, rewards.smallest_side(reward.weights))
    reward.try_plugs(
        evaluation_pair(val[0])[1][:, : config.samples.crop, : config.samples.crop],
        has_gradient="reward" in config.objective,
    )
    step = checkpoint["step"] if checkpoint else None
    runs.same_everywhere("model or checkpoint", [model_digest(pretrained), step])

    folder.mkdir(parents=True, exist_ok=True)
    if judge:  # what it cannot do shows before anything is computed
        runs.say(f"starting the judge {config.expert.judge}, whose log is {judge.log}")
        degraded, gt = (
            F.interpolate(image[None], (config.samples.crop,) * 2)
            for image in evaluation_pair(val[0])
        )
        n = config.training.batch_size
        judge.start(degraded.repeat(n, 1, 1, 1), gt.repeat(n, 1, 1, 1), config.policy.group_size)
    store_config(config, folder)  # now --resume goes on
    describe_reward(config, reward, folder)

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
        state = method(
            config, run, pretrained, reward, samples, val, judge=judge, checkpoint=checkpoint
        )
        run.save("last.pt")
        if len(set(runs.gather(model_digest(state.live)))) > 1:
            runs.say("note: the processes' weights are not equal to the bit; the first's are kept")
        write_report(config, run, pretrained, reward, held_out)
        if rollouts and runs.rank() == 0:
            show_rollouts(config, run, reward, val, rollouts)


def store_config(config, folder):
    """Writes config.json, from which --resume goes on, on other devices of the kind, too."""
    device = config.device if runs.processes() == 1 else torch.device(config.device).type
    training = dataclasses.replace(config.training, max_minutes=None)
    stored = dataclasses.replace(config, resume=None, device=device, training=training)
    runs.save_json(folder / "config.json", dataclasses.asdict(stored))


@dataclass
class State:
    """What a run is at a step: all that a checkpoint holds."""

    live: torch.nn.ModuleDict  # model, and a policy if it is a network of its own: what is trained
    averaged: torch.nn.Module  # of the same: what is measured and kept
    optimizer: torch.optim.Optimizer
    rates: dict  # {name of a parameter group: its rate}
    total: int  # crops of the whole run
    reference: torch.nn.Module | None = None  # π_ref, if it is a network of its own
    step: int = 0
    seen: int = 0  # crops
    history: list = field(default_factory=list)  # what validations found, the first at step 0

    COUNTERS = ("total", "step", "seen", "history")

    def checkpoint(self):
        policy = self.averaged.module["policy"] if "policy" in self.live else None
        return dict(
            **model_state(self.averaged.module["model"]),
            **(policy_state(policy) if policy else {}),
            **({"ref": self.reference.state_dict()} if self.reference else {}),
            **{name: getattr(self, name) for name in self.COUNTERS},
            live=self.live.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )

    def load(self, checkpoint):
        """Goes on where a checkpoint of this run stopped. Raises CheckpointError."""
        try:
            self.live.load_state_dict(checkpoint["live"])
            for name, module in self.averaged.module.items():
                module.load_state_dict(checkpoint[name])
            self.averaged.n_averaged += checkpoint["step"]
            if self.reference:
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
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.rates[group["name"]]

    def restore(self, image):
        """The deterministic output of the averaged weights, for images of any size."""
        modules = self.averaged.module
        controller = modules["policy"].mean() if "policy" in modules else None
        return restore(modules["model"], image, controller=controller)


def begin(config, live, rates, crops, reference=None):
    """The State before the first step. live: {name: module} as a ModuleDict; rates: {name: rate},
    logged as lr and lr_heads; crops: data.Crops, for the length of the run."""
    names = dict(model="lr", policy="lr_heads")
    groups = []
    for name in rates:
        learned = [p for p in live[name].parameters() if p.requires_grad]
        groups += [dict(params=learned, name=names[name])] if learned else []
    crops_a_step = config.training.batch_size * runs.processes()
    return State(
        live=live,
        averaged=runs.averaged(live, config.training.ema),
        optimizer=torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True),
        rates={names[name]: rate for name, rate in rates.items()},
        total=config.training.steps * crops_a_step or config.training.epochs * len(crops.samples),
        reference=reference,
    )


# ------------------------------------------------------------------------------- reward and samples


def make_reward(config, has_judge):
    """The composite reward that --rewards asks for. Raises RewardError, and RunError where the
    crops are too small, or the user's own reward has changed since the run began."""
    plugs = rewards.plugs_of(config.scoring.rewards)
    if config.resume and plugs != config.plugs:
        raise runs.RunError(
            f"{', '.join(plugs)} changed since {config.resume} began: start a new run"
        )
    runs.same_everywhere("file of rewards", plugs)
    config.plugs = plugs
    weights = rewards.parse_terms(config.scoring.rewards, has_judge)
    side = rewards.smallest_side(weights)
    if config.samples.crop < side:
        raise runs.RunError(
            f"crops of {config.samples.crop} px are too small for these rewards: they need {side}"
        )
    return rewards.Reward(weights, config.device, config.scoring.weights_dir)


def describe_reward(config, reward, folder):
    """Prints and stores the table of terms."""
    expert = config.expert
    rows = rewards.describe_terms(
        reward.weights, judge=f"{expert.judge_model or expert.judge}, {expert.judge_mode}"
    )
    table = report.markdown(rows[0], [row.values() for row in rows])
    runs.say("reward, Eq. 22: weights are renormalised over the terms that are on (--rewards)")
    runs.say(f"{table}\n")
    runs.save_json(folder / "rewards.json", rows)


def usable_samples(config, side):
    """(training, validation, held-out) samples; prints what the data folder holds of the paper's
    training sets. Those to measure on are decoded once and have `side` px or more a side, those to
    train on are looked at when they are mined. Raises DataError when nothing is left to measure
    on."""
    if config.data_root and is_adair_layout(config.data_root):
        head, rows = training_table(config.data_root, task_names(config.tasks))
        runs.say(f"{report.markdown(head, rows)}\n")
    tasks = task_names(config.tasks) if config.tasks else ()
    split = list_training(config.data_root, tasks=tasks, listed=config.listed)
    samples = in_draws(split.train, config.draws)
    runs.same_everywhere("list of images", names_digest([*samples, *split.val, *split.held_out]))
    val, broken = split_usable(split.val, max(16, side))
    held_out, more = split_usable(split.held_out, max(16, side))
    if config.measure_crop:
        val, held_out = ([middle(s, config.measure_crop) for s in part] for part in (val, held_out))
    runs.say_skipped(split.problems + broken + more)
    if not (val and held_out):
        raise DataError(
            f"none of the images set aside to measure on can be read: {(broken + more)[0]}"
        )
    counts = ", ".join(f"{task} {n}" for task, n in Counter(s.task for s in samples).items())
    aside = f"{len(val)} to choose on, {len(held_out)} to report on"
    runs.say(f"training images: {counts}; set aside: {aside}")
    return samples, val, held_out


def generators_of(config, numbers):
    """One generator for each crop: what is random about it follows from the run's seed and the
    crop's number alone."""
    generators = [torch.Generator(config.device) for _ in numbers]
    # mixed, since a CPU's generator takes the low 32 bits of a seed
    seeds = [int(np.random.SeedSequence((config.seed, n)).generate_state(1)[0]) for n in numbers]
    return [g.manual_seed(seed) for g, seed in zip(generators, seeds)]


# ------------------------------------------------------------------------------------ the controls
# Each is the method's own line, or, where a flag asks for it, what the line has to beat.


def advantages(scores, policy, generators):
    """Eq. 8 of scores (B, G, …), along G, 0 in a group that the judge alone had to score and could
    not; --shuffle-advantages: in random order within each group."""
    scores = scores.movedim(1, -1)  # (B, …, G)
    if policy.advantage_scale == "batch":
        found = grpo.batch_advantages(scores)
    else:
        found = grpo.group_advantages(scores, policy.advantage_eps)
    found = found.nan_to_num(nan=0.0).movedim(-1, 1)
    return grpo.shuffled(found, generators) if policy.shuffle_advantages else found


def chosen_rollout(scores, policy, generators):
    """g* of each group, (B,); --supervise random: any rollout of it."""
    if policy.supervise == "random":
        return grpo.random_of_group(scores, generators)
    return grpo.best_of_group(scores)


def image_weights(restored, gt, policy):
    """(w_RL, w_sup), (B,) each, of images (B, 3, H, W): 1, or --weighting difficulty."""
    if policy.weighting == "difficulty":
        return grpo.difficulty_weights(psnr(restored.detach(), gt))
    return torch.ones(2, len(gt), device=gt.device)


def fine_tune(config, run, state, crops, reward, val, forward):
    """Training without rollouts and RL, on the same samples and steps: the deterministic output,
    forward(images), learns from ℓ1 (--objective sft), from the gradient of the reward itself, which
    RL does without (reward), or from both (reward+sft)."""
    run.start(state, config.objective, shown=dict(psnr="psnr_det"))
    for batch in run.batches(crops, config.training.batch_size):
        validate_when_due(config, run, reward, val)
        state.set_rates(config.training)
        with half_precision(config):
            output = forward(batch.degraded)
        losses = {}
        if "sft" in config.objective:
            losses["loss/l1"] = (output - batch.gt).abs().mean()
        if "reward" in config.objective:
            of_images = reward.differentiable(output.float(), batch.gt, batch.tasks)
            losses["loss/reward"] = -of_images.mean()
        loss = sum(losses.values())
        state.optimizer.zero_grad()
        loss.backward()
        metrics = losses | {"psnr_in": batch_psnr(batch.degraded, batch.gt)}
        run.update([state.optimizer], loss, metrics | {"psnr_det": batch_psnr(output, batch.gt)})
    validate_when_due(config, run, reward, val)
    return state


def half_precision(config):
    """Autocast of the restorer to bfloat16 under --amp bf16. What a policy computes is float32 all
    the same."""
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.training.amp == "bf16")


# ------------------------------------------------------------------------------------- measurements


def measure(run, reward, restoring, samples, desc):
    """AdaIR's protocol and the reward over `samples`, by all processes: rows."""

    def measure_one(sample):
        row, restored, gt = evaluate_image(restoring, sample)
        return row | dict(reward=reward.of_image(restored, gt, sample.task))

    return runs.parallel_map(measure_one, samples, desc, run.stop)


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


def batch_psnr(restored, gt):
    """Mean PSNR in dB over a batch."""
    return psnr(restored.detach(), gt).mean()


def describe(scores, terms, judge=None):
    """What the log says of the rewards of groups: {name: scalar}. scores: (B, G), NaN where the
    judge failed a group; terms: {name: (B, G)}."""
    metrics = {}
    for name, values in {"": scores, **terms}.items():
        values = values[values.isfinite().all(dim=1)]
        if not len(values):
            continue
        mean, deviation = values.mean(), values.std(dim=1, correction=0)  # (), (B,)
        if name:
            metrics[f"rewards/{name}/mean"] = mean
            metrics[f"rewards/{name}/std"] = deviation.mean()
        else:
            metrics |= {"reward": mean, "reward_std": deviation.mean()}
            metrics["frac_reward_zero_std"] = (deviation < 1e-7).float().mean()
    if judge and judge.problem:
        tqdm.write(f"judge: {judge.problem}")
    return metrics | (judge.metrics if judge else {})


# ------------------------------------------------------------------------------------- the report


SAMPLED = ("psnr_sample", "reward_sample")


def add_samples(rows, run, reward, chain, held_out):
    """Adds to the rows what a chain's samples are worth, beside its output without noise."""
    drawn = measure(run, reward, partial(restore, Sampled(chain)), held_out, "sampled")
    for row, of_sample in zip(rows, drawn):
        row |= dict(psnr_sample=of_sample["psnr"], reward_sample=of_sample["reward"])


def measure_all(run, reward, model, restoring, held_out, desc="before"):
    """`measure`, and of a chain what its samples are worth, too."""
    rows = measure(run, reward, restoring, held_out, desc)
    if isinstance(model, Chain):
        add_samples(rows, run, reward, model, held_out)
    return rows


def start_digest(config, pretrained, reward, held_out):
    """What the measurements of the start depend on: the model, the reward, the images."""
    images = [(s.task, s.name, s.box, mining.stamp_of(s)) for s in held_out]
    told = repr((model_digest(pretrained), reward.weights, config.plugs, images))
    return hashlib.sha256(told.encode()).hexdigest()


def known_before(scores, start):
    """The measurements of the start of a run whose hard.json is among --scores, if they are of the
    same model, reward and images; or nothing."""
    for path in scores:
        found = Path(path).with_name("report.json")
        stored = runs.load_json(found) if found.exists() else {}
        if stored.get("start") == start:
            runs.say(f"before: taken over from {found}")
            return stored["before"]
    return []


@torch.no_grad()
def show_rollouts(config, run, reward, val, rollouts):
    """Draws rollouts.png: four rollouts of a training crop's size from a validation image, a hazy
    one if there is one, by the policy as it is at the end; their rewards are without a judge's
    part. Nothing where no validation image is as large as a crop."""
    side = config.samples.crop
    hazy_first = sorted(val, key=lambda s: s.task != "dehaze")
    found = ((s, *load_pair(middle(s, side))) for s in hazy_first)
    sample, *pair = next((f for f in found if min(f[1].shape[1:]) == side), (None,))
    if not sample:
        return
    degraded, gt = (image[None].to(config.device) for image in pair)
    generators = generators_of(config, [0])
    restored, actions = rollouts(config, run.state, degraded, generators)
    tasks = [sample.task] * len(restored)
    scores = reward.differentiable(restored, gt.expand_as(restored), tasks)
    report.plot_rollouts(
        run.folder / "rollouts.png",
        degraded[0],
        restored.cpu(),
        actions.cpu(),
        scores=scores.cpu(),
        advantages=grpo.group_advantages(scores[None], 1e-12)[0].cpu(),
    )


def write_report(config, run, pretrained, reward, held_out):
    """The last step against the start, on images that nobody looked at before: report.md,
    report.json, curves.png, samples.png."""
    state, folder = run.state, run.folder
    start = start_digest(config, pretrained, reward, held_out)
    before = known_before(config.samples.scores, start)
    if not before:
        before = measure_all(run, reward, pretrained, partial(restore, pretrained), held_out)
    trained = state.averaged.module["model"]
    after = measure_all(run, reward, trained, state.restore, held_out, "after")
    if runs.rank():
        return
    gains = [new["psnr"] - old["psnr"] for old, new in zip(before, after)]
    rows = []
    for i in report.typical_and_worst(before, gains):
        degraded, gt = evaluation_pair(held_out[i])
        old, new = restore(pretrained, degraded), state.restore(degraded)
        crop = slice(None), *report.most_changed(old, new)
        pictures = {
            f"{held_out[i].task}, {before[i]['psnr_in']:.2f} dB": degraded,
            f"before, {before[i]['psnr']:.2f} dB": old,
            f"after, {gains[i]:+.2f} dB": new,
            "truth": gt,
            "ten times what changed": report.ten_times(new, old),
        }
        rows.append([(caption, image[crop]) for caption, image in pictures.items()])
    runs.write_atomic(folder / "samples.png", report.plot_samples(rows))
    every = 1 + state.step // 10_000  # what a plot can show; of a long run too many to hold
    shown = list(itertools.islice(runs.read_metrics(folder), 0, None, every))
    report.plot_curves(folder / "curves.png", shown, state.history)
    hard = mining.select(before, 0.3)
    table = report.before_after_table(before, after, hard)
    notes = []
    if "psnr_sample" in after[0]:
        gained = [report.mean(after, k) - report.mean(before, k) for k in SAMPLED]
        notes.append(f"Samples: {gained[0]:+.3f} dB, reward {gained[1]:+.5f}.")
    if lost := sum(row["skipped"] for row in runs.read_metrics(folder)):
        notes.append(f"In {lost:.0f} steps loss or gradient were not finite; they were skipped.")
    if config.expert.judge != "none":
        failures = sum(row.get("judge/failures", 0) for row in runs.read_metrics(folder))
        part = (
            "of --rewards default, not the judge's" if reward.is_judge_alone else "without its part"
        )
        notes.append(
            f"The reward is {part}. The judge left {failures:.0f} rollouts without a score."
        )
    side = config.samples.measure_crop
    measured = f"{f'the middle {side} px, ' if side else ''}deterministic output"
    text = f"""# {config.objective}: before and after, {len(before)} held-out images

{table}

Seed {config.seed}, torch {torch.__version__}, {config.device}. PSNR and SSIM by AdaIR's protocol,
{measured} of the last step. Hard are the 30 % of each task with the lowest PSNR before.
{" ".join(notes)}
Command: `{config.command}`

![curves](curves.png)
![samples](samples.png)

The last row of the samples is the image of lowest gain, the others are of median gain. Shown is
the crop of 96 px at most that changed most; the numbers are of all that is measured of an image.
"""
    runs.write_atomic(folder / "report.md", text.encode())
    stored = dict(start=start, before=before, after=after, hard=hard, validation=state.history)
    runs.save_json(folder / "report.json", stored)
    files = "report.md, curves.png, samples.png, last.pt, metrics.jsonl"
    runs.say(f"\n{table}\n\neverything of this run lies in {folder}: {files}")
