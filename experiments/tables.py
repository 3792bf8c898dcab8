"""Tables from runs, with 95 % intervals.

    python -m experiments.tables runs/results     the runs there; leaves small files (`collect`)
    python -m experiments.tables results/main     such files alone: the runs we made

Both leave gains.png, curves.png and training.png beside them.

Run folders are ARM/SEED, as experiments.run leaves them. A photograph weighs the same however many
of its draws there are (in a run's own report.md every image does). On the validation images the
reward is that of a run's own --rewards.
"""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

import report
import runs
from experiments import figures
from experiments.run import ARMS

# scale and digits of what is gained
SHOWN = {"psnr": (1, 3), "ssim": (1e4, 1), "reward": (1e4, 1), "exposure": (1e4, 1)}
RUN = ["arm", "seed"]
GAINS = [*RUN, "task", "image", "psnr_before", "reward_before", "hard", *SHOWN]
COLUMNS = {
    "gains": GAINS,
    "measured": GAINS,
    "validation": [*RUN, "step", "task", "psnr", "reward"],
    "training": "arm seed step reward psnr_det psnr_best loss/sup loss/cons loss/total".split(),
}
# Which arms answer a question together: an arm, and its controls.
CONTROLS = {
    "irpo": "sft best-of-g irpo-shuffled irpo-no-cons sft-time reward-time reward-sft-time hard-30 "
    "group-2 general-alone task-alone",
    "best-of-g": "random-rollout",
    "rl": "rl-shuffled",
    "rl-all": "rl-all-shuffled",
    "reward": "sft",
    "reward-sft": "sft",
    "irpo-difficulty": "irpo",
    "reward-sft-time": "sft-time",
    "rl-time": "rl-shuffled-time",
    "hard-30": "random-30 easy-30 all-data all-data-epochs hard-10 hard-50",
    "group-8": "irpo",
    "judged": "judged-shuffled",
}
PAIRS = [(arm, control) for arm, of in CONTROLS.items() for control in of.split()]


# ------------------------------------------------------------------------------------------- files


def collect(folder):
    """Writes the files of the runs in a folder, a row for every arm and seed and:

    gains.csv: for every held-out image the PSNR and reward before, whether it is one of the hard
    30 %, and the gains (of exposure where experiments.measure was run); measured.csv: the same of
    the validation images, where it was run; validation.csv: the gains of every validation;
    training.csv: of every step the rewards of the rollouts, the PSNR of the mean action and of the
    best rollout, L_sup, L_cons and L_total. Raises RunError unless an arm's runs have the same
    settings.
    """
    parts = {name: [] for name in COLUMNS}
    for path in files_of_runs(folder, "report.json"):
        stored = runs.load_json(path)
        found = dict(
            gains=compared(stored["before"], stored["after"], stored["hard"]),
            measured=compared(stored.get("val_before", []), stored.get("val_after", [])),
            validation=validations(stored["validation"]),
            training=pd.DataFrame(runs.read_metrics(path.parent)),
        )
        for name, rows in found.items():
            parts[name].append(rows.assign(arm=path.parts[-3], seed=path.parts[-2]))
    for name, tables in parts.items():
        rows = pd.concat(tables).reindex(columns=COLUMNS[name])
        if len(rows):
            write_csv(folder / f"{name}.csv", rows)


def compared(before, after, hard=()):
    """The rows of images {task, name, psnr, …} before, with what was gained after."""
    before, after = pd.DataFrame(before), pd.DataFrame(after)
    gains = after.reindex(columns=[*SHOWN]) - before.reindex(columns=[*SHOWN])
    names = dict(name="image", psnr="psnr_before", reward="reward_before")
    start = before.rename(columns=names).reindex(columns=["task", *names.values()])
    return start.join(gains).assign(hard=before.index.isin(hard).astype(int))


def validations(history):
    """The gains of every validation since the first, of every task and their mean."""
    steps = [past["step"] for past in history]
    gains = [pd.DataFrame(gained) for gained in report.gains_since_start(history)]
    return pd.concat(gains, keys=steps, names=["step", "task"]).reset_index()


def write_csv(path, rows):
    """Writes rows as CSV, numbers with six decimals."""
    runs.write_atomic(path, rows.to_csv(index=False, float_format="%.6f").encode())


def read(path):
    """The rows of one of the files, arms in the order of `run.ARMS`; none if it is not there."""
    if not path.exists():
        return pd.DataFrame(columns=RUN)
    rows = pd.read_csv(path, dtype=dict(arm=str))
    order = {arm: place for place, arm in enumerate(dict.fromkeys([*ARMS, *rows["arm"]]))}
    rows = rows.sort_values("arm", key=lambda arms: arms.map(order), kind="stable")
    if "image" in rows:
        rows["photo"] = rows["image"].str.replace(r"#\d+$", "", regex=True)  # #2: its second draw
    return rows.reset_index(drop=True)


