"""The plumbing of a run: its processes, its end, its folder, atomic files, metrics, figures. Nothing of the method is here."""

import argparse
import contextlib
import ctypes
import datetime
import importlib
import io
import json
import math
import os
import platform
import re
import signal
import sys
from collections import defaultdict
from functools import partialmethod
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

import data


class RunError(ValueError):
    """A run cannot start or go on; the text says why and what to do, in one sentence."""


class Lost(RunError):
    """Another process of the run has ended, or hangs."""


class Stopped(BaseException):
    """The run was asked to end; the text says by what. No Exception: wherever it strikes, nobody may take it for a failure of what he tried."""


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


# ------------------------------------------------------------------------------------------- the run's processes
# torchrun starts W of them and tells each its RANK, 0 … W − 1. Without it there is one, of rank 0.

HANGS_AFTER = datetime.timedelta(minutes=30)  # so long a process waits for the others; one that dies is noticed at once


def join(wanted):
    """Joins the other processes that torchrun started, if it did. Returns the device of this one: `wanted`, or of several
    GPUs its own. Raises RunError where there is none for it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return wanted
    if "LOCAL_RANK" not in os.environ:
        raise RunError("WORLD_SIZE is set, but torchrun did not start this process: unset it, or start with torchrun")
    if on_gpu(wanted):
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if torch.device(wanted).index is not None or local >= there:
            raise RunError(f"--device {wanted}: under torchrun process i of a machine takes cuda:i, and this machine has {there} GPU(s)")
        wanted = f"cuda:{local}"
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        with collective():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu(wanted) else "gloo", timeout=HANGS_AFTER)
    if rank():  # the first one speaks for all
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return wanted


def leave():
    """Leaves the processes that `join` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_for_all(device):
    """What `join` was given: of several GPUs, no certain one."""
    return device if processes() == 1 else torch.device(device).type


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def collective():
    """Around what all processes do together: raises Lost if one of them does not."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no class of its own
        reason = str(error).split("\n")[0].split(". ")[0][-200:]
        raise Lost(f"another process of this run ended or hangs ({reason}); its own message, if it had one, says why") from None


def gather(value):
    """[value of process 0, of process 1, …] in every process. What JSON can hold travels, as text: nothing is unpickled."""
    if processes() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with collective():
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(processes())]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        padded = torch.nn.functional.pad(text, (0, max(map(int, sizes)) - len(text)))
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded)
    return [json.loads(text[: int(n)].numpy().tobytes()) for text, n in zip(texts, sizes)]


def same_everywhere(what, value):
    """Raises RunError if `value` differs between the processes, as when a machine sees another folder."""
    for i, other in enumerate(gather(value)):
        if other != value:
            raise RunError(f"process {i} has another {what} than process {rank()}: all machines need the same files under the same paths")


def share(items, per_process):
    """A list in parts for all processes to work on at a time, of at most `per_process` items each: yields this process's part of every one."""
    together = per_process * processes()
    for first in range(0, len(items), together):
        start = first + rank() * per_process
        yield items[start : min(start + per_process, first + together)]


