"""The plumbing of a run: its folder, atomic files, metrics, figures and report. Nothing of the method is here."""

import argparse
import ctypes
import importlib
import io
import json
import math
import os
import platform
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data


class RunError(ValueError):
    """A run cannot start or go on; the text says why and what to do, in one sentence."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps a description's lines and shows every default."""

    def _get_help_string(self, action):
        plain = "default:" in action.help or action.required or action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence and exit code 2."""

    def error(self, message):
        sys.exit(self.fail(message))

    def fail(self, message):
        print(f"{Path(self.prog.split()[0]).name}: {message}", file=sys.stderr)
        return 2


def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a number in [low, high], or (low, high] if open_low."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not (low <= value <= high) or (open_low and value == low):
            bounds = f"{'above' if open_low else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"it is {text}; it must be {bounds}")
        return value

    return parse


def multiple_of_8(text):
    """An argparse type for sizes: 8, 16, 24, …"""
    value = number(int, 8)(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"it is {text}; it must be a multiple of 8")
    return value


def existing_file(text):
    """An argparse type: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return text


def tile_size(text):
    """An argparse type for --tile: 0, or a multiple of 8 that is more than two overlaps of 32 px."""
    value = number(int, 0)(text)
    if value and (value % 8 or value <= 64):
        raise argparse.ArgumentTypeError(f"it is {text}; it must be 0 or a multiple of 8 above 64")
    return value


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu(device):
    return torch.device(device).type == "cuda"


def keep_freed_memory():
    """Tells glibc to keep large blocks that are freed: it would hand them back to the kernel, which has to fault in and
    clear every page of the next one. Without it the forward pass of a 256 px image took 1.4 times as long. Elsewhere: nothing."""
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold, top_pad = ctypes.CDLL(None), -4, -1, -2  # names of <malloc.h>
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)


def device(text):
    """An argparse type: a device that works here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:100]
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine that can be used ({reason}); cpu always is") from None
    return text


def write_atomic(path, content):
    """Writes bytes so that a kill or a full disk leaves the previous file intact."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written ({error.strerror}); what was there before is intact") from None


def save_checkpoint(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def write_image(path, image):
    """Writes a (3, H, W) tensor in [0, 1] as an 8-bit PNG, rounded (truncating would cost 0.16 dB at 38 dB), atomically."""
    pixels, buffer = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy(), io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def save_json(path, value):
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def load_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error})") from None


def refuse_existing(path):
    """Raises RunError if a run folder has something in it already, other than the log of a judge that could not start."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(file.name != "judge.log" for file in path.iterdir())):
        raise RunError(f"{path} exists: continue it with --resume {path}, or choose another --out")


class Log:
    """metrics.jsonl and TensorBoard, one row a step. A resumed run drops what was logged after its checkpoint."""

    def __init__(self, folder, step=0):
        self.path = Path(folder) / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(self.path, "a")
        from torch.utils.tensorboard import SummaryWriter  # here, as matplotlib below: they are slow to load, for a judge, too

        self.board = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(self, step, metrics):
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def close(self):
        self.file.close()
        self.board.close()


def read_metrics(folder):
    """The rows of metrics.jsonl; a last line that a kill cut short is left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def mean_by_task(rows, key):
    """{task: mean of `key`} in the order of data.TASKS."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["task"]].append(row[key])
    order = [t for t in data.TASKS if t in groups] + [t for t in groups if t not in data.TASKS]
    return {t: float(np.mean(groups[t])) for t in order}


def before_after_table(before, after):
    """Markdown table of PSNR and SSIM per task, before and after, with the mean over tasks as last row."""
    columns = [("psnr_in", before), ("psnr", before), ("psnr", after), ("ssim", before), ("ssim", after)]
    values = [mean_by_task(rows, key) for key, rows in columns]
    count = {t: sum(row["task"] == t for row in before) for t in values[0]}
    lines = [
        "| task | images | input dB | before dB | after dB | gain dB | before SSIM | after SSIM |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def line(name, n, v):
        return f"| {name} | {n} | {v[0]:.2f} | {v[1]:.2f} | {v[2]:.2f} | {v[2] - v[1]:+.3f} | {v[3]:.4f} | {v[4]:.4f} |"

    lines += [line(t, count[t], [column[t] for column in values]) for t in values[0]]
    lines.append(line("mean of tasks", len(before), [float(np.mean(list(column.values()))) for column in values]))
    return "\n".join(lines)


def gain_table(rows):
    """Markdown table of PSNR per task, input against restored."""
    before, after, ssim = (mean_by_task(rows, key) for key in ("psnr_in", "psnr", "ssim"))
    lines = ["| task | input dB | restored dB | gain dB | SSIM |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {t} | {before[t]:.2f} | {after[t]:.2f} | {after[t] - before[t]:+.2f} | {ssim[t]:.4f} |" for t in before]
    return "\n".join(lines)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")  # no window
    return importlib.import_module("matplotlib.pyplot")


def plot_curves(folder, rows):
    """curves.png: what tells whether a run works, each as measured and as a running mean."""
    panels = [
        ("reward", "mean reward of the rollouts"),
        ("reward_std", "spread of rewards in a group"),
        ("psnr_gain", "training crops: output − input (dB)"),
        ("kl", "KL to the starting policy (nats)"),
        ("entropy", "entropy of the policy (nats)"),
        ("frac_reward_zero_std", "groups without spread"),
        ("loss/total", "loss, Eq. 7"),
        ("grad_norm", "gradient norm"),
        ("policy/gates", "mean of the gates (start: 0.5)"),
    ]
    if not rows:
        return
    plt = pyplot()
    gates = [k for k in rows[-1] if ".g_" in k and k.endswith("/mean")]
    shown = {*rows[-1], "psnr_gain", *(["policy/gates"] if gates else [])}
    panels = [(key, title) for key, title in panels if key in shown]
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(12, 2.6 * -(-len(panels) // 3)), squeeze=False)
    steps = np.array([row["step"] for row in rows])

    def draw(axis, values, label=None, color="C0"):
        values = np.array(values, dtype=float)
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        axis.plot(steps[window // 2 : window // 2 + len(smooth)], smooth, color=color, label=label, linewidth=1.6)

    for axis, (key, title) in zip(axes.flat, panels):
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        if key == "psnr_gain":
            for i, (name, label) in enumerate((("psnr_det", "deterministic"), ("psnr_best", "best rollout"))):
                if name in rows[-1]:
                    draw(axis, [row[name] - row["psnr_in"] for row in rows], label, f"C{i}")
            axis.legend(fontsize=7)
        elif key == "policy/gates":
            for i, name in enumerate(gates):
                draw(axis, [row[name] for row in rows], name.split("/", 1)[1].removesuffix("/mean"), f"C{i}")
            axis.legend(fontsize=6, ncol=2)
        else:
            draw(axis, [row[key] for row in rows])
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    plt.close(figure)


def plot_samples(path, samples, names=("input", "before", "after", "truth")):
    """One row per (title, input, …, truth), images (3, H, W) under `names`, captioned with their PSNR."""
    plt = pyplot()
    figure, axes = plt.subplots(len(samples), len(names), figsize=(2.4 * len(names), 2.55 * len(samples)), squeeze=False)
    for row, (title, *images) in zip(axes, samples):
        for axis, name, image in zip(row, names, images):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            caption = name if name == "truth" else f"{name}  {data.psnr(image, images[-1]):.2f} dB"
            axis.set_title(caption, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)
