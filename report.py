"""Tables and figures: Markdown, CSV, curves.png, samples.png. Nothing of the method is here.

A row of an evaluation is a dict with task, name, psnr_in, psnr, ssim and whatever else was
measured.
"""

import csv
import io
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ------------------------------------------------------------------------------------------ tables


def markdown(head, rows):
    """A Markdown table that is aligned as plain text, too: the first column left, others right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]

    def line(row):
        first = row[0].ljust(widths[0])
        return f"| {' | '.join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(line(row) for row in (cells[0], rule, *cells[1:]))


def to_csv(head, rows):
    """CSV text; floats get six decimals."""
    buffer = io.StringIO()
    cells = ([f"{c:.6f}" if isinstance(c, float) else c for c in row] for row in (head, *rows))
    csv.writer(buffer).writerows(cells)
    return buffer.getvalue()


def mean(rows, key):
    return float(np.mean([row[key] for row in rows]))


def by_task(rows):
    """{task: its rows}, in the order in which the tasks first appear."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["task"]].append(row)
    return dict(groups)


def mean_of(values):
    """The mean over tasks of {task: value}."""
    return float(np.mean(list(values.values())))


def mean_of_tasks(rows, key):
    """The mean over tasks of each task's mean."""
    return mean_of({task: mean(of_task, key) for task, of_task in by_task(rows).items()})


def before_after_table(before, after, hard):
    """PSNR, SSIM and reward per task, before and after, and their mean over tasks: of all images,
    of the hard ones (indices) and of the rest."""
    head = ["task", "images", "input dB", "before dB", "after dB", "gain dB"]
    head += ["before SSIM", "after SSIM", "before reward", "after reward", "gain e-4"]

    def line(name, chosen):
        old, new = ([rows[i] for i in chosen] for rows in (before, after))
        psnr, psnr_after = mean_of_tasks(old, "psnr"), mean_of_tasks(new, "psnr")
        reward, reward_after = mean_of_tasks(old, "reward"), mean_of_tasks(new, "reward")
        decibels = [f"{v:.2f}" for v in (mean_of_tasks(old, "psnr_in"), psnr, psnr_after)]
        cells = [name, len(chosen), *decibels, f"{psnr_after - psnr:+.3f}"]
        cells += [f"{mean_of_tasks(rows, 'ssim'):.4f}" for rows in (old, new)]
        rewards = [f"{reward:.4f}", f"{reward_after:.4f}"]
        return [*cells, *rewards, f"{1e4 * (reward_after - reward):+.1f}"]

    every, tasks = range(len(before)), [row["task"] for row in before]
    lines = [line(task, [i for i in every if tasks[i] == task]) for task in dict.fromkeys(tasks)]
    lines.append(line("mean of tasks", every))
    rest = [i for i in every if i not in hard]
    parts = (("hard 30 %", hard), ("the rest", rest))
    lines += [line(f"mean: {name}", chosen) for name, chosen in parts if chosen]
    return markdown(head, lines)


def gains_since_start(history):
    """What each validation gained since the first: [{"psnr": {task: dB, …, "mean": dB}, "reward":
    …}]."""
    gains = []
    for found in history:
        one = {}
        for key in ("psnr", "reward"):
            one[key] = {task: v - history[0][key][task] for task, v in found[key].items()}
            one[key]["mean"] = mean_of(one[key])
        gains.append(one)
    return gains


