"""Tables from run folders, with 95 % intervals.

    python results/tables.py [runs/results]       also leaves gains.csv there

A folder holds ARM/SEED/report.json, as results/run.py leaves them. Intervals are Student's, with a
standard error from a bootstrap over photographs and seeds as clusters: both are drawn anew with
replacement, and with a photograph all its draws and tasks. A photograph weighs the same however
many of its draws are hard (in a run's own report.md every image does).
"""

import json
import sys
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).parents[1]))
import report
from data import photo_of

RESAMPLES = 10_000
# Which arms answer a question together: the second is the control of the first.
PAIRS = (
    ("irpo", "sft"),
    ("irpo", "best-of-g"),
    ("best-of-g", "random-rollout"),
    ("irpo", "irpo-shuffled"),
    ("rl", "rl-shuffled"),
    ("rl-all", "rl-all-shuffled"),
    ("reward", "sft"),
    ("reward-sft", "sft"),
    ("irpo", "irpo-no-cons"),
    ("irpo-difficulty", "irpo"),
    ("irpo", "hard-30"),
    ("hard-30", "random-30"),
    ("hard-30", "easy-30"),
    ("hard-30", "all-data"),
)


def pretrained(arms):
    """{task: mean PSNR of the model that all runs started from}. Exits unless it is one model, on
    the same images."""
    first = None
    for path in sorted(path for folder in arms.values() for path in folder.glob("*/report.json")):
        rows = json.loads(path.read_text())["before"]
        found = {(row["task"], row["name"]): row["psnr"] for row in rows}
        first = first or (path, found, rows)
        same = found.keys() == first[1].keys()
        if not same or any(abs(psnr - first[1][key]) > 0.01 for key, psnr in found.items()):
            another = "began with another model, or was measured on other images, than"
            sys.exit(f"results/tables.py: {path} {another} {first[0]}")
    return {task: report.mean(rows, "psnr") for task, rows in report.by_task(first[2]).items()}


def check_settings(folder):
    """Exits unless the runs of an arm had the same settings, but for the seed."""
    first = None
    for path in sorted(folder.glob("*/config.json")):
        stored = json.loads(path.read_text())
        stored["samples"].pop("scores")
        settings = {k: v for k, v in stored.items() if k not in ("seed", "out", "command")}
        first = first or (path, settings)
        if settings != first[1]:
            sys.exit(f"results/tables.py: {path} has other settings than {first[0]}")


def gains(folder, key, only=None):
    """Gains of one arm: an array (seeds, photographs, tasks), draws averaged, NaN where `only`
    leaves nothing; and the names of seeds, photographs and tasks. key: "psnr", "ssim" or "reward";
    only: "hard" or "rest" of the images."""
    seeds = sorted(path.parent.name for path in folder.glob("*/report.json"))
    cells = {}
    for seed in seeds:
        stored = json.loads((folder / seed / "report.json").read_text())
        for i, (old, new) in enumerate(zip(stored["before"], stored["after"])):
            if only is None or (i in stored["hard"]) == (only == "hard"):
                cell = seed, photo_of(old["name"]), old["task"]
                cells.setdefault(cell, []).append(new[key] - old[key])
    photos = sorted({photo for _, photo, _ in cells})
    tasks = list(dict.fromkeys(task for *_, task in cells))
    shape = len(seeds), len(photos), len(tasks)
    values = [np.mean(cells.get((s, p, t), np.nan)) for s in seeds for p in photos for t in tasks]
    return np.array(values).reshape(shape), (seeds, photos, tasks)


def write_csv(path, arms):
    """A row for every arm, seed, task and image: the PSNR before, and the three gains."""
    head = "arm seed task image psnr_before psnr ssim reward hard".split()
    rows = []
    for arm, folder in arms.items():
        for of_seed in sorted(folder.glob("*/report.json")):
            stored = json.loads(of_seed.read_text())
            for i, (old, new) in enumerate(zip(stored["before"], stored["after"])):
                found = (new[key] - old[key] for key in ("psnr", "ssim", "reward"))
                row = [arm, of_seed.parent.name, old["task"], old["name"], old["psnr"], *found]
                rows.append([*row, int(i in stored["hard"])])
    path.write_text(report.to_csv(head, rows))


def mean_of_tasks(values):
    """The mean over tasks of each task's mean over seeds and photographs."""
    return np.nanmean(np.nanmean(values, axis=(-3, -2)), axis=-1)


