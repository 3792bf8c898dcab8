"""Tables from runs, with 95 % intervals.

    python -m experiments.tables runs/results      of the runs there; leaves small files (`collect`)
    python -m experiments.tables results/main      of such files alone: the runs we made

Both leave gains.png, curves.png and training.png beside them.

Run folders are ARM/SEED, as experiments/run.py leaves them. Intervals are from bootstraps over
photographs and over seeds (`interval`); with a photograph come all its draws and tasks. A
photograph weighs the same however many of its draws are hard (in a run's own report.md every image
does). On the validation images the reward is that of a run's own --rewards.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import scipy.stats

import report
import runs
from data import photo_of
from experiments import figures
from experiments.run import ARMS

RESAMPLES = 10_000
WORDS = {"arm", "seed", "set", "task", "image"}  # columns that hold no numbers
KEYS = (("psnr", 1, 3, "dB"), ("reward", 1e4, 1, "1e-4"))  # with scale, digits and unit
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
    ("irpo", "sft-time"),
    ("irpo", "reward-time"),
    ("irpo", "reward-sft-time"),
    ("reward-sft-time", "sft-time"),
    ("rl-time", "rl-shuffled-time"),
    ("irpo", "hard-30"),
    ("hard-30", "random-30"),
    ("hard-30", "easy-30"),
    ("hard-30", "all-data"),
    ("hard-30", "all-data-epochs"),
    ("hard-30", "hard-10"),
    ("hard-30", "hard-50"),
    ("irpo", "group-2"),
    ("group-8", "irpo"),
    ("judged", "judged-shuffled"),
    ("irpo", "general-alone"),
    ("irpo", "task-alone"),
)


# ------------------------------------------------------------------------------------------- files


def collect(folder):
    """Writes the files of the runs in a folder, a row for every arm and seed and:

    gains.csv: for every held-out image the PSNR and reward before, whether it is one of the hard
    30 %, and the gains (of exposure where measure.py was run); measured.csv: the same of the
    validation images, where measure.py was run; validation.csv: the gains of every validation;
    training.csv: of every step the rewards of the rollouts, the PSNR of the mean action and of the
    best rollout, L_sup, L_cons and L_total. Exits unless an arm's runs have the same settings.
    """
    head = "arm seed task image psnr_before reward_before hard psnr ssim reward exposure".split()
    files = dict(
        gains=[head],
        measured=[head],
        validation=["arm seed step task psnr reward".split()],
        training=["arm seed step reward psnr_det psnr_best loss/sup loss/cons loss/total".split()],
    )
    for path in files_of_runs(folder, "report.json"):
        of_run = [path.parts[-3], path.parts[-2]]
        stored = json.loads(path.read_text())
        files["gains"] += compared(of_run, stored["before"], stored["after"], stored["hard"])
        on_val = stored.get("val_before", []), stored.get("val_after", [])
        files["measured"] += compared(of_run, *on_val)
        history = stored["validation"]
        for past, found in zip(history, report.gains_since_start(history)):
            for task in found["psnr"]:
                row = [*of_run, past["step"], task, found["psnr"][task], found["reward"][task]]
                files["validation"].append(row)
        names = files["training"][0][3:]
        for row in runs.read_metrics(path.parent):
            files["training"].append([*of_run, row["step"], *(row.get(name) for name in names)])
    for name, (head, *rows) in files.items():
        if rows:
            (folder / f"{name}.csv").write_text(report.to_csv(head, rows))


def compared(of_run, before, after, hard=()):
    """The rows of images, before and after."""
    rows = []
    for i, (old, new) in enumerate(zip(before, after)):
        row = [*of_run, old["task"], old["name"], old["psnr"], old["reward"], int(i in hard)]
        for key in ("psnr", "ssim", "reward", "exposure"):
            row.append(new[key] - old[key] if key in old else None)
        rows.append(row)
    return rows


def files_of_runs(folder, name):
    """ARM/SEED/name of all runs of a folder. Exits unless an arm's runs have the same settings."""
    paths = sorted(folder.glob(f"*/*/{name}"))
    for of_arm in {path.parents[1] for path in paths}:
        check_settings(of_arm)
    return paths


