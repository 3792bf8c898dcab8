"""IRPO: GRPO post-training of an image restorer. The loop is `post_train`, one step of it `irpo_step`.

    python train.py --hard-ratio 0.3      post-train the demo model on its hard samples, nothing downloaded
    python train.py pretrain …            AdaIR's own supervised training, which the demo model came from
"""

import argparse
import contextlib
import copy
import itertools
import math
import os
import shlex
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import grpo
import judge as judges
import model as adair
import policy as policies
import rewards
import runs

DEMO_MODEL = Path(__file__).parent / "weights" / "demo.pt"

# What pre-training builds unless told otherwise: Table 6.
NEW_MODEL = dict(dim=48, blocks=[4, 6, 6, 8], refinement=4, rate=0.25)

# What a preset sets; any flag given on the command line wins over it.
PRESETS = {
    "demo": dict(steps=200, epochs=0, batch_size=1, lr=1e-5, head_lr_factor=600.0, eval_every=100, save_every=50, rewards="default"),
    "paper": dict(steps=0, epochs=30, batch_size=1, lr=3e-5, head_lr_factor=6.0, eval_every=5000, save_every=500, rewards="paper"),
}


# What may go wrong in mid-run; the rest is a bug.
FAILURES = (runs.RunError, judges.JudgeError, data.DataError, OSError, torch.OutOfMemoryError)
SKIPS_IN_A_ROW = 5  # so many steps without a finite loss and gradient end a run

# What the judge's flags are unless given; a resumed run takes those that are.
JUDGE = dict(
    judge="none", judge_model=None, judge_device=None, judge_mode="logits", judge_prompt=None, judge_args=None,
    judge_timeout=60.0, judge_patience=5,
)  # fmt: skip


def irpo_step(model, policy, ref, reward, batch, args, progress, generators, judge=None):
    """Forward and backward of one IRPO step; gradients are left in the parameters.

    batch: degraded and gt (B, 3, H, W), B tasks; generators: one per image, or one for all, which its actions are drawn from; judge: judge.Judge,
    which R_qwen comes from. Returns (metrics, replay): metrics {name: scalar tensor}, and what `policy_loss` needs to use the group once more.
    """
    degraded, gt, tasks = batch
    with torch.set_grad_enabled(not args.freeze_backbone), half_precision(args):
        encoding = model.encode(degraded)  # no action in it: one serves the whole group and the deterministic output

    with torch.no_grad():
        with half_precision(args):
            y, states, actions = draw_group(model, policy, encoding, args.group_size, generators)
        scores = judge and judge.ask(degraded, y, gt)  # at work while the other rewards are computed
        r, terms = reward(y, gt, tasks, scores)  # (B, G), Eq. 22; asks for the scores last
    advantages = grpo.group_advantages(r)  # Eq. 8
    best = grpo.best_of_group(r)  # g*
    metrics = {
        "reward": r.mean(),
        "reward_std": r.std(dim=1, correction=0).mean(),
        "frac_reward_zero_std": (r.std(dim=1, correction=0) < 1e-7).float().mean(),
        "psnr_in": batch_psnr(degraded, gt),
    }
    for name, value in terms.items():
        value = value[value.isfinite().all(dim=1)]  # the judge may have failed a group
        if len(value):
            metrics |= {f"rewards/{name}/mean": value.mean(), f"rewards/{name}/std": value.std(dim=1, correction=0).mean()}

    if args.freeze_backbone:
        supervised = 0.0
        with torch.no_grad(), half_precision(args):
            y_det = model.decode(encoding, policy.mean())
        metrics |= {"psnr_best": batch_psnr(grpo.take(y, best), gt), "psnr_det": batch_psnr(y_det, gt)}
    else:  # the backbone: g* again and the mean action, with graph, as one batch of two per image
        control = policy.replay_and_mean(grpo.take(actions, best))
        with half_precision(args):
            y_best, y_det = model.decode(encoding, control, copies=2).unflatten(0, (-1, 2)).unbind(1)
        l_sup, l_cons = grpo.supervised_losses(y_best, y_det, gt)  # Eq. 1, 2
        supervised = grpo.total_loss(0.0, l_sup, l_cons, progress)
        metrics |= {"loss/sup": l_sup, "loss/cons": l_cons}
        metrics |= {"psnr_best": batch_psnr(y_best, gt), "psnr_det": batch_psnr(y_det, gt)}

    with torch.no_grad():
        logp_old = policy.log_prob(states, actions)
        logp_ref = ref.log_prob(states, actions)
    replay = (states, actions, logp_old, logp_ref, advantages)
    rl, policy_metrics = policy_loss(policy, ref, replay, args)
    loss = rl + supervised  # Eq. 7
    loss.backward()
    return metrics | policy_metrics | {"loss/total": loss}, replay


def draw_group(model, policy, encoding, group_size, generators, at_once=4):
    """G stochastic rollouts per image, without graph, Eq. 4: (restored (B·G, 3, H, W), states, actions (B·G, 3, 4)).

    They are decoded as one batch, or `at_once` per image after each other, so that the memory a larger group takes is
    that of its images.
    """
    encoding, parts = encoding.detach(), []
    for first in range(0, group_size, at_once):
        n = min(at_once, group_size - first)
        rollout = policy.sample(generators)
        y = model.decode(encoding, rollout, copies=n)
        flat = (y, rollout.actions, *(state for level in rollout.states for state in level))
        parts.append([t.unflatten(0, (-1, n)) for t in flat])  # (B, n, …) each
    y, actions, *states = (torch.cat(part, dim=1).flatten(0, 1) for part in zip(*parts))
    return y, list(zip(states[::2], states[1::2])), actions