def files_of_runs(folder, name):
    """ARM/SEED/name of all runs of a folder. Raises RunError unless an arm's runs have the same
    settings."""
    paths = sorted(folder.glob(f"*/*/{name}"))
    for of_arm in {path.parents[1] for path in paths}:
        check_settings(of_arm)
    return paths


def check_settings(folder):
    """Raises RunError unless the runs of an arm had the same settings, but for the seed and the
    machine."""
    first = None
    for path in sorted(folder.glob("*/config.json")):
        settings = runs.load_json(path)
        for name in ("seed", "out", "command", "device"):
            settings.pop(name)
        for name in ("scores", "workers"):
            settings["samples"].pop(name)
        first = first or (path, settings)
        if settings != first[1]:
            raise runs.RunError(f"{path} has other settings than {first[0]}")


def check_same(rows, key, by, how):
    """Raises RunError unless all runs have the same images, whose `key` differs by no more than
    `by`; how: what else they have done."""
    of_runs = rows.pivot(index=RUN, columns=["task", "image"], values=key)  # a row for every run
    first, others = of_runs.iloc[0], of_runs.iloc[1:]
    same = ((others - first).abs() <= by).all(axis=1)  # an image that one lacks is NaN
    if not same.all():
        names = ["/".join(map(str, run)) for run in (same.idxmin(), of_runs.index[0])]
        raise runs.RunError(f"{names[0]} {how} than {names[1]}")


# --------------------------------------------------------------------------------------- intervals


def in_cells(rows, key):
    """The gains of every (task, seed, photo), draws averaged: a Series."""
    return rows.groupby(["task", "seed", "photo"], sort=False)[key].mean()


def mean_of_tasks(rows, key):
    """The mean over tasks of each task's mean over seeds and photographs."""
    return in_cells(rows, key).groupby("task").mean().mean()


def interval(rows, key, over=("seed", "photo")):
    """(mean, low, high) at 95 % of the mean over tasks of rows[key]: what it may be for other seeds
    and other photographs, or for others of what `over` names. rows: with task, seed and photo. NaN
    where there is one seed, or one photograph.

    The mean is a sum over cells (task, seed, photo), so how far it is off is a sum of shares, too.
    The shares of one seed are added up, squared, and added over the seeds, times n / (n − 1) since
    every task's mean is that of its own n: a variance. That of photographs comes the same way; with
    a photograph go all its tasks. Both are added. (What is peculiar to a photograph under a seed is
    counted twice, which is on the safe side.) Student's t has Satterthwaite's degrees of freedom.
    """
    cells = in_cells(rows, key).rename("gain").reset_index()
    of_tasks = cells.groupby("task")
    off = cells["gain"] - of_tasks["gain"].transform("mean")
    off = off / of_tasks["gain"].transform("size") / of_tasks.ngroups
    variances, freedoms = [], []
    for name in over:
        n = of_tasks[name].transform("nunique")
        shares = (off * np.sqrt(n / (n - 1).clip(lower=1))).groupby(cells[name]).sum()
        variances.append((shares**2).sum())
        freedoms.append(len(shares) - 1)
    mean, variance = of_tasks["gain"].mean().mean(), sum(variances)
    if min(freedoms) == 0:
        return mean, math.nan, math.nan
    spread = sum(v**2 / freedom for v, freedom in zip(variances, freedoms))
    freedom = variance**2 / spread if spread else 1.0
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    return mean, mean - half, mean + half


def shown(key, mean, low=math.nan, high=math.nan):
    """A mean of psnr, ssim, reward or exposure with its interval, if it has one."""
    scale, digits = SHOWN[key]
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (mean, low, high))
    return f"{mean} [{low}, {high}]" if low != "+nan" else mean


# ------------------------------------------------------------------------------------------ tables


def per_task(rows):
    """The PSNR of the pre-trained model and the mean gains over it, in dB and reward, per task."""
    tasks, tables = rows["task"].unique(), []
    for key, unit in (("psnr", "dB"), ("reward", "reward, 1e-4")):
        lines = []
        if key == "psnr":
            start = rows.groupby("task")["psnr_before"].mean()
            lines.append(["pre-trained model", *(f"{start[task]:.2f}" for task in tasks)])
        for arm, of_arm in rows.groupby("arm", sort=False):
            means = in_cells(of_arm, key).groupby("task").mean()
            lines.append([arm, *(shown(key, means[task]) for task in tasks)])
        tables.append(report.markdown([f"gain, {unit}", *tasks], lines))
    return "\n\n".join(tables)


def overall(rows, intervals):
    """PSNR, SSIM and reward of all images, and PSNR and reward of the hard and the other ones."""
    head = ["gain over the pre-trained model", "seeds", "PSNR, dB", "SSIM, 1e-4", "reward, 1e-4"]
    head += ["hard 30 %: dB", "1e-4", "the rest: dB", "1e-4"]
    lines = []
    for arm, of_arm in rows.groupby("arm", sort=False):
        line = [arm, of_arm["seed"].nunique()]
        line += [shown(key, *found) for key, found in intervals[arm].items()]
        for part in (of_arm[of_arm["hard"] == 1], of_arm[of_arm["hard"] == 0]):
            line += [shown(key, mean_of_tasks(part, key)) for key in ("psnr", "reward")]
        lines.append(line)
    return report.markdown(head, lines)


