"""Hard mining (Sec. 3.2): every training image is restored by the pre-trained model, and the worst
`ratio` of each task become D_hard."""

import hashlib
import os
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import DataError, adair_repeats, load_pair, names_digest, problem_of
from metrics import psnr
from model import model_digest, restore
from runs import (
    RunError,
    gather,
    load_json,
    on_gpu,
    parallel_map,
    same_everywhere,
    save_json,
    say,
    say_skipped,
)

LOADED = 16  # on a GPU, so many images in a row are loaded together, and
BATCH_PIXELS = 1 << 20  # those of one size are restored together, up to so many pixels
WITNESSES = 3  # so many of the hard files tell a resumed run whether its images have changed


def stamp_of(sample):
    """What tells whether a sample's files are those of an earlier run: (bytes, time) of each."""
    files = [os.stat(path) for path in sample.files]
    return [[file.st_size, file.st_mtime_ns] for file in files]


def known_scores(paths, digest):
    """{(task, name): row} of earlier minings (their hard.json) under the model of this digest.
    Raises RunError for a file that is none."""
    known = {}
    for path in paths:
        stored = load_json(path)
        try:
            rows = stored["rows"] if stored["model"] == digest else []
            scored = [row for row in rows if row["stamp"] and "psnr" in row]
            known |= {(row["task"], row["name"]): row for row in scored}
        except (KeyError, TypeError):
            raise RunError(f"{path} is not the hard.json of a run") from None
        say(f"{path}: {len(scored)} scores of this model")
    return known


@torch.inference_mode()
def score(restore, samples, min_side, pixels):
    """Full-image PSNR of samples: a row {task, name, stamp, psnr} for each, or {problem} for one
    that cannot be used. restore None: the same without psnr."""
    rows, of_size = [], defaultdict(list)
    for sample in samples:
        rows.append(dict(task=sample.task, name=sample.name))
        try:
            degraded, gt = load_pair(sample, min_side=min_side)
            rows[-1]["stamp"] = stamp_of(sample)
            if restore:
                of_size[gt.shape].append((rows[-1], degraded, gt))
        except (DataError, OSError) as error:
            rows[-1]["problem"] = str(error)
    for (_, height, width), members in of_size.items():
        n = max(1, pixels // (height * width))
        for first in range(0, len(members), n):
            batch = members[first : first + n]
            restored = restore(torch.stack([degraded for _, degraded, _ in batch]))
            for (row, _, gt), y in zip(batch, restored):
                row["psnr"] = psnr(y, gt).item()
    return rows


def mine(restore, samples, min_side=8, known=None, pixels=0, stop=None):
    """Full-image PSNR of every sample under the pre-trained model: (rows, problems).

    restore: (B, 3, H, W) -> (B, 3, H, W); None: looks at the files alone.
    min_side: px that an image must have a side.
    known: {(task, name): row} of earlier minings of this model, taken over where name, size and
    time of the files agree. pixels: of one batch (a GPU); 0: image by image.
    Shared by the processes. What cannot be used is named in `problems` and left out.
    """
    rows, wanted = {}, []
    for i, sample in enumerate(samples):
        row = (known or {}).get((sample.task, sample.name))
        fits = row and not problem_of(sample, min_side, decode=False)
        if fits and row["stamp"] == stamp_of(sample):
            rows[i] = {key: row[key] for key in ("task", "name", "stamp", "psnr")}
        else:
            wanted.append(i)
    n = LOADED if pixels else 1
    parts = [wanted[first : first + n] for first in range(0, len(wanted), n)]

    def score_part(part):
        return score(restore, [samples[i] for i in part], min_side, pixels)

    for part, found in zip(parts, parallel_map(score_part, parts, "mining", stop)):
        rows |= zip(part, found)
    rows = [rows[i] for i in range(len(samples))]
    problems = [row["problem"] for row in rows if "problem" in row]
    return [row for row in rows if "problem" not in row], list(dict.fromkeys(problems))


def select(rows, ratio=0.3, mode="hard", scope="task", seed=0):
    """Indices of D_hard: of every task (and so of every σ) the `ratio` of `rows` with the lowest
    PSNR, at least one of those that are ranked together.

    mode: "hard", "easy" (the highest), "random" or "all". scope: "global" ranks all tasks together,
    which picks the tasks with low PSNR rather than the failures. Ties go by name. Raises DataError
    unless 0 < ratio ≤ 1.
    """
    if not 0 < ratio <= 1:
        raise DataError(f"the hard ratio is {ratio}; it must be above 0 and at most 1")
    if mode == "all":
        return list(range(len(rows)))
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["task"] if scope == "task" else "all"].append(i)
    chosen, rng, sign = [], np.random.default_rng(seed), -1 if mode == "easy" else 1
    for members in groups.values():
        members.sort(key=lambda i: (sign * rows[i]["psnr"], rows[i]["task"], rows[i]["name"]))
        if mode == "random":
            members = [members[i] for i in rng.permutation(len(members))]
        chosen += members[: max(1, round(ratio * len(members)))]
    return sorted(chosen)


