"""IRPO: GRPO post-training of an image restorer. The loop is `post_train`, one step of it `irpo_step`.

    python train.py --hard-ratio 0.3      post-train the demo model on its hard samples, nothing downloaded
    python train.py pretrain …            AdaIR's own supervised training, which the demo model came from
"""

import argparse
import contextlib
import copy
import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
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
    "demo": dict(steps=200, epochs=0, batch_size=1, lr=1e-5, head_lr_factor=600.0, eval_every=100, rewards="default"),
    "paper": dict(steps=0, epochs=30, batch_size=1, lr=3e-5, head_lr_factor=6.0, eval_every=5000, rewards="paper"),
}


# What the judge's flags are unless given; a resumed run takes those that are.
JUDGE = dict(
    judge="none", judge_model=None, judge_device=None, judge_mode="logits", judge_prompt=None, judge_args=None,
    judge_timeout=60.0, judge_patience=5,
)  # fmt: skip


def irpo_step(model, policy, ref, reward, batch, args, progress, generator, judge=None):
    """Forward and backward of one IRPO step; gradients are left in the parameters.

    batch: degraded and gt (B, 3, H, W), B tasks; judge: judge.Judge, which R_qwen comes from. Returns (metrics, replay): metrics {name: scalar tensor}, and what
    `policy_loss` needs to use the group once more.
    """
    degraded, gt, tasks = batch
    with torch.set_grad_enabled(not args.freeze_backbone), half_precision(args):
        encoding = model.encode(degraded)  # no action in it: one serves the whole group and the deterministic output

    with torch.no_grad():
        with half_precision(args):
            y, states, actions = draw_group(model, policy, encoding, args.group_size, generator)
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
        value = value[value.isfinite()] if name == "qwen" else value
        if len(value):
            metrics |= {f"rewards/{name}/mean": value.mean(), f"rewards/{name}/std": value.std(correction=0)}

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


def draw_group(model, policy, encoding, group_size, generator, at_once=4):
    """G stochastic rollouts per image, without graph, Eq. 4: (restored (B·G, 3, H, W), states, actions (B·G, 3, 4)).

    They are decoded as one batch, or `at_once` per image after each other, so that the memory a larger group takes is
    that of its images.
    """
    encoding, parts = encoding.detach(), []
    for first in range(0, group_size, at_once):
        n = min(at_once, group_size - first)
        rollout = policy.sample(generator)
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


