"""Where images come from: the table of tasks, three sources of samples, training crops.

A `Sample` says which files an image is made of; nothing is decoded before it is needed. Whatever is
random here is a function of (seed, image name, epoch), so a run can be repeated, resumed and split
over workers without its data changing.
"""

import contextlib
import hashlib
import itertools
import math
import os
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from degradations import blur, gaussian_noise, haze, low_light, rain

IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
# The formats Pillow may read, whatever a file is called: an EPS file is a program it would run.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 2**27  # of an image: a file of a few kB may claim, and on decoding fill, any size
PHOTO_WINDOW = 512  # px; of a larger photo in a plain folder, this much around its centre is used


class DataError(ValueError):
    """Something is wrong with the data; its text says what, where and what to do."""


# ------------------------------------------------------------------------------------------- tasks


class Pairs(NamedTuple):
    """Two folders of AdaIR's layout, and how the names of their files belong together."""

    degraded: str
    clean: str
    partner: Callable = lambda stem: [stem]  # the clean stems that may belong to a degraded one
    names: tuple = ("NAME", "NAME")  # how the files are called, for whoever looks for them


class Task(NamedTuple):
    """All that sets one task apart. A new task is one row of TASKS and the functions it names."""

    degrade: Callable  # (gt, rng) -> degraded: the task synthesised on a clean photograph
    reward: str  # its row of rewards.TASK_REWARDS, Eq. 21
    train: Pairs | str  # under Train/: pairs, or a folder of clean images
    test: Pairs | str  # under test/KIND/SET: pairs; or, under test/KIND, folders of clean images
    kind: str  # the name of its folder under test/
    title: str = ""  # above its column in the layout of Table 2; "" if it has none there
    column: int = 0  # its place among them
    repeats: int = 1  # how often AdaIR's training list repeats an image
    # What the paper trains and tests on (Sec. 4.1), with numbers of images or pairs:
    trained_on: tuple = ()  # (name, number)
    tested_on: dict = {}  # {name: number}
    foreign: str = ""  # the set out of domain, whose number it does not state
    family: str = ""  # in --tasks, a name for several related tasks
    variant: str = ""  # behind the name of a test set: which of the related tasks

    @property
    def is_drawn_anew(self):
        """Whether the task is synthesised in AdaIR's training, too, and so in every epoch anew."""
        return isinstance(self.train, str)


def _denoising(sigma, title=""):
    return Task(
        degrade=partial(gaussian_noise, sigma=sigma),
        reward="grad",
        title=title,
        column=3,
        train="Denoise",
        test="*",
        kind="denoise",
        repeats=3,
        trained_on=("BSD400 + WED", 5144),
        tested_on={"BSD68": 68, "Urban100": 100, "Kodak24": 24},
        foreign="SIDD",
        family="denoise",
        variant=f"σ={sigma}",
    )


def _first_part(stem):
    """The scene of RESIDE's names, SCENE_LIGHT_HAZE."""
    return [stem.split("_")[0]]


