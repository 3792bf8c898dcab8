"""Benchmark tables, before and after, in the layout of the paper's Tables 2 and 3; and restoring
one's own photos.

    python eval.py --ckpt runs/NAME --data-root data
    python eval.py restore photo.jpg --ckpt runs/NAME
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import tyro
from tqdm import tqdm

import report
import runs
from data import TASKS, DataError, images_in, list_adair_test, read_image, split_usable
from diffusion import Chain, Sampled
from metrics import evaluate_image, evaluation_pair, psnr
from model import CheckpointError, load_adair, load_restorer, read_checkpoint, restore
from policy import PolicyError, load_policy
from rewards import NETS, RewardError, load_net, weight_path

WHOLE_PIXELS = 1 << 20  # photos above this are restored in tiles unless --tile 0 asks otherwise
SMALLEST = 8  # px a side
ERRORS = (DataError, CheckpointError, PolicyError, RewardError)
METRICS = {"psnr": 2, "ssim": 3, "lpips": 3}  # and how many decimals the tables show
TABLE_2 = {  # its columns, by task
    "dehaze": "Dehazing",
    "derain": "Deraining",
    "denoise25": "Denoising",
    "deblur": "Deblurring",
    "lowlight": "Low-Light",
}


@dataclass
class Benchmark:
    """Tables 2 and 3 of a checkpoint; `eval.py restore --help` is about photos."""

    ckpt: str
    """run folder, or a checkpoint file: official AdaIR or ours"""
    data_root: str
    """folder with test/ in AdaIR's layout, or sets with input/ + target/"""
    before: str | None = None
    """checkpoint of the 'before' row; without it, what the run started from"""
    sets: tuple[str, ...] = ()
    """names of the test sets to use; without it, all that are found"""
    limit: runs.Count = 0
    """images per set, the first ones; 0: all"""
    tile: runs.Count = 0
    """restore in tiles of this many px; 0: whole images"""
    save_images: bool = False
    """write every restored image, into OUT/images/SET/METHOD"""
    weights_dir: str | None = None
    """where LPIPS looks for its weights; without it, torch's cache"""
    out: str | None = None
    """folder for the tables; without it, the run folder, or runs/eval-FOLDER-NAME for a file"""
    overwrite: bool = False
    """replace results that exist"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


@dataclass
class Restore:
    """Restores a photo, or a folder of photos."""

    photo: tyro.conf.Positional[str]
    """an image, or a folder of images"""
    ckpt: str
    """run folder, or a checkpoint file: official AdaIR or ours"""
    out: str = "restored"
    """folder for the results, written as PNG"""
    temperature: runs.NotNegative = 0.0
    """of a diffusion chain: deviation of its noise, 1: as it was trained; 0: none"""
    seed: runs.Count = 0
    """of that noise"""
    tile: runs.Count | None = None
    """px; 0: whole image (default: 512 above 1 MP, else whole)"""
    overwrite: bool = False
    """replace results that exist"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


def load(path, device, temperature=0.0, seed=0):
    """(restore, init): the deterministic restorer of a run folder or a checkpoint file, ours or any
    that `model.load_restorer` reads, and the path of the model a run started from, None if that is
    unknown. temperature, seed: of a diffusion chain's noise. Raises RunError for a temperature of
    another."""
    path = Path(path)
    file = path / "last.pt" if path.is_dir() else path
    config, checkpoint = file.parent / "config.json", read_checkpoint(file)
    policy = load_policy(checkpoint)
    net = load_adair(file, checkpoint=checkpoint) if policy else load_restorer(file)
    if temperature:
        if not isinstance(net, Chain):
            raise runs.RunError(f"--temperature is of diffusion chains; {file} holds none")
        net = Sampled(net, temperature, seed)
    net = net.to(device, memory_format=torch.channels_last)
    controller = policy.to(device).mean() if policy else None
    is_run = isinstance(checkpoint, dict) and "step" in checkpoint and config.exists()
    init = runs.load_json(config)["init"] if is_run else None
    return partial(restore, net, controller=controller), init


# ------------------------------------------------------------------------------------------ tables