def spread(function, items):
    """function(a process's share of items) -> one result per item; all of them, in the order of items, in every process."""
    n, of = rank(), processes()
    part = items[len(items) * n // of : len(items) * (n + 1) // of]
    return [result for results in gather(function(part)) for result in results]


def average(parameters, metrics, images):
    """Averages gradients, in place, and metrics over the processes as if one had done all their images: each process counts by its own number of
    them, `images`, which may be 0. metrics: {name: scalar tensor}; returns {name: number}, the same in all processes."""
    numbers = torch.stack([v.detach().float() for v in metrics.values()]).tolist() if metrics else []  # one synchronisation
    told = [dict(zip(metrics, numbers)), images, "".join("01"[p.grad is not None] for p in parameters)]
    everyone = gather(told)  # before the gradients, so that a GPU need not wait for a process that is gone
    total, result = sum(n for _, n, _ in everyone), {}
    for name in dict.fromkeys(name for each, _, _ in everyone for name in each):
        values, weights = zip(*[(each[name], n) for each, n, _ in everyone if name in each])
        result[name] = sum(v * n for v, n in zip(values, weights)) / sum(weights)
    learning = [p for p, *flags in zip(parameters, *(each[2] for each in everyone)) if "1" in flags]
    if processes() > 1 and learning:
        for p in learning:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # in the parameter's own memory layout, as Adam wants it
        flat = torch.cat([p.grad.reshape(-1) for p in learning]) * (images / total)
        with collective():
            dist.all_reduce(flat)
        for p, part in zip(learning, flat.split([p.numel() for p in learning])):
            p.grad.copy_(part.view_as(p))
    return result


def exchange(batch, judge, interrupts):
    """What the processes tell each other after a step: (names of its images, their problems, the judge's metrics). If one was asked to end,
    all will."""
    *_, names, _, problems = batch
    judged, failed = (judge.metrics, judge.problem and str(judge.problem)) if judge and names else ({}, None)
    told = gather([names, problems, interrupts.reason, judged, failed])
    interrupts.reason = interrupts.reason or next((reason for _, _, reason, _, _ in told if reason), None)
    for said in filter(None, (each[4] for each in told)):
        tqdm.write(f"judge: {said}")
    judged = [each[3] for each in told if each[3]]
    kinds = {"judge/latency": max, "judge/wait": max, "judge/failures": sum, "judge/starts": sum}
    metrics = {name: merge(each[name] for each in judged) for name, merge in kinds.items()} if judged else {}
    return [n for each in told for n in each[0]], [p for each in told for p in each[1]], metrics


def evaluate(restore, samples, desc="evaluate", keep=(), also=None):
    """`data.evaluate`, shared by the processes: rows of all samples everywhere, the images at the indices in `keep` in the first one."""
    others = [i for i in range(len(samples)) if i not in keep]
    mine = [*keep, *others[:: processes()]] if rank() == 0 else others[rank() :: processes()]
    rows, kept = data.evaluate(restore, [samples[i] for i in mine], desc, range(len(keep)) if rank() == 0 else (), also)
    by_index = {i: row for part in gather([list(pair) for pair in zip(mine, rows)]) for i, row in part}
    return [by_index[i] for i in range(len(samples))], {i: kept[k] for k, i in enumerate(keep) if k in kept}


# ------------------------------------------------------------------------------------------------ ways to end


class Interrupts:
    """Within it SIGTERM, Ctrl-C and the end of `minutes` raise Stopped, at once or, while they are held, when they are released. Another
    Ctrl-C ends the program at once."""

    def __init__(self, minutes=None):
        self.reason, self.held, self.pid, self.minutes = None, False, os.getpid(), minutes
        self.names = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
        if minutes:
            if not hasattr(signal, "SIGALRM"):
                raise RunError("--max-minutes needs a Unix system")
            self.names[signal.SIGALRM] = f"--max-minutes {minutes:g}"

    def __enter__(self):
        self.before = {number: signal.signal(number, self) for number in self.names}
        if self.minutes:
            signal.setitimer(signal.ITIMER_REAL, 60 * self.minutes)
        return self

    def __exit__(self, *_):
        if self.minutes:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        if os.getpid() != self.pid:  # a process that loads images: the main one will end it
            return
        if self.reason:  # it is ending already
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.reason = self.names[number]
        if not self.held:
            raise Stopped(self.reason)

    def hold(self):
        self.held = True

    def release(self):
        self.held = False
        if self.reason:
            raise Stopped(self.reason)


NO_MEMORY = "out of GPU memory: a smaller --crop or --batch-size (or --group-size) needs less"


def ending(error, interrupts, step, again):
    """What to raise when `error` ended training after so many steps: Stopped if the run was asked to end, though another process may have been first to do
    so, else RunError with what goes on."""
    if isinstance(error, Stopped):
        return Stopped(f"{interrupts.reason}, after step {step}")
    if isinstance(error, Lost) and interrupts.reason:
        return Stopped(f"{interrupts.reason}, after step {step}; another process of this run had ended before")
    return RunError(f"{NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else error}, after step {step}; {again} goes on")


# ------------------------------------------------------------------------------------------------------- batches


def batches(crops, size, first, workers, device):
    """Batches (`data.collate`) of crops number first, first + 1, …, `size` of them for each process in turn; the last may be smaller, or empty.
    workers: processes that load; None is 4 beside a GPU, else none.

    A worker process that dies, as for memory or in a decoder, costs the crop it was reading, whose image is among the batch's problems.
    Raises RunError when three die in a row.
    """
    deaths, step = 0, size * processes()
    workers = (4 if on_gpu(device) else 0) if workers is None else workers
    crops.reading = torch.full((workers, 2), -1).share_memory_()  # what each worker is at: its process id, the crop's number
    while first < len(crops):
        starts = (i + rank() * size for i in range(first, len(crops), step))
        numbers = (range(start, min(start + size, len(crops))) for start in starts)
        loader = DataLoader(crops, batch_sampler=numbers, num_workers=workers, collate_fn=data.collate, pin_memory=on_gpu(device))
        iterator = iter(loader)
        if workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise in the middle of a step
        while first < len(crops):
            try:
                batch = next(iterator)
            except RuntimeError as error:
                dead = set(map(int, re.findall(r"\d+", str(error)))) if "DataLoader worker" in str(error) else ()
                at = [n for pid, n in crops.reading.tolist() if pid in dead and n >= 0]
                if not dead:
                    raise
                deaths += 1
                names = ", ".join(crops.sample(n).degraded or crops.sample(n).gt for n in at) or "nothing"
                if deaths == 3:
                    raise RunError(f"a third worker process in a row died, the last one while it read {names}: --workers 0 reads without them") from None
                tqdm.write(f"a worker process died while it read {names}; others go on")
                crops.lost |= set(at)
                break
            yield batch
            first, deaths = first + step, 0


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
        if text == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) < torch.cuda.device_count():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # else every process would take memory of the first
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:100]
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine that can be used ({reason}); cpu always is") from None
    return text


