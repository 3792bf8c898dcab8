"""Time and memory of one IRPO step, of AdaIR's forward and of mining, each against the same thing written plainly.

    python bench.py                       a step, its parts and inference; the demo model
    python bench.py --model paper         the same at the published size, random weights
    python bench.py scaling               what a step and a restored photo cost as they grow; writes a table and a plot
    python bench.py mining                images per second of hard mining

Both sides run in one process with the same weights, inputs and actions, in turns; a ratio is one of medians. Figures of
two runs, and of two machines, cannot be compared.
"""

import argparse
import copy
import gc
import math
import os
import statistics
import sys
import time
import types
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory here, talks on standard error

import torch
import torch.nn.functional as F

import data
import grpo
import model as adair
import policy as policies
import rewards
import runs
import train

# ------------------------------------------------------------------------------------------ AdaIR, written plainly
# What `model.py` does otherwise, the way the equations read: forward methods that take the place of ours.


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
    return self.project_out(plain_channel_attention(self.q_dwconv(self.q(x)), k, v, self.temperature))


def plain_feed_forward(self, x):
    gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
    return self.project_out(F.gelu(gate) * value)


def plain_aflb(self, x, y, mask_rule, rates, control=None):
    """Spec of the original: roll, mask, roll back and invert, once for either band; the mask is filled in a loop."""
    b, _, h, w = y.shape
    f = self.conv1(F.interpolate(x, (h, w), mode="bilinear", align_corners=False))
    if control is not None:
        r_h, r_l, g_f, g_o = control(f, y).unbind(dim=1)
        rate = torch.stack((r_h, r_l), dim=1)
    elif mask_rule == "adair":
        rate = self.rate_conv(f.mean(dim=(2, 3), keepdim=True)).flatten(1).sigmoid()
    else:
        rate = f.new_tensor(rates).expand(b, 2)
    mask = torch.zeros_like(f)
    for i in range(b):
        rows, columns = (int(self.half_size(rate[i, j], side, mask_rule)) for j, side in ((0, h), (1, w)))
        mask[i, :, h // 2 - rows : h // 2 + rows, w // 2 - columns : w // 2 + columns] = 1
    spectrum = torch.roll(torch.fft.fft2(f, norm="forward"), (h // 2, w // 2), dims=(2, 3))

    def back(part):
        return torch.fft.ifft2(torch.roll(part, (-(h // 2), -(w // 2)), dims=(2, 3)), norm="forward").abs()

    low, high = back(spectrum * mask), back(spectrum * (1 - mask))
    high, low = self.channel_cross_l(high, y), self.channel_cross_h(low, y)
    o = self.channel_cross_agg(y, self.frequency_refine(low, high))
    if control is None:
        return self.para2 * y + self.para1 * o
    return g_f[:, None, None, None] * (self.para2 * y) + g_o[:, None, None, None] * (self.para1 * o)


def plain_resample(self, x):
    return self.body(x)


def plain_encode(self, x):
    skip1 = self.encoder_level1(self.patch_embed(x))
    skip2 = self.encoder_level2(self.down1_2(skip1))
    skip3 = self.encoder_level3(self.down2_3(skip2))
    return adair.Encoding(x, skip1, skip2, skip3, self.latent(self.down3_4(skip3)))


PLAIN = {
    adair.LayerNorm: plain_layer_norm,
    adair.Attention: plain_attention,
    adair.CrossAttention: plain_cross_attention,
    adair.FeedForward: plain_feed_forward,
    adair.AFLB: plain_aflb,
    adair.Resample: plain_resample,
}


def plain_adair(model):
    """A copy of the model that computes the same the plain way, in the layout its layers happen to return."""
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in plain.modules():
        if type(module) in PLAIN:
            module.forward = types.MethodType(PLAIN[type(module)], module)
    plain.encode = types.MethodType(plain_encode, plain)
    return plain


def plain_step(model, policy, ref, reward, batch, args, progress, actions):
    """The step of `train.irpo_step` with these actions (B·G, 3, 4), written plainly: every rollout a forward of its own
    with graph, every image rewarded by itself. Leaves gradients; returns the loss."""
    degraded, gt, tasks = batch
    group, states, scores, best, deterministic = args.group_size, [], [], [], []
    for b in range(len(gt)):
        x, truth, outputs, r = degraded[b : b + 1], gt[b : b + 1], [], []
        for g in range(group):
            i = b * group + g
            controller = policy.replay(actions[i : i + 1])
            outputs.append(model(x, controller))
            states.append(controller.states)
            r.append(reward(outputs[-1], truth, tasks[b : b + 1])[0].item())
        best.append(outputs[r.index(max(r))])
        deterministic.append(model(x, policy.mean()))
        scores.append(r)
    advantages = grpo.group_advantages(torch.tensor(scores, device=gt.device))
    l_sup, l_cons = grpo.supervised_losses(torch.cat(best), torch.cat(deterministic), gt)
    states = [[torch.cat(kind) for kind in zip(*level)] for level in zip(*states)]
    with torch.no_grad():
        logp_old, logp_ref = policy.log_prob(states, actions), ref.log_prob(states, actions)
    rl, _ = train.policy_loss(policy, ref, (states, actions, logp_old, logp_ref, advantages), args)
    loss = grpo.total_loss(rl, l_sup, l_cons, progress)
    loss.backward()
    return loss


# --------------------------------------------------------------------------------------------------- measuring


def seconds(functions, repeats, device):
    """Medians of `repeats` timings of every function, taken in turns after one warm-up each."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, taken in zip(functions, times):
            gc.collect()
            wait_for(device)
            start = time.perf_counter()
            function()
            wait_for(device)
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def wait_for(device):
    if runs.on_gpu(device):
        torch.cuda.synchronize(device)


def peak_memory(function, device):
    """MiB of tensors that function() holds at its height, beyond what was held before: not weights and Adam's moments,
    which it is the caller's to have, with no gradients left over. (A process takes more than its tensors.)"""
    gc.collect()
    if runs.on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def gradients(*modules):
    return {name: p.grad for module in modules for name, p in module.named_parameters() if p.grad is not None}


def distance(ours, plain):
    """Of two sets of gradients {name: tensor}: ‖a − b‖/‖b‖ of all in one vector; the largest max|a − b|/max|b| of a
    tensor, and its name."""
    assert ours.keys() == plain.keys()
    whole = torch.stack([(ours[k] - g).norm() for k, g in plain.items()]).norm() / torch.stack([g.norm() for g in plain.values()]).norm()
    worst = max((((ours[k] - g).abs().max() / g.abs().max().clamp(min=1e-30)).item(), k) for k, g in plain.items())
    return whole.item(), *worst


# -------------------------------------------------------------------------------------------------- what is timed


def build(args):
    """The model of --model, on its device, in eval mode."""
    torch.manual_seed(args.seed)
    if args.model == "demo":
        model = adair.load_adair(train.DEMO_MODEL)
    else:
        model = adair.AdaIR(mask_rule="fraction", rates=(0.25, 0.25)).eval()
        for block in (model.fre1, model.fre2, model.fre3):
            torch.nn.init.normal_(block.para1, std=0.1)  # a fresh one is 0, and nothing behind it would get a gradient
    return model.to(args.device, torch.float64 if args.dtype == "fp64" else torch.float32, memory_format=torch.channels_last)


def setting(args, model):
    """(policy, π_ref, reward, batch of real crops, arguments as train.py has them)."""
    policy = policies.policy_for(model).to(args.device)
    ref = policy.frozen_copy()
    for parameter in ref.parameters():  # otherwise the KL and its gradient are 0
        parameter.data += 0.02 * torch.randn_like(parameter)
    flags = f"--group-size {args.group_size} --crop {args.crop} --device {args.device} --amp {args.amp}"
    reward = rewards.Reward(rewards.parse_terms("default"), args.device)
    samples = [s._replace(box=()) for s in data.list_embedded(data.EMBEDDED_TRAIN)[::9]]
    crops = data.Crops(samples, args.crop, args.seed, args.batch_size)
    degraded, gt, tasks, *_ = data.collate([crops[i] for i in range(args.batch_size)])
    batch = (degraded.to(args.device, model.output.weight.dtype), gt.to(args.device, model.output.weight.dtype), tasks)
    return policy, ref, reward, batch, train.parse(flags.split())


def our_step(args, model):
    """step() -> what `train.irpo_step` returned; Adam's included."""
    policy, ref, reward, batch, flags = setting(args, model)
    generator, optimizer = torch.Generator(args.device), train.adam(model, policy, flags)

    def step(update=True):
        optimizer.zero_grad()
        result = train.irpo_step(model, policy, ref, reward, batch, flags, 0.5, [generator.manual_seed(args.seed)])
        if update:
            train.optimizer_step(optimizer, {}, args.batch_size)
        return result

    return step, (policy, ref, reward, batch, flags)


def bench_step(args):
    """Our step against the plain one, and against the sum of what it cannot avoid."""
    model = build(args)
    plain = plain_adair(model)
    if args.compile:
        train.compile_blocks(model)
    step, (policy, ref, reward, batch, flags) = our_step(args, model)
    plain_policy = copy.deepcopy(policy)
    plain_optimizer = train.adam(plain, plain_policy, flags)
    metrics, (_, actions, *_) = step(update=False)

    def step_plainly(update=True):
        plain_optimizer.zero_grad()
        loss = plain_step(plain, plain_policy, ref, reward, batch, flags, 0.5, actions)
        if update:
            train.optimizer_step(plain_optimizer, {}, args.batch_size)
        return loss

    loss = step_plainly(update=False).item()
    whole, worst, name = distance(gradients(model, policy), gradients(plain, plain_policy))
    of_loss = abs(metrics["loss/total"].item() - loss) / abs(loss)
    print(f"  relative differences: loss {of_loss:.1e}, gradient {whole:.1e}; worst tensor of the gradient {worst:.1e} ({name})")

    x, take, half = batch[0], policy.mean(), partial(train.half_precision, flags)
    with torch.no_grad(), half():
        encoding = model.encode(x)

    def encode():
        model.zero_grad()
        with half():
            code = model.encode(x)
        torch.autograd.backward(code[1:], [torch.ones_like(t) for t in code[1:]])

    def decode_group():
        with torch.no_grad(), half():
            model.decode(encoding, take, copies=args.group_size)

    def decode_pair():
        model.zero_grad()
        with half():
            restored = model.decode(encoding, take, copies=2)
        restored.mean().backward()

    times = seconds((step, step_plainly, encode, decode_group, decode_pair), args.repeats, args.device)
    memory = []
    for function in (step, step_plainly):
        for module in (model, policy, plain, plain_policy):
            module.zero_grad()
        memory.append(peak_memory(function, args.device))
    print(f"  {'step':34} {1000 * times[0]:9.1f} ms {memory[0]:8.0f} MiB")
    print(f"  {'plain step':34} {1000 * times[1]:9.1f} ms {memory[1]:8.0f} MiB")
    print(f"  {'plain / ours':34} {times[1] / times[0]:9.2f}    {memory[1] / memory[0]:8.2f}")
    parts = ("encode, forward and backward", f"decode {args.group_size} without graph", "decode 2, forward and backward")
    for part, t in zip(parts, times[2:]):
        print(f"    {part:32} {1000 * t:9.1f} ms")
    print(f"  {'step / sum of these parts':34} {times[0] / sum(times[2:]):9.2f}")


def bench_inference(args):
    """AdaIR's forward against the plain one's, without graph."""
    model = build(args)
    plain = plain_adair(model)
    if args.compile:
        train.compile_blocks(model)
    for side in args.sizes:
        x = torch.rand(1, 3, side, side, device=args.device, dtype=model.output.weight.dtype)

        @torch.inference_mode()
        def ours():
            with train.half_precision(args):
                return model(x)

        @torch.inference_mode()
        def plainly():
            return plain(x)

        difference = (ours() - plainly()).abs().max().item()
        times = seconds((ours, plainly), args.repeats, args.device)
        memory = [peak_memory(function, args.device) for function in (ours, plainly)]
        print(f"  {side} px: {1000 * times[0]:.0f} ms, plain {1000 * times[1]:.0f} ms, plain / ours {times[1] / times[0]:.2f}; memory {memory[0]:.0f} and {memory[1]:.0f} MiB, {memory[1] / memory[0]:.2f}; largest difference {difference:.1e}")


def bench_mining(args):
    """data.mine against a loop that takes image after image, with our AdaIR and with the plain one."""
    model = build(args)
    plain = plain_adair(model)
    samples, _, _ = data.list_training(args.data_root)
    samples = samples[:: max(1, len(samples) // args.images)][: args.images]
    pixels = 1 << 20 if runs.on_gpu(args.device) else 0

    def one_by_one(net):
        values = []
        for sample in samples:
            data.sample_digest(sample)
            degraded, gt = data.load_pair(sample)
            values.append(data.psnr(adair.restore(net, degraded), gt))
        return values

    def mine():
        return [row["psnr"] for row in data.mine(partial(adair.restore, model), samples, pixels=pixels)[0]]

    found = mine()
    for net, name in ((model, "our AdaIR"), (plain, "plain AdaIR")):
        difference = max(abs(a - b) for a, b in zip(found, one_by_one(net)))
        print(f"  PSNRs against a loop over images with {name}: largest difference {difference:.1e} dB")
    times = seconds((mine, partial(one_by_one, model), partial(one_by_one, plain)), args.repeats, args.device)
    rate = [len(samples) / t for t in times]
    print(f"  {len(samples)} images: {rate[0]:.2f} a second; loop, our AdaIR {rate[1]:.2f}, ratio {rate[0] / rate[1]:.2f}; loop, plain AdaIR {rate[2]:.2f}, ratio {rate[0] / rate[2]:.2f}")


def bench_scaling(args):
    """Our step for growing groups and crops, and `restore` for growing photos: a table (Markdown) and a plot."""
    model = build(args)
    print("\n| step: crop | " + " | ".join(f"G = {g}" for g in args.groups) + " |")
    print("|---" * (1 + len(args.groups)) + "|")
    plt = runs.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(14, 3))
    for crop in args.crops:
        cells = []
        for group in args.groups:
            args.crop, args.group_size = crop, group
            step, _ = our_step(args, model)
            time_taken = seconds([step], args.repeats, args.device)[0]
            model.zero_grad()
            cells.append((time_taken, peak_memory(step, args.device)))
        print(f"| {crop} px | " + " | ".join(f"{t:.2f} s, {m:.0f} MiB" for t, m in cells) + " |", flush=True)
        for axis, values in zip(axes, zip(*cells)):
            axis.plot(args.groups, values, "o-", label=f"crop {crop}")
    for axis, title in zip(axes, ("seconds per step", "MiB of tensors per step")):
        axis.set(title=title, xlabel="G, rollouts per image", xticks=args.groups, ylim=(0, None))
        axis.legend(fontsize=7)

    print("\n| photo | whole | in tiles of 512 px |\n|---|---|---|")
    lines = {None: [], 512: []}
    for megapixels in args.megapixels:
        h, w = (round(side * math.sqrt(megapixels * 1e6 / 1.5)) // 8 * 8 for side in (1, 1.5))
        x, cells = torch.rand(3, h, w), []
        for tile in lines:
            run = partial(adair.restore, model, x, tile)
            cells.append((seconds([run], args.repeats, args.device)[0], peak_memory(run, args.device)))
            lines[tile].append(cells[-1])
        print(f"| {w}×{h} | " + " | ".join(f"{t:.1f} s, {m:.0f} MiB" for t, m in cells) + " |", flush=True)
    for tile, cells in lines.items():
        for axis, values in zip(axes[2:], zip(*cells)):
            axis.plot(args.megapixels, values, "o-", label=f"tiles of {tile} px" if tile else "whole")
    for axis, title in zip(axes[2:], ("seconds per photo", "MiB of tensors per photo")):
        axis.set(title=title, xlabel="megapixels", ylim=(0, None))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.plot, dpi=110)
    print(f"\nthe plot is {args.plot}")


# ------------------------------------------------------------------------------------------------- command line


def main(argv):
    p = runs.Parser(prog="bench.py", description=__doc__, formatter_class=runs.HelpFormatter)
    commands = {"step": [bench_step], "inference": [bench_inference], "mining": [bench_mining], "scaling": [bench_scaling], "both": [bench_step, bench_inference]}
    whole = runs.number(int, 1)
    p.add_argument("what", nargs="?", choices=commands, default="both", help="what to measure; both: step and inference")
    p.add_argument("--model", choices=("demo", "paper"), default="demo", help="paper: Table 6's size, random weights")
    p.add_argument("--crop", type=crop_size, default=128, help="px a side, of the step; 16 to 400")
    p.add_argument("--group-size", type=whole, default=4, help="G, of the step")
    p.add_argument("--batch-size", type=whole, default=1, help="images, of the step")
    p.add_argument("--device", type=runs.device, default=runs.default_device(), help="cpu, cuda, cuda:1, …")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp64"), default="fp32", help="bf16: autocast on our side alone; fp64: of both backbones")
    p.add_argument("--compile", action="store_true", help="torch.compile, on our side alone")
    p.add_argument("--sizes", type=runs.multiple_of_8, nargs="+", default=[256, 512], help="px a side, of inference")
    p.add_argument("--groups", type=whole, nargs="+", default=[2, 4, 8, 16], help="G, of scaling")
    p.add_argument("--crops", type=crop_size, nargs="+", default=[64, 128, 192, 256], help="px a side, of scaling")
    p.add_argument("--megapixels", type=runs.number(float, 0.01), nargs="+", default=[0.25, 1.0, 2.0, 4.0], help="photos, of scaling")
    p.add_argument("--plot", default="cost.png", help="PNG that scaling draws")
    p.add_argument("--data-root", help="images, of mining; default: the embedded photographs")
    p.add_argument("--images", type=whole, default=35, help="how many, of mining")
    p.add_argument("--repeats", type=whole, default=5, help="timings of which the median is taken")
    p.add_argument("--seed", type=runs.number(int, 0, 2**31 - 1), default=0, help="of weights, crops and actions")
    p.add_argument("--system-malloc", action="store_true", help="leave glibc's allocator as it is (runs.keep_freed_memory)")
    args = p.parse_args(argv)
    args.amp = "bf16" if args.dtype == "bf16" else "fp32"  # as train.py calls it
    if args.what in ("mining", "scaling") and (args.compile or args.dtype != "fp32"):
        p.error(f"{args.what} is measured in fp32 and not compiled")
    if args.what == "scaling" and (not args.plot.endswith(".png") or not Path(args.plot).resolve().parent.is_dir()):
        p.error(f"--plot: {args.plot} must be a .png in a folder that exists")
    if not args.system_malloc:
        runs.keep_freed_memory()
    where = torch.cuda.get_device_name(args.device) if runs.on_gpu(args.device) else f"{torch.get_num_threads()} CPU threads"
    dtype = f"{args.dtype}{' (plain: fp32)' if args.dtype == 'bf16' else ''}{', compiled (plain: not)' if args.compile else ''}"
    try:
        for bench in commands[args.what]:
            what = bench.__name__.removeprefix("bench_")
            print(f"{what}: model {args.model}, {dtype}, {where}, torch {torch.__version__}, seed {args.seed}, {args.repeats} repeats", flush=True)
            bench(args)
    except (data.DataError, adair.CheckpointError, runs.RunError, OSError) as error:
        return p.fail(error)
    except torch.OutOfMemoryError:
        return p.fail("out of GPU memory: a smaller --crop, --batch-size or --group-size needs less")
    except KeyboardInterrupt:
        return p.fail("stopped")


def crop_size(text):
    """An argparse type: a crop that SSIM can take and the smallest of the photographs has."""
    value = runs.multiple_of_8(text)
    if not 16 <= value <= 400:
        raise argparse.ArgumentTypeError(f"it is {value}; it must be 16 to 400")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