def lpips_of(weights_dir, device):
    """(restored, gt) -> LPIPS (AlexNet) of two images (3, H, W) in [0, 1], if its weights are
    there, else None."""
    path = weight_path("lpips", weights_dir)
    if not path.is_file():
        runs.say(f"LPIPS is not measured: {path} is not there ({NETS['lpips'].base}{path.name})")
        return None
    net = load_net("lpips", path).to(device)

    @torch.no_grad()
    def distance(restored, gt):
        pair = (t[None].clamp(0, 1).to(device) * 2 - 1 for t in (restored, gt))
        return net(*pair).item()

    return distance


def evaluate_set(restorer, samples, desc, lpips=None, folder=None):
    """AdaIR's protocol over a test set, shared by the processes: a row {task, name, psnr_in, psnr,
    ssim} for each sample, with lpips if it is given; restored images go into `folder`, if given."""
    base = os.path.commonpath([os.path.dirname(sample.name) for sample in samples])

    def measure(sample):
        row, restored, gt = evaluate_image(restorer, sample)
        if lpips:
            row["lpips"] = lpips(restored, gt)
        if folder:
            save_png(folder / os.path.relpath(sample.name, base), restored)
        return row

    return runs.parallel_map(measure, samples, desc)


def save_png(path, image):
    """Writes an image (3, H, W) in [0, 1]; .png is added to a name of another type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path if path.suffix == ".png" else Path(f"{path}.png")
    runs.write_atomic(path, report.to_png(image))


def comparison(name, sample, restorers):
    """A sample of the test set `name`, as each of the restorers leaves it: a row of
    `report.plot_samples`."""
    degraded, gt = evaluation_pair(sample)
    images = {f"{name}: input": degraded}
    images |= {method: restorer(degraded) for method, restorer in restorers.items()}
    row = [(f"{label}  {psnr(image, gt):.2f} dB", image) for label, image in images.items()]
    return [*row, ("truth", gt)]


def cell(means, sign=""):
    """28.31/0.912: the means of METRICS, as many as there are, each with its decimals."""
    return "/".join(f"{v:{sign}.{digits}f}" for v, digits in zip(means, METRICS.values()))


def table(title, images, columns):
    """A titled table: a row per method, and the gain where there are two; a column for each set of
    columns {set: heading}, and their average. images: as for `tables`."""
    keys = [key for key in METRICS if key in images]
    means = images.groupby(["method", "set"])[keys].mean()
    values = {m: means.loc[m].loc[[*columns]].to_numpy() for m in images["method"].unique()}
    if len(values) == 2:
        before, after = values.values()
        values["gain"] = after - before
    lines = []
    for method, of_sets in values.items():
        sign = "+" if method == "gain" else ""
        lines.append([method, *(cell(v, sign) for v in (*of_sets, of_sets.mean(axis=0)))])
    text = report.markdown(["Method", *columns.values(), "Average"], lines)
    return f"**{title}: {'/'.join(keys).upper()}**\n\n{text}\n"


def tables(images):
    """Table 2 (in domain, denoising at σ = 25), all noise levels, and Table 3 (every set that is
    not under test/). images: a frame with a row per image and method: set, method, task, psnr,
    ssim."""
    task_of = images.groupby("set", sort=False)["task"].first()
    known = {name: TASKS[task] for name, task in task_of.items() if task in TASKS}
    titled = [n for task in TABLE_2 for n in known if task_of[n] == task]
    parts = {
        "In domain (layout of Table 2)": {n: f"{TABLE_2[task_of[n]]} {n}" for n in titled},
        "Denoising by noise level": {n: n for n in known if known[n].variant},
        "Out of domain (layout of Table 3)": {n: n for n in task_of.index if n not in known},
    }
    return "\n".join(table(title, images, columns) for title, columns in parts.items() if columns)


# ---------------------------------------------------------------------------------------- programs


def benchmark(config):
    """Evaluates a checkpoint on every test set and writes the tables."""
    runs.check_tile(config.tile)
    runs.check_device(config.device)
    device, ckpt = runs.join(config.device), Path(config.ckpt)
    default = ckpt if ckpt.is_dir() else f"runs/eval-{ckpt.resolve().parent.name}-{ckpt.stem}"
    out = Path(config.out or default)
    if (out / "eval.md").exists() and not config.overwrite and runs.rank() == 0:
        raise runs.RunError(f"{out} holds an evaluation: give --overwrite, or another --out")

    restorer, init = load(config.ckpt, device)
    restorers = {"model": restorer}
    if before := config.before or init:
        restorers = {"before": load(before, device)[0], "after": restorer}
    restorers = {name: partial(r, tile=config.tile or None) for name, r in restorers.items()}
    sets = find_sets(config)
    lpips = lpips_of(config.weights_dir, device)

    rows = []
    for name, samples in sets.items():
        for method, restorer in restorers.items():
            folder = out / "images" / name / method if config.save_images else None
            found = evaluate_set(restorer, samples, f"{name}, {method}", lpips, folder)
            rows += [dict(set=name, method=method) | row for row in found]
            means = [report.mean(found, key) for key in METRICS if key in found[0]]
            runs.say(f"{name}: {len(found)} images, {method} {cell(means)}")
    if runs.rank():
        return

    images = pd.DataFrame(rows).rename(columns=dict(name="image", psnr_in="psnr_input"))
    grouped = images.groupby(["set", "method"], sort=False)
    means = grouped.mean(numeric_only=True)
    means.insert(0, "images", grouped.size())
    text = tables(images)
    if config.limit:
        text += f"\nOnly the first {config.limit} images of each set (--limit).\n"
    pictures = [comparison(name, samples[0], restorers) for name, samples in sets.items()]
    out.mkdir(parents=True, exist_ok=True)
    runs.write_atomic(out / "eval.md", text.encode())
    runs.write_atomic(out / "eval.csv", means.to_csv(float_format="%.6f").encode())
    each = images.to_csv(index=False, float_format="%.6f")
    runs.write_atomic(out / "eval-images.csv", each.encode())
    runs.write_atomic(out / "eval.png", report.plot_samples(pictures))
    print(f"\n{text}\nwritten to {out}: eval.md, eval.csv, eval-images.csv, eval.png")


def find_sets(config):
    """{name: samples} of the test sets to use. Raises DataError for what cannot be read."""
    if not Path(config.data_root).is_dir():
        raise DataError(f"there is no folder {config.data_root}")
    sets = list_adair_test(config.data_root, config.sets)
    sets = {name: samples[: config.limit or None] for name, samples in sets.items()}
    names = [[name, *(sample.name for sample in sets[name])] for name in sets]
    runs.same_everywhere("list of images", names)
    for name, samples in sets.items():
        _, problems = split_usable(samples, SMALLEST, decode=False)
        if problems:
            raise DataError(f"{problems[0]} (test set {name})")
    return sets


def restore_photos(config):
    """Restores photos. Raises DataError if some could not be read, after the others."""
    runs.check_tile(config.tile)
    runs.check_device(config.device)
    restorer, _ = load(config.ckpt, config.device, config.temperature, config.seed)
    source, targets, broken = Path(config.photo), {}, 0
    photos = images_in(source) if source.is_dir() else [source]
    if not photos:
        raise DataError(f"{source} holds no image")
    for photo in photos:
        name = os.path.relpath(photo, source if source.is_dir() else source.parent)
        target = (Path(config.out) / name).with_suffix(".png")
        if target in targets or (target.exists() and not config.overwrite):
            raise DataError(f"{photo} would replace {target}: rename one, or give --overwrite")
        targets[target] = photo
    for target, photo in tqdm(targets.items(), desc="restore", unit="photo"):
        try:
            image = read_image(photo)
            tile = config.tile
            if tile is None:
                tile = 512 if image[0].numel() > WHOLE_PIXELS else 0
            restored = restorer(image, tile=tile or None, progress=True)
        except ValueError as error:  # of reading, or of an image that is too small
            tqdm.write(f"{photo} is not restored: {error}")
            broken += 1
            continue
        save_png(target, restored)
    if broken:
        raise DataError(f"{broken} of {len(photos)} photo(s) could not be restored, see above")
    print(f"restored {len(photos)} photo(s) into {config.out}")


def run_program(argv):
    """The program with these flags."""
    if argv[:1] == ["restore"]:
        restore_photos(runs.flags(Restore, "eval.py restore", __doc__, argv[1:]))
    else:
        benchmark(runs.flags(Benchmark, "eval.py", __doc__, argv))


def main(argv=None):
    return runs.program("eval.py", run_program, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