def half_precision(args):
    """Autocast of the backbone to bfloat16 under --amp bf16. What the policy computes is float32 all the same."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp == "bf16")


def compile_blocks(model):
    """torch.compile of every transformer block by itself, in place: blocks of one shape share their code, and the
    controllers between them stay plain Python. Raises RunError where torch.compile does not work."""
    try:
        torch.compile(torch.square)(next(model.parameters()))
    except Exception as error:
        raise runs.RunError(no_compiler(error)) from None
    torch._dynamo.config.cache_size_limit = 64  # per function: four widths × (encode, group, pair, validation), and their graphs
    for block in model.modules():
        if isinstance(block, adair.TransformerBlock):
            block.compile()


def no_compiler(error):
    reason = " ".join(str(error).split())[:200]
    return f"--compile does not work here, leave it out ({type(error).__name__}: {reason})"


def policy_loss(policy, ref, replay, args):
    """L_RL of the heads (Eq. 6) on stored states and actions. Returns (loss, metrics)."""
    states, actions, logp_old, logp_ref, advantages = replay
    alpha, beta = policy(states)  # (B·G, 3, 4)
    logp = policies.beta_log_prob(actions, alpha, beta).sum(dim=(1, 2))  # Eq. 23
    entropy = policies.beta_entropy(alpha, beta).sum(dim=(1, 2))
    exact_kl = None
    if args.kl == "exact":
        exact_kl = policies.beta_kl(alpha, beta, *ref(states)).sum(dim=(1, 2)).view_as(advantages)
    group = (t.view_as(advantages) for t in (logp, logp_old, logp_ref))
    loss, metrics = grpo.grpo_loss(
        *group, advantages, entropy.view_as(advantages), args.clip, args.kl_beta, args.entropy_tau, exact_kl
    )
    mean, concentration = (alpha / (alpha + beta)).mean(dim=0), (alpha + beta).mean(dim=0)  # (3, 4)
    for level in range(3):
        for k, name in enumerate(policies.CONTROLS):
            metrics[f"policy/{level + 1}.{name}/mean"] = mean[level, k].detach()
            metrics[f"policy/{level + 1}.{name}/concentration"] = concentration[level, k].detach()
    return loss, metrics


def sft_step(model, policy, batch, args):
    """The control: L1 of the deterministic output alone, on the same samples; no rollouts, no reward."""
    degraded, gt, _ = batch
    with half_precision(args):
        y_det = model(degraded, policy.mean())
    loss = (y_det - gt).abs().mean()
    loss.backward()
    return {"loss/total": loss, "psnr_in": batch_psnr(degraded, gt), "psnr_det": batch_psnr(y_det, gt)}


def batch_psnr(y, gt):
    """Mean PSNR in dB over a batch."""
    mse = (y.detach().clamp(0, 1) - gt).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return (-10 * mse.log10()).mean()


def post_train(args, interrupts, judge=None):
    """The whole method: list, mine, post-train, compare. Returns the run folder. Raises runs.Stopped when `interrupts` end it, with a checkpoint."""
    device = args.device
    run = Path(args.resume or args.out)
    if not args.resume and runs.rank() == 0:
        runs.refuse_existing(run)
    checkpoint = adair.read_checkpoint(run / "last.pt") if args.resume and (run / "last.pt").exists() else None

    # The three things a run is made of: a pre-trained model, a reward, samples.
    pretrained = load_pretrained(args.init, args.mask_rule).to(device, memory_format=torch.channels_last)
    terms = rewards.parse_terms(args.rewards, judge is not None)
    if args.objective == "irpo" and args.crop < rewards.smallest_side(terms):
        raise runs.RunError(f"crops of {args.crop} px are too small for these rewards: they need {rewards.smallest_side(terms)}")
    reward = rewards.Reward(terms, device, args.weights_dir) if args.objective == "irpo" else None
    digest = data.model_digest(pretrained)
    known = known_scores([args.scores, run / "hard.json", run / "mining.jsonl"], digest)
    train, val = usable_samples([args.data_root], args.crop, data.task_names(args.tasks), args.list)
    runs.same_everywhere("model or checkpoint", [digest, checkpoint["step"] if checkpoint else None])
    run.mkdir(parents=True, exist_ok=True)
    if judge:
        start_judge(judge, val[0], args)
    runs.save_json(run / "config.json", vars(args) | {"device": runs.device_for_all(device)})  # from here on, --resume goes on
    if reward:
        described = rewards.describe_terms(terms, judge and f"{args.judge_model or args.judge}, {args.judge_mode}")
        print_terms(described)
        runs.save_json(run / "rewards.json", described)

    before_restore = partial(adair.restore, pretrained)
    hard = mine_hard(args, run, before_restore, digest, known, train, resumed=checkpoint is not None)
    del train, known

    # The policy starts where the pre-trained model is; π_ref stays there.
    torch.manual_seed(args.seed)
    model = copy.deepcopy(pretrained)
    model.config["mask_rule"] = args.mask_rule
    policy = policies.load_policy(checkpoint) if checkpoint else policies.policy_for(model, args.concentration)
    policy = policy.to(device)
    ref = policy.frozen_copy()
    optimizer = adam(model, policy, args)
    together = args.batch_size * runs.processes()
    step, seen, total, best_psnr, validated = 0, 0, args.steps * together or args.epochs * len(hard), -math.inf, 0  # seen, total: crops
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        ref.load_state_dict(checkpoint["ref"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, seen, total, best_psnr, validated = (checkpoint[k] for k in ("step", "seen", "total", "best_psnr", "validated"))

    def save(name):
        weights = dict(model=model.state_dict(), config=model.config, policy=policy.state_dict(), policy_config=policy.config)
        rest = dict(ref=ref.state_dict(), optimizer=optimizer.state_dict(), step=step, seen=seen, total=total)
        runs.save_checkpoint(run / name, weights | rest | dict(best_psnr=best_psnr, validated=validated))

    pictures = one_of_each_task(val)
    before, before_images = runs.evaluate(before_restore, val, "before", pictures)
    if not checkpoint:
        best_psnr = keep_best(save, before, best_psnr)  # best.pt starts as the start
    after_restore = partial(adair.restore, model, controller=policy.mean())
    if args.compile:
        compile_blocks(model)
    crops = data.Crops(hard, args.crop, args.seed, total)
    log = runs.Log(run, step)
    bar = tqdm(total=step + math.ceil((total - seen) / together), initial=step, desc=args.objective, unit="step", smoothing=0.05)
    skipped, start = 0, time.perf_counter()
    updating = False
    try:
        for batch in runs.batches(crops, args.batch_size, seen, args.workers, device):
            if step % args.eval_every == 0 and step > validated:
                best_psnr = keep_best(save, runs.evaluate(after_restore, val, "validate")[0], best_psnr)
                validated, start = step, time.perf_counter()
            interrupts.hold()  # a step is done whole or not at all
            updating = True
            metrics = update(model, policy, ref, reward, optimizer, batch, args, seen / total, judge)
            step, seen, updating = step + 1, seen + together, False
            skipped, judged = after_step(batch, metrics, skipped, interrupts, judge)
            metrics |= judged | {"lr": args.lr, "lr_heads": args.lr * args.head_lr_factor, "step_time": time.perf_counter() - start}
            log.write(step, metrics)
            shown = {"reward": "reward", "psnr": "psnr_det", "kl": "kl"}
            bar.set_postfix({k: f"{metrics[v]:.3f}" for k, v in shown.items() if v in metrics}, refresh=False)
            bar.update()
            if args.keep_every and step % args.keep_every == 0:
                save(f"step-{step:06d}.pt")
            if step % args.save_every == 0:
                save("last.pt")
            start = time.perf_counter()
            interrupts.release()
    except (runs.Stopped, *FAILURES) as ended:
        interrupts.hold()
        bar.close()
        if not updating or args.inner_epochs == 1:  # between inner epochs a step is half done
            save("last.pt")
        raise runs.ending(ended, interrupts, step, f"--resume {run}") from None
    save("last.pt")
    bar.close()
    log.close()

    if len(set(runs.gather(data.model_digest(model)))) > 1:  # rounding, where machines differ; a bug where they do not
        print("note: the weights of the processes are not equal to the bit; those of the first one are kept")

    # The last checkpoint against the start, on images nothing was trained on or chosen by.
    after, after_images = runs.evaluate(after_restore, val, "after", pictures)
    keep_best(save, after, best_psnr)
    if runs.rank() == 0:
        write_report(run, args, before, after, val, pictures, before_images, after_images)
    return run


def update(model, policy, ref, reward, optimizer, batch, args, progress, judge):
    """One step: gradients on this process's part of the batch, their average over all processes, Adam. Returns {name: number}."""
    degraded, gt, tasks, names, numbers, _ = batch
    metrics, replay = {}, None
    optimizer.zero_grad()
    if names:
        images = degraded.to(args.device, non_blocking=True), gt.to(args.device, non_blocking=True), tasks
        if args.objective == "irpo":
            generators = [torch.Generator(args.device).manual_seed((args.seed << 32) + n) for n in numbers]
            metrics, replay = irpo_step(model, policy, ref, reward, images, args, progress, generators, judge)
        else:
            metrics = sft_step(model, policy, images, args)
    metrics = optimizer_step(optimizer, metrics, len(names))
    for _ in range(args.inner_epochs - 1):  # the same group again: ρ leaves 1, the clip may bind
        more = {}
        optimizer.zero_grad()
        if replay:
            loss, more = policy_loss(policy, ref, replay, args)
            loss.backward()
        skipped = metrics["skipped"]
        metrics |= optimizer_step(optimizer, more, len(names))
        metrics["skipped"] = max(metrics["skipped"], skipped)
    return metrics