def post_train(args, judge=None):
    """The whole method: list, mine, post-train, compare. Returns the run folder."""
    device = args.device
    run = Path(args.resume or args.out)
    if not args.resume:
        runs.refuse_existing(run)
    checkpoint = adair.read_checkpoint(run / "last.pt") if args.resume and (run / "last.pt").exists() else None

    # The three things a run is made of: a pre-trained model, a reward, samples.
    pretrained = load_pretrained(args.init, args.mask_rule).to(device, memory_format=torch.channels_last)
    terms = rewards.parse_terms(args.rewards, judge is not None)
    if args.objective == "irpo" and args.crop < rewards.smallest_side(terms):
        raise runs.RunError(f"crops of {args.crop} px are too small for these rewards: they need {rewards.smallest_side(terms)}")
    reward = rewards.Reward(terms, device, args.weights_dir) if args.objective == "irpo" else None
    digest = data.model_digest(pretrained)
    known = known_scores([args.scores, run / "hard.json"], digest)
    train, val = usable_samples([args.data_root], args.crop)
    run.mkdir(parents=True, exist_ok=True)
    if judge:
        start_judge(judge, val[0], args)
    if reward:
        described = rewards.describe_terms(terms, judge and f"{args.judge_model or args.judge}, {args.judge_mode}")
        print_terms(described)
        runs.save_json(run / "rewards.json", described)
    runs.save_json(run / "config.json", vars(args))

    before_restore = partial(adair.restore, pretrained)
    hard = mine_hard(args, run, before_restore, digest, known, train, resumed=checkpoint is not None)

    # The policy starts where the pre-trained model is; π_ref stays there.
    torch.manual_seed(args.seed)
    model = copy.deepcopy(pretrained)
    model.config["mask_rule"] = args.mask_rule
    policy = policies.load_policy(checkpoint) if checkpoint else policies.policy_for(model, args.concentration)
    policy = policy.to(device)
    ref = policy.frozen_copy()
    optimizer = adam(model, policy, args)
    step, best_psnr = 0, -math.inf
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        ref.load_state_dict(checkpoint["ref"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, best_psnr = checkpoint["step"], checkpoint["best_psnr"]

    def save(name):
        weights = dict(model=model.state_dict(), config=model.config, policy=policy.state_dict(), policy_config=policy.config)
        rest = dict(ref=ref.state_dict(), optimizer=optimizer.state_dict(), step=step, best_psnr=best_psnr)
        runs.save_checkpoint(run / name, weights | rest)

    pictures = one_of_each_task(val)
    before, before_images = data.evaluate(before_restore, val, "before", pictures)
    if not checkpoint:
        best_psnr = keep_best(save, before, best_psnr)  # best.pt starts as the start
    after_restore = partial(adair.restore, model, controller=policy.mean())
    steps = args.steps or math.ceil(args.epochs * len(hard) / args.batch_size)
    if args.compile:
        compile_blocks(model)
    crops = data.Crops(hard, args.crop, args.seed, steps * args.batch_size)
    loader = data_loader(crops, args.batch_size, step * args.batch_size, args)
    log = runs.Log(run, step)
    bar = tqdm(total=steps, initial=step, desc=args.objective, unit="step", smoothing=0.05)
    start = time.perf_counter()
    for degraded, gt, tasks, names, broken in loader:
        report_skipped(broken)
        if names:
            batch = (degraded.to(device, non_blocking=True), gt.to(device, non_blocking=True), tasks)
            optimizer.zero_grad()
            if args.objective == "irpo":
                generator = torch.Generator(device).manual_seed((args.seed << 32) + step)
                try:
                    metrics, replay = irpo_step(model, policy, ref, reward, batch, args, step / steps, generator, judge)
                except judges.JudgeError as error:  # it failed too often; nothing of this step is in the weights
                    bar.close()
                    save("last.pt")
                    more = f"--resume {run} goes on at step {step}, with other --judge… flags if need be"
                    raise runs.RunError(f"{error}; {more}") from None
                metrics |= optimizer_step(optimizer)
                for _ in range(args.inner_epochs - 1):  # the same group again: ρ leaves 1, the clip may bind
                    optimizer.zero_grad()
                    loss, more = policy_loss(policy, ref, replay, args)
                    loss.backward()
                    metrics |= more | optimizer_step(optimizer)
            else:
                metrics = sft_step(model, policy, batch, args)
                metrics |= optimizer_step(optimizer)
            values = torch.stack([v.detach().float() for v in metrics.values()]).tolist()  # one synchronisation
            rates = {"lr": args.lr, "lr_heads": args.lr * args.head_lr_factor}
            metrics = dict(zip(metrics, values))
            if not math.isfinite(metrics["grad_norm"]):  # looked at here, so that a GPU need not wait in mid-step
                bar.close()
                raise runs.RunError(f"the gradient of {', '.join(names)} is not finite; a smaller --lr may help")
            metrics |= rates | {"step_time": time.perf_counter() - start}
            if judge:
                metrics |= judge.metrics
                if judge.problem:
                    tqdm.write(f"judge: {judge.problem}")
            log.write(step + 1, metrics)
            shown = {"reward": "reward", "psnr": "psnr_det", "kl": "kl"}
            bar.set_postfix({k: f"{metrics[v]:.3f}" for k, v in shown.items() if v in metrics}, refresh=False)
        step += 1
        bar.update()
        if step % args.eval_every == 0 and step < steps:
            best_psnr = keep_best(save, data.evaluate(after_restore, val, "validate")[0], best_psnr)
        if step % args.save_every == 0 or step == steps:
            save("last.pt")
        start = time.perf_counter()
    bar.close()
    log.close()

    # The last checkpoint against the start, on images nothing was trained on or chosen by.
    after, after_images = data.evaluate(after_restore, val, "after", pictures)
    keep_best(save, after, best_psnr)
    write_report(run, args, before, after, val, pictures, before_images, after_images)
    return run


def mine_hard(args, run, restore, digest, known, train, resumed):
    """D_hard (Sec. 3.2): the samples that the pre-trained model, `restore`, does worst on; writes hard.json."""
    rows, broken = data.mine(restore, train, known, pixels=1 << 20 if runs.on_gpu(args.device) else 0)
    report_skipped(broken)
    if not rows:
        raise data.DataError("none of the training images can be read")
    chosen = data.select(rows, args.hard_ratio, args.select, args.hard_scope, args.seed)
    for i in chosen:
        rows[i]["selected"] = True
    mined = dict(model=digest, ratio=args.hard_ratio, select=args.select, rows=rows)
    if resumed and runs.load_json(run / "hard.json") != mined:
        raise runs.RunError(f"the training images or the model at {args.init} changed since {run} began: start a new run")
    runs.save_json(run / "hard.json", mined)
    print(f"D_hard: {len(chosen)} of {len(rows)} training images ({args.select}, ratio {args.hard_ratio})")
    by_name = {(s.task, s.name): s for s in train}
    hard = [by_name[rows[i]["task"], rows[i]["name"]] for i in chosen]
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
    judge = judges.Judge(command, Path(args.resume or args.out) / "judge.log", args.judge_timeout, args.judge_patience)
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


def optimizer_step(optimizer):
    """Adam's step; {"grad_norm": …}."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.step()
    return {"grad_norm": norm}


def keep_best(save, rows, best_psnr):
    """Saves best.pt if the mean PSNR over tasks of these validation rows is the highest so far."""
    values = runs.mean_by_task(rows, "psnr").values()
    if sum(values) / len(values) > best_psnr:
        best_psnr = sum(values) / len(values)
        save("best.pt")
    return best_psnr


def data_loader(crops, batch, start, args):
    """Batches of crops number start, start + 1, …"""
    on_gpu = runs.on_gpu(args.device)
    workers = (4 if on_gpu else 0) if args.workers is None else args.workers
    sampler = range(start, len(crops))
    return DataLoader(crops, batch, sampler=sampler, num_workers=workers, collate_fn=data.collate, pin_memory=on_gpu)


def known_scores(paths, digest):
    """{sample digest: psnr} of earlier minings (hard.json files) under the model of this digest."""
    known = {}
    for path in paths:
        if path and Path(path).exists():
            stored = runs.load_json(path)
            try:
                scores = {row["digest"]: row["psnr"] for row in stored["rows"]}
                same = stored["model"] == digest
            except (KeyError, TypeError):
                raise runs.RunError(f"{path} is not the hard.json of a run") from None
            print(f"{path}: {len(scores)} scores " + ("reused" if same else "of another model, not used"))
            known |= scores if same else {}
    return known


def usable_samples(roots, crop):
    """(training, validation) samples of all roots (None: the embedded photographs), as far as their headers promise to
    work; what does not is named. Raises DataError when nothing is left."""
    sources = [data.list_training(root) for root in roots]
    train, val, problems = (sum(parts, []) for parts in zip(*sources))
    train, more = data.check_headers(train, crop)
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
    runs.plot_curves(run, runs.read_metrics(run))
    figures = []
    for i in pictures:
        degraded, gt = data.evaluation_pair(val[i])
        figures.append((val[i].task, degraded, before_images[i], after_images[i], gt))
    runs.plot_samples(run / "samples.png", figures)
    rows = [row for row in runs.read_metrics(run) if "judge/failures" in row]
    unscored = int(sum(row["judge/failures"] for row in rows))
    judged = f" The judge left {unscored} rollouts without a score in {len(rows)} steps." if rows else ""
    what = "IRPO" if args.objective == "irpo" else "the SFT control (L1 on the deterministic output)"
    text = f"""# {what}: before and after, {len(before)} held-out images

{table}

Seed {args.seed}, torch {torch.__version__}, {args.device}. PSNR and SSIM by AdaIR's protocol, deterministic output of the last step.{judged}
Command: `python train.py {" ".join(args.argv)}`

![curves](curves.png)
![samples](samples.png)
"""
    runs.write_atomic(run / "report.md", text.encode())
    runs.save_json(run / "report.json", dict(before=before, after=after))
    print(f"\n{table}\n\neverything of this run lies in {run}: report.md, curves.png, samples.png, last.pt, metrics.jsonl")


def pretrain(args):
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
    if (run / "pretrain.pt").exists():
        state = adair.read_checkpoint(run / "pretrain.pt")
        if not {"net", "ema", "opt", "step", "config", "settings"} <= state.keys():
            raise runs.RunError(f"{run}/pretrain.pt is not of this version: choose another --out")
        if state["config"] != net.config:
            raise runs.RunError(f"{run} holds the training of another model ({state['config']}): choose another --out")
        other = [k for k, v in settings.items() if state["settings"][k] != v]
        if other:
            raise runs.RunError(f"{run} was trained with another --{other[0].replace('_', '-')}: give the same, or another --out")
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["opt"])
        step = state["step"]
        print(f"{run} goes on at step {step} of {args.steps}")

    if args.compile:
        compile_blocks(net)

    def stage(step):  # the last quarter sees the larger crop, in batches of about the same number of pixels
        crop = args.crop[-1] if step >= args.steps * 3 // 4 else args.crop[0]
        return crop, max(1, args.batch_size * args.crop[0] ** 2 // crop**2)

    with open(run / "pretrain.jsonl", "a") as log:
        bar = tqdm(total=args.steps, initial=step, desc="pretrain", smoothing=0.02)
        while step < args.steps:
            crop, batch = stage(step)
            end = next((s for s in range(step, args.steps) if stage(s) != (crop, batch)), args.steps)
            crops = data.Crops(samples, crop, args.seed, end * batch, fresh=True, cycle=args.cycle)
            for degraded, gt, _, names, broken in data_loader(crops, batch, step * batch, args):
                report_skipped(broken)
                warm_up, decay = min(1, (step + 1) / 200), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
                optimizer.param_groups[0]["lr"] = args.lr * warm_up * decay + 1e-6
                if names:
                    degraded = degraded.to(args.device)
                    with half_precision(args):
                        restored = net(degraded)
                    loss = (restored - gt.to(args.device)).abs().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                    optimizer.step()
                    ema.update_parameters(net)
                step += 1
                bar.update()
                if names and step % 20 == 0:
                    bar.set_postfix(l1=f"{loss.item():.4f}", crop=crop)
                    print(json.dumps(dict(step=step, l1=loss.item(), crop=crop)), file=log, flush=True)
                if step % args.save_every == 0 or step == args.steps:
                    state = dict(net=net.state_dict(), ema=ema.state_dict(), opt=optimizer.state_dict(), step=step)
                    state |= dict(config=net.config, settings=settings)
                    runs.save_checkpoint(run / "pretrain.pt", state)
                    runs.save_checkpoint(run / "model.pt", dict(model=ema.module.state_dict(), config=net.config))
        bar.close()
    rows, _ = data.evaluate(partial(adair.restore, ema.module.eval()), val, "validate")
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
    add("--batch-size", None, "images per update, each with a group of its own, Table 6", runs.number(int, 1))
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
    add("--save-every", 50, "steps between checkpoints", runs.number(int, 1))
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
    p.add_argument("--batch-size", type=runs.number(int, 1), default=8, help="crops per step at the first crop size")
    p.add_argument("--steps", type=runs.number(int, 1), default=4200, help="updates")
    p.add_argument("--lr", type=runs.number(float, 0), default=1e-3, help="Adam's peak rate")
    p.add_argument("--ema", type=runs.number(float, 0, 1), default=0.998, help="decay of the averaged weights")
    p.add_argument("--cycle", nargs="+", choices=data.TASKS, default=list(data.TASKS), metavar="TASK", help="tasks drawn in turn")
    p.add_argument("--save-every", type=runs.number(int, 1), default=100, help="steps between checkpoints")
    p.add_argument("--amp", choices=("fp32", "bf16"), default="fp32", help="bf16: bfloat16 autocast, for GPUs")
    p.add_argument("--compile", action="store_true", help="torch.compile of the transformer blocks: it takes minutes to start")
    p.add_argument("--workers", type=runs.number(int, 0), help="processes that load images; default: 0 on a CPU, 4 beside a GPU")
    p.add_argument("--seed", type=runs.number(int, 0), default=0, help="of weights and crops")
    p.add_argument("--device", type=runs.device, default=runs.default_device(), help="cpu, cuda, cuda:1, …")
    return p


def parse(argv):
    """Arguments of a post-training run: command line over preset, or the stored ones of a resumed run."""
    parser = post_train_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if any(word.startswith("-") and " " not in word and not word.startswith(("--res", "--judge")) for word in argv):
            parser.error("a resumed run keeps its settings: give --resume RUN alone, or with --judge… flags")
        config = Path(args.resume) / "config.json"
        if not config.exists():
            parser.error(f"{args.resume} is no run folder: it has no config.json")
        stored = {**vars(args), **JUDGE, **PRESETS["demo"], **runs.load_json(config), "resume": args.resume}
        judge = {k: v for k, v in vars(args).items() if k in JUDGE}
        if judge and (stored["judge"] == "none") != (judge.get("judge", stored["judge"]) == "none"):
            parser.error(f"{args.resume} keeps its reward: a run cannot gain or lose its judge")
        if "judge" in judge and not judges.is_url(judge["judge"]):
            judge.setdefault("judge_model", None)  # that of a server
        stored = check_judge(parser, {**stored, **judge})
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
    for key in ("data_root", "weights_dir"):
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
    try:
        if argv[:1] == ["pretrain"]:
            pretrain(pretrain_parser().parse_args(argv[1:]))
        else:
            args = parse(argv)
            with judge_of(args) as judge:
                post_train(args, judge)
    except (judges.JudgeError, data.DataError, rewards.RewardError, adair.CheckpointError, policies.PolicyError, runs.RunError) as error:
        return parser.fail(error)
    except OSError as error:  # a folder that cannot be written, a full disk
        return parser.fail(error)
    except torch.OutOfMemoryError:
        return parser.fail("out of GPU memory: a smaller --crop or --batch-size (or --group-size) needs less")
    except KeyboardInterrupt:
        again = "the same command" if argv[:1] == ["pretrain"] else "--resume RUN"
        return parser.fail(f"stopped; {again} goes on from the last checkpoint")
    except torch._dynamo.exc.TorchDynamoException as error:
        return parser.fail(no_compiler(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
