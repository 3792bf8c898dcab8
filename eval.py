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

import numpy as np
import torch
import tyro
from tqdm import tqdm

import report
import runs
from data import (
    IMAGE_TYPES,
    TASKS,
    DataError,
    images_in,
    list_adair_test,
    names_digest,
    read_image,
    split_usable,
)
from metrics import evaluate, psnr
from model import CheckpointError, load_adair, read_checkpoint, restore
from policy import PolicyError, load_policy
from rewards import NETS, RewardError, load_net, weight_path

WHOLE_PIXELS = 1 << 20  # photos above this are restored in tiles unless --tile 0 asks otherwise
SMALLEST = 8  # px a side
ERRORS = (DataError, CheckpointError, PolicyError, RewardError)
METRICS = {"psnr": 2, "ssim": 3, "lpips": 3}  # and how many decimals the tables show


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
    limit: int = 0
    """images per set, the first ones; 0: all"""
    tile: int = 0
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
    tile: int | None = None
    """px; 0: whole image (default: 512 above 1 MP, else whole)"""
    overwrite: bool = False
    """replace results that exist"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""


def load(path, device):
    """(restore, init): the deterministic restorer of a run folder or a checkpoint file, official or
    ours, and the path of the model a run started from, None if that is unknown."""
    path = Path(path)
    file = path / "last.pt" if path.is_dir() else path
    config = file.parent / "config.json"
    if path.is_dir() and not file.exists():
        raise CheckpointError(f"{path} is no run folder: it has no last.pt")
    checkpoint = read_checkpoint(file)
    net = load_adair(file, checkpoint=checkpoint).to(device, memory_format=torch.channels_last)
    policy = load_policy(checkpoint)
    controller = policy.to(device).mean() if policy else None
    init = runs.load_json(config)["init"] if policy and config.exists() else None
    return partial(restore, net, controller=controller), init


# ------------------------------------------------------------------------------------------ tables


def lpips_of(weights_dir, device):
    """(restored, gt) -> LPIPS (AlexNet) of two images (3, H, W) in [0, 1], if its weights are
    there, else None."""
    path = weight_path("lpips", weights_dir)
    if not path.is_file():
        source = f"{NETS['lpips'].base}{path.name}"
        runs.say(f"LPIPS is not measured: {path} is not there (from {source})")
        return None
    net = load_net("lpips", path).to(device)

    @torch.no_grad()
    def distance(restored, gt):
        pair = (t[None].clamp(0, 1).to(device) * 2 - 1 for t in (restored, gt))
        return net(*pair).item()

    return distance


def evaluate_set(name, samples, restorers, tile=None, lpips=None, folder=None):
    """AdaIR's protocol, shared by the processes, for one test set and every named restorer.

    lpips: (restored, gt) -> number. folder: for the restored images.
    Returns ({method: rows}, figure): of the set's first image, a row of `report.plot_samples`.
    """
    base, figure = os.path.commonpath([os.path.dirname(s.name) for s in samples]), []

    def measure(method, restorer):
        def also(sample, degraded, restored, gt):
            if folder:
                path = folder / name / method / os.path.relpath(sample.name, base)
                path.parent.mkdir(parents=True, exist_ok=True)
                path = path if path.suffix == ".png" else Path(f"{path}.png")
                runs.write_atomic(path, report.to_png(restored))
            if sample is samples[0]:  # the first process has it
                images = (
                    {method: restored} if figure else {f"{name}: input": degraded, method: restored}
                )
                figure.extend((f"{k}  {psnr(v, gt):.2f} dB", v) for k, v in images.items())
                figure.extend([("truth", gt)] if method == [*restorers][-1] else [])
            return {"lpips": lpips(restored, gt)} if lpips else {}

        mapper = partial(runs.parallel_map, desc=f"{name}, {method}")
        return evaluate(partial(restorer, tile=tile), samples, also, mapper)

    return {method: measure(method, restorer) for method, restorer in restorers.items()}, figure


def measured(results):
    """The metrics that rows have."""
    rows = next(iter(next(iter(results.values())).values()))
    return [key for key in METRICS if key in rows[0]]


def cell(values, keys, sign=""):
    return "/".join(f"{value:{sign}.{METRICS[key]}f}" for value, key in zip(values, keys))


def table(title, results, columns, names):
    """A titled table: a row per method and a column per set, and their average; the gain as last
    row. names: {set: what stands before its name}."""
    keys, methods = measured(results), [*results[columns[0]]]
    means = {m: [[report.mean(results[c][m], k) for k in keys] for c in columns] for m in methods}
    means = {m: [*values, np.mean(values, axis=0)] for m, values in means.items()}
    rows = [[m, *(cell(value, keys) for value in values)] for m, values in means.items()]
    if len(methods) == 2:
        gains = [np.subtract(b, a) for a, b in zip(*means.values())]
        rows.append(["gain", *(cell(gain, keys, "+") for gain in gains)])
    head = ["Method", *(f"{names.get(c, '')} {c}".strip() for c in columns), "Average"]
    return (
        f"**{title}: {'/'.join(key.upper() for key in keys)}**\n\n{report.markdown(head, rows)}\n"
    )


def tables(results):
    """Table 2 (in domain, denoising at σ = 25), all noise levels, and Table 3 (every set that is
    not under test/)."""
    task_of = {name: next(iter(methods.values()))[0]["task"] for name, methods in results.items()}
    known = {name: TASKS[task] for name, task in task_of.items() if task in TASKS}
    columns = sorted((n for n in known if known[n].title), key=lambda n: known[n].column)
    noise = [name for name in known if known[name].variant]
    foreign = [name for name in results if name not in known]
    parts = [
        ("In domain (layout of Table 2)", columns, {n: known[n].title for n in columns}),
        ("Denoising by noise level", noise, {}),
        ("Out of domain (layout of Table 3)", foreign, {}),
    ]
    return "\n".join(table(title, results, sets, names) for title, sets, names in parts if sets)


def csv_files(results):
    """{file name: text}: the numbers of the tables, a line per set and method; and a line per image
    and method."""
    keys = ["psnr_in", *measured(results)]
    by_set, by_image = [], []
    for name, methods in results.items():
        for method, rows in methods.items():
            by_set.append([name, method, len(rows), *(report.mean(rows, k) for k in keys)])
            by_image += [[name, method, r["task"], r["name"], *(r[k] for k in keys)] for r in rows]
    names = ["psnr_input", *keys[1:]]
    return {
        "eval.csv": report.to_csv(["set", "method", "images", *names], by_set),
        "eval-images.csv": report.to_csv(["set", "method", "task", "image", *names], by_image),
    }


# ---------------------------------------------------------------------------------------- programs


def benchmark(config):
    """Evaluates a checkpoint on every test set and writes the tables."""
    runs.check_ranges(config, limit="[0, inf)", tile="[0, inf)")
    runs.check_tile(config.tile)
    runs.check_device(config.device)
    device, ckpt = runs.join(config.device), Path(config.ckpt)
    default = ckpt if ckpt.is_dir() else f"runs/eval-{ckpt.resolve().parent.name}-{ckpt.stem}"
    out = Path(config.out or default)
    if (out / "eval.md").exists() and not config.overwrite and runs.rank() == 0:
        raise runs.RunError(f"{out} holds an evaluation: give --overwrite, or another --out")
    restorer, init = load(config.ckpt, device)
    init = config.before or init
    restorers = (
        {"before": load(init, device)[0], "after": restorer} if init else {"model": restorer}
    )
    if not Path(config.data_root).is_dir():
        raise DataError(f"there is no folder {config.data_root}")
    sets = list_adair_test(config.data_root, config.sets)
    sets = {name: samples[: config.limit or None] for name, samples in sets.items()}
    runs.same_everywhere("list of images", [names_digest(samples) for samples in sets.values()])
    for name, samples in sets.items():
        _, problems = split_usable(samples, SMALLEST, decode=False)
        if problems:
            raise DataError(f"{problems[0]} (test set {name})")
    rest = config.tile or None, lpips_of(config.weights_dir, device)
    folder = out / "images" if config.save_images else None
    results, figures = {}, []
    for name, samples in sets.items():
        results[name], figure = evaluate_set(name, samples, restorers, *rest, folder)
        figures.append(figure)
        keys, rows = measured(results), results[name]
        means = (f"{m} {cell([report.mean(r, k) for k in keys], keys)}" for m, r in rows.items())
        degraded = report.mean(next(iter(rows.values())), "psnr_in")
        runs.say(f"{name}: {len(samples)} images, input {degraded:.2f}  {'  '.join(means)}")
    if runs.rank():
        return
    limited = f"\nOnly the first {config.limit} images of each set (--limit).\n"
    texts = {"eval.md": tables(results) + (limited if config.limit else ""), **csv_files(results)}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        runs.write_atomic(out / name, content.encode())
    runs.write_atomic(out / "eval.png", report.plot_samples(figures))
    pictures = ", images/" if config.save_images else ""
    print(f"\n{texts['eval.md']}\nwritten to {out}: {', '.join(texts)}, eval.png{pictures}")


def target_files(photos, base, out, overwrite):
    """{file to write: photo}. Raises DataError where two photos, or a file that is there, are in
    the way."""
    targets = {}
    for photo in photos:
        target = (out / photo.relative_to(base)).with_suffix(".png")
        if target in targets:
            both = f"{photo} and {targets[target]} would both become {target}"
            raise DataError(f"{both}: rename one")
        if target.exists() and not overwrite:
            raise DataError(f"{target} exists: give --overwrite, or another --out")
        targets[target] = photo
    return targets


def restore_photos(config):
    """Restores photos; names those that cannot be read, at the end, as an error."""
    runs.check_ranges(config, tile="[0, inf)")
    runs.check_tile(config.tile)
    runs.check_device(config.device)
    restorer, _ = load(config.ckpt, config.device)
    source, out = Path(config.photo), Path(config.out)
    if not source.exists():
        raise DataError(f"there is no photo or folder {source}")
    folder = source.is_dir()
    photos = list(map(Path, images_in(source, recursive=True))) if folder else [source]
    if not photos:
        raise DataError(f"{source} holds no image ({', '.join(sorted(IMAGE_TYPES))})")
    base = source if folder else source.parent
    targets, broken = target_files(photos, base, out, config.overwrite), []
    for target, photo in tqdm(targets.items(), desc="restore", unit="photo"):
        try:
            image = read_image(photo)
            if min(image.shape[1:]) < SMALLEST:
                size = f"{image.shape[2]}×{image.shape[1]} px; {SMALLEST} px a side is the least"
                raise DataError(f"{photo} is {size}")
        except DataError as error:
            broken.append(str(error))
            continue
        default = 512 if image[0].numel() > WHOLE_PIXELS else 0
        tile = default if config.tile is None else config.tile
        restored = restorer(image, tile=tile or None, progress=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        runs.write_atomic(target, report.to_png(restored))
    for problem in broken:
        tqdm.write(f"not restored: {problem}")
    if broken:
        count = f"{len(broken)} of {len(photos)} photo(s) could not be restored"
        raise DataError(f"{count}; the others are in {out}")
    print(f"restored {len(photos)} photo(s) into {out}")


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