def write_atomic(path, content):
    """Writes bytes, or pieces of them, so that a kill or a full disk leaves the previous file intact."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"{path} could not be written ({error.strerror}); what was there before is intact") from None
        raise


def save_checkpoint(path, state):
    """Writes a checkpoint; the first process does."""
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(path, buffer.getvalue())


def write_image(path, image):
    """Writes a (3, H, W) tensor in [0, 1] as an 8-bit PNG, rounded (truncating would cost 0.16 dB at 38 dB), atomically."""
    pixels, buffer = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy(), io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def json_pieces(value):
    """JSON text in pieces of bytes, since that of a large data set is larger than what it says."""
    return (piece.encode() for piece in json.JSONEncoder(indent=1).iterencode(value))


def save_json(path, value):
    """Writes JSON; the first process does."""
    if rank() == 0:
        write_atomic(path, json_pieces(value))


def is_saved(path, value):
    """Whether `save_json` wrote this value there."""
    with open(path, "rb") as file:
        return all(file.read(len(piece)) == piece for piece in json_pieces(value)) and not file.read(1)


def load_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error})") from None


def refuse_existing(path):
    """Raises RunError if a run folder has something in it already, other than the log of a judge that could not start."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(not re.fullmatch(r"judge(-\d+)?\.log|.*\.tmp", file.name) for file in path.iterdir())):
        raise RunError(f"{path} exists: continue it with --resume {path}, or choose another --out")


