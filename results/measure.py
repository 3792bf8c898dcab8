"""Measures finished runs of the demo again, all by the same: the composite reward of --rewards
default, whatever they were trained by, and the known answer of exposure_judge.py.

    python results/measure.py runs/results/judged runs/results/judged-shuffled

Writes both, and the same of the validation photographs, into each report.json, which
results/tables.py reads; report.md stays as it is. Arms of another --rewards (general-alone,
task-alone) need it before they are compared.
"""

import json
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from exposure_judge import closeness

import rewards
import runs
from config import DEMO_MODEL
from data import list_training
from metrics import evaluate
from model import load_adair, load_pretrained, read_checkpoint, restore
from policy import load_policy


def measure(samples, restoring):
    """A row for every sample, as restoring(image) gives it."""
    reward = rewards.Reward(rewards.parse_terms("default"))

    def also(sample, degraded, restored, gt):
        seen, true = (rewards.luma(image[None].clamp(0, 1)).mean() for image in (restored, gt))
        exposure = closeness(seen.item(), true.item())
        return dict(reward=reward.of_image(restored, gt, sample.task), exposure=exposure)

    return evaluate(restoring, tqdm(samples, leave=False), also)


def check(folder):
    """Exits unless a run is one of the demo, with its weights."""
    config = json.loads((folder / "config.json").read_text())
    samples = config["samples"]
    of_demo = Path(config["init"]).name == DEMO_MODEL.name and not samples["data_root"]
    if not of_demo or samples["tasks"]:
        sys.exit(f"results/measure.py: {folder} is no run of the demo model on all of its tasks")
    if not (folder / "last.pt").exists():
        sys.exit(f"results/measure.py: {folder} has no last.pt to measure")


def main():
    runs.check_device("cpu")
    paths = sorted(path for arm in sys.argv[1:] for path in Path(arm).glob("*/report.json"))
    if not paths:
        sys.exit("results/measure.py: name folders of arms, which hold SEED/report.json")
    demo, pretrained = list_training(None), load_pretrained(DEMO_MODEL, "fraction")
    parts = {"": demo.held_out, "val_": demo.val}
    before = {}
    for path in paths:
        check(path.parent)
        stored = json.loads(path.read_text())
        checkpoint = read_checkpoint(path.parent / "last.pt")
        model, policy = load_adair(path.parent / "last.pt", checkpoint), load_policy(checkpoint)
        for part, samples in parts.items():
            if "exposure" in stored.get(f"{part}after", [{}])[0]:
                continue
            if part not in before:
                before[part] = measure(samples, partial(restore, pretrained))
            after = measure(samples, partial(restore, model, controller=policy.mean()))
            stored |= {f"{part}before": before[part], f"{part}after": after}
            runs.save_json(path, stored)
        print(path, flush=True)


if __name__ == "__main__":
    main()