def after_step(batch, metrics, skipped, interrupts, judge=None):
    """What all processes do after a step, done or skipped: tell each other and the user. skipped: how many before it were, in a row; returns (that number now, the
    judge's metrics). Raises RunError when it is SKIPS_IN_A_ROW."""
    names, broken, judged = runs.exchange(batch, judge, interrupts)
    report_skipped(broken)
    skipped = skipped + 1 if metrics["skipped"] else 0
    if skipped == SKIPS_IN_A_ROW:
        raise runs.RunError(f"loss or gradient were not finite {skipped} times in a row, the last time on {', '.join(names)}")
    return skipped, judged


def mine_hard(args, run, restore, digest, known, train, resumed):
    """D_hard (Sec. 3.2): the samples that the pre-trained model, `restore`, does worst on; writes hard.json. Until that is there the
    scores lie in mining.jsonl, so that a mining that was ended goes on. known: {digest of a sample: PSNR}."""
    gpu, rows, broken = runs.on_gpu(args.device), [], []
    scored_before = (dict(digest=d, psnr=v) for d, v in known.items())
    lines = runs.Appended(run / "mining.jsonl", itertools.chain([dict(model=digest)], scored_before))
    with tqdm(total=len(train), desc="mining", unit="image", smoothing=0.1, leave=False) as bar:
        for part in runs.share(train, 64 if gpu else 16):
            found = data.mine(restore, part, known, 1 << 20 if gpu else 0, lambda n: bar.update(n * runs.processes()))
            for scored, problems in runs.gather(found):
                lines.write(dict(digest=row["digest"], psnr=row["psnr"]) for row in scored if row["digest"] not in known)
                rows += scored
                broken += problems
    lines.close()
    report_skipped(broken)
    if not rows:
        raise data.DataError("none of the training images can be read")
    chosen = data.select(rows, args.hard_ratio, args.select, args.hard_scope, args.seed)
    for i in chosen:
        rows[i]["selected"] = True
    mined = dict(model=digest, ratio=args.hard_ratio, select=args.select, rows=rows)
    if runs.rank() == 0 and resumed and not runs.is_saved(run / "hard.json", mined):
        raise runs.RunError(f"the training images or the model at {args.init} changed since {run} began: start a new run")
    runs.save_json(run / "hard.json", mined)
    if runs.rank() == 0:
        (run / "mining.jsonl").unlink()
    print(f"D_hard: {len(chosen)} of {len(rows)} training images ({args.select}, ratio {args.hard_ratio})")
    wanted = {(rows[i]["task"], rows[i]["name"]) for i in chosen}
    hard = [s for s in train if (s.task, s.name) in wanted]
    return data.adair_repeats(hard) if args.select == "all" else hard