def at_the_end(rows):
    """The gains of PSNR and reward at the last validation, means over tasks, of every (arm, seed).
    rows: of validation.csv."""
    means = rows[rows["task"] == "mean"].sort_values("step", kind="stable")
    return means.groupby(RUN)[["psnr", "reward"]].last()


def on_validation(rows):
    """The gains at the last validation, which is what settings are chosen on: their mean over
    seeds, and the lowest and highest seed."""
    lines, last = [], at_the_end(rows)
    for arm in rows["arm"].unique():
        line = [arm, len(last.loc[arm])]
        for key, found in last.loc[arm].items():
            mean, low, high = (shown(key, v) for v in (found.mean(), found.min(), found.max()))
            line.append(f"{mean} ({low} to {high})")
        lines.append(line)
    return report.markdown(["on the validation images", "seeds", "PSNR, dB", "reward, 1e-4"], lines)


def minus(rows, one, other):
    """The rows of one arm with its gains minus those of another, on the seeds that both have."""
    keys = [key for key in SHOWN if key in rows]
    mine, theirs = (
        rows[rows["arm"] == arm].set_index(["seed", "task", "image"]) for arm in (one, other)
    )
    difference = mine.assign(**(mine[keys] - theirs[keys]).reindex(mine.index))
    return difference.dropna(subset="psnr").reset_index()


def difference(rows, one, other):
    """How much more one arm gains than another on the same seeds."""
    units = dict(psnr="dB", reward="1e-4", exposure="1e-4 of exposure")
    both = minus(rows, one, other)
    if both.empty:
        return f"{one} minus {other}: no seed in common"
    asked = rows[rows["arm"].isin([one, other])]
    keys = [key for key in units if asked[key].notna().all()]
    words = [f"{shown(key, *interval(both, key))} {units[key]}" for key in keys]
    return f"{one} minus {other}, {both['seed'].nunique()} seeds: {', '.join(words)}"


def in_validation(rows, one, other):
    """The same on the validation images: the mean, and how many seeds are above 0."""
    last = at_the_end(rows)
    both, words = (last.loc[one] - last.loc[other]).dropna(), []
    for key, unit in (("psnr", "dB"), ("reward", "1e-4")):
        above = f"{(both[key] > 0).sum()} of {len(both)} above 0"
        words.append(f"{shown(key, both[key].mean())} ({above}) {unit}")
    return f"validation {', '.join(words)}"


def in_training(rows, one, other):
    """How much higher the reward of the rollouts is in the second half of training under one arm
    than under another on the same crops, with an interval over seeds. rows: of training.csv."""
    late = rows[rows["step"] > rows.groupby("arm")["step"].transform("max") / 2]
    means = late.groupby(RUN)["reward"].mean()
    both = (means[one] - means[other]).dropna().reset_index().assign(task="all", photo="all")
    words = shown("reward", *interval(both, "reward", over=["seed"]))
    return f"{words} 1e-4 of the rollouts' reward in training, {len(both)} seed(s)"


# ----------------------------------------------------------------------------------------- program


def run_program(argv):
    folder = Path(argv[0] if argv else "runs/results")
    if list(folder.glob("*/*/report.json")):
        collect(folder)
    gains, measured, validation, training = (read(folder / f"{name}.csv") for name in COLUMNS)
    if gains.empty and validation.empty:
        raise runs.RunError(
            f"{folder} holds no ARM/SEED/report.json: make some by python -m experiments.run"
        )
    if len(validation):
        print(on_validation(validation), end="\n\n")
        figures.curves(folder / "curves.png", validation)
    if len(training):
        figures.training(folder / "training.png", training)
    if len(gains):
        check_same(
            gains, "psnr_before", 0.01, "began with another model, or was measured on other images,"
        )
        check_same(gains, "reward_before", 1e-3, "was measured by another reward")
        intervals = {
            arm: {key: interval(rows, key) for key in ("psnr", "ssim", "reward")}
            for arm, rows in gains.groupby("arm", sort=False)
        }
        print(per_task(gains), overall(gains, intervals), sep="\n\n", end="\n\n")
        figures.gains(folder / "gains.png", intervals)
    for one, other in PAIRS:
        gained, chosen, again, trained = (
            {one, other} <= {*rows["arm"]} for rows in (gains, validation, measured, training)
        )
        if gained:
            print(difference(gains, one, other))
        if chosen:
            print(f"{one} minus {other}: {in_validation(validation, one, other)}")
        if again:
            print(f"validation images: {difference(measured, one, other)}")
        if trained and "shuffled" in other:
            print(f"{one} minus {other}: {in_training(training, one, other)}")


def main(argv=None):
    return runs.program("experiments.tables", run_program, argv)


if __name__ == "__main__":
    sys.exit(main())
