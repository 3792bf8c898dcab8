"""Measures what runs of lrpo.py made of a diffusion chain, by its noise-free output and by samples.

    python -m experiments.run --arms chains --seeds 0 1 2 --jobs 2 --out runs/chain
    python -m experiments.chain runs/chain [--on data/test/denoise/bsd68]
    python -m experiments.chain results/chain         # the rows of chain.csv there alone

Leaves chain.csv beside the arms: a row for every run, output and image (of other photographs
chain-validation.csv, chain-photographs.csv). Outputs (--outputs): without noise; samples at
temperature 1 and 0.5; without noise, the last step being that of the start, which RL does not
train. The reward is lrpo.py's for chains; PSNR and BRISQUE (Mittal et al. 2012, by the
package brisque) are not in it. BRISQUE is shown as 1 − BRISQUE/100, so that more is better.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from pydantic import Field
from tqdm import tqdm

import lrpo
import report
import runs
from data import DataError, list_training, middle
from diffusion import Chain, Sampled
from experiments.measure import photographs_in
from experiments.run import CHAIN, CHAIN_WITHOUT
from experiments.tables import interval, of_both, write_csv
from metrics import evaluation_pair, psnr
from model import CheckpointError, load_restorer, model_digest, restore
from rewards import Reward, RewardError, Scene, effective_weights, parse_terms, weighted_sum

OUTPUTS = "noise-free", "sample", "half-noise", "start-last-step"
MEASURES = ["reward", "piqe", "ssim", "lowpass", "brisque", "psnr"]


@dataclass
class Config:
    """Measure runs of a diffusion chain."""

    folder: tyro.conf.Positional[Path]
    """of ARM/SEED, or of a chain.csv"""
    on: str = "held-out"
    """what to measure on: the demo's held-out photographs, its validation ones, on which settings
    are chosen, or a folder of photographs"""
    side: Annotated[int, Field(ge=16, multiple_of=8)] = 192
    """px a side of the middle of a photograph that is measured"""
    outputs: Annotated[tuple[Literal[OUTPUTS], ...], Field(min_length=1)] = OUTPUTS
    """what to measure and to show: each takes its time"""


class LastStepOf(torch.nn.Module):
    """A chain without noise whose last step is another's."""

    def __init__(self, chain, last):
        super().__init__()
        self.chain, self.last = chain, last

    def forward(self, degraded):
        y = 2 * degraded - 1
        *_, (t, x, _) = self.chain.walk(y, lambda: torch.zeros_like(y))
        return (self.last.predict(x, y, torch.full((len(y),), t, device=y.device)) + 1) / 2


def outputs_of(chain, start, names):
    """{name: restorer} of a chain, for the names that are asked for."""
    outputs = {
        "noise-free": chain,
        "sample": Sampled(chain),
        "half-noise": Sampled(chain, temperature=0.5),
        "start-last-step": LastStepOf(chain, start),
    }
    return {name: outputs[name] for name in names}


def brisque_of():
    """A function from images (3, H, W) to 1 − BRISQUE/100. Raises RunError without the package."""
    try:
        from brisque import BRISQUE
    except ImportError as error:
        said = f"experiments.chain needs the packages pypiqe and brisque ({error})"
        raise runs.RunError(f"{said}: pip install pypiqe brisque") from None

    class Brisque(BRISQUE):
        def scale_features(self, features):  # NumPy 2.4 makes no number of an array of one
            return super().scale_features([np.ravel(f)[0] for f in features])

    model = Brisque(url=False)

    def value(image):
        pixels = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        return 1 - model.score(pixels) / 100

    return value


def measure(outputs, samples, reward, brisque):
    """{output: rows} of all samples."""
    weights, rows = effective_weights(reward.weights), {name: [] for name in outputs}
    for sample in tqdm(samples, leave=False):
        degraded, gt = evaluation_pair(sample)
        for name, net in outputs.items():
            restored = restore(net, degraded).clamp(0, 1)
            scene = Scene(restored[None, None], gt[None], [sample.task], reward.nets)
            terms = reward.terms(scene, weights)
            row = {name: value.item() for name, value in terms.items()}
            row |= dict(reward=weighted_sum(terms, weights).item())
            row |= dict(psnr=psnr(restored, gt).item(), brisque=brisque(restored))
            rows[name].append(dict(task=sample.task, image=sample.name, **row))
    return rows