def check_settings(folder):
    """Exits unless the runs of an arm had the same settings, but for the seed and the machine."""
    first = None
    for path in sorted(folder.glob("*/config.json")):
        stored = json.loads(path.read_text())
        del stored["samples"]["scores"], stored["samples"]["workers"]
        mine = ("seed", "out", "command", "device")
        settings = {k: v for k, v in stored.items() if k not in mine}
        first = first or (path, settings)
        if settings != first[1]:
            sys.exit(f"experiments/tables.py: {path} has other settings than {first[0]}")


def read(path):
    """{arm: rows} of one of the files, with numbers as such; {} if it is not there."""
    arms = {}
    if not path.exists():
        return arms
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            words = {name: row.pop(name) for name in WORDS & row.keys()}
            numbers = {name: float(value) for name, value in row.items() if value}
            arms.setdefault(words["arm"], []).append(words | numbers)
    known = [*ARMS, *arms]
    return dict(sorted(arms.items(), key=lambda arm: known.index(arm[0])))


def pretrained(arms):
    """{task: mean PSNR of the model that all runs started from}. Exits unless it is one model, on
    the same images, measured by one reward."""
    another = "{} began with another model, or was measured on other images, than {}"
    hint = "{} was measured by another reward than {}: run experiments/measure.py"
    rows = check_same(arms, "psnr_before", 0.01, f"experiments/tables.py: {another}")
    check_same(arms, "reward_before", 1e-3, f"experiments/tables.py: {hint}")
    tasks = report.by_task(rows)
    return {task: report.mean(of, "psnr_before") for task, of in tasks.items()}


def check_same(arms, key, by, message):
    """The rows of the first run. Exits with message.format(run, first run) unless all runs have the
    same images, whose `key` differs by no more than `by`."""
    first = None
    for arm, of_arm in arms.items():
        for seed, of_run in by_seed(of_arm).items():
            name, rows = f"{arm}/{seed}", {(row["task"], row["image"]): row for row in of_run}
            first = first or (name, rows)
            same = rows.keys() == first[1].keys()
            if not same or any(abs(row[key] - first[1][at][key]) > by for at, row in rows.items()):
                sys.exit(message.format(name, first[0]))
    return list(first[1].values())


# --------------------------------------------------------------------------------------- intervals


def by_seed(rows):
    """{seed: its rows}"""
    seeds = sorted({row["seed"] for row in rows})
    return {seed: [row for row in rows if row["seed"] == seed] for seed in seeds}


def gains(rows, key, only=None):
    """Gains of one arm: an array (seeds, photographs, tasks), draws averaged, NaN where `only`
    leaves nothing; and the names of seeds, photographs and tasks.

    key: "psnr", "ssim", "reward" or "exposure"; only: "hard" or "rest" of the images."""
    cells = {}
    for row in rows:
        if only is None or bool(row["hard"]) == (only == "hard"):
            cell = row["seed"], photo_of(row["image"]), row["task"]
            cells.setdefault(cell, []).append(row[key])
    seeds = [*by_seed(rows)]
    photos = sorted({photo for _, photo, _ in cells})
    tasks = list(dict.fromkeys(task for *_, task in cells))
    shape = len(seeds), len(photos), len(tasks)
    values = [np.mean(cells.get((s, p, t), np.nan)) for s in seeds for p in photos for t in tasks]
    return np.array(values).reshape(shape), (seeds, photos, tasks)


def mean_of_tasks(values):
    """The mean over tasks of each task's mean over seeds and photographs."""
    return np.nanmean(np.nanmean(values, axis=(-3, -2)), axis=-1)


