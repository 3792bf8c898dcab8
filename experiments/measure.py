"""Measures finished runs of the demo model again, all by the same: the composite reward of
--rewards default, whatever they were trained by, and the known answer of
experiments.exposure_judge.

    python -m experiments.measure runs/results/judged runs/results/judged-shuffled
    python -m experiments.measure runs/results/irpo --measure-on data/test/denoise/bsd68

Writes them, and the same of the validation photographs, into each report.json, which
experiments.tables reads; report.md stays as it is. Arms of another --rewards (general-alone,
task-alone) need it before they are compared. With --measure-on it measures other photographs
instead, under every degradation, one draw each, on their middle 256 px.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from tqdm import tqdm

import runs
from config import DEMO_MODEL
from data import DataError, find_photos, list_training, middle
from eval import load
from experiments.exposure_judge import closeness, mean_luminance
from metrics import evaluate_image
from model import CheckpointError, load_pretrained, model_digest, restore
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


@dataclass
class Config:
    """Measure finished runs again."""

    arms: tyro.conf.Positional[tuple[Path, ...]]
    """folders of arms, which hold SEED/report.json"""
    measure_on: Path | None = None
    """folder of photographs to measure on"""


def photographs_in(folder):
    """The samples of a folder of photographs. Raises DataError unless all of them can be read."""
    samples, problems = find_photos(folder)
    if problems or not samples:
        raise DataError(problems[0] if problems else f"{folder} holds no photograph")
    return samples


def parts_of(config):
    """What to measure: {key in report.json: samples}. Raises DataError."""
    if not config.measure_on:
        demo = list_training(None)
        return {"": demo.held_out, "val_": demo.val}
    return {"photographs_": [middle(s, 256) for s in photographs_in(config.measure_on)]}


def run_program(argv):
    """Measures the runs of these folders of arms, as far as they have not been."""
    config = runs.flags(Config, "experiments.measure", __doc__, argv)
    paths = sorted(path for arm in config.arms for path in arm.glob("*/report.json"))
    if not paths:
        raise runs.RunError("name folders of arms, which hold SEED/report.json")
    runs.check_device("cpu")
    parts, pretrained = parts_of(config), load_pretrained(DEMO_MODEL, "fraction")
    reward, before = Reward(parse_terms("default")), {}
    for path in paths:
        started = runs.load_json(path.parent / "config.json")
        is_demo = Path(started["init"]).name == DEMO_MODEL.name
        if not is_demo or started["samples"]["data_root"] or started["samples"]["tasks"]:
            raise runs.RunError(f"{path.parent} is no run of the demo model on all of its tasks")
        stored, (restoring, _) = runs.load_json(path), load(path.parent, "cpu")
        mined = runs.load_json(path.with_name("hard.json"))
        if mined["model"] != model_digest(pretrained):
            raise runs.RunError(f"{path.parent} began from another demo model than today's")
        for part, samples in parts.items():
            names = [sample.name for sample in samples]
            rows = stored.get(f"{part}after", [{}])
            if "exposure" in rows[0] and [row["name"] for row in rows] == names:
                before[part] = stored[f"{part}before"]
                continue
            before[part] = before.get(part) or measure(
                reward, samples, partial(restore, pretrained)
            )
            stored |= {f"{part}before": before[part]}
            stored |= {f"{part}after": measure(reward, samples, restoring)}
            runs.save_json(path, stored)
        print(path, flush=True)


def main(argv=None):
    return runs.program("experiments.measure", run_program, argv, (CheckpointError, DataError))


if __name__ == "__main__":
    sys.exit(main())