@contextlib.contextmanager
def judge_of(args):
    """The judge --judge asks for, not yet started, or None. It ends with the block."""
    if args.judge == "none":
        yield None
        return
    batch = str(args.batch_size * args.group_size)
    command = [sys.executable, judges.__file__, "--parent", str(os.getpid()), "--mode", args.judge_mode, "--batch-size", batch]
    if args.judge_prompt:
        command += ["--prompt", args.judge_prompt]
    if judges.is_url(args.judge):  # a little less time than we wait for it, so that it can say which request failed
        command += ["--server", args.judge, "--model", args.judge_model, "--timeout", str(0.9 * args.judge_timeout), "--device", "cpu"]
    else:
        command += ["--model", args.judge, "--device", args.judge_device or judge_device(args.device)]
    command += args.judge_args or []
    log = Path(args.resume or args.out) / (f"judge-{runs.rank()}.log" if runs.rank() else "judge.log")
    judge = judges.Judge(command, log, args.judge_timeout, args.judge_patience)
    try:
        yield judge
    finally:
        judge.close()


def judge_device(device):
    """Where a trainer's judge goes: behind the trainers' GPUs, rank i's to cuda:(world + i); beside a CPU trainer to the CPU.
    Raises RunError if there is no such GPU."""
    if not runs.on_gpu(device):
        return "cpu"
    world, rank = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    taken = torch.device(device).index or 0
    wanted = 0 if world == 1 and taken else world + rank
    if wanted >= torch.cuda.device_count():
        raise runs.RunError(
            f"the judge wants a GPU of its own, cuda:{wanted}, and this machine has {torch.cuda.device_count()}: name one with "
            f"--judge-device ({device} would be shared with the training), or a server with --judge"
        )
    return f"cuda:{wanted}"


def start_judge(judge, sample, args):
    """Starts it, and has it score a batch of a step's size: what it cannot do shows before anything is computed."""
    degraded, gt = data.evaluation_pair(sample)
    shape = (args.crop, args.crop)
    degraded, gt = (torch.nn.functional.interpolate(t[None], shape).repeat(args.batch_size, 1, 1, 1) for t in (degraded, gt))
    print(f"starting the judge {args.judge}, whose log is {judge.log}")
    judge.start(degraded, gt, args.group_size)


def load_pretrained(path, wanted_rule):
    """The AdaIR to start from, under the mask rule it was trained with. Raises CheckpointError for one that is post-trained,
    since its policy would be lost, and for one trained under "fraction" when the original's rule is wanted."""
    checkpoint = adair.read_checkpoint(path)
    if isinstance(checkpoint, dict) and "policy" in checkpoint:
        raise adair.CheckpointError(f"{path} is post-trained, and its policy would be lost: --init wants a pre-trained model")
    model = adair.load_adair(path, checkpoint=checkpoint)
    if model.config["mask_rule"] == "fraction" != wanted_rule:
        raise adair.CheckpointError(f"{path} was trained under mask rule fraction: --mask-rule {wanted_rule} would change what it computes")
    return model


def one_of_each_task(samples):
    """Indices of one sample per task, of different images where there are several."""
    members = [[i for i, s in enumerate(samples) if s.task == t] for t in dict.fromkeys(s.task for s in samples)]
    return [indices[k % len(indices)] for k, indices in enumerate(members)]


def adam(model, policy, args):
    """Adam for the heads and, unless it is frozen, the backbone, each at its rate."""
    groups = [dict(params=policy.parameters(), lr=args.lr * args.head_lr_factor)]
    if not args.freeze_backbone:
        # A model without controller asks rate_conv; with one, nobody does.
        named = [p for name, p in model.named_parameters() if ".rate_conv." not in name]
        groups.append(dict(params=named, lr=args.lr))
    return torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True)