class Appended:
    """A file of JSON lines that begins with `rows` and grows; the first process writes."""

    def __init__(self, path, rows):
        self.path, self.file = path, None
        if rank() == 0:
            write_atomic(path, (json.dumps(row).encode() + b"\n" for row in rows))
            self.file = open(path, "a")

    def write(self, rows):
        if self.file:
            try:
                self.file.writelines(json.dumps(row) + "\n" for row in rows)
                self.file.flush()
            except OSError as error:
                raise RunError(f"{self.path} could not be written ({error.strerror})") from None

    def close(self):
        if self.file:
            self.file.close()


class Log:
    """metrics.jsonl and TensorBoard, one row a step; the first process writes. A resumed run drops what was logged after its checkpoint."""

    def __init__(self, folder, step=0):
        self.lines = Appended(Path(folder) / "metrics.jsonl", (row for row in read_metrics(folder) if row["step"] <= step))
        self.board = None
        if rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # here, as matplotlib below: they are slow to load, for a judge, too

            self.board = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(self, step, metrics):
        if self.board:
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # of a skipped step some are not
            self.lines.write([{"step": step, **metrics}])
            try:
                for name, value in metrics.items():
                    self.board.add_scalar(name, value, step)
            except OSError as error:
                raise RunError(f"TensorBoard's file in {self.lines.path.parent} could not be written ({error.strerror})") from None

    def close(self):
        if self.board:
            self.lines.close()
            self.board.close()


def read_metrics(folder):
    """The rows of metrics.jsonl, one after the other: a long run's are too many to hold."""
    return read_lines(Path(folder) / "metrics.jsonl")


def read_lines(path):
    """Yields the rows of a file of JSON lines, if it is there; a last line that a kill cut short is left out."""
    if path.exists():
        with open(path) as file:
            for line in file:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    return


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
    rows = [row for row in rows if "loss/total" in row and not row["skipped"]]
    if not rows:
        return
    plt = pyplot()
    gates = [k for k in rows[-1] if ".g_" in k and k.endswith("/mean")]
    shown = {*rows[-1], "psnr_gain", *(["policy/gates"] if gates else [])}
    panels = [(key, title) for key, title in panels if key in shown]
    height = 2.6 * -(-len(panels) // 3)
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(12, height), squeeze=False)
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
                    draw(axis, [row.get(name, math.nan) - row["psnr_in"] for row in rows], label, f"C{i}")
            axis.legend(fontsize=7)
        elif key == "policy/gates":
            for i, name in enumerate(gates):
                draw(axis, [row.get(name, math.nan) for row in rows], name.split("/", 1)[1].removesuffix("/mean"), f"C{i}")
            axis.legend(fontsize=6, ncol=2)
        else:
            draw(axis, [row.get(key, math.nan) for row in rows])
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.subplots_adjust(0.04, 0.45 / height, 0.99, 1 - 0.3 / height, 0.16, 0.35)
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    plt.close(figure)


def plot_samples(path, samples, names=("input", "before", "after", "truth"), width=264, gap=6, line=18):
    """A picture with one row per (title, input, …, truth), images (3, H, W) under `names`, `width` px wide each, captioned with their PSNR."""
    heights = [round(width * images[0].shape[1] / images[0].shape[2]) + line for _, *images in samples]
    sheet = Image.new("RGB", ((width + gap) * len(names) + gap, sum(heights) + gap * (len(heights) + 1)), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(12), gap
    for (title, *images), height in zip(samples, heights):
        for column, (name, image) in enumerate(zip(names, images)):
            left = gap + column * (width + gap)
            said = f"{title}: {name}" if column == 0 else name
            said += "" if name == "truth" else f"  {data.psnr(image, images[-1]):.2f} dB"
            draw.text((left, top), said, "black", font)
            pixels = Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
            how = Image.Resampling.NEAREST if image.shape[2] < width else Image.Resampling.LANCZOS
            sheet.paste(pixels.resize((width, height - line), how), (left, top + line))
        top += height + gap
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    write_atomic(path, buffer.getvalue())