def typical_and_worst(rows, gains):
    """Of every task the index of the image of median gain, and last that of the lowest gain."""
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["task"]].append(i)
    ranked = [sorted(members, key=lambda i: gains[i]) for members in groups.values()]
    return [members[len(members) // 2] for members in ranked] + [int(np.argmin(gains))]


def gain_table(rows):
    """PSNR per task, input against restored."""
    lines = []
    for task, group in by_task(rows).items():
        psnr_in, psnr = mean(group, "psnr_in"), mean(group, "psnr")
        ssim = f"{mean(group, 'ssim'):.4f}"
        lines.append([task, f"{psnr_in:.2f}", f"{psnr:.2f}", f"{psnr - psnr_in:+.2f}", ssim])
    return markdown(["task", "input dB", "restored dB", "gain dB", "SSIM"], lines)


# ----------------------------------------------------------------------------------------- figures

# What tells whether a run works: metrics, each with a title and how its curves are labelled.
CURVES = [
    ({"reward": ""}, "mean reward of the rollouts"),
    ({"reward_std": ""}, "standard deviation of rewards in a group"),
    ({"gain_det": "deterministic", "gain_best": "best rollout"}, "crops: output − input (dB)"),
    ({"kl": ""}, "KL to the starting policy (nats)"),
    ({"entropy": ""}, "entropy of the policy (nats)"),
    ({"frac_reward_zero_std": ""}, "groups of equal rewards"),
    ({"loss/total": ""}, "loss, Eq. 7"),
    ({"grad_norm": ""}, "gradient norm"),
    (
        {f"policy/{i}.{g}/mean": f"{i}.{g}" for i in (1, 2, 3) for g in ("g_f", "g_o")},
        "mean of the gates (start: 0.5)",
    ),
]


def pyplot():
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    return pyplot


def plot_curves(path, rows, history=()):
    """Draws what validations gained since the start, per task, and CURVES of a run's logged rows,
    each as measured and as a running mean."""
    rows = [row for row in rows if not row["skipped"]]
    for row in rows:
        for kind in ("det", "best"):
            if f"psnr_{kind}" in row:
                row[f"gain_{kind}"] = row[f"psnr_{kind}"] - row["psnr_in"]
    logged = {name for row in rows for name in row}
    panels = [(names, title) for names, title in CURVES if names.keys() & logged]
    validated = [("psnr", "validation: PSNR (dB)"), ("reward", "validation: reward")]
    validated = validated if len(history) > 1 else []
    if not panels and not validated:
        return
    plt = pyplot()
    n_rows = -(-(len(panels) + len(validated)) // 3)
    figure, axes = plt.subplots(n_rows, 3, figsize=(12, 2.6 * n_rows), squeeze=False)
    steps = np.array([row["step"] for row in rows])
    window = max(1, len(steps) // 20)
    for axis in axes.flat[len(panels) + len(validated) :]:
        axis.axis("off")
    gains, at = gains_since_start(history), [found["step"] for found in history]
    for axis, (key, title) in zip(axes.flat, validated):
        axis.set_title(f"{title} against the start", fontsize=9)
        for task in gains[0][key]:
            whole = dict(color="black", linewidth=2) if task == "mean" else dict(linewidth=1)
            axis.plot(at, [gain[key][task] for gain in gains], label=task, **whole)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.legend(fontsize=6, ncol=2)
        axis.tick_params(labelsize=7)
    for axis, (names, title) in zip(axes.flat[len(validated) :], panels):
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        for color, (name, label) in enumerate(names.items()):
            values = np.array([row.get(name, math.nan) for row in rows], dtype=float)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            centres = steps[window // 2 : window // 2 + len(smooth)]
            axis.plot(steps, values, color=f"C{color}", alpha=0.2, linewidth=0.8)
            axis.plot(centres, smooth, color=f"C{color}", label=label, linewidth=1.6)
        if len(names) > 1:
            axis.legend(fontsize=6, ncol=2)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.subplots_adjust(0.055, 0.17 / n_rows, 0.99, 1 - 0.12 / n_rows, 0.16, 0.35)
    figure.savefig(Path(path), dpi=110)
    plt.close(figure)


def as_picture(image):
    """A tensor (3, H, W) in [0, 1] as a Pillow image, rounded: truncating costs 0.16 dB at 38
    dB."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


def to_png(picture):
    """The bytes of a PNG file of a Pillow image, or of a tensor (3, H, W) in [0, 1]."""
    picture = picture if isinstance(picture, Image.Image) else as_picture(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def plot_samples(rows, width=264, gap=6, line=18):
    """A PNG with one line of images per row, [(caption, (3, H, W) in [0, 1]), …], each `width` px
    wide under its caption; all rows have equally many."""
    heights = [round(width * row[0][1].shape[1] / row[0][1].shape[2]) + line for row in rows]
    size = ((width + gap) * len(rows[0]) + gap, sum(heights) + gap * (len(rows) + 1))
    sheet, font, top = Image.new("RGB", size, "white"), ImageFont.load_default(12), gap
    draw = ImageDraw.Draw(sheet)
    for row, height in zip(rows, heights):
        for column, (caption, image) in enumerate(row):
            left = gap + column * (width + gap)
            draw.text((left, top), caption, "black", font)
            enlarged = image.shape[2] < width
            how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            picture = as_picture(image).resize((width, height - line), how)
            sheet.paste(picture, (left, top + line))
        top += height + gap
    return to_png(sheet)