def optimizer_step(optimizer, metrics, images, clip=math.inf):
    """Averages gradients and metrics, scalar tensors, over the processes, which did `images` each; then Adam's step, unless the loss or the
    gradient is not finite. clip: the norm that gradients are reduced to. Returns {name: number}, with grad_norm and skipped, which is 1 if no
    step was taken."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    metrics = runs.average(parameters, metrics, images)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip < math.inf:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    norm = norm.item()
    finite = math.isfinite(norm) and math.isfinite(metrics.get("loss/total", 0))
    if finite:
        optimizer.step()
    return metrics | {"grad_norm": norm, "skipped": int(not finite)}


def keep_best(save, rows, best_psnr):
    """Saves best.pt if the mean PSNR over tasks of these validation rows is the highest so far."""
    values = runs.mean_by_task(rows, "psnr").values()
    if sum(values) / len(values) > best_psnr:
        best_psnr = sum(values) / len(values)
        save("best.pt")
    return best_psnr


def known_scores(paths, digest):
    """{sample digest: psnr} of earlier minings (hard.json files) under the model of this digest."""
    known = {}
    for path in paths:
        if path and Path(path).exists():
            stored = runs.load_json(path) if Path(path).suffix == ".json" else list(runs.read_lines(path))
            try:
                stored = dict(stored[0], rows=stored[1:]) if isinstance(stored, list) else stored
                scores = {row["digest"]: row["psnr"] for row in stored["rows"]}
                same = stored["model"] == digest
            except (KeyError, TypeError, IndexError):
                raise runs.RunError(f"{path} is not the hard.json of a run") from None
            print(f"{path}: {len(scores)} scores " + ("reused" if same else "of another model, not used"))
            known |= scores if same else {}
    return known


def usable_samples(roots, crop, tasks=None, listed=None):
    """(training, validation) samples of all roots (None: the embedded photographs), as far as their headers promise to
    work; what does not is named. Raises DataError when nothing is left."""
    sources = [data.list_training(root, tasks=tasks, listed=listed) for root in roots]
    train, val, problems = (sum(parts, []) for parts in zip(*sources))
    runs.same_everywhere("list of images", data.names_digest(train + val))
    train, more = data.check_headers(train, crop, runs.spread)
    val, val_problems = data.check_headers(val, 16)
    val, broken = data.check_pixels(val)  # a measurement that fails at the end would cost the whole run
    report_skipped(problems + more + val_problems + broken)
    if train and not val:
        raise data.DataError(f"none of the images set aside to measure on can be read: {(val_problems + broken)[0]}")
    if not train:
        where = ", ".join(str(root or "the embedded photographs") for root in roots)
        raise data.DataError(f"none of the training images of {where} can be used with crops of {crop} px")
    tasks = Counter(s.task for s in train)
    print("training images: " + ", ".join(f"{task} {n}" for task, n in tasks.items()) + f"; set aside: {len(val)}")
    return train, val


def report_skipped(problems, shown=20):
    """Names what is left out of training, the first ones in full, and counts it."""
    problems = list(dict.fromkeys(problems))
    for problem in problems[:shown]:
        tqdm.write(f"skipped: {problem}")
    if problems:
        more = f"; {len(problems) - shown} more are not shown" if len(problems) > shown else ""
        tqdm.write(f"{len(problems)} image(s) or pair(s) skipped in training{more}")


def print_terms(rows):
    print("reward, Eq. 22: the weights below are renormalised over the terms that are on (--rewards)")
    print(f"  {'term':6} {'weight':>7} {'paper':>7}")
    for row in rows:
        print(f"  {row['term']:6} {row['weight']:7.3f} {row['paper']:7.3f}  {row['state']}")


def write_report(run, args, before, after, val, pictures, before_images, after_images):
    """The before/after table, curves.png, samples.png and report.md; prints the table and where everything lies."""
    table = runs.before_after_table(before, after)
    steps = failures = lost = 0
    for row in runs.read_metrics(run):
        steps, failures, lost = steps + 1, failures + row.get("judge/failures", 0), lost + row["skipped"]
    every = 1 + steps // 10_000  # what a plot can show
    runs.plot_curves(run, list(itertools.islice(runs.read_metrics(run), 0, None, every)))
    figures = []
    for i in pictures:
        degraded, gt = data.evaluation_pair(val[i])
        figures.append((val[i].task, degraded, before_images[i], after_images[i], gt))
    runs.plot_samples(run / "samples.png", figures)
    skipped = f" In {lost} steps loss or gradient were not finite; they were skipped." if lost else ""
    judged = f" The judge left {int(failures)} rollouts without a score in {steps} steps." if args.judge != "none" else ""
    what = "IRPO" if args.objective == "irpo" else "the SFT control (L1 on the deterministic output)"
    text = f"""# {what}: before and after, {len(before)} held-out images

{table}

Seed {args.seed}, torch {torch.__version__}, {args.device}. PSNR and SSIM by AdaIR's protocol, deterministic output of the last step.{judged}{skipped}
Command: `python train.py {shlex.join(args.argv)}`

