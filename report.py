"""Tables and figures: Markdown, CSV, curves.png, samples.png, rollouts.png. Nothing of the method
is here.

A row of an evaluation is a dict with task, name, psnr_in, psnr, ssim and whatever else was
measured.
"""

import io

import numpy as np
import pandas as pd
import torch.nn.functional as F
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


def mean(rows, key):
    return float(np.mean([row[key] for row in rows]))


def by_task(rows):
    """{task: its rows}, in the order in which the tasks first appear."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return {task: [row for row in rows if row["task"] == task] for task in tasks}


def mean_of(values):
    """The mean over tasks of {task: value}."""
    return float(np.mean(list(values.values())))


def before_after_table(before, after, hard):
    """PSNR, SSIM and reward per task, before and after, and their mean over tasks: of all images,
    of the hard ones (indices) and of the rest."""
    head = ["task", "images", "input dB", "before dB", "after dB", "gain dB"]
    head += ["before SSIM", "after SSIM", "before reward", "after reward", "gain e-4"]

    def line(name, images):
        means = images.groupby("task").mean(numeric_only=True).mean()  # tasks weigh alike
        cells = [f"{means[key]:.2f}" for key in ("psnr_in", "psnr", "psnr_after")]
        cells.append(f"{means['psnr_after'] - means['psnr']:+.3f}")
        cells += [f"{means[key]:.4f}" for key in ("ssim", "ssim_after", "reward", "reward_after")]
        cells.append(f"{1e4 * (means['reward_after'] - means['reward']):+.1f}")
        return [name, len(images), *cells]

    images = pd.DataFrame(before).join(pd.DataFrame(after).add_suffix("_after"))
    is_hard = images.index.isin(hard)
    lines = [line(task, of_task) for task, of_task in images.groupby("task", sort=False)]
    lines.append(line("mean of tasks", images))
    for name, part in (("hard 30 %", images[is_hard]), ("the rest", images[~is_hard])):
        if len(part):
            lines.append(line(f"mean: {name}", part))
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
    chosen, ranked = [], sorted(range(len(rows)), key=lambda i: gains[i])
    for task in by_task(rows):
        members = [i for i in ranked if rows[i]["task"] == task]
        chosen.append(members[len(members) // 2])
    return [*chosen, ranked[0]]


# ----------------------------------------------------------------------------------------- figures

GATES = {f"policy/{i}.{g}/mean": f"{i}.{g}" for i in (1, 2, 3) for g in ("g_f", "g_o")}
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
    (GATES, "mean of the gates (start: 0.5)"),
]


def pyplot():
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    return pyplot


def plot_curves(path, rows, history=()):
    """Draws what validations gained since the start, per task, and CURVES of a run's logged rows,
    each as measured and as a running mean."""
    log = pd.DataFrame([row for row in rows if not row["skipped"]])
    for kind in ("det", "best"):
        if f"psnr_{kind}" in log:
            log[f"gain_{kind}"] = log[f"psnr_{kind}"] - log["psnr_in"]
    validated = dict(psnr="PSNR (dB)", reward="reward") if len(history) > 1 else {}
    logged = [(names, title) for names, title in CURVES if any(name in log for name in names)]
    n_rows = -(-(len(validated) + len(logged)) // 3)
    if not n_rows:
        return
    plt = pyplot()
    figure, axes = plt.subplots(n_rows, 3, figsize=(12, 2.6 * n_rows), squeeze=False)
    free = iter(axes.flat)
    for key, what in validated.items():
        plot_gains(next(free), history, key, f"validation: {what} against the start")
    for names, title in logged:
        plot_log(next(free), log, names, title)
    for axis in free:
        axis.axis("off")
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.subplots_adjust(0.055, 0.17 / n_rows, 0.99, 1 - 0.12 / n_rows, 0.16, 0.35)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_gains(axis, history, key, title):
    """What validations gained since the first: a line per task, and their mean."""
    gains, steps = gains_since_start(history), [found["step"] for found in history]
    for task in gains[0][key]:
        style = dict(color="black", linewidth=2) if task == "mean" else dict(linewidth=1)
        axis.plot(steps, [gain[key][task] for gain in gains], label=task, **style)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.legend(fontsize=6, ncol=2)
    axis.set_title(title, fontsize=9)


def plot_log(axis, log, names, title):
    """Logged metrics {name: label}: as measured, pale, and a running mean."""
    for color, (name, label) in enumerate(names.items()):
        if name not in log:
            continue
        smooth = log[name].rolling(max(1, len(log) // 20), center=True).mean()
        axis.plot(log["step"], log[name], color=f"C{color}", alpha=0.2, linewidth=0.8)
        axis.plot(log["step"], smooth, color=f"C{color}", label=label, linewidth=1.6)
    if len(names) > 1:
        axis.legend(fontsize=6, ncol=2)
    axis.set_title(title, fontsize=9)


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


def most_changed(before, after, side=96):
    """(rows, columns), slices of the crop of `side` px, or of all that there is, in which two
    images (3, H, W) differ most."""
    off = (after - before).abs().mean(dim=0, keepdim=True)
    height, width = (min(side, n) for n in off.shape[1:])
    means = F.avg_pool2d(off, (height, width), stride=8)[0]
    top, left = (8 * int(i) for i in divmod(int(means.argmax()), means.shape[1]))
    return slice(top, top + height), slice(left, left + width)


def ten_times(after, before):
    """Ten times what changed, around grey."""
    return (0.5 + 10 * (after - before)).clamp(0, 1)


def plot_rollouts(path, degraded, restored, actions, scores, advantages):
    """Draws the rollouts of one image (3, H, W): restored (G, 3, H, W), how each differs from their
    mean, its action, numbers (G, K) or an image (G, 3, h, w), its reward and advantage (G,); the
    best one framed."""
    n, best, mean = len(restored), int(scores.argmax()), restored.mean(dim=0)
    figure, axes = pyplot().subplots(3, n + 1, figsize=(2.4 * (n + 1), 7), squeeze=False)
    for axis, title in zip(axes[1:, 0], ["ten times what differs\nfrom their mean", "action"]):
        axis.text(1, 0.5, title, ha="right", va="center", transform=axis.transAxes)
    axes[0, 0].imshow(as_picture(degraded))
    axes[0, 0].set_title("degraded", fontsize=10)
    for g in range(n):
        words = f"r = {scores[g]:.4f}, A = {advantages[g]:+.2f}"
        bold = "bold" if g == best else "normal"
        axes[0, g + 1].set_title(words, fontsize=10, weight=bold)
        axes[0, g + 1].imshow(as_picture(restored[g]))
        axes[1, g + 1].imshow(as_picture(ten_times(restored[g], mean)))
        if actions.ndim == 2:
            axes[2, g + 1].bar(range(actions.shape[1]), actions[g].tolist(), color="#4a6fa5")
            axes[2, g + 1].set_ylim(0, 1)
        else:
            axes[2, g + 1].imshow(as_picture(actions[g]))
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[1:, 0]:
        axis.axis("off")
    for axis in axes[:, best + 1]:
        for side in axis.spines.values():
            side.set(color="#2a7d46", linewidth=4)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot().close(figure)


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
