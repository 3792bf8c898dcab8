"""Time and memory of one IRPO step, and of AdaIR's forward, each against the same thing
written plainly.

    python -m experiments.bench                  a step, its parts and inference; the demo model
    python -m experiments.bench --model paper    the same at the published size, random weights

Both sides run in one process with the same weights, inputs and actions, in turns; a ratio is one of
medians. Figures of two runs, and of two machines, cannot be compared.
"""

import contextlib
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from functools import partial
from typing import Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory here, talks

import torch
import torch.nn.functional as F
import tyro

import runs
import train
from config import DEMO_MODEL, parse
from data import DataError, in_draws, list_training
from grpo import group_advantages, grpo_loss, rollout, supervised_losses, total_loss
from model import (
    AFLB,
    AdaIR,
    Attention,
    CheckpointError,
    CrossAttention,
    Encoding,
    FeedForward,
    LayerNorm,
    Resample,
    load_adair,
)
from rewards import Reward, parse_terms

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of the weights


@dataclass
class Config:
    """Measure."""

    what: tyro.conf.Positional[Literal["both", "step", "inference"]] = "both"
    """both: step and inference"""
    model: Literal["demo", "paper"] = "demo"
    """paper: Table 6's size, random weights"""
    crop: int = 128
    """px a side, of the step; 16 to 256"""
    group_size: int = 4
    """G, of the step"""
    batch_size: int = 1
    """images, of the step"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16: autocast on our side alone; fp64: of both backbones"""
    sizes: tuple[int, ...] = (256, 512)
    """px a side, of inference"""
    repeats: int = 5
    """timings of which the median is taken"""
    seed: int = 0
    """of weights, crops and actions"""


def check(config):
    """Raises RunError, in one sentence, for values that cannot work."""
    counts = dict.fromkeys(("group_size", "batch_size", "repeats"), "[1, inf)")
    runs.check_ranges(config, **counts, crop="[16, 256]", seed="[0, 2147483647]")
    runs.check_multiple_of_8("--crop", config.crop)
    runs.check_multiple_of_8("--sizes", *config.sizes)
    runs.check_device(config.device)


# ------------------------------------------------------------------------- AdaIR, written plainly
# What `model.py` does otherwise, the way the equations read: forward methods that take the place of
# ours.


def plain_layer_norm(self, x):
    x = x.permute(0, 2, 3, 1)
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, correction=0)
    x = (x - mean) / torch.sqrt(variance + 1e-5) * self.body.weight + self.body.bias
    return x.permute(0, 3, 1, 2)