def interval(values, seed=0):
    """(mean, low, high) of the mean over tasks, at 95 %; values as `gains` gives them. Of one seed
    low and high are NaN.

    Two variances of the mean add up: that of bootstraps over photographs, and that of bootstraps
    over seeds, each times n / (n − 1), since n draws of n vary less than new ones would. What is
    peculiar to a photograph under a seed is counted twice, which is on the safe side. Student's t
    has the degrees of freedom of Welch and Satterthwaite.
    """
    n_seeds, n_photos, _ = values.shape
    if n_photos < 2:
        sys.exit("experiments/tables.py: one photograph has no interval; hold out more")
    mean = mean_of_tasks(values)
    if n_seeds < 2:
        return mean, np.nan, np.nan
    rng = np.random.default_rng(seed)
    variances = []
    for n, of_axis in ((n_seeds, values), (n_photos, values.swapaxes(0, 1))):
        drawn = rng.multinomial(n, np.ones(n) / n, RESAMPLES)  # how often each one is
        there = np.isfinite(of_axis)
        total, count = (
            np.einsum("rn,nmt->rt", drawn, of_each)
            for of_each in (np.where(there, of_axis, 0), there.astype(float))
        )
        with np.errstate(invalid="ignore"):
            variances.append(np.var(np.nanmean(total / count, axis=1)) * n / (n - 1))
    of_seeds, of_photos = variances
    shares = of_seeds**2 / (n_seeds - 1) + of_photos**2 / (n_photos - 1)
    freedom = sum(variances) ** 2 / shares if shares else 1.0
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(sum(variances))
    return mean, mean - half, mean + half


def shown(mean, low, high, digits):
    """A mean with its interval, if it has one."""
    text = f"{mean:+.{digits}f}"
    return text if np.isnan(low) else f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def cell(values, scale=1.0, digits=3):
    return shown(*(scale * v for v in interval(values)), digits)


# ------------------------------------------------------------------------------------------ tables


def per_task(arms):
    """The PSNR of the pre-trained model and the mean gains over it, in dB and reward, per task."""
    start = pretrained(arms)
    tables = []
    for key, scale, digits, unit in (("psnr", 1, 3, "dB"), ("reward", 1e4, 1, "reward, 1e-4")):
        rows = [["pre-trained model", *(f"{v:.2f}" for v in start.values())]] if scale == 1 else []
        for arm, of_arm in arms.items():
            values, (_, _, tasks) = gains(of_arm, key)
            means = scale * np.nanmean(values, axis=(0, 1))
            rows.append([arm, *(f"{mean:+.{digits}f}" for mean in means)])
        tables.append(report.markdown([f"gain, {unit}", *tasks], rows))
    return "\n\n".join(tables)


def overall(arms, intervals):
    """PSNR, SSIM and reward of all images, and PSNR and reward of the hard and the other ones."""
    head = ["gain over the pre-trained model", "seeds", "PSNR, dB", "SSIM, 1e-4", "reward, 1e-4"]
    head += ["hard 30 %: dB", "1e-4", "the rest: dB", "1e-4"]
    rows = []
    for arm, of_arm in arms.items():
        row = [arm, len(by_seed(of_arm)), shown(*intervals[arm]["psnr"], 3)]
        row += [shown(*(1e4 * v for v in intervals[arm][key]), 1) for key in ("ssim", "reward")]
        for part in ("hard", "rest"):
            row.append(f"{mean_of_tasks(gains(of_arm, 'psnr', part)[0]):+.3f}")
            row.append(f"{1e4 * mean_of_tasks(gains(of_arm, 'reward', part)[0]):+.1f}")
        rows.append(row)
    return report.markdown(head, rows)


def last_validations(rows):
    """{seed: the row of the mean over tasks at the end}, of one arm's rows of validation.csv."""
    means = [row for row in rows if row["task"] == "mean"]
    return {row["seed"]: row for row in sorted(means, key=lambda row: row["step"])}


def on_validation(arms):
    """The gains at the last validation, which is what settings are chosen on: their mean over
    seeds, and the lowest and highest seed. arms: rows of validation.csv."""
    rows = []
    for arm, of_arm in arms.items():
        last = last_validations(of_arm)
        row = [arm, len(last)]
        for key, scale, digits, _ in KEYS:
            found = [scale * of_seed[key] for of_seed in last.values()]
            three = np.mean(found), min(found), max(found)
            mean, low, high = (f"{value:+.{digits}f}" for value in three)
            row.append(f"{mean} ({low} to {high})")
        rows.append(row)
    return report.markdown(["on the validation images", "seeds", "PSNR, dB", "reward, 1e-4"], rows)


