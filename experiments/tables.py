"""Tables from runs, with 95 % intervals.

    python -m experiments.tables runs/results     the runs there; leaves small files (`collect`)
    python -m experiments.tables results/main     such files alone: the runs we made

Both leave gains.png, differences.png, curves.png and training.png beside them. Where eval.py has
been run, too, Tables 2 and 3 are among the tables, means over seeds.

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
from data import TASKS
from eval import TABLE_2
from eval import tables as layout
from experiments import figures
from experiments.run import ARMS

# what is gained
UNITS = dict(psnr="dB", ssim="1e-4 of SSIM", reward="1e-4 of reward", exposure="1e-4 of exposure")
RUN = ["arm", "seed"]
GAINS = [*RUN, "task", "image", "psnr_before", "reward_before", "hard", *UNITS]
COLUMNS = {
    "gains": GAINS,
    "measured": GAINS,
    "photographs": GAINS,
    "validation": [*RUN, "step", "task", "psnr", "reward"],
    "training": "arm seed step reward psnr_det psnr_best loss/sup loss/cons loss/total".split(),
    "tests": [*RUN, "set", "task", "image", "psnr_before", "ssim_before", "psnr", "ssim"],
}
# Which arms answer a question together: an arm, and its controls.
CONTROLS = {
    "irpo": "sft best-of-g irpo-shuffled irpo-no-cons sft-time reward-time reward-sft-time hard-30 "
    "random-30 all-data group-2 general-alone task-alone",
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
    "lrpo": "lrpo-shuffled lrpo-sft-time lrpo-reward-time",
    "lrpo-judged": "lrpo-judged-shuffled",
}
PAIRS = [(arm, control) for arm, of in CONTROLS.items() for control in of.split()]


# ------------------------------------------------------------------------------------------- files


def collect(folder):
    """Writes the files of the runs in a folder, a row for every arm and seed and:

    gains.csv: for every held-out image the PSNR and reward before, whether it is one of the hard
    30 %, and the gains (of exposure where experiments.measure was run); measured.csv: the same of
    the validation images, where it was run; photographs.csv: of those of its --measure-on;
    validation.csv: the gains of every validation;
    training.csv: of every step the rewards of the rollouts, the PSNR of the mean action and of the
    best rollout, L_sup, L_cons and L_total; tests.csv: for every image of every test set PSNR and
    SSIM before, and the gains, where eval.py was run. Raises RunError unless an arm's runs have the
    same settings.
    """
    parts = {name: [] for name in COLUMNS}
    for of_arm in sorted({path.parents[1] for path in folder.glob("*/*/report.json")}):
        check_settings(of_arm)
    for path in sorted(folder.glob("*/*/report.json")):
        stored, tested = runs.load_json(path), path.with_name("eval-images.csv")
        found = dict(
            gains=compared(stored["before"], stored["after"], stored["hard"]),
            measured=compared(stored.get("val_before", []), stored.get("val_after", [])),
            photographs=compared(
                stored.get("photographs_before", []), stored.get("photographs_after", [])
            ),
            validation=validations(stored["validation"]),
            training=pd.DataFrame(runs.read_metrics(path.parent)),
            tests=evaluated(pd.read_csv(tested)) if tested.exists() else pd.DataFrame(),
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
    gains = after.reindex(columns=[*UNITS]) - before.reindex(columns=[*UNITS])
    names = dict(name="image", psnr="psnr_before", reward="reward_before")
    start = before.rename(columns=names).reindex(columns=["task", *names.values()])
    return start.join(gains).assign(hard=before.index.isin(hard).astype(int))


def validations(history):
    """The gains of every validation since the first, of every task and their mean."""
    steps = [past["step"] for past in history]
    gains = [pd.DataFrame(gained) for gained in report.gains_since_start(history)]
    return pd.concat(gains, keys=steps, names=["step", "task"]).reset_index()


def evaluated(rows):
    """The rows of eval-images.csv before, with what was gained after."""
    rows = rows.set_index(["set", "task", "image"])
    before, after = (rows.loc[rows["method"] == m, ["psnr", "ssim"]] for m in ("before", "after"))
    return before.add_suffix("_before").join(after - before).reset_index()


def write_csv(path, rows):
    """Writes rows as CSV, numbers with six decimals."""
    runs.write_atomic(path, rows.to_csv(index=False, float_format="%.6f").encode())


def read(path):
    """The rows of one of the files, arms in the order of `run.ARMS`; none if it is not there."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS[path.stem])
    rows = pd.read_csv(path, dtype=dict(arm=str))
    order = {arm: place for place, arm in enumerate(dict.fromkeys([*ARMS, *rows["arm"]]))}
    rows = rows.sort_values("arm", key=lambda arms: arms.map(order), kind="stable")
    if "image" in rows:
        rows["photo"] = rows["image"].str.replace(r"#\d+$", "", regex=True)  # #2: its second draw
    return rows.reset_index(drop=True)


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
    `by`; how: what else a run has done."""
    if rows.empty:
        return
    of_runs = rows.pivot(index=RUN, columns=["task", "image"], values=key)  # a row for every run
    off = (of_runs.iloc[1:] - of_runs.iloc[0]).abs()
    same = (off <= by).all(axis=1)  # an image that one lacks is NaN
    if not same.all():
        names = ["/".join(map(str, run)) for run in (same.idxmin(), of_runs.index[0])]
        raise runs.RunError(f"{names[0]} {how} than {names[1]}")


# --------------------------------------------------------------------------------------- intervals


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
    cells = rows.groupby(["task", "seed", "photo"], sort=False)[key].mean()  # over draws
    cells = cells.rename("gain").reset_index()
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
    """A mean of psnr in dB, or of another key in 1e-4, with its interval, if it has one."""
    scale, digits = (1, 3) if key == "psnr" else (1e4, 1)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (mean, low, high))
    return f"{mean} [{low}, {high}]" if low != "+nan" else mean


# ------------------------------------------------------------------------------------------ tables


def per_task(rows, key):
    """The mean gains over the pre-trained model per task, and of PSNR what it has."""
    cells = rows.groupby(["arm", "task", "seed", "photo"], sort=False)[key].mean().reset_index()
    means = cells.pivot_table(index="arm", columns="task", values=key, sort=False)
    lines = [[arm, *(shown(key, v) for v in of_tasks)] for arm, of_tasks in means.iterrows()]
    if key == "psnr":
        start = rows.groupby("task")["psnr_before"].mean()
        lines.insert(0, ["pre-trained model", *(f"{start[task]:.2f}" for task in means)])
    return report.markdown([f"gain, {UNITS[key]}", *means], lines)


def overall(title, rows):
    """What every arm gains of PSNR, SSIM and reward, as far as they are there, with intervals, and
    of PSNR and reward on the hard images and the other ones."""
    keys = [key for key in ("psnr", "ssim", "reward") if key in rows]
    parts = {"hard 30 %": 1, "the rest": 0} if "hard" in rows and rows["hard"].any() else {}
    head = [f"{title}: gain", "seeds", *(UNITS[key] for key in keys)]
    head += [name for part in parts for name in (f"{part}: dB", "1e-4")]
    lines = []
    for arm, of_arm in rows.groupby("arm", sort=False):
        line = [arm, of_arm["seed"].nunique()]
        line += [shown(key, *interval(of_arm, key)) for key in keys]
        for hard in parts.values():
            part = of_arm[of_arm["hard"] == hard]
            line += [shown(key, interval(part, key)[0]) for key in ("psnr", "reward")]
        lines.append(line)
    return report.markdown(head, lines)


def sets_of(rows):
    """{title: rows} of test sets: those of Table 2 together, and each that is not under test/."""
    foreign = rows[~rows["task"].isin([*TASKS])]
    parts = {"in domain": rows[rows["task"].isin([*TABLE_2])]}
    parts |= dict(iter(foreign.groupby("set", sort=False)))
    return {title: of for title, of in parts.items() if len(of)}


def as_methods(rows):
    """The pre-trained model and the arms as methods of `eval.tables`; rows: of tests.csv."""
    start = rows.assign(method="pre-trained", psnr=0.0, ssim=0.0)
    both = pd.concat([start, rows.assign(method=rows["arm"])])
    return both.assign(**{key: both[key] + both[f"{key}_before"] for key in ("psnr", "ssim")})


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


# ----------------------------------------------------------------------------------- comparisons


def difference(rows, one, other):
    """How much more one arm gains than another on the same seeds, of what both have."""
    both = of_both(rows, one, other)
    if both.empty:
        return f"{one} minus {other}: no seed in common"
    asked = rows[rows["arm"].isin([one, other])]
    keys = [key for key in UNITS if key in rows and asked[key].notna().all()]
    words = [f"{shown(key, *interval(both, key))} {UNITS[key]}" for key in keys]
    return f"{one} minus {other}, {both['seed'].nunique()} seeds: {', '.join(words)}"


def differences(rows, pairs):
    """{key: {"one − other": (mean, low, high)}} of pairs of arms, for a figure."""
    found = {key: {} for key in ("psnr", "reward")}
    for one, other in pairs:
        both = of_both(rows, one, other)
        for key in found if len(both) else ():
            found[key][f"{one} − {other}"] = interval(both, key)
    return found


def of_both(rows, one, other, keys=tuple(UNITS)):
    """How much more one arm gains than another, of the seeds and images that both have."""
    keys = [key for key in keys if key in rows]
    mine, theirs = (
        rows[rows["arm"] == arm].set_index(["seed", "task", "image"]) for arm in (one, other)
    )
    both = mine.assign(**(mine[keys] - theirs[keys]).reindex(mine.index))
    return both.dropna(subset="psnr").reset_index()


def in_validation(rows, one, other):
    """The same at the last validation: the mean, and how many seeds are above 0."""
    last = at_the_end(rows)
    both, words = (last.loc[one] - last.loc[other]).dropna(), []
    for key, unit in (("psnr", "dB"), ("reward", "1e-4")):
        above = f"{(both[key] > 0).sum()} of {len(both)} above 0"
        words.append(f"{shown(key, both[key].mean())} ({above}) {unit}")
    return ", ".join(words)


def in_training(rows, one, other):
    """How much higher the reward of the rollouts is in the second half of training under one arm
    than under another on the same crops, with an interval over seeds. rows: of training.csv."""
    late = rows[rows["step"] > rows.groupby("arm")["step"].transform("max") / 2]
    means = late.groupby(RUN)["reward"].mean()
    both = (means[one] - means[other]).dropna().reset_index().assign(task="all", photo="all")
    words = shown("reward", *interval(both, "reward", over=["seed"]))
    return f"{words} 1e-4 of the rollouts' reward, {len(both)} seed(s)"


# ----------------------------------------------------------------------------------------- program


def run_program(argv):
    folder = Path(argv[0] if argv else "runs/results")
    if list(folder.glob("*/*/report.json")):
        collect(folder)
    gains, measured, photographs, validation, training, tests = (
        read(folder / f"{name}.csv") for name in COLUMNS
    )
    if gains.empty and validation.empty:
        raise runs.RunError(f"{folder} holds no ARM/SEED/report.json: see experiments.run")
    for rows in (gains, photographs, tests):
        check_same(rows, "psnr_before", 0.01, "has another start, or other images,")
    check_same(gains, "reward_before", 1e-3, "was measured by another reward")
    if len(validation):
        print(on_validation(validation), end="\n\n")
        figures.curves(folder / "curves.png", validation)
    if len(training):
        figures.training(folder / "training.png", training)
    if len(gains):
        for text in (per_task(gains, "psnr"), per_task(gains, "reward")):
            print(text, end="\n\n")
        print(overall("held-out images", gains), end="\n\n")
        arms = gains.groupby("arm", sort=False)
        intervals = {k: {arm: interval(of, k) for arm, of in arms} for k in ("psnr", "reward")}
        figures.gains(folder / "gains.png", intervals)
        pairs = [pair for pair in PAIRS if {*pair} <= {*gains["arm"]}]
        if (found := differences(gains, pairs))["psnr"]:
            figures.gains(folder / "differences.png", found)
    wide = f"{photographs['photo'].nunique() if len(photographs) else 0} other photographs"
    if len(photographs):
        print(per_task(photographs, "psnr"), end="\n\n")
        print(per_task(photographs, "reward"), end="\n\n")
        print(overall(wide, photographs), end="\n\n")
    if len(tests):
        print(layout(as_methods(tests)))
        for title, rows in sets_of(tests).items():
            print(overall(title, rows), end="\n\n")
    compared = {"held-out": gains, wide: photographs, "validation images": measured}
    compared |= sets_of(tests)
    for one, other in PAIRS:
        for name, rows in compared.items():
            if {one, other} <= {*rows["arm"]}:
                print(f"{name}: {difference(rows, one, other)}")
        if {one, other} <= {*validation["arm"]}:
            print(f"validations: {one} minus {other}, {in_validation(validation, one, other)}")
        if {one, other} <= {*training["arm"]} and "shuffled" in other:
            print(f"training: {one} minus {other}, {in_training(training, one, other)}")


def main(argv=None):
    return runs.program("experiments.tables", run_program, argv)


if __name__ == "__main__":
    sys.exit(main())