![curves](curves.png)
![samples](samples.png)
"""
    runs.write_atomic(run / "report.md", text.encode())
    runs.save_json(run / "report.json", dict(before=before, after=after))
    print(f"\n{table}\n\neverything of this run lies in {run}: report.md, curves.png, samples.png, last.pt, metrics.jsonl")


def pretrain(args, interrupts):
    """Supervised AdaIR: L1, Adam with warm-up and cosine decay; the result, model.pt, is an average of the weights.

    Killed, the same command goes on where it stopped (bit for bit on the same machine).
    """
    samples, val = usable_samples([r for r in (args.data_root, args.photos) if r] or [None], max(args.crop))
    missing = [t for t in args.cycle if t not in {s.task for s in samples}]
    if missing:
        raise data.DataError(f"there are no training images for {', '.join(missing)}: give --photos, or leave it out of --cycle")

    torch.manual_seed(args.seed)
    shape = {k: v for k in NEW_MODEL if (v := getattr(args, k)) is not None}
    if args.init:
        if shape:
            raise runs.RunError(f"--{next(iter(shape))} goes with a new model: that of --init brings its own")
        net = load_pretrained(args.init, args.mask_rule)
        net.config["mask_rule"] = args.mask_rule
    else:
        shape = {**NEW_MODEL, **shape}
        rate = shape["rate"] if args.mask_rule == "fraction" else adair.EMPTY_RATE
        net = adair.AdaIR(shape["dim"], shape["blocks"], shape["refinement"], mask_rule=args.mask_rule, rates=(rate, rate))
    net = net.train().to(args.device, memory_format=torch.channels_last)
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=averaging)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)

    run = Path(args.out)
    run.mkdir(parents=True, exist_ok=True)
    step = 0
    settings = {k: getattr(args, k) for k in ("data_root", "photos", "init", "seed", "lr", "ema", "crop", "batch_size", "cycle")}
    settings["processes"] = runs.processes()
    if (run / "pretrain.pt").exists():
        state = adair.read_checkpoint(run / "pretrain.pt")
        if not {"net", "ema", "opt", "step", "config", "settings"} <= state.keys():
            raise runs.RunError(f"{run}/pretrain.pt is not of this version: choose another --out")
        if state["config"] != net.config:
            raise runs.RunError(f"{run} holds the training of another model ({state['config']}): choose another --out")
        other = [k for k, v in settings.items() if state["settings"].get(k) != v]
        if other:
            name = "number of processes" if other[0] == "processes" else f"--{other[0].replace('_', '-')}"
            raise runs.RunError(f"{run} was trained with another {name}: give the same, or another --out")
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["opt"])
        step = state["step"]
        print(f"{run} goes on at step {step} of {args.steps}")

    runs.same_everywhere("model or state of training", [step, data.model_digest(net)])
    if args.compile:
        compile_blocks(net)

    def stage(step):  # the last quarter sees the larger crop, in batches of about the same number of pixels
        crop = args.crop[-1] if step >= args.steps * 3 // 4 else args.crop[0]
        return crop, max(1, args.batch_size * args.crop[0] ** 2 // crop**2)

    def save():
        state = dict(net=net.state_dict(), ema=ema.state_dict(), opt=optimizer.state_dict(), step=step)
        runs.save_checkpoint(run / "pretrain.pt", state | dict(config=net.config, settings=settings))
        runs.save_checkpoint(run / "model.pt", dict(model=ema.module.state_dict(), config=net.config))

    log = runs.Appended(run / "pretrain.jsonl", [row for row in runs.read_lines(run / "pretrain.jsonl") if row["step"] <= step])
    bar = tqdm(total=args.steps, initial=step, desc="pretrain", smoothing=0.02)
    skipped = 0
    try:
        while step < args.steps:
            crop, batch = stage(step)
            together = batch * runs.processes()
            end = next((s for s in range(step, args.steps) if stage(s) != (crop, batch)), args.steps)
            crops = data.Crops(samples, crop, args.seed, end * together, fresh=True, cycle=args.cycle)
            for loaded in runs.batches(crops, batch, step * together, args.workers, args.device):
                degraded, gt, _, names, *_ = loaded
                interrupts.hold()  # a step is done whole or not at all
                warm_up, decay = min(1, (step + 1) / 200), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
                optimizer.param_groups[0]["lr"] = args.lr * warm_up * decay + 1e-6
                optimizer.zero_grad()
                metrics = {}
                if names:
                    with half_precision(args):
                        restored = net(degraded.to(args.device))
                    metrics = {"loss/total": (restored - gt.to(args.device)).abs().mean()}
                    metrics["loss/total"].backward()
                metrics = optimizer_step(optimizer, metrics, len(names), clip=1.0)
                if not metrics["skipped"]:
                    ema.update_parameters(net)
                step += 1
                skipped, _ = after_step(loaded, metrics, skipped, interrupts)
                bar.update()
                if step % 20 == 0 and "loss/total" in metrics:
                    bar.set_postfix(l1=f"{metrics['loss/total']:.4f}", crop=crop)
                    log.write([dict(step=step, l1=metrics["loss/total"], crop=crop)])
                interrupts.release()
                if step % args.save_every == 0:
                    save()
    except (runs.Stopped, *FAILURES) as ended:
        interrupts.hold()
        bar.close()
        save()
        raise runs.ending(ended, interrupts, step, "the same command") from None
    save()
    bar.close()
    log.close()
    rows, _ = runs.evaluate(partial(adair.restore, ema.module.eval()), val, "validate")
    for kind, chosen in (("pairs of files", True), ("synthesised", False)):
        real = {(s.task, s.name) for s in val if bool(s.degraded) == chosen}
        part = [row for row in rows if (row["task"], row["name"]) in real]
        print(f"\nvalidation, {kind}\n{runs.gain_table(part)}" if part else f"\nvalidation, {kind}: none")
    print(f"\nthe model is {run / 'model.pt'}")
    return run


# ------------------------------------------------------------------------------------------------- command line


def post_train_parser():
    p = runs.Parser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`train.py pretrain --help` lists the flags of supervised pre-training.",
    )
    demo, paper = PRESETS["demo"], PRESETS["paper"]

    def add(flag, default, help, type=None, **rest):
        key = flag[2:].replace("-", "_")
        if key in demo:
            shown = f"(default: {demo[key]}; preset paper: {paper[key]})"
            default = argparse.SUPPRESS
        elif key in JUDGE:
            shown = "" if JUDGE[key] is None else f"(default: {JUDGE[key]})"
            default = argparse.SUPPRESS
        else:
            shown = "" if default is None else f"(default: {default})"
        rest |= {"type": type} if type else {}
        p.add_argument(flag, default=default, help=f"{help} {shown}".strip(), **rest)

    add("--preset", "demo", "demo: minutes on two CPU cores; paper: Table 6", choices=PRESETS)
    add("--data-root", None, "AdaIR's data folder, or a folder of photos; default: photographs inside scikit-image")
    add("--tasks", None, "some of them: denoise derain dehaze is Table 7, one alone Table 1; default: all that are there", choices=("denoise", *data.TASKS), nargs="+")
    add("--list", None, "file that names the training images to use, one path under --data-root a line", runs.existing_file)
    add("--init", str(DEMO_MODEL), "pre-trained AdaIR to start from, official or ours")
    add("--out", None, "run folder to create; default: runs/OBJECTIVE-DATE-TIME-seedSEED")
    add("--resume", None, "run folder to continue, with its own settings")
    add("--objective", "irpo", "irpo: Eq. 7; sft: the control, L1 on the deterministic output", choices=("irpo", "sft"))
    add("--seed", 0, "of crops and actions", runs.number(int, 0, 2**31 - 1))
    add("--device", runs.default_device(), "cpu, cuda, cuda:1, …", runs.device)
    add("--amp", "fp32", "bf16: the backbone in bfloat16 autocast, for GPUs; the policy stays float32", choices=("fp32", "bf16"))
    add("--compile", False, "torch.compile of the transformer blocks, for GPUs and long runs: it takes minutes to start", action="store_true")
    add("--workers", None, "processes that load images; default: 0 on a CPU, 4 beside a GPU", runs.number(int, 0, 256))
    add("--hard-ratio", 0.3, "share of the training set in D_hard, Sec. 3.2, Table 6", runs.number(float, 0, 1, open_low=True))
    add("--select", "hard", "which samples, Fig. 5", choices=("hard", "random", "easy", "all"))
    add("--hard-scope", "task", "rank within each task and noise level, or all together", choices=("task", "global"))
    add("--scores", None, "hard.json of an earlier run, reused where model and images are the same", runs.existing_file)
    add("--steps", None, "updates; 0: by --epochs", runs.number(int, 0))
    add("--epochs", None, "passes over D_hard, Table 6", runs.number(int, 0))
    add("--batch-size", None, "images per update and process, each with a group of its own, Table 6", runs.number(int, 1))
    add("--crop", 128, "px, a multiple of 8, Table 6", runs.multiple_of_8)
    add("--group-size", 4, "G, rollouts per image, Table 5", runs.number(int, 1))
    add("--lr", None, "Adam's rate for the backbone, Table 6", runs.number(float, 0))
    add("--head-lr-factor", None, "the heads' rate over --lr; the paper's 6 is made for 10⁵ updates", runs.number(float, 0))
    add("--concentration", 30.0, "α + β the gates start with", runs.number(float, 2, 3000, open_low=True))
    add("--freeze-backbone", False, "train the heads alone, without Eq. 1 and 2", action="store_true")
    add("--clip", 0.2, "ϵ of Eq. 6", runs.number(float, 0))
    add("--kl-beta", 0.04, "β of Eq. 6", runs.number(float, 0))
    add("--entropy-tau", 0.01, "τ of Eq. 6, Table 6", runs.number(float, 0))
    add("--kl", "sample", "Eq. 11, or the closed form", choices=("sample", "exact"))
    add("--inner-epochs", 1, "updates of the heads per group; above 1 the clip can bind", runs.number(int, 1))
    add("--rewards", None, "terms of Eq. 22: default, paper, or a list as psnr,ssim=0.3,task")
    add("--judge", None, "R_qwen's judge, Appendix B.2: Qwen2.5-VL (hub name or folder), or a server: http://HOST:PORT/v1")
    add("--judge-model", None, "what a server calls the judge's model")
    add("--judge-device", None, "its own; default: rank i's on cuda:(world size + i), beside a CPU trainer cpu")
    add("--judge-mode", None, "expectation over the score's tokens, or generate: the paper's written answer", choices=("logits", "generate"))
    add("--judge-prompt", None, "file with a prompt of your own: <gt>, <degraded>, <restored> mark the images", runs.existing_file)
    add("--judge-args", None, "further flags of judge.py, quoted: '--min-pixels 50176 --dtype fp16'", shlex.split)
    add("--judge-timeout", None, "s a step waits for it before it is started again", runs.number(float, 0, open_low=True))
    add("--judge-patience", None, "failures in a row after which the run stops", runs.number(int, 1))
    add("--weights-dir", None, f"where clip, lpips and aes find their weights; default: {rewards.default_weights_dir()}")
    add("--mask-rule", "fraction", "how rates become masks (README); under adair they do nothing at 128 px", choices=("fraction", "adair"))
    add("--eval-every", None, "steps between validations, which choose best.pt", runs.number(int, 1))
    add("--save-every", None, "steps between checkpoints, last.pt", runs.number(int, 1))
    add("--keep-every", 0, "steps between checkpoints that are kept, step-N.pt; 0: none", runs.number(int, 0))
    add("--max-minutes", None, "end with a checkpoint after so long; --resume takes another", runs.number(float, 0, open_low=True))
    return p


def pretrain_parser():
    p = runs.Parser(prog="train.py pretrain", description=pretrain.__doc__, formatter_class=runs.HelpFormatter)
    p.add_argument("--data-root", help="AdaIR's data folder; default: photographs inside scikit-image")
    p.add_argument("--photos", help="folder of photos on which all tasks are synthesised besides")
    p.add_argument("--init", help="AdaIR to start from; default: from scratch")
    p.add_argument("--out", default="runs/pretrain", help="run folder, created or continued")
    p.add_argument("--dim", type=runs.multiple_of_8, help=f"channels, Table 6 (default: {NEW_MODEL['dim']})")
    p.add_argument("--blocks", type=runs.number(int, 1), nargs=4, help=f"transformer blocks, Table 6 (default: {NEW_MODEL['blocks']})")
    p.add_argument("--refinement", type=runs.number(int, 1), help=f"refinement blocks, Table 6 (default: {NEW_MODEL['refinement']})")
    p.add_argument("--mask-rule", choices=("fraction", "adair"), default="fraction", help="how rates become masks")
    rate = runs.number(float, 0.001, 0.999)
    p.add_argument("--rate", type=rate, help=f"the constant r_h, r_l under --mask-rule fraction (default: {NEW_MODEL['rate']})")
    p.add_argument("--crop", type=runs.multiple_of_8, nargs=2, default=[64, 128], help="px, at first and in the last quarter")
    p.add_argument("--batch-size", type=runs.number(int, 1), default=8, help="crops per step and process at the first crop size")
    p.add_argument("--steps", type=runs.number(int, 1), default=4200, help="updates")
    p.add_argument("--lr", type=runs.number(float, 0), default=1e-3, help="Adam's peak rate")
    p.add_argument("--ema", type=runs.number(float, 0, 1), default=0.998, help="decay of the averaged weights")
    p.add_argument("--cycle", nargs="+", choices=data.TASKS, default=list(data.TASKS), metavar="TASK", help="tasks drawn in turn")
    p.add_argument("--save-every", type=runs.number(int, 1), default=100, help="steps between checkpoints")
    p.add_argument("--amp", choices=("fp32", "bf16"), default="fp32", help="bf16: bfloat16 autocast, for GPUs")
    p.add_argument("--compile", action="store_true", help="torch.compile of the transformer blocks: it takes minutes to start")
    p.add_argument("--workers", type=runs.number(int, 0), help="processes that load images; default: 0 on a CPU, 4 beside a GPU")
    p.add_argument("--max-minutes", type=runs.number(float, 0, open_low=True), help="end with a checkpoint after so long")
    p.add_argument("--seed", type=runs.number(int, 0), default=0, help="of weights and crops")
    p.add_argument("--device", type=runs.device, default=runs.default_device(), help="cpu, cuda, cuda:1, …")
    return p


def parse(argv):
    """Arguments of a post-training run: command line over preset, or the stored ones of a resumed run."""
    parser = post_train_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if any(word.startswith("-") and " " not in word and not word.startswith(("--res", "--judge", "--max-minutes")) for word in argv):
            parser.error("a resumed run keeps its settings: give --resume RUN alone, or with --max-minutes and --judge… flags")
        config = Path(args.resume) / "config.json"
        if not config.exists():
            parser.error(f"{args.resume} is no run folder: it has no config.json")
        stored = {**vars(args), **JUDGE, **PRESETS["demo"], **runs.load_json(config), "resume": args.resume, "max_minutes": args.max_minutes}
        judge = {k: v for k, v in vars(args).items() if k in JUDGE}
        if judge and (stored["judge"] == "none") != (judge.get("judge", stored["judge"]) == "none"):
            parser.error(f"{args.resume} keeps its reward: a run cannot gain or lose its judge")
        if "judge" in judge and not judges.is_url(judge["judge"]):
            judge.setdefault("judge_model", None)  # that of a server
        stored = check_judge(parser, {**stored, **judge})
        stored["device"] = stored["device"].split(":")[0] if "WORLD_SIZE" in os.environ else stored["device"]
        try:
            runs.device(stored["device"])
        except argparse.ArgumentTypeError as error:
            parser.error(f"{config}: {error}")
        return argparse.Namespace(**stored)
    if hasattr(args, "epochs") and not hasattr(args, "steps"):
        args.steps = 0  # whoever names epochs means epochs
    for key, value in PRESETS[args.preset].items():
        if not hasattr(args, key):
            setattr(args, key, value)
    if not args.steps and not args.epochs:
        parser.error("--steps and --epochs are both 0: nothing would be trained")
    if args.objective == "sft" and args.freeze_backbone:
        parser.error("--objective sft with --freeze-backbone would train nothing")
    args = argparse.Namespace(**check_judge(parser, {**JUDGE, **vars(args)}))
    if args.objective == "sft" and args.judge != "none":
        parser.error("--objective sft has no reward: leave --judge out")
    args.init = str(Path(args.init).resolve())  # so that --resume and eval.py work from any folder
    for key in ("data_root", "weights_dir", "list"):
        setattr(args, key, getattr(args, key) and str(Path(getattr(args, key)).resolve()))
    args.out = args.out or f"runs/{args.objective}-{time.strftime('%Y%m%d-%H%M%S')}-seed{args.seed}"
    args.argv = argv
    return args


def check_judge(parser, settings):
    """The settings with the judge's paths made absolute; ends the program if its flags contradict each other."""
    if judges.is_url(settings["judge"]) != bool(settings["judge_model"]):
        parser.error("--judge-model names the model of a server: it goes with --judge http://… and only with that")
    paths = {"judge": Path(settings["judge"]).is_dir(), "judge_prompt": settings["judge_prompt"]}
    return settings | {key: str(Path(settings[key]).resolve()) for key, is_path in paths.items() if is_path}