def interval(values, seed=0):
    """(mean, low, high) of the mean over tasks: its standard error by the bootstrap over seeds and
    photographs, times Student's t for so few photographs. (Percentiles of the bootstrap would be
    too narrow: of six photographs they hold the true mean 86 times in 100. Of fewer than five seeds
    these are, too, where seeds matter more than photographs.)"""
    rng = np.random.default_rng(seed)
    n_seeds, n_photos, _ = values.shape
    if n_photos < 2:
        sys.exit("results/tables.py: one photograph has no interval; hold out more")
    # how often each seed and each photograph is drawn
    seeds, photos = (rng.multinomial(n, np.ones(n) / n, RESAMPLES) for n in (n_seeds, n_photos))
    there = np.isfinite(values)
    total, count = (
        np.einsum("rs,spt,rp->rt", seeds, of_each, photos, optimize=True)
        for of_each in (np.where(there, values, 0), there.astype(float))
    )
    with np.errstate(invalid="ignore"):
        found = np.nanmean(total / count, axis=1)
    error = np.std(found) * np.sqrt(n_photos / (n_photos - 1))
    half = scipy.stats.t.ppf(0.975, n_photos - 1) * error
    mean = mean_of_tasks(values)
    return mean, mean - half, mean + half


def cell(values, scale=1.0, digits=3):
    mean, low, high = (scale * v for v in interval(values))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def per_task(arms):
    """The PSNR of the pre-trained model and the mean gains over it, in dB, per task."""
    start = pretrained(arms)
    rows = [["pre-trained model", *(f"{v:.2f}" for v in start.values())]]
    for arm, folder in arms.items():
        values, (_, _, tasks) = gains(folder, "psnr")
        rows.append([arm, *(f"{v:+.3f}" for v in np.nanmean(values, axis=(0, 1)))])
    return report.markdown(["PSNR, gain, dB", *tasks], rows)


def overall(arms):
    """PSNR, SSIM and reward of all images, and PSNR and reward of the hard and the other ones."""
    head = ["gain over the pre-trained model", "seeds", "PSNR, dB", "SSIM, 1e-4", "reward, 1e-4"]
    head += ["hard 30 %: dB", "1e-4", "the rest: dB", "1e-4"]
    rows = []
    for arm, folder in arms.items():
        row = [arm, len(gains(folder, "psnr")[1][0]), cell(gains(folder, "psnr")[0])]
        row += [cell(gains(folder, key)[0], 1e4, 1) for key in ("ssim", "reward")]
        for part in ("hard", "rest"):
            row.append(f"{mean_of_tasks(gains(folder, 'psnr', part)[0]):+.3f}")
            row.append(f"{1e4 * mean_of_tasks(gains(folder, 'reward', part)[0]):+.1f}")
        rows.append(row)
    return report.markdown(head, rows)


def on_validation(arms):
    """The gains at the last validation, which is what settings are chosen on: their mean over
    seeds, and the lowest and highest seed."""
    rows = []
    for arm, folder in arms.items():
        paths = folder.glob("*/report.json")
        histories = [json.loads(path.read_text())["validation"] for path in paths]
        last = [report.gains_since_start(history)[-1] for history in histories]
        row = [arm]
        for key, scale, digits in (("psnr", 1, 3), ("reward", 1e4, 1)):
            found = [scale * gains[key]["mean"] for gains in last]
            three = np.mean(found), min(found), max(found)
            mean, low, high = (f"{value:+.{digits}f}" for value in three)
            row.append(f"{mean} ({low} to {high})")
        rows.append(row)
    return report.markdown(["on the validation images", "PSNR, dB", "reward, 1e-4"], rows)


def difference(arms, one, other):
    """How much more one arm gains than another on the same seeds."""
    lines = []
    for key, scale, digits, unit in (("psnr", 1, 3, "dB"), ("reward", 1e4, 1, "1e-4")):
        (a, (seeds, *_)), (b, (others, *_)) = (gains(arms[name], key) for name in (one, other))
        shared = [s for s in seeds if s in others]
        if not shared:
            return f"{one} minus {other}: no seed in common"
        pick = [seeds.index(s) for s in shared], [others.index(s) for s in shared]
        lines.append(f"{cell(a[pick[0]] - b[pick[1]], scale, digits)} {unit}")
    return f"{one} minus {other}, {len(shared)} seeds: {', '.join(lines)}"


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/results")
    done = sorted({path.parent.parent for path in folder.glob("*/*/report.json")})
    if not done:
        sys.exit(f"results/tables.py: {folder} holds no ARM/SEED/report.json: run results/run.py")
    arms = {path.name: path for path in done}
    for path in done:
        check_settings(path)
    write_csv(folder / "gains.csv", arms)
    print(per_task(arms), overall(arms), on_validation(arms), "", sep="\n\n")
    for one, other in PAIRS:
        if {one, other} <= arms.keys():
            print(difference(arms, one, other))


if __name__ == "__main__":
    main()
