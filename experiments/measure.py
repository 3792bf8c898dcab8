"""Measures finished runs of the demo again, all by the same: the composite reward of --rewards
default, whatever they were trained by, and the known answer of exposure_judge.py.

    python -m experiments.measure runs/results/judged runs/results/judged-shuffled

Writes both, and the same of the validation photographs, into each report.json, which
experiments/tables.py reads; report.md stays as it is. Arms of another --rewards (general-alone,
task-alone) need it before they are compared.
"""

import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

import rewards
import runs
from config import DEMO_MODEL
from data import list_training
from eval import load
from experiments.exposure_judge import closeness, mean_luminance
from metrics import evaluate
from model import CheckpointError, load_pretrained, restore


def measure(samples, restoring):
    """A row for every sample, as restoring(image) gives it."""
    reward = rewards.Reward(rewards.parse_terms("default"))

    def also(sample, degraded, restored, gt):
        exposure = closeness(mean_luminance(restored.clamp(0, 1)), mean_luminance(gt))
        return dict(reward=reward.of_image(restored, gt, sample.task), exposure=exposure)

    return evaluate(restoring, tqdm(samples, leave=False), also)


def check(folder):
    """Raises RunError unless a run is one of the demo."""
    config = runs.load_json(folder / "config.json")
    samples = config["samples"]
    of_demo = Path(config["init"]).name == DEMO_MODEL.name and not samples["data_root"]
    if not of_demo or samples["tasks"]:
        raise runs.RunError(f"{folder} is no run of the demo model on all of its tasks")


def run_program(arms):
    """Measures the runs of these folders of arms, as far as they have not been."""
    runs.check_device("cpu")
    paths = sorted(path for arm in arms for path in Path(arm).glob("*/report.json"))
    if not paths:
        raise runs.RunError("name folders of arms, which hold SEED/report.json")
    demo, pretrained = list_training(None), load_pretrained(DEMO_MODEL, "fraction")
    parts = {"": demo.held_out, "val_": demo.val}
    before = {}
    for path in paths:
        check(path.parent)
        stored = runs.load_json(path)
        restoring, _ = load(path.parent, "cpu")
        for part, samples in parts.items():
            if "exposure" in stored.get(f"{part}after", [{}])[0]:
                continue
            if part not in before:
                before[part] = measure(samples, partial(restore, pretrained))
            after = measure(samples, restoring)
            stored |= {f"{part}before": before[part], f"{part}after": after}
            runs.save_json(path, stored)
        print(path, flush=True)


def main():
    return runs.program("experiments/measure.py", run_program, errors=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