def main(argv):
    parser = post_train_parser()
    runs.keep_freed_memory()
    pretraining, again = argv[:1] == ["pretrain"], "the same command"
    try:
        args = pretrain_parser().parse_args(argv[1:]) if pretraining else parse(argv)
        args.device = runs.join(args.device)
        args.out = runs.gather(args.out)[0]  # its default has the time in it
        with runs.Interrupts(args.max_minutes) as interrupts:
            try:
                if pretraining:
                    pretrain(args, interrupts)
                else:
                    with judge_of(args) as judge:
                        post_train(args, interrupts, judge)
            except runs.Stopped as stopped:
                run = Path(args.out if pretraining else args.resume or args.out)
                again = f"--resume {run}" if not pretraining and (run / "config.json").exists() else again
                print(f"stopped by {stopped}; {again} goes on")
    except (judges.JudgeError, data.DataError, rewards.RewardError, adair.CheckpointError, policies.PolicyError, runs.RunError) as error:
        return parser.fail(error)
    except OSError as error:  # a folder that cannot be written, a full disk
        return parser.fail(error)
    except torch.OutOfMemoryError:
        return parser.fail(runs.NO_MEMORY)
    except KeyboardInterrupt:
        return parser.fail("stopped at once; --resume RUN goes on from the last checkpoint, the same command if it was pre-training")
    except Exception as error:
        if "torch._dynamo" in sys.modules and isinstance(error, torch._dynamo.exc.TorchDynamoException):  # naming it loads it, for seconds
            return parser.fail(no_compiler(error))
        raise
    finally:
        runs.leave()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
