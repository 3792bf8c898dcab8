"""Time and memory of one IRPO step, and of AdaIR's forward, each against the same thing written
plainly.

    python -m experiments.bench                  a step and inference; the demo model
    python -m experiments.bench --model paper    the same at the published size, random weights
    python -m experiments.bench lrpo             a step of LRPO against the size of its group

Both sides run in one process with the same weights, inputs and actions, in turns; a ratio is one of
medians. Figures of two runs, and of two machines, cannot be compared. What is written plainly here
is what the tests hold the fast code to.
"""

import contextlib
import copy
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory here, talks

import torch
import torch.nn.functional as F
import tyro
from pydantic import Field

import lrpo
import report
import runs
import study
import train
from config import DEMO_MODEL, parse, parse_over
from data import DataError, list_training
from grpo import rollout
from model import AdaIR, CheckpointError, load_adair
from rewards import Reward, parse_terms


@dataclass
class Config:
    """Measure."""

    what: tyro.conf.Positional[Literal["both", "step", "inference", "lrpo"]] = "both"
    """both: step and inference; lrpo: a step of LRPO on one image, for G of 4, 16, 64, 256"""
    model: Literal["demo", "paper"] = "demo"
    """paper: Table 6's size, random weights"""
    crop: Annotated[int, Field(ge=16, le=256, multiple_of=8)] = 128
    """px a side, of the step"""
    group_size: runs.Positive = 4
    """G, of the step"""
    sizes: tuple[runs.MultipleOf8, ...] = (256, 512)
    """px a side, of inference"""
    repeats: runs.Positive = 5
    """timings of which the median is taken"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast, on our side alone"""
    compile: bool = False
    """torch.compile, of inference, on both sides"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


# ------------------------------------------------------------------------- AdaIR, written plainly
# The way the equations read. Of `model.py` only the layers and their weights are used.


def norm(layer, x):
    x = x.permute(0, 2, 3, 1)
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, correction=0)
    x = (x - mean) / torch.sqrt(variance + 1e-5) * layer.body.weight + layer.body.bias
    return x.permute(0, 3, 1, 2)


def channel_attention(q, k, v, temperature):
    """softmax(τ · q̂ k̂ᵀ) · v between channels, in len(temperature) heads; maps (B, C, H, W)."""
    b, c, h, w = q.shape
    q, k, v = (t.reshape(b, len(temperature), -1, h * w) for t in (q, k, v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return ((scores * temperature).softmax(dim=-1) @ v).reshape(b, c, h, w)


def self_attention(block, x):
    q, k, v = block.qkv_dwconv(block.qkv(x)).chunk(3, dim=1)
    return block.project_out(channel_attention(q, k, v, block.temperature))


def cross_attention(block, x, y):
    q, (k, v) = block.q_dwconv(block.q(x)), block.kv_dwconv(block.kv(y)).chunk(2, dim=1)
    return block.project_out(channel_attention(q, k, v, block.temperature))


def feed_forward(block, x):
    gate, value = block.dwconv(block.project_in(x)).chunk(2, dim=1)
    return block.project_out(F.gelu(gate) * value)


def transformer(blocks, x):
    for block in blocks:
        x = x + self_attention(block.attn, norm(block.norm1, x))
        x = x + feed_forward(block.ffn, norm(block.norm2, x))
    return x


def aflb(block, x, y, constant_rates, control):
    """Spectrum rolled, masked, rolled back and inverted, once for either band; the mask is filled
    in a loop."""
    h, w = y.shape[-2:]
    f = block.conv1(F.interpolate(x, (h, w), mode="bilinear", align_corners=False))
    rates, g_f, g_o = f.new_tensor([constant_rates] * len(f)), 1.0, 1.0
    if control is not None:
        controls = control(f, y)
        rates, g_f, g_o = controls[:, :2], *controls[:, 2:, None, None, None].unbind(dim=1)
    mask = torch.zeros_like(f)
    for of_image, (r_h, r_l) in zip(mask, rates.tolist()):
        a, b = round(r_h * h / 2 + 1e-4), round(r_l * w / 2 + 1e-4)  # as in model.py where it ties
        of_image[:, h // 2 - a : h // 2 + a, w // 2 - b : w // 2 + b] = 1
    spectrum = torch.roll(torch.fft.fft2(f, norm="forward"), (h // 2, w // 2), dims=(2, 3))
    bands = []
    for part in (spectrum * mask, spectrum * (1 - mask)):
        part = torch.roll(part, (-(h // 2), -(w // 2)), dims=(2, 3))
        bands.append(torch.fft.ifft2(part, norm="forward").abs())
    low = cross_attention(block.channel_cross_h, bands[0], y)
    high = cross_attention(block.channel_cross_l, bands[1], y)
    o = cross_attention(block.channel_cross_agg, y, block.frequency_refine(low, high))
    return g_f * (block.para2 * y) + g_o * (block.para1 * o)  # Eq. 5


def plain_adair(model, x, controller=None):
    """What model(x, controller) computes under mask rule fraction."""

    def decided(level, y):
        control = controller and partial(controller, level)
        block = (model.fre1, model.fre2, model.fre3)[level]
        return aflb(block, x, y, model.config["rates"], control)

    skip1 = transformer(model.encoder_level1, model.patch_embed.proj(x))
    skip2 = transformer(model.encoder_level2, model.down1_2.body(skip1))
    skip3 = transformer(model.encoder_level3, model.down2_3.body(skip2))
    y = transformer(model.latent, model.down3_4.body(skip3))
    y = torch.cat((model.up4_3.body(decided(0, y)), skip3), dim=1)
    y = transformer(model.decoder_level3, model.reduce_chan_level3(y))
    y = torch.cat((model.up3_2.body(decided(1, y)), skip2), dim=1)
    y = transformer(model.decoder_level2, model.reduce_chan_level2(y))
    y = torch.cat((model.up2_1.body(decided(2, y)), skip1), dim=1)
    y = transformer(model.refinement, transformer(model.decoder_level1, y))
    return model.output(y) + x


# -------------------------------------------------------------------------- a step, written plainly


def plain_step(restore, policy, reference, reward, batch, actions, beta=0.04, tau=0.01, eps=1e-6):
    """The loss of a step, Eq. 7, with graph: image by image and rollout by rollout, every rollout a
    forward of its own with graph, rewarded by itself, densities by torch.distributions.

    restore(x, controller): the model. actions: (B, G, 3, 4), which the policy has just drawn, so
    that ρ is 1 and the clip of Eq. 10 does nothing. Both λ are those at the start.
    """
    losses = []
    for b, of_image in enumerate(actions):
        x, gt, task = batch.degraded[b : b + 1], batch.gt[b : b + 1], batch.tasks[b : b + 1]
        outputs, rewards, ratios, rest = [], [], [], []
        for action in of_image:
            controller = policy.replay(action[None])
            y = restore(x, controller)  # Eq. 4, 5
            density, start = (
                torch.distributions.Beta(*heads.densities(controller.states))
                for heads in (policy, reference)
            )
            log_prob, ref = (d.log_prob(action).sum() for d in (density, start))  # Eq. 23
            ratio = (log_prob - log_prob.detach()).exp()  # Eq. 9
            kl, entropy = ratio * (log_prob - ref.detach()), density.entropy().sum()  # Eq. 11
            outputs.append(y)
            rewards.append(reward(y.detach()[:, None], x, gt, task)[0].squeeze())  # Eq. 22
            ratios.append(ratio)
            rest.append(beta * kl - tau * entropy)
        r = torch.stack(rewards)
        advantages = (r - r.mean()) / ((r - r.mean()).square().mean() + eps).sqrt()  # Eq. 8
        loss_rl = (torch.stack(rest) - torch.stack(ratios) * advantages).mean()  # Eq. 6, 10
        best, mean = outputs[r.argmax()], restore(x, policy.mean())
        sup, cons = (best - gt).abs().mean(), (best - mean).abs().mean()  # Eq. 1, 2
        losses.append(loss_rl + 0.35 * sup + 0.2 * cons)
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def measured(config, taken):
    """Appends to `taken` the seconds that the block takes; at the last of its turns, after a
    warm-up and config.repeats, the MiB of tensors that it holds at its height, beyond what was held
    before. (A process takes more than its tensors.)"""
    gc.collect()
    if len(taken) <= config.repeats:
        start = time.perf_counter()
        yield
        if runs.on_gpu(config.device):
            torch.cuda.synchronize(config.device)
        taken.append(time.perf_counter() - start)
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        yield
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    taken.append(max(itertools.accumulate(event.nbytes() for event in events)) / 2**20)


def line(name, ours, plain, difference):
    """A line of the table from what `measured` took of both sides."""
    seconds = [1000 * statistics.median(taken[1:-1]) for taken in (ours, plain)]
    cells = [name]
    for a, b in (seconds, (ours[-1], plain[-1])):
        cells += [f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}"]
    return [*cells, difference]


def gradients(*modules):
    named = (pair for module in modules for pair in module.named_parameters())
    return {name: p.grad for name, p in named if p.grad is not None}


def distance(ours, plain):
    """Of two sets of gradients {name: tensor} as one vector each: ‖a − b‖/‖b‖."""
    assert ours.keys() == plain.keys()
    difference = torch.stack([(ours[name] - g).norm() for name, g in plain.items()]).norm()
    return (difference / torch.stack([g.norm() for g in plain.values()]).norm()).item()


class Turns(runs.Run):
    """A run whose loop is given one batch again and again, in turns with the plain step on it.
    Leaves what `measured` took of both, their losses and their gradients, [ours, plain] each."""

    def batches(self, crops, size, until=None):
        model, policy = self.state.live.values()
        reference = self.state.reference
        for parameter in reference.parameters():  # else the KL and its gradient are 0
            parameter.data += 0.02 * torch.randn_like(parameter)
        self.crops = 0  # so that the state stays what it is
        batch = crops.collate([crops[n] for n in range(size)])
        degraded, gt = (t.to(model.output.weight) for t in (batch.degraded, batch.gt))
        batch, self.names = batch._replace(degraded=degraded, gt=gt), batch.names
        with torch.no_grad(), study.half_precision(self.flags):
            generators = study.generators_of(self.flags, batch.numbers)
            group_size, encoding = self.config.group_size, model.encode(degraded)
            actions = rollout(model, policy, encoding, group_size, generators).actions

        # in the layout that plain layers happen to return
        plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        heads = copy.deepcopy(policy)
        optimizer = torch.optim.Adam([*plain.parameters(), *heads.parameters()], lr=0.0, fused=True)
        restore = partial(plain_adair, plain)

        self.taken = [], []
        for _ in range(self.config.repeats + 2):
            with measured(self.config, self.taken[0]):
                yield batch
            with measured(self.config, self.taken[1]):
                loss = plain_step(restore, heads, reference, self.reward, batch, actions)
                loss.backward()
                optimizer.step()
            self.losses = next(runs.read_metrics(self.folder))["loss/total"], loss.item()
            self.gradients = gradients(model, policy), gradients(plain, heads)
            self.state.live.zero_grad(), optimizer.zero_grad()


def time_step(config, model):
    """The loop of `train.post_train` at rates of 0, on a real crop: the `Turns`, when they are
    over."""
    flags = ["--lr", 0, "--hard-ratio", 1, "--batch-size", 1, "--device", config.device]
    flags += ["--crop", config.crop, "--group-size", config.group_size, "--amp", config.dtype]
    flags += ["--advantage-eps", 1e-6]
    flags = parse([str(flag) for flag in flags])
    reward = Reward(parse_terms("default"), config.device)
    samples = list_training(None, tasks=["dehaze"]).train[:1]  # where the rewards differ
    talk = contextlib.redirect_stdout(sys.stderr)  # what a run says is no figure
    with tempfile.TemporaryDirectory() as folder, talk:
        with Turns(folder, runs.Stop(), "", config.device, save_every=1 << 60) as run:
            run.config, run.flags, run.reward = config, flags, reward
            train.post_train(flags, run, model, reward, samples, [])
    return run


# ------------------------------------------------------------------------------------- the program


def build(config):
    """The model of --model, on its device, in eval mode."""
    torch.manual_seed(0)
    if config.model == "demo":
        model = load_adair(DEMO_MODEL)
    else:
        model = AdaIR(mask_rule="fraction", rates=(0.25, 0.25)).eval()
        for block in (model.fre1, model.fre2, model.fre3):
            torch.nn.init.normal_(block.para1, std=0.1)  # 0 in a fresh one: no gradient behind it
    return model.to(config.device, memory_format=torch.channels_last)


def bench_step(config):
    """Our step against the plain one: a line of the table."""
    run = time_step(config, build(config))
    loss = abs(run.losses[0] / run.losses[1] - 1)
    difference = f"loss {loss:.0e}, gradient {distance(*run.gradients):.0e}"
    return line(f"step, crop {config.crop}, G = {config.group_size}", *run.taken, difference)


@torch.inference_mode()
def bench_inference(config, side):
    """AdaIR's forward against the plain one's, without graph: a line of the table."""
    model, plain = build(config), build(config).to(memory_format=torch.contiguous_format)
    x, taken = torch.rand(1, 3, side, side, device=config.device), ([], [])
    kind, is_half = torch.device(config.device).type, config.dtype == "bf16"
    ours, plainly = (
        torch.compile(side) if config.compile else side
        for side in (model, partial(plain_adair, plain))
    )
    for _ in range(config.repeats + 2):
        with measured(config, taken[0]), torch.autocast(kind, torch.bfloat16, enabled=is_half):
            restored = ours(x)
        with measured(config, taken[1]):
            wanted = plainly(x)
    return line(f"forward at {side} px", *taken, f"{(restored - wanted).abs().max():.0e}")


class Again(runs.Run):
    """A run whose loop is given one batch again and again. Leaves what `measured` took of it."""

    def batches(self, crops, size, until=None):
        self.crops, self.taken = 0, []  # so that the state stays what it is
        batch = crops.collate([crops[n] for n in range(size)])
        degraded, gt = (t.to(self.config.device) for t in (batch.degraded, batch.gt))
        batch, self.names = batch._replace(degraded=degraded, gt=gt), batch.names
        for _ in range(self.config.repeats + 2):
            with measured(self.config, self.taken):
                yield batch


def bench_lrpo(config, group_size):
    """A step of `lrpo.post_train` on one image: a line of the table."""
    flags = ["--batch-size", 1, "--device", config.device]
    flags += ["--crop", config.crop, "--group-size", group_size]
    flags = parse_over("lrpo.py", "", dict(demo=lrpo.Config()), [str(flag) for flag in flags])
    reward = Reward(parse_terms("default"), config.device)
    samples = list_training(None, tasks=["dehaze"]).train[:1]
    talk = contextlib.redirect_stdout(sys.stderr)  # what a run says is no figure
    with tempfile.TemporaryDirectory() as folder, talk:
        with Again(folder, runs.Stop(), "", config.device, save_every=1 << 60) as run:
            run.config = config
            lrpo.post_train(flags, run, build(config), reward, samples, [])
    return [
        f"G = {group_size}",
        f"{statistics.median(run.taken[1:-1]):.2f}",
        f"{run.taken[-1]:.0f}",
    ]


def run_program(argv):
    config = runs.flags(Config, "experiments.bench", __doc__, argv)
    runs.check_device(config.device)
    if config.what == "lrpo":
        rows = [bench_lrpo(config, group_size) for group_size in (4, 16, 64, 256)]
        head = ["LRPO, one image", "s a step", "MiB"]
    else:
        rows = [bench_step(config)] if config.what != "inference" else []
        rows += [bench_inference(config, s) for s in config.sizes if config.what != "step"]
        head = ["", "ours, ms", "plain, ms", "ratio", "ours, MiB", "plain, MiB", "ratio"]
        head.append("difference")
    where = f"{torch.get_num_threads()} CPU threads"
    if runs.on_gpu(config.device):
        where = torch.cuda.get_device_name(config.device)
    kind = f"{config.dtype}, compiled" if config.compile else config.dtype
    print(f"model {config.model}, {kind}, {where}, torch {torch.__version__}, ", end="")
    print(f"medians of {config.repeats}\n")
    print(report.markdown(head, rows))


def main(argv=None):
    return runs.program("experiments.bench", run_program, argv, (DataError, CheckpointError))


if __name__ == "__main__":
    sys.exit(main())