# ------------------------------------------------------------------------------ hard.json of a run


def witnesses(samples):
    """{path: hash} of a few of the files of samples, evenly spread."""
    files = list(dict.fromkeys(path for s in samples for path in s.files))
    chosen = files[:: max(1, len(files) // WITNESSES)][:WITNESSES]
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in chosen}


def selected(rows, samples):
    """The samples whose rows are selected. Raises KeyError where one is gone."""
    by_name = {(s.task, s.name): s for s in samples}
    return [by_name[row["task"], row["name"]] for row in rows if row.get("selected")]


def save_hard(path, digest, rows, chosen, samples):
    """Writes hard.json: the model's hash, every image's score, which were selected. Returns the
    samples that were."""
    for i in chosen:
        rows[i]["selected"] = True
    hard = selected(rows, samples)
    save_json(path, dict(model=digest, files=witnesses(hard), rows=rows))
    return hard


def load_hard(path, digest, samples):
    """The hard samples of a run that goes on. Raises RunError where the model is another, or some
    of its images are gone or have changed."""
    stored = load_json(path)
    try:
        hard = selected(stored["rows"], samples)
        same = stored["model"] == digest and stored["files"] == witnesses(hard)
    except (KeyError, FileNotFoundError):
        same = False
    if not same:
        run = os.path.dirname(path)
        raise RunError(f"images or model changed since {run} began: start a new run")
    return hard


def hard_samples(config, run, pretrained, samples):
    """D_hard, which is mined unless the run folder has it already; leaves hard.json there. Under
    --select all nothing is scored: every image is taken that can be used."""
    digest, path = model_digest(pretrained), run.folder / "hard.json"
    if gather(path.exists())[0]:
        hard = load_hard(path, digest, samples)
    else:
        pixels = BATCH_PIXELS if on_gpu(config.device) else 0
        known = known_scores(config.samples.scores, digest)
        restoring = None if config.samples.select == "all" else partial(restore, pretrained)
        rows, problems = mine(restoring, samples, config.samples.crop, known, pixels, run.stop)
        say_skipped(problems)
        if not rows:
            where = config.samples.data_root or "the demo's photographs"
            crop = f"crops of {config.samples.crop} px"
            raise DataError(f"none of the training images of {where} can be used with {crop}")
        chosen = select(
            rows,
            ratio=config.samples.hard_ratio,
            mode=config.samples.select,
            scope=config.samples.hard_scope,
            seed=config.seed,
        )
        hard = save_hard(path, digest, rows, chosen, samples)
        same_everywhere("set of hard images", names_digest(hard))
    how = config.samples.select
    how += f", ratio {config.samples.hard_ratio}" if how != "all" else ""
    say(f"D_hard: {len(hard)} of {len(samples)} training images ({how})")
    return adair_repeats(hard) if config.samples.repeats == "adair" else hard
