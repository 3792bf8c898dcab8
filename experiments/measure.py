"""Measures finished runs of the demo again, all by the same: the composite reward of --rewards
default, whatever they were trained by, and the known answer of experiments.exposure_judge.

    python -m experiments.measure runs/results/judged runs/results/judged-shuffled

Writes both, and the same of the validation photographs, into each report.json, which
experiments.tables reads; report.md stays as it is. Arms of another --rewards (general-alone,
task-alone) need it before they are compared.
"""

import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

import runs
from config import DEMO_MODEL
from data import list_training
from eval import load
from experiments.exposure_judge import closeness, mean_luminance
from metrics import evaluate_image
from model import CheckpointError, load_pretrained, restore
from rewards import Reward, parse_terms


def measure(reward, samples, restoring):
    """A row for every sample, as restoring(image) gives it."""
    rows = []
    for sample in tqdm(samples, leave=False):
        row, restored, gt = evaluate_image(restoring, sample)
        row["reward"] = reward.of_image(restored, gt, sample.task)
        row["exposure"] = closeness(mean_luminance(restored.clamp(0, 1)), mean_luminance(gt))
        rows.append(row)
    return rows


def run_program(arms):
    """Measures the runs of these folders of arms, as far as they have not been."""
    paths = sorted(path for arm in arms for path in Path(arm).glob("*/report.json"))
    if not paths:
        raise runs.RunError("name folders of arms, which hold SEED/report.json")
    runs.check_device("cpu")
    demo, pretrained = list_training(None), load_pretrained(DEMO_MODEL, "fraction")
    reward, before = Reward(parse_terms("default")), {}
    for path in paths:
        config = runs.load_json(path.parent / "config.json")
        is_demo = Path(config["init"]).name == DEMO_MODEL.name
        if not is_demo or config["samples"]["data_root"] or config["samples"]["tasks"]:
            raise runs.RunError(f"{path.parent} is no run of the demo model on all of its tasks")
        stored, (restoring, _) = runs.load_json(path), load(path.parent, "cpu")
        for part, samples in {"": demo.held_out, "val_": demo.val}.items():
            if "exposure" in stored.get(f"{part}after", [{}])[0]:
                continue
            before[part] = before.get(part) or measure(
                reward, samples, partial(restore, pretrained)
            )
            stored |= {f"{part}before": before[part]}
            stored |= {f"{part}after": measure(reward, samples, restoring)}
            runs.save_json(path, stored)
        print(path, flush=True)


def main(argv=None):
    return runs.program("experiments.measure", run_program, argv, (CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
