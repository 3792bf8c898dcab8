"""What several tests need: a small AdaIR, pictures, a run that takes seconds, the sentence of a
failure."""

import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of every worker and what it starts: they run side by side

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import TASKS, find_photos
from model import AdaIR


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_adair(mask_rule="fraction", rates=(0.25, 0.25), para1=0.5):
    """A random AdaIR of 0.3 M parameters with weights large enough that its controls show."""
    torch.manual_seed(0)
    net = AdaIR(8, (1, 1, 1, 1), 1, mask_rule=mask_rule, rates=rates).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    for block in (net.fre1, net.fre2, net.fre3):
        torch.nn.init.constant_(block.para1, para1)  # 0 in a fresh one
    return net


@pytest.fixture
def net():
    return small_adair()


def save_adair(path, net):
    """A checkpoint of ours."""
    torch.save(dict(model=net.state_dict(), config=net.config), path)
    return path


def picture(width=80, height=64, seed=0):
    """Smooth random colours with an edge, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = []
    for _ in range(3):
        along = np.sin(x / rng.uniform(4, 15) + rng.uniform(0, 6))
        waves.append(along * np.cos(y / rng.uniform(4, 15)))
    image = 0.5 + 0.4 * np.stack(waves, axis=-1)
    image[height // 2 :, : width // 3] *= 0.4
    return (image.clip(0, 1) * 255).astype(np.uint8)


def write(path, pixels=None, **kwargs):
    """Writes an image file, `picture(**kwargs)` unless its pixels are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(**kwargs) if pixels is None else pixels).save(path)
    return path


def cut_off(path, size=400):
    """Leaves an image file its header and takes its pixels."""
    path.write_bytes(path.read_bytes()[:size])


def samples_of(folder, n=5, tasks=TASKS):
    """The samples of n photographs made there."""
    for i in range(n):
        write(folder / f"{i}.png", seed=i)
    return find_photos(folder, tasks)[0]


# ---------------------------------------------------------------------------------------- tiny runs


@pytest.fixture
def init(tmp_path):
    return save_adair(tmp_path / "init.pt", small_adair(para1=0.1))


@pytest.fixture
def photos(tmp_path):
    for i in range(6):
        write(tmp_path / f"photos/{i}.png", width=64, height=48, seed=i)
    return tmp_path / "photos"


@pytest.fixture
def small(init, photos, tmp_path):
    """Flags of a run of train.py that takes seconds: of the photographs 4 are to train on, 1 to
    choose on, 1 to report on."""

    def flags(name, *more):
        base = ["--init", init, "--data-root", photos, "--out", tmp_path / name, "--device", "cpu"]
        base += ["--crop", 32, "--steps", 10, "--save-every", 4, "--eval-every", 5]
        base += ["--draws", 1, "--batch-size", 1]
        return [str(flag) for flag in (*base, *more)]

    return flags


def logged(run):
    """The rows of a run's log so far."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "step_time"} for row in rows]


def fails(capsys, main, argv):
    """The one sentence on standard error of a command that must end with exit code 2."""
    capsys.readouterr()
    try:
        code = main([str(flag) for flag in argv])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and "Traceback" not in error
    return error if "full helptext" in error else error.splitlines()[-1]  # tyro's own, or ours


def reference_files(*parts):
    """Path of the reference data beside the project, if this checkout has it."""
    path = ROOT.parent.joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"reference file {'/'.join(parts)} is not beside this checkout")
    return path