TASKS = {
    "denoise15": _denoising(15),
    "denoise25": _denoising(25, title="Denoising"),
    "denoise50": _denoising(50),
    "derain": Task(
        degrade=rain,
        reward="aniso",
        title="Deraining",
        column=2,
        train=Pairs(
            "Derain/rainy", "Derain/gt", lambda stem: ["no" + stem], ("rain-N", "norain-N")
        ),
        test=Pairs("input", "target", lambda stem: [stem, "no" + stem]),
        kind="derain",
        repeats=120,
        trained_on=("Rain100L", 200),
        tested_on={"Rain100L": 100},
        foreign="GT-Rain",
    ),
    "dehaze": Task(
        degrade=haze,
        reward="contrast",
        title="Dehazing",
        column=1,
        train=Pairs("Dehaze/synthetic", "Dehaze/original", _first_part, ("**/ID_A_B", "ID")),
        test=Pairs("input", "target", _first_part, ("ID_A_B", "ID")),
        kind="dehaze",
        repeats=1,
        trained_on=("RESIDE OTS", 72135),
        tested_on={"SOTS": 500},
        foreign="RRSHID",
    ),
    "deblur": Task(
        degrade=blur,
        reward="sharp",
        title="Deblurring",
        column=4,
        train=Pairs("Deblur/blur", "Deblur/sharp"),
        test=Pairs("input", "target"),
        kind="deblur",
        repeats=5,
        trained_on=("GoPro", 2103),
        tested_on={"GoPro": 1111},
        foreign="ReLoBlur",
    ),
    "lowlight": Task(
        degrade=low_light,
        reward="lowlight",
        title="Low-Light",
        column=5,
        train=Pairs("Enhance/low", "Enhance/gt"),
        test=Pairs("input", "target"),
        kind="enhance",
        repeats=20,
        trained_on=("LOL", 485),
        tested_on={"LOL": 15},
        foreign="LoLi-Street",
    ),
}
# What a user may call tasks: by their names, or by that of a family, as "denoise" of all its σ.
TASK_WORDS = tuple(dict.fromkeys([*filter(None, (t.family for t in TASKS.values())), *TASKS]))


def task_names(words):
    """The tasks, in the order of TASKS, that words as ["denoise", "dehaze"] name; all for none."""
    return [name for name, t in TASKS.items() if not words or name in words or t.family in words]


class Sample(NamedTuple):
    """One image of one task. Without `degraded` the degradation is synthesised from `gt`."""

    task: str  # one of TASKS, or the name of a paired test set
    name: str  # unique within its task; seeds what is random about it
    gt: str  # path of the clean image
    degraded: str = ""  # path of the degraded image
    box: tuple = ()  # (left, top, right, bottom): the part of the file that is meant; () is all


# ---------------------------------------------------------------------------------- reading images


def to_rgb(image):
    """A PIL image of any mode as (H, W, 3) float32 in [0, 1]: EXIF rotation applied, grey tripled,
    alpha dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        # 16-bit grey, or floats: Pillow's own conversion would clip them to 8 bits
        scale = 1 if image.mode == "F" else 65535
        pixels = np.asarray(image, dtype=np.float32) / scale
        if not np.isfinite(pixels).all():
            raise ValueError("it holds values that are no numbers")
        return np.repeat(pixels.clip(0, 1)[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


@contextlib.contextmanager
def opened(path):
    """The image at `path`, its pixels not yet decoded.

    Raises DataError for a file that is missing, broken or absurdly large, also while it is decoded:
    Pillow's many decoders fail in many ways.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}×{image.height} px"
                raise ValueError(f"it claims {size}; more than {MAX_PIXELS >> 20} MP are refused")
            yield image
    except FileNotFoundError:
        raise DataError(f"there is no image {path}") from None
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({error!r:.200})") from None