def samples_of(config):
    """What to measure on. Raises DataError."""
    demo = list_training(None)
    samples = {"held-out": demo.held_out, "validation": demo.val}.get(config.on)
    return [middle(s, config.side) for s in samples or photographs_in(config.on)]


def collect(config, paths):
    """The rows of all runs: of every output and image what it was before, and the gains."""
    reward, brisque = Reward(parse_terms(lrpo.chain().scoring.rewards)), brisque_of()
    samples, starts, found = samples_of(config), {}, []
    for path in paths:
        init = runs.load_json(path / "config.json")["init"]
        if init not in starts:
            start = load_restorer(init)
            if not isinstance(start, Chain):
                raise runs.RunError(f"{path} is no run of a diffusion chain")
            outputs = outputs_of(start, start, config.outputs)
            starts[init] = start, measure(outputs, samples, reward, brisque)
        start, before = starts[init]
        if runs.load_json(path / "hard.json")["model"] != model_digest(start):
            raise runs.RunError(f"{path} began from another model than {init} is today")
        outputs = outputs_of(load_restorer(path / "last.pt"), start, config.outputs)
        after = measure(outputs, samples, reward, brisque)
        for name, rows in after.items():
            old, new = pd.DataFrame(before[name]), pd.DataFrame(rows)
            gains = new[["task", "image"]].join(old[MEASURES].add_suffix("_before"))
            gains = gains.join(new[MEASURES] - old[MEASURES])
            found.append(gains.assign(arm=path.parent.name, seed=path.name, output=name))
        print(path, flush=True)
    return pd.concat(found)


def table(rows):
    """What every arm gains, by every output, with intervals over photographs and seeds."""
    head = ["", "output", "seeds", *(f"{key}, 1e-4" for key in MEASURES[:-1]), "PSNR, dB"]
    lines = []
    for name, of_output in rows.groupby("output", sort=False):
        first = of_output[of_output["arm"] == of_output["arm"].iloc[0]]
        start = [first.groupby("task")[f"{key}_before"].mean().mean() for key in MEASURES]
        lines.append(["start", name, "", *(f"{v:.4f}" for v in start[:-1]), f"{start[-1]:.2f}"])
    for (arm, name), of_arm in rows.groupby(["arm", "output"], sort=False):
        lines.append([arm, name, of_arm["seed"].nunique(), *cells(of_arm)])
    for arm, control in PAIRS:
        for name, of_output in rows.groupby("output", sort=False):
            both = of_both(of_output, arm, control, MEASURES)
            if len(both):
                lines.append([f"{arm} − {control}", name, both["seed"].nunique(), *cells(both)])
    return report.markdown(head, lines)


PAIRS = [("chain", arm) for arm in CHAIN | CHAIN_WITHOUT if arm != "chain"]


def cells(rows):
    """The mean gains in rows, with intervals, of one seed over photographs alone."""
    over, words = ("seed", "photo") if rows["seed"].nunique() > 1 else ("photo",), []
    for key in MEASURES:
        scale, digits = (1, 3) if key == "psnr" else (1e4, 0)
        known = rows.dropna(subset=key)  # BRISQUE of a flat image is none
        mean, low, high = (f"{scale * v:+.{digits}f}" for v in interval(known, key, over))
        words.append(mean if "nan" in low else f"{mean} [{low}, {high}]")
    return words


def run_program(argv):
    """Measures the runs in a folder, or reads what was measured, and prints the table."""
    config = runs.flags(Config, "experiments.chain", __doc__, argv)
    runs.check_device("cpu")
    paths = sorted(path.parent for path in config.folder.glob("*/*/report.json"))
    part = config.on if config.on in ("held-out", "validation") else "photographs"
    file = config.folder / ("chain.csv" if part == "held-out" else f"chain-{part}.csv")
    if paths:
        rows = collect(config, paths)
        if file.exists():  # outputs that were measured before
            known = pd.read_csv(file, dtype=dict(seed=str))
            rows = pd.concat([rows, known[~known["output"].isin(config.outputs)]])
        write_csv(file, rows)
    if not file.exists():
        raise runs.RunError(f"{config.folder} holds no ARM/SEED/report.json and no {file.name}")
    rows = pd.read_csv(file, dtype=dict(seed=str))
    rows = rows[rows["output"].isin(config.outputs)]
    print(table(rows.assign(photo=rows["image"].str.replace(r"#\d+$", "", regex=True))))


def main(argv=None):
    errors = (CheckpointError, DataError, RewardError)
    return runs.program("experiments.chain", run_program, argv, errors)


if __name__ == "__main__":
    sys.exit(main())
