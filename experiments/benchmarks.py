"""Tables 2 and 3 of several runs, from what eval.py left in their folders, with 95 % intervals.

    python -m experiments.benchmarks runs/real    ARM/SEED/eval-images.csv there; leaves tests.csv
    python -m experiments.benchmarks results/real    such a file alone: of the runs we made

A figure is the mean over seeds. Intervals are from bootstraps over images and over seeds
(tables.interval), images drawn from all sets together.
"""

import csv
import sys
from pathlib import Path

import report
from data import TASKS
from eval import tables as layout
from experiments import tables

KEYS = (("psnr", 1, 3), ("ssim", 1e4, 1))  # with scale and digits


def collect(folder):
    """Writes tests.csv: for every image of every test set the PSNR and SSIM before, and what the
    runs gain, a row for every arm and seed. Exits unless an arm's runs have the same settings."""
    rows = []
    for path in tables.files_of_runs(folder, "eval-images.csv"):
        with open(path, newline="") as file:
            found = list(csv.DictReader(file))
        before = {(r["set"], r["image"]): r for r in found if r["method"] == "before"}
        for row in (r for r in found if r["method"] == "after"):
            old = before[row["set"], row["image"]]
            start = [float(old[key]) for key, *_ in KEYS]
            change = [float(row[key]) - value for (key, *_), value in zip(KEYS, start)]
            names = [row[name] for name in ("set", "task", "image")]
            rows.append([*path.parts[-3:-1], *names, *start, *change])
    head = "arm seed set task image psnr_before ssim_before psnr ssim".split()
    (folder / "tests.csv").write_text(report.to_csv(head, rows))


def check_images(arms):
    """Exits unless all runs began with one model, and were evaluated on the same images."""
    another = "{} began with another model, or was evaluated on other images, than {}"
    tables.check_same(arms, "psnr_before", 0.01, f"experiments/benchmarks.py: {another}")


def by_method(arms):
    """{set: {method: rows with psnr and ssim}}, as eval.tables takes them."""
    results = {}
    for arm, rows in arms.items():
        for row in rows:
            of_set = results.setdefault(row["set"], {})
            start = {key: row[f"{key}_before"] for key, *_ in KEYS}
            after = {key: row[key] + start[key] for key in start}
            of_set.setdefault("pre-trained", []).append(dict(task=row["task"], **start))
            of_set.setdefault(arm, []).append(dict(task=row["task"], **after))
    return results


def groups(rows):
    """{title: rows}: the sets of Table 2 together, and each set that is not under test/."""
    parts = {}
    for row in rows:
        task = TASKS.get(row["task"])
        if task is None or task.title:
            parts.setdefault("in domain" if task else row["set"], []).append(row)
    return dict(sorted(parts.items(), key=lambda part: part[0] != "in domain"))


def gains(arms):
    """The mean gains of PSNR and SSIM over the pre-trained model, with intervals."""
    lines = []
    for arm, rows in arms.items():
        parts = groups(rows)
        cells = [
            ", ".join(tables.cell(tables.gains(of, key)[0], *rest) for key, *rest in KEYS)
            for of in parts.values()
        ]
        lines.append([arm, len(tables.by_seed(rows)), *cells])
    return report.markdown(["gain: dB, 1e-4 of SSIM", "seeds", *parts], lines)


def difference(arms, one, other):
    """How much more PSNR and SSIM one arm gains than another, on the seeds that both have."""
    rows = tables.minus(arms[one], arms[other])
    if not rows:
        return f"{one} minus {other}: no seed in common"
    words = [
        f"{title} {key} {tables.cell(tables.gains(of, key)[0], *rest)}"
        for title, of in groups(rows).items()
        for key, *rest in KEYS
    ]
    return f"{one} minus {other}, seeds {' '.join(tables.by_seed(rows))}: {', '.join(words)}"


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/real")
    if list(folder.glob("*/*/eval-images.csv")):
        collect(folder)
    arms = tables.read(folder / "tests.csv")
    if not arms:
        missing = "holds no ARM/SEED/eval-images.csv with a model before and after: run eval.py"
        sys.exit(f"experiments/benchmarks.py: {folder} {missing}")
    check_images(arms)
    print(layout(by_method(arms)), gains(arms), "", sep="\n")
    for one, other in (pair for pair in tables.PAIRS if {*pair} <= arms.keys()):
        print(difference(arms, one, other))


if __name__ == "__main__":
    main()