def read_image(path, box=()):
    """The image at `path` as a tensor (3, H, W) in [0, 1]. Raises DataError."""
    with opened(path) as image:
        pixels = to_rgb(ImageOps.exif_transpose(image).crop(box) if box else image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_size(path):
    """(width, height) from the file's header alone, EXIF rotation applied. Raises DataError."""
    with opened(path) as image:
        # Of a PNG that says nothing at its start, Pillow would decode all to look at its end.
        silent = image.format == "PNG" and not {"exif", "Raw profile type exif"} & {*image.info}
        turned = not silent and image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if turned else image.size


def rng_of(seed, name, epoch):
    """The generator of what is random about one image in one epoch."""
    return np.random.default_rng((seed, zlib.crc32(name.encode()), epoch))


def load_pair(sample, seed=0, epoch=0):
    """(degraded, gt) of a sample, both (3, H, W) in [0, 1]: the whole image.

    Synthesised degradations are those of (seed, task, name, epoch); mining and evaluation use seed
    0 and epoch 0. Raises DataError when a file is missing or broken, or the two differ in size.
    """
    gt = read_image(sample.gt, sample.box)
    if sample.degraded:
        degraded = read_image(sample.degraded, sample.box)
        if degraded.shape != gt.shape:
            raise DataError(size_problem(sample, degraded.shape[:0:-1], gt.shape[:0:-1]))
        return degraded, gt
    rng = rng_of(seed, f"{sample.task}/{sample.name}", epoch)
    try:
        return TASKS[sample.task].degrade(gt, rng), gt
    except ValueError as error:
        raise DataError(f"{sample.gt} cannot be degraded ({error})") from None


def size_problem(sample, degraded, gt):
    sizes = f"{degraded[0]}×{degraded[1]} px but its clean image {sample.gt} is {gt[0]}×{gt[1]}"
    return f"{sample.degraded} is {sizes}"


def side_problem(sample, width, height, min_side):
    """The sentence about an image with fewer px a side than a crop; "" if it has enough."""
    size = f"{width}×{height} px, smaller than the crop of {min_side}"
    return f"{sample.gt} is {size}" if min(width, height) < min_side else ""


def problem_of(sample, min_side=8, decode=True):
    """What makes a sample unusable, in a sentence; "" if nothing.

    min_side: px that it must have a side; decode: read every pixel, not the headers alone.
    """

    def size(path):
        return tuple(read_image(path).shape[:0:-1]) if decode else image_size(path)

    try:
        gt = size(sample.gt)
        degraded = size(sample.degraded) if sample.degraded else gt
    except DataError as error:
        return str(error)
    if degraded != gt:
        return size_problem(sample, degraded, gt)
    left, top, right, bottom = sample.box or (0, 0, *gt)
    return side_problem(sample, right - left, bottom - top, min_side)


def split_usable(samples, min_side=8, decode=True, mapper=None):
    """Splits samples by `problem_of`: (usable, problems). Samples of the same files are looked at
    once. mapper(function, samples): as map; without it, some threads at once."""

    def files(sample):
        return sample[2:5]

    unique = {files(s): s for s in samples}
    look = partial(problem_of, min_side=min_side, decode=decode)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = (mapper or pool.map)(look, list(unique.values()))
        problems = dict(zip(unique, found))
    usable = [s for s in samples if not problems[files(s)]]
    return usable, list(dict.fromkeys(filter(None, problems.values())))


# ----------------------------------------------------------------------------------------- sources


def natural(path):
    """Sort key under which 2 comes before 10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(12), path)


def walk(folder):
    """os.walk through links, too, but into no folder twice; in the same order everywhere."""
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        below = {
            os.path.realpath(os.path.join(parent, name)): name for name in sorted(folders)[::-1]
        }
        folders[:] = sorted(name for real, name in below.items() if real not in seen)
        seen |= below.keys()
        yield parent, folders, files


def is_image(name):
    return os.path.splitext(name)[1].lower() in IMAGE_TYPES and name[0] != "."


def images_in(folder, recursive=False):
    """Paths (text) of a folder's image files, naturally sorted; none if there is no such folder."""
    found = []
    for parent, folders, files in walk(folder):
        found += [os.path.join(parent, name) for name in files if is_image(name)]
        if not recursive:
            folders.clear()
    return sorted(found, key=lambda path: (natural(path), path))


def stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def pair_up(task, pairs, folder, root):
    """The pairs in two folders under `folder`: each degraded file with the clean one, whatever its
    extension, that is called as `pairs.partner` says, in the folder of the same name or at the top.

    Returns (samples, problems): what has no partner is named in `problems`.
    """
    degraded, clean = (os.path.join(folder, name) for name in (pairs.degraded, pairs.clean))
    truths = images_in(clean, recursive=True)
    by_stem = {(os.path.relpath(os.path.dirname(p), clean), stem(p)): p for p in truths}
    samples, problems, used = [], [], set()
    for path in images_in(degraded, recursive=True):
        parent = os.path.relpath(os.path.dirname(path), degraded)
        partners = pairs.partner(stem(path))
        wanted = [(place, name) for name in partners for place in (parent, ".")]
        truth = next((by_stem[key] for key in wanted if key in by_stem), None)
        if truth is None:
            problems.append(f"{path} has no clean image {partners[0]}.* in {clean}")
        else:
            used.add(truth)
            samples.append(Sample(task, os.path.relpath(path, root), truth, path))
    problems += [f"{path} has no degraded image" for path in truths if path not in used]
    return samples, problems


def find_adair_train(root, tasks=TASKS):
    """AdaIR's training folders under root/Train, as (samples, problems)."""
    samples, problems = [], []
    for task in tasks:
        source, train = TASKS[task].train, os.path.join(root, "Train")
        if isinstance(source, Pairs):
            found, broken = pair_up(task, source, train, root)
        else:
            clean = images_in(os.path.join(train, source), recursive=True)
            found, broken = [Sample(task, os.path.relpath(p, root), p) for p in clean], []
        samples, problems = samples + found, problems + broken
    return samples, problems


def find_adair_test(root):
    """AdaIR's test sets under root/test, and any other folder under root that holds input/ and
    target/, as {set name: (its folder under root, samples, problems)}.

    Sets of clean images stand there once for every task that is synthesised on them.
    """
    root, sets = Path(root), {}
    paired = {t.kind: name for name, t in TASKS.items() if isinstance(t.test, Pairs)}
    for name, task in TASKS.items():
        clean = [] if isinstance(task.test, Pairs) else (root / "test" / task.kind).glob(task.test)
        for folder in sorted(path for path in clean if path.is_dir()):
            samples = [Sample(name, os.path.relpath(p, root), p) for p in images_in(folder)]
            sets[f"{folder.name} {task.variant}"] = str(folder.relative_to(root)), samples, []
    for folder in sorted(Path(parent) for parent, folders, _ in walk(root) if "input" in folders):
        parts = folder.relative_to(root).parts
        name = parts[-1] if parts else root.resolve().name
        name = "/".join(parts) if name in sets else name
        kind = parts[1] if len(parts) > 1 and parts[0] == "test" else None
        task = paired.get(kind, name)
        pairs = TASKS[task].test if kind in paired else Pairs("input", "target")
        sets[name] = "/".join(parts) or ".", *pair_up(task, pairs, folder, root)
    return sets


def list_adair_test(root, only=None):
    """The test sets of `find_adair_test` that are called `only`, all by default: {name: samples}.

    Raises DataError for a file without partner in one of them, and for a set that is not there.
    """
    found = find_adair_test(root)
    unknown = [name for name in only or () if name not in found]
    if unknown:
        raise DataError(f"{root} has no test set {unknown[0]!r}; it has {', '.join(found)}")
    chosen = {name: parts for name, parts in found.items() if not only or name in only}
    broken = [problem for _, _, problems in chosen.values() for problem in problems]
    if broken:
        count = f"{len(broken)} such problem(s) under {root}"
        raise DataError(f"{broken[0]}; {count}, and an evaluation leaves nothing out")
    sets = {name: samples for name, (_, samples, _) in chosen.items() if samples}
    if not sets:
        wanted = "test/denoise/SET/*, test/derain/SET/{input,target}, … or input/ + target/"
        raise DataError(f"{root} holds no test images: wanted {wanted}")
    return sets


def keep_listed(samples, path):
    """The samples that a list names: a text file with one path under the data root a line.

    No file that the list names is opened. Raises DataError for a line that is none of the samples,
    and for a list without any.
    """
    names, wanted = {s.name for s in samples}, set()
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(iter(lambda: file.readline(4096), ""), 1):
            name = os.path.normpath(line.strip())
            if name == ".":  # an empty line
                continue
            if name not in names:
                leaves = os.path.isabs(name) or name.startswith("..")
                outside = ", which lies outside the data root" if leaves else ""
                shown = f"{line.strip()!r:.200} is no training image{outside}"
                raise DataError(f"{path}, line {number}: {shown}")
            wanted.add(name)
    if not wanted:
        raise DataError(f"{path} names no image")
    return [s for s in samples if s.name in wanted]


def find_photos(folder, tasks=TASKS):
    """Photographs in a plain folder (and below), once per task, all degradations synthesised.

    Returns (samples, problems). Raises DataError for the folder of a data set: its degraded images
    are no truths.
    """
    pairs = [t.train for t in TASKS.values() if isinstance(t.train, Pairs)]
    degraded = {"input", *(os.path.basename(p.degraded) for p in pairs)}
    samples, problems = [], []
    for parent, folders, _ in walk(folder):
        here = Path(folder).resolve().name if parent == str(folder) else ""
        for part in sorted(degraded & {*folders, here}):
            hint = "give AdaIR's data folder, or one of clean photos"
            raise DataError(f"{folder} holds degraded images ({part}/) but no Train/: {hint}")
    for path in images_in(folder, recursive=True):
        try:
            width, height = image_size(path)
        except DataError as error:
            problems.append(str(error))
            continue
        side_w, side_h = min(width, PHOTO_WINDOW), min(height, PHOTO_WINDOW)
        left, top = (width - side_w) // 2, (height - side_h) // 2
        box = (left, top, left + side_w, top + side_h)
        name = os.path.relpath(path, folder)
        samples += [Sample(task, name, path, box=box) for task in tasks]
    return samples, problems


def photo_of(name):
    """The photograph's name in that of one of its draws or tiles."""
    return re.sub(r"(#\d+|@[\d,-]+)$", "", name)


def in_draws(samples, draws, smallest):
    """Photographs under several draws of their degradation. Where a draw changes nothing in how
    hard an image is, since it is drawn anew for every crop (noise), a photo is cut into as many
    tiles instead, fewer where they would have sides below `smallest` px."""
    found = []
    for s in samples:
        if s.degraded or not s.box or draws == 1:  # of a data set: as it is
            found.append(s)
        elif not TASKS[s.task].is_drawn_anew:  # the name seeds the draw
            found += [s._replace(name=f"{s.name}#{k + 1}") for k in range(draws)]
        else:
            boxes = tiles(s.box, draws, smallest)
            found += [
                s._replace(name=f"{s.name}@{x},{y}-{r},{b}", box=(x, y, r, b))
                for x, y, r, b in boxes
            ]
    return found


def tiles(box, n, smallest):
    """A box cut into n boxes in rows and columns, or into fewer where they would have a side below
    `smallest`: as many as fit, and of those the squarest."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top

    def merit(cut):
        rows, columns = cut
        return rows * columns, -abs(math.log(width / columns * rows / height))

    most = max(1, height // smallest), max(1, width // smallest)
    cuts = [(r, c) for r in range(1, most[0] + 1) for c in range(1, most[1] + 1) if r * c <= n]
    rows, columns = max(cuts, key=merit)
    xs = [left + width * k // columns for k in range(columns + 1)]
    ys = [top + height * k // rows for k in range(rows + 1)]
    return [(x, y, x2, y2) for y, y2 in zip(ys, ys[1:]) for x, x2 in zip(xs, xs[1:])]


# The demo's photographs: Kodak's 24 at half size. Fixed parts, by number.
KODAK = Path(__file__).with_name("kodak")
KODAK_HELD_OUT = (4, 8, 12, 16, 20, 24)  # to report on
KODAK_VAL = (3, 9, 15, 21)  # to choose on


def list_kodak(tasks=TASKS):
    """(train, val, held_out) of the demo's photographs; the held-out ones under two draws."""
    samples, problems = find_photos(KODAK, tasks)
    if problems or len({s.gt for s in samples}) != 24:
        raise DataError(f"{KODAK} does not hold the demo's 24 photographs: clone the project anew")

    def part(numbers):
        return [s for s in samples if int(stem(s.gt)[-2:]) in numbers]

    held_out = part(KODAK_HELD_OUT)
    again = [s._replace(name=f"{s.name}#2") for s in held_out]  # the name seeds the draw
    rest = {*range(1, 25)} - {*KODAK_VAL, *KODAK_HELD_OUT}
    return part(rest), part(KODAK_VAL), held_out + again


def set_aside(samples, most):
    """Splits one task's samples into (train, val): a sample of each of the last `most` truths, at
    most a fifth of them, at least one; fewer where a scene begins among them, as names tell that
    differ in more than their last number. What else shares a truth that is set aside (OTS has 35
    hazes of each) is not trained on, unless there is no other truth."""
    of_truth = defaultdict(list)
    for sample in samples:
        of_truth[sample.gt].append(sample)
    groups = list(of_truth.values()) if len(of_truth) > 1 else [[s] for s in samples]
    n = min(most, max(len(groups) // 5, 1), max(len(groups) - 1, 0))
    scenes = [re.sub(r"\d+(?=\D*$)", "", stem(group[0].gt)) for group in groups]
    first = len(groups) - n
    later = (i for i in range(first, len(groups)) if i and scenes[i] != scenes[i - 1])
    cut = next(later, first)
    return sum(groups[:cut], []), [group[0] for group in groups[cut:]]


class Split(NamedTuple):
    """A data set in three parts, which share no image."""

    train: list  # samples
    val: list  # that choose best.pt
    held_out: list  # that are looked at before and after
    problems: list  # sentences on what is left out of training


def list_training(root=None, aside=12, tasks=(), listed=None):
    """The training set of a folder, and what is never trained on: a Split.

    root: AdaIR's data folder (holding Train/), or a folder of photos, or None for the demo's
    photographs. From a folder the last images of every task are held out (`set_aside`, at most
    `aside`), and of the rest the last ones, half as many, are for validation; nothing is known of
    one scene in the folders of two tasks. Of the demo's photographs the parts are fixed.
    tasks: those to use, each of which must be there; without them, all that are there.
    listed: a file that names the images to use (`keep_listed`).
    Raises DataError when there is nothing to train on or nothing to set aside.
    """
    asked, tasks = tasks, tasks or TASKS
    if root is None:
        if listed:
            hint = "but the demo's photographs are trained on"
            raise DataError(f"{listed} names files of a data folder, {hint}")
        return Split(*list_kodak(tasks), [])
    if not os.path.isdir(root):
        raise DataError(f"there is no folder {root}")
    in_layout = os.path.isdir(os.path.join(root, "Train"))
    samples, problems = (find_adair_train if in_layout else find_photos)(root, tasks)
    if not samples:
        what = "Train/ holds no pairs in AdaIR's layout (Denoise/, Derain/rainy + gt/, …)"
        what = what if in_layout else "holds neither AdaIR's Train/ nor any image that can be read"
        which = f" for {', '.join(asked)}" if asked else ""
        hint = f"; {len(problems)} file(s) cannot be used, as {problems[0]}" if problems else ""
        raise DataError(f"{root}{'/' if in_layout else ' '}{what}{which}{hint}")
    samples = keep_listed(samples, listed) if listed else samples
    by_task = defaultdict(list)
    for sample in samples:
        by_task[sample.task].append(sample)
    absent = [task for task in asked if task not in by_task]
    if absent:
        raise DataError(f"{root} has no training images for {', '.join(absent)}")
    split = Split([], [], [], problems)
    for of_task in (by_task[task] for task in TASKS if task in by_task):
        rest, held_out = set_aside(of_task, aside)
        train, val = set_aside(rest, max(1, len(held_out) // 2))
        for part, found in zip(split, (train, val, held_out)):
            part.extend(found)
    if not split.val:
        need = "at least three are needed, one to choose on and one to report on"
        raise DataError(f"{root} holds two images per task or fewer: {need}")
    return split


def split_listed(samples, path):
    """Splits samples into (train, val) by a text file: val are those of whose files one is named,
    one path a line, by its last parts, as in Derain/rainy/rain-1.png.

    Raises DataError for a line that names no file of theirs.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    listed = {PurePath(line.strip()).parts for line in lines if line.strip() and line[0] != "#"}
    lengths, found, train, val = {len(parts) for parts in listed}, set(), [], []
    for sample in samples:
        files = [PurePath(file).parts for file in (sample.gt, sample.degraded) if file]
        named = listed & {parts[-n:] for parts in files for n in lengths}
        found |= named
        (val if named else train).append(sample)
    for parts in sorted(listed - found):
        raise DataError(f"{path} names {'/'.join(parts)}, which is none of the training images")
    return train, val


def names_digest(samples):
    """Hash of which samples these are, whatever their files hold."""
    digest = hashlib.sha256()
    for s in samples:
        digest.update(f"{s.task}/{s.name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------- training crops


class Batch(NamedTuple):
    """B training crops."""

    degraded: torch.Tensor  # (B, 3, crop, crop) in [0, 1]
    gt: torch.Tensor  # (B, 3, crop, crop) in [0, 1]
    tasks: list  # B names
    names: list  # B names of images
    numbers: list  # B numbers of crops, which also seed their actions


class Crops(torch.utils.data.Dataset):
    """Crop number n of a training run: (degraded, gt, task, name, n), images (3, crop, crop).

    Everything about crop n follows from (seed, n): a resumed run or one with other workers sees the
    same crops. An epoch is a permutation of the samples; an image keeps the degradation it was
    mined with and only noise is drawn anew. Raises DataError for a file that broke since it was
    checked.
    """

    def __init__(self, samples, crop, seed):
        self.samples, self.crop, self.seed = samples, crop, seed

    def order(self, epoch):
        """Which sample each crop of an epoch is cut from; the last one asked for is kept."""
        if getattr(self, "_order", (None,))[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._order = epoch, rng.permutation(len(self.samples))
        return self._order[1]

    def task_of(self, n):
        """The task of crop number n."""
        epoch, position = divmod(n, len(self.samples))
        return self.samples[self.order(epoch)[position]].task

    def of_each_task(self, most):
        """{task: numbers of `most` crops of it}, of different images as far as there are so
        many."""
        found = {sample.task: [] for sample in self.samples}
        for n in itertools.count():
            if all(len(members) == most for members in found.values()):
                return found
            members = found[self.task_of(n)]
            if len(members) < most:
                members.append(n)

    def batches_of_each_task(self, most):
        """Yields a Batch of `most` crops of every task (`of_each_task`)."""
        for numbers in self.of_each_task(most).values():
            yield self.collate([self[n] for n in numbers])

    def __getitem__(self, n):
        rng = np.random.default_rng((self.seed, n, 1))
        epoch, position = divmod(n, len(self.samples))
        sample = self.samples[self.order(epoch)[position]]
        anew = TASKS[sample.task].is_drawn_anew
        degraded, gt = load_pair(sample, *((self.seed + 1, epoch) if anew else (0, 0)))
        top, left = self.corner(sample, gt, rng)
        window = (slice(None), slice(top, top + self.crop), slice(left, left + self.crop))
        flips = [d for d in (1, 2) if rng.random() < 0.5]
        degraded, gt = degraded[window].flip(flips), gt[window].flip(flips)
        return degraded, gt, sample.task, sample.name, n

    def corner(self, sample, image, rng):
        """Where a crop of an image (3, H, W) begins: (top, left)."""
        height, width = image.shape[1:]
        if problem := side_problem(sample, width, height, self.crop):
            raise DataError(problem)
        return rng.integers(height - self.crop + 1), rng.integers(width - self.crop + 1)

    @staticmethod
    def collate(items):
        """A list of crops -> Batch."""
        degraded, gt, *rest = zip(*items)
        return Batch(torch.stack(degraded), torch.stack(gt), *map(list, rest))


def adair_repeats(samples):
    """The samples as often as AdaIR's training lists repeat them per epoch (without mining)."""
    return [s for s in samples for _ in range(TASKS[s.task].repeats)]


if __name__ == "__main__":
    print("data.py: python inventory.py says what a data folder holds", file=sys.stderr)
    sys.exit(2)
