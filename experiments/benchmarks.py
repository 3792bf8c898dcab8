"""Tables 2 and 3 of several runs, from what eval.py left in their folders, with 95 % intervals.

    python -m experiments.benchmarks runs/real       of ARM/SEED/eval-images.csv; leaves tests.csv
    python -m experiments.benchmarks results/real    of such a file alone: the runs we made

A figure is the mean over seeds.
"""

import sys
from pathlib import Path

import pandas as pd

import report
import runs
from data import TASKS
from eval import TABLE_2
from eval import tables as layout
from experiments import tables

KEYS = ["psnr", "ssim"]


def collect(folder):
    """Writes tests.csv: for every image of every test set the PSNR and SSIM before, and what the
    runs gain, a row for every arm and seed. Raises RunError unless an arm's runs have the same
    settings."""
    parts = []
    for path in tables.files_of_runs(folder, "eval-images.csv"):
        rows = pd.read_csv(path).set_index(["set", "task", "image"])
        before, after = (rows[rows["method"] == name][KEYS] for name in ("before", "after"))
        gained = before.add_suffix("_before").join(after - before)
        parts.append(gained.reset_index().assign(arm=path.parts[-3], seed=path.parts[-2]))
    head = [*tables.RUN, "set", "task", "image", "psnr_before", "ssim_before", *KEYS]
    tables.write_csv(folder / "tests.csv", pd.concat(parts)[head])


def by_method(rows):
    """The arms and the pre-trained model as methods, as eval.tables takes them."""
    start = rows.assign(method="pre-trained", psnr=0.0, ssim=0.0)
    both = pd.concat([start, rows.assign(method=rows["arm"])])
    return both.assign(**{key: both[key] + both[f"{key}_before"] for key in KEYS})


def groups(rows):
    """{title: rows}: the sets of Table 2 together, and each set that is not under test/."""
    foreign = rows[~rows["task"].isin([*TASKS])]
    parts = {"in domain": rows[rows["task"].isin([*TABLE_2])]}
    parts |= dict(iter(foreign.groupby("set", sort=False)))
    return {title: of for title, of in parts.items() if len(of)}


def gains(rows):
    """The mean gains of PSNR and SSIM over the pre-trained model, with intervals."""
    lines = []
    for arm, of_arm in rows.groupby("arm", sort=False):
        line = [arm, of_arm["seed"].nunique()]
        for of in groups(of_arm).values():
            line.append(", ".join(tables.shown(key, *tables.interval(of, key)) for key in KEYS))
        lines.append(line)
    return report.markdown(["gain: dB, 1e-4 of SSIM", "seeds", *groups(rows)], lines)


def difference(rows, one, other):
    """How much more PSNR and SSIM one arm gains than another, on the seeds that both have."""
    both = tables.minus(rows, one, other)
    if both.empty:
        return f"{one} minus {other}: no seed in common"
    words = []
    for title, of in groups(both).items():
        words += [f"{title} {key} {tables.shown(key, *tables.interval(of, key))}" for key in KEYS]
    seeds = " ".join(map(str, both["seed"].unique()))
    return f"{one} minus {other}, seeds {seeds}: {', '.join(words)}"


def run_program(argv):
    folder = Path(argv[0] if argv else "runs/real")
    if list(folder.glob("*/*/eval-images.csv")):
        collect(folder)
    rows = tables.read(folder / "tests.csv")
    if rows.empty:
        raise runs.RunError(
            f"{folder} holds no ARM/SEED/eval-images.csv with a model before and after: run eval.py"
        )
    how = "began with another model, or was evaluated on other images,"
    tables.check_same(rows, "psnr_before", 0.01, how)
    print(layout(by_method(rows)), gains(rows), sep="\n", end="\n\n")
    for one, other in tables.PAIRS:
        if {one, other} <= {*rows["arm"]}:
            print(difference(rows, one, other))


def main(argv=None):
    return runs.program("experiments.benchmarks", run_program, argv)


if __name__ == "__main__":
    sys.exit(main())