def plain_channel_attention(q, k, v, temperature):
    b, c, h, w = q.shape
    q, k, v = (t.reshape(b, len(temperature), -1, h * w) for t in (q, k, v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return ((scores * temperature).softmax(dim=-1) @ v).reshape(b, c, h, w)


def plain_attention(self, x):
    q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
    return self.project_out(plain_channel_attention(q, k, v, self.temperature))


def plain_cross_attention(self, x, y):
    k, v = self.kv_dwconv(self.kv(y)).chunk(2, dim=1)
    return self.project_out(
        plain_channel_attention(self.q_dwconv(self.q(x)), k, v, self.temperature)
    )


def plain_feed_forward(self, x):
    gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
    return self.project_out(F.gelu(gate) * value)


def plain_aflb(self, x, y, mask_rule, rates, control=None):
    """Spec of the original: roll, mask, roll back and invert, once for either band; the mask is
    filled in a loop."""
    b, _, h, w = y.shape
    f = self.conv1(F.interpolate(x, (h, w), mode="bilinear", align_corners=False))
    if control is not None:
        controls = control(f, y)
        rate, g_f, g_o = controls[:, :2], *controls[:, 2:, None, None, None].unbind(dim=1)
    elif mask_rule == "adair":
        rate = self.rate_conv(f.mean(dim=(2, 3), keepdim=True)).flatten(1).sigmoid()
    else:
        rate = f.new_tensor(rates).expand(b, 2)
    mask = torch.zeros_like(f)
    for i in range(b):
        rows = int(self.half_size(rate[i, 0], h, mask_rule))
        columns = int(self.half_size(rate[i, 1], w, mask_rule))
        inside = slice(h // 2 - rows, h // 2 + rows), slice(w // 2 - columns, w // 2 + columns)
        mask[i, :, *inside] = 1
    spectrum = torch.roll(torch.fft.fft2(f, norm="forward"), (h // 2, w // 2), dims=(2, 3))

    def back(part):
        return torch.fft.ifft2(
            torch.roll(part, (-(h // 2), -(w // 2)), dims=(2, 3)), norm="forward"
        ).abs()

    low, high = back(spectrum * mask), back(spectrum * (1 - mask))
    high, low = self.channel_cross_l(high, y), self.channel_cross_h(low, y)
    o = self.channel_cross_agg(y, self.frequency_refine(low, high))
    if control is None:
        return self.para2 * y + self.para1 * o
    return g_f * (self.para2 * y) + g_o * (self.para1 * o)


def plain_resample(self, x):
    return self.body(x)


def plain_encode(self, x):
    skip1 = self.encoder_level1(self.patch_embed(x))
    skip2 = self.encoder_level2(self.down1_2(skip1))
    skip3 = self.encoder_level3(self.down2_3(skip2))
    return Encoding(x, skip1, skip2, skip3, self.latent(self.down3_4(skip3)))


PLAIN = {
    LayerNorm: plain_layer_norm,
    Attention: plain_attention,
    CrossAttention: plain_cross_attention,
    FeedForward: plain_feed_forward,
    AFLB: plain_aflb,
    Resample: plain_resample,
}


def plain_adair(model):
    """A copy of the model that computes the same the plain way, in the layout its layers happen to
    return."""
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in plain.modules():
        if type(module) in PLAIN:
            module.forward = types.MethodType(PLAIN[type(module)], module)
    plain.encode = types.MethodType(plain_encode, plain)
    return plain


def plain_step(state, reward, batch, config, actions):
    """The step of `train.post_train` with these actions (B, G, 3, 4), written plainly: every
    rollout a forward of its own with graph, every image rewarded by itself. Leaves gradients;
    returns the loss."""
    model, policy = state.live.values()
    states, scores, best, deterministic = [], [], [], []
    for b in range(len(batch.gt)):
        one = slice(b, b + 1)
        x, truth, outputs, r = batch.degraded[one], batch.gt[one], [], []
        for action in actions[b]:
            controller = policy.replay(action[None])
            outputs.append(model(x, controller))
            states.append(controller.states)
            r.append(reward(outputs[-1][:, None], x, truth, batch.tasks[one])[0].item())
        best.append(outputs[r.index(max(r))])
        deterministic.append(model(x, policy.mean()))
        scores.append(r)
    advantages = group_advantages(torch.tensor(scores, device=batch.gt.device))
    losses = supervised_losses(torch.cat(best), torch.cat(deterministic), batch.gt)
    shape = actions.shape[:2]
    states = [
        [torch.cat(kind).unflatten(0, shape) for kind in zip(*level)] for level in zip(*states)
    ]
    with torch.no_grad():
        old, ref = (heads.evaluate(states, actions)[0] for heads in (policy, state.reference))
    log_prob, entropy, _ = policy.evaluate(states, actions)
    weights = config.policy.clip, config.policy.kl_beta, config.policy.entropy_tau
    loss_rl, _ = grpo_loss(log_prob, old, ref, advantages, entropy, *weights)
    loss = total_loss(loss_rl, *losses, state.progress)
    loss.backward()
    return loss


# --------------------------------------------------------------------------------------- measuring


def wait_for(device):
    if runs.on_gpu(device):
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def stopwatch(device, times):
    """Appends the seconds that the block takes to `times`."""
    gc.collect()
    wait_for(device)
    start = time.perf_counter()
    yield
    wait_for(device)
    times.append(time.perf_counter() - start)


def seconds(functions, repeats, device):
    """Medians of `repeats` timings of every function, taken in turns after one warm-up each."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, taken in zip(functions, times):
            with stopwatch(device, taken):
                function()
    return [statistics.median(taken[1:]) for taken in times]


@contextlib.contextmanager
def peak_memory(device, peaks):
    """Appends the MiB of tensors that the block holds at its height, beyond what was held before:
    not weights and Adam's moments, which it is the caller's to have, with no gradients left over.
    (A process takes more than its tensors.)"""
    gc.collect()
    if runs.on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        peaks.append((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        yield
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    peaks.append(peak / 2**20)


def memory_of(function, device):
    peaks = []
    with peak_memory(device, peaks):
        function()
    return peaks[0]


def gradients(*modules):
    named = (pair for module in modules for pair in module.named_parameters())
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def distance(ours, plain):
    """Of two sets of gradients {name: tensor}: ‖a − b‖/‖b‖ of all in one vector; the largest max|a
    − b|/max|b| of a tensor, and its name."""
    assert ours.keys() == plain.keys()
    difference = torch.stack([(ours[k] - g).norm() for k, g in plain.items()]).norm()
    whole = difference / torch.stack([g.norm() for g in plain.values()]).norm()

    def of_one(name):
        largest = plain[name].abs().max().clamp(min=1e-30)
        return ((ours[name] - plain[name]).abs().max() / largest).item()

    name = max(plain, key=of_one)
    return whole.item(), of_one(name), name


class TimedRun(runs.Run):
    """A run whose loop is given one batch again and again, and is timed.

    rivals(state, batch) -> functions that are timed in turns with it. `times` has, of the loop and
    then of each rival, a list of seconds, the first of a warm-up; `peaks` the MiB of the loop's
    step. loss and gradient are those of the first.
    """

    def __init__(self, folder, device, repeats, dtype, rivals):
        super().__init__(folder, runs.Stop(), "", device, save_every=1 << 60)
        self.repeats, self.dtype, self.rivals = repeats, dtype, rivals
        self.peaks = []

    def batches(self, crops, size):
        device, state = self.device, self.state
        self.crops = 0  # the state stays what it is
        for parameter in state.reference.parameters():  # else the KL and its gradient are 0
            parameter.data += 0.02 * torch.randn_like(parameter)
        batch = crops.collate([crops[n] for n in range(size)])
        degraded, gt = (t.to(device, self.dtype) for t in (batch.degraded, batch.gt))
        batch = batch._replace(degraded=degraded, gt=gt)
        self.names, rivals = batch.names, self.rivals(state, batch)
        self.times = [[] for _ in (self, *rivals)]
        for turn in range(self.repeats + 1):
            with stopwatch(device, self.times[0]):
                yield batch
            if turn == 0:
                self.gradient = gradients(*state.live.values())
            for rival, taken in zip(rivals, self.times[1:]):
                with stopwatch(device, taken):
                    rival()
        state.live.zero_grad()
        with peak_memory(device, self.peaks):
            yield batch

    def finish(self, metrics):
        self.metrics = metrics
        super().finish(metrics)

    def medians(self):
        return [statistics.median(taken[1:]) for taken in self.times]


def time_step(config, model, rivals):
    """The loop of `train.post_train` at rates of 0, on real crops: the TimedRun, when it is
    over."""
    flags = ["--lr", 0, "--hard-ratio", 1, "--device", config.device, "--seed", config.seed]
    flags += ["--crop", config.crop, "--group-size", config.group_size]
    flags += ["--batch-size", config.batch_size]
    flags += ["--amp", "bf16" if config.dtype == "bf16" else "fp32"]
    flags = parse([str(flag) for flag in flags])
    samples = in_draws(list_training(None).train, 6, config.crop)[::9]  # of all tasks
    reward = Reward(parse_terms("default"), config.device)
    dtype = model.output.weight.dtype
    with tempfile.TemporaryDirectory() as folder:
        rivals = partial(rivals, reward, flags)
        talk = contextlib.redirect_stdout(sys.stderr)  # what a run says is no figure
        with talk, TimedRun(folder, config.device, config.repeats, dtype, rivals) as run:
            train.post_train(flags, run, model, reward, samples[: config.batch_size], [])
    return run


# ---------------------------------------------------------------------------------- what is timed


def build(config):
    """The model of --model, on its device, in eval mode."""
    torch.manual_seed(config.seed)
    if config.model == "demo":
        model = load_adair(DEMO_MODEL)
    else:
        model = AdaIR(mask_rule="fraction", rates=(0.25, 0.25)).eval()
        for block in (model.fre1, model.fre2, model.fre3):
            torch.nn.init.normal_(block.para1, std=0.1)  # 0 in a fresh one: no gradient behind it
    dtype = DTYPES[config.dtype]
    return model.to(config.device, dtype, memory_format=torch.channels_last)


def bench_step(config):
    """Our step against the plain one, and against the sum of what it cannot avoid."""
    found = {}

    def rivals(reward, flags, state, batch):
        plain, (model, policy) = copy.copy(state), state.live.values()
        both = dict(model=plain_adair(model), policy=copy.deepcopy(policy))
        plain.live = torch.nn.ModuleDict(both)
        groups = [module.parameters() for module in both.values()]
        optimizer = torch.optim.Adam([dict(params=p, lr=0.0) for p in groups], fused=True)
        half = partial(train.half_precision, flags)
        with torch.no_grad(), half():
            encoding = model.encode(batch.degraded)
            generators = train.action_generators(flags, batch.numbers)
            group = rollout(model, policy, encoding, config.group_size, generators)

        def step_plainly():
            optimizer.zero_grad()
            found["loss"] = plain_step(plain, reward, batch, flags, group.actions).item()
            found.setdefault("gradient", gradients(*plain.live.values()))
            optimizer.step()

        def encode():
            model.zero_grad()
            with half():
                code = model.encode(batch.degraded)
            torch.autograd.backward(code[1:], [torch.ones_like(t) for t in code[1:]])

        def decode_group():
            with torch.no_grad(), half():
                model.decode(encoding, policy.mean(), copies=config.group_size)

        def decode_pair():
            model.zero_grad()
            with half():
                restored = model.decode(encoding, policy.mean(), copies=2)
            restored.mean().backward()

        found["step"], found["zero"] = step_plainly, optimizer.zero_grad
        return step_plainly, encode, decode_group, decode_pair

    run = time_step(config, build(config), rivals)
    found["zero"]()
    peaks = [run.peaks[0], memory_of(found["step"], config.device)]
    whole, worst, name = distance(run.gradient, found["gradient"])
    loss = abs(run.metrics["loss/total"] - found["loss"]) / abs(found["loss"])
    print(f"  relative differences: loss {loss:.1e}, gradient {whole:.1e}, {worst:.1e} in {name}")
    ours, plain, *parts = run.medians()
    print(f"  {'step':34} {1000 * ours:9.1f} ms {peaks[0]:8.0f} MiB")
    print(f"  {'plain step':34} {1000 * plain:9.1f} ms {peaks[1]:8.0f} MiB")
    print(f"  {'plain / ours':34} {plain / ours:9.2f}    {peaks[1] / peaks[0]:8.2f}")
    group = f"decode {config.group_size} without graph"
    names = ("encode, forward and backward", group, "decode 2, forward and backward")
    for name, taken in zip(names, parts):
        print(f"    {name:32} {1000 * taken:9.1f} ms")
    print(f"  {'step / sum of these parts':34} {ours / sum(parts):9.2f}")


def bench_inference(config):
    """AdaIR's forward against the plain one's, without graph."""
    model = build(config)
    plain = plain_adair(model)
    amp = partial(torch.autocast, torch.device(config.device).type, torch.bfloat16)
    for side in config.sizes:
        x = torch.rand(1, 3, side, side, device=config.device, dtype=model.output.weight.dtype)

        @torch.inference_mode()
        def run(net, x=x, half=False):
            with amp(enabled=half):
                return net(x)

        both = partial(run, model, half=config.dtype == "bf16"), partial(run, plain)
        difference = (both[0]() - both[1]()).abs().max().item()
        ours, plainly = seconds(both, config.repeats, config.device)
        memory = [memory_of(function, config.device) for function in both]
        print(f"  {side} px: {1000 * ours:.0f} ms, plain {1000 * plainly:.0f} ms")
        print(
            f"    plain / ours {plainly / ours:.2f}, memory {memory[1] / memory[0]:.2f}", end="; "
        )
        print(f"{memory[0]:.0f} MiB; largest difference {difference:.1e}")


def run_program(argv):
    """The program with these flags."""
    config = runs.flags(Config, "bench.py", __doc__, argv)
    check(config)
    gpu = runs.on_gpu(config.device)
    threads = f"{torch.get_num_threads()} CPU threads"
    where = torch.cuda.get_device_name(config.device) if gpu else threads
    how = f"{config.dtype}{' (plain: fp32)' if config.dtype == 'bf16' else ''}, {where}"
    benches = dict(step=bench_step, inference=bench_inference)
    for name, bench in benches.items():
        if config.what in (name, "both"):
            print(f"{name}: model {config.model}, {how}, torch {torch.__version__}", end=", ")
            print(f"seed {config.seed}, {config.repeats} repeats", flush=True)
            bench(config)


def main(argv=None):
    return runs.program("bench.py", run_program, argv, (DataError, CheckpointError))


if __name__ == "__main__":
    sys.exit(main())