def minus(rows, others):
    """The rows of one arm with its gains minus those of another, on the seeds that both have."""
    keys = ("psnr", "ssim", "reward", "exposure")
    theirs = {(row["seed"], row["task"], row["image"]): row for row in others}
    shared = by_seed(rows).keys() & by_seed(others).keys()
    differences = []
    for row in (row for row in rows if row["seed"] in shared):
        other = theirs[row["seed"], row["task"], row["image"]]
        differences.append(
            row | {key: row[key] - other[key] for key in keys if key in row and key in other}
        )
    return differences


def difference(arms, one, other):
    """How much more one arm gains than another on the same seeds."""
    keys = [*KEYS]
    if all("exposure" in row for name in (one, other) for row in arms[name]):
        keys.append(("exposure", 1e4, 1, "1e-4 of exposure"))
    rows = minus(arms[one], arms[other])
    if not rows:
        return f"{one} minus {other}: no seed in common"
    lines = [
        f"{cell(gains(rows, key)[0], scale, digits)} {unit}" for key, scale, digits, unit in keys
    ]
    return f"{one} minus {other}, {len(by_seed(rows))} seeds: {', '.join(lines)}"


def in_validation(arms, one, other):
    """The same on the validation images: the mean, and how many seeds are above 0."""
    last = last_validations(arms[one]), last_validations(arms[other])
    shared = sorted(last[0].keys() & last[1].keys())
    parts = []
    for key, scale, digits, unit in KEYS:
        values = [scale * (last[0][seed][key] - last[1][seed][key]) for seed in shared]
        above = sum(value > 0 for value in values)
        parts.append(f"{np.mean(values):+.{digits}f} ({above} of {len(shared)} above 0) {unit}")
    return f"validation {', '.join(parts)}"


def in_training(arms, one, other):
    """How much higher the reward of the rollouts is in the second half of training under one arm
    than under another on the same crops, with Student's interval over seeds. arms: rows of
    training.csv."""
    means = []
    for name in (one, other):
        last = max(row["step"] for row in arms[name])
        late = [row for row in arms[name] if row["step"] > last / 2]
        means.append({seed: report.mean(of, "reward") for seed, of in by_seed(late).items()})
    shared = sorted(means[0].keys() & means[1].keys())
    values = 1e4 * np.array([means[0][seed] - means[1][seed] for seed in shared])
    mean, half, seeds = values.mean(), np.nan, "1 seed"
    if len(values) > 1:
        half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
        seeds = f"{len(values)} seeds"
    difference = shown(mean, mean - half, mean + half, 1)
    return f"{difference} 1e-4 of the rollouts' reward in training, {seeds}"


# ----------------------------------------------------------------------------------------- program


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/results")
    if list(folder.glob("*/*/report.json")):
        collect(folder)
    arms, measured, validations, training = (
        read(folder / f"{name}.csv") for name in ("gains", "measured", "validation", "training")
    )
    if not arms and not validations:
        sys.exit(f"experiments/tables.py: {folder} holds no ARM/SEED/report.json")
    if validations:
        print(on_validation(validations), "\n")
        figures.curves(folder / "curves.png", validations)
    if training:
        figures.training(
            folder / "training.png", {arm: by_seed(of) for arm, of in training.items()}
        )
    if arms:
        keys = ("psnr", "ssim", "reward")
        intervals = {
            arm: {key: interval(gains(rows, key)[0]) for key in keys} for arm, rows in arms.items()
        }
        print(per_task(arms), overall(arms, intervals), "", sep="\n\n")
        figures.gains(folder / "gains.png", intervals)
    for one, other in PAIRS:
        if {one, other} <= arms.keys():
            print(difference(arms, one, other))
        if {one, other} <= validations.keys():
            print(f"{one} minus {other}: {in_validation(validations, one, other)}")
        if {one, other} <= measured.keys():
            print(f"validation images: {difference(measured, one, other)}")
        if "shuffled" in other and {one, other} <= training.keys():
            print(f"{one} minus {other}: {in_training(training, one, other)}")


if __name__ == "__main__":
    main()
