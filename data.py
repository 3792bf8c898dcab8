"""Where images come from: the table of tasks, three sources of samples, training crops.

A `Sample` says which files an image is made of; nothing is decoded before it is needed. Whatever is
random here is a function of (seed, image name, epoch), so a run can be repeated, resumed and split
over workers without its data changing.
"""

import contextlib
import hashlib
import os
import re
import zlib
from collections.abc import Callable
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


class Task(NamedTuple):
    """What sets one task apart. A new task is a row of TASKS and one of rewards.TASK_REWARDS."""

    degrade: Callable  # (gt, rng) -> degraded: the task synthesised on a clean photograph
    kind: str  # its test sets lie under test/KIND; in --tasks, all tasks of this kind
    train: tuple  # folders under Train/: of degraded and clean images, or of clean ones alone
    paper: tuple  # its training set (Sec. 4.1): name, number of images or pairs
    repeats: int = 1  # how often AdaIR's training list repeats an image
    partners: Callable = lambda stem: [stem]  # how the clean image of a degraded one may be called
    variant: str = ""  # behind the name of a test set: which of the tasks of one kind

    @property
    def has_pairs(self):
        """Whether AdaIR has pairs of it; else it is synthesised there, too, in every epoch anew."""
        return len(self.train) == 2


def _denoising(sigma):
    noise, paper = partial(gaussian_noise, sigma=sigma), ("BSD400 + WED", 5144)
    return Task(noise, "denoise", ("Denoise",), paper, repeats=3, variant=f"σ={sigma}")


TASKS = {
    "denoise15": _denoising(15),
    "denoise25": _denoising(25),
    "denoise50": _denoising(50),
    "derain": Task(
        rain,
        kind="derain",
        train=("Derain/rainy", "Derain/gt"),
        paper=("Rain100L", 200),
        repeats=120,
        partners=lambda stem: ["no" + stem, stem],  # rain-1, norain-1
    ),
    "dehaze": Task(
        haze,
        kind="dehaze",
        train=("Dehaze/synthetic", "Dehaze/original"),
        paper=("RESIDE OTS", 72135),
        partners=lambda stem: [stem.split("_")[0]],  # SCENE_LIGHT_HAZE, SCENE
    ),
    "deblur": Task(
        blur,
        kind="deblur",
        train=("Deblur/blur", "Deblur/sharp"),
        paper=("GoPro", 2103),
        repeats=5,
    ),
    "lowlight": Task(
        low_light,
        kind="enhance",
        train=("Enhance/low", "Enhance/gt"),
        paper=("LOL", 485),
        repeats=20,
    ),
}
TASK_WORDS = tuple(dict.fromkeys([*(t.kind for t in TASKS.values()), *TASKS]))


def task_names(words):
    """The tasks, in the order of TASKS, that words as ["denoise", "dehaze"] name; all for none."""
    return [name for name, t in TASKS.items() if not words or name in words or t.kind in words]


class Sample(NamedTuple):
    """One image of one task. Without `degraded` the degradation is synthesised from `gt`."""

    task: str  # one of TASKS, or the name of a paired test set
    name: str  # unique within its task; seeds what is random about it
    gt: str  # path of the clean image
    degraded: str = ""  # path of the degraded image
    box: tuple = ()  # (left, top, right, bottom): the part of the file that is meant; () is all

    @property
    def files(self):
        """The paths of its files, the clean image's first."""
        return (self.gt, self.degraded) if self.degraded else (self.gt,)


# ---------------------------------------------------------------------------------- reading images


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
    """The image at `path`, of any mode, or the part of it in a box: a tensor (3, H, W) in [0, 1],
    EXIF rotation applied, grey tripled, alpha dropped. Raises DataError."""
    with opened(path) as image:
        image = ImageOps.exif_transpose(image)
        image = image.crop(box) if box else image
        if image.mode == "F" or image.mode.startswith("I"):
            # floats, or 16-bit grey: Pillow's own conversion would clip them to 8 bits
            grey = np.asarray(image, dtype=np.float32) / (1 if image.mode == "F" else 65535)
            if not np.isfinite(grey).all():
                raise ValueError("it holds values that are no numbers")
            pixels = np.repeat(grey.clip(0, 1)[..., None], 3, axis=-1)
        else:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_size(path, box=()):
    """(width, height) of an image from its header alone, EXIF rotation applied; with a box, which
    lies inside the image, that of the box. Raises DataError."""
    if box:
        left, top, right, bottom = box
        return right - left, bottom - top
    with opened(path) as image:
        # Of a PNG that says nothing at its start, Pillow would decode all to look at its end; of a
        # TIFF it has turned the size already.
        signs = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
        is_silent = image.format == "PNG" and not signs & image.info.keys()
        is_as_it_is = is_silent or image.format == "TIFF"
        is_turned = not is_as_it_is and image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if is_turned else image.size


def middle(sample, side):
    """The sample of the middle `side` px of its image, or of all that there is. Raises DataError
    for an image that cannot be read."""
    box = sample.box or (0, 0, *image_size(sample.gt))
    left, top, right, bottom = box
    x, y = (max(size - side, 0) // 2 for size in (right - left, bottom - top))
    return sample._replace(
        box=(left + x, top + y, min(left + x + side, right), min(top + y + side, bottom))
    )


def rng_of(seed, name, epoch):
    """The generator of what is random about one image in one epoch."""
    return np.random.default_rng((seed, zlib.crc32(name.encode()), epoch))


def check_sizes(sample, sizes, min_side=1):
    """Raises DataError unless a sample's images have one size, and min_side px or more a side.

    sizes: (width, height) of each of `sample.files`.
    """
    gt, degraded = (f"{width}×{height}" for width, height in (sizes[0], sizes[-1]))
    if degraded != gt:
        raise DataError(f"{sample.degraded} is {degraded} px but its clean image is {gt}")
    if min(sizes[0]) < min_side:
        raise DataError(f"{sample.gt} is {gt} px, smaller than the crop of {min_side}")


def problem_of(sample, min_side=8, decode=True):
    """What makes a sample unusable, in a sentence; "" if nothing.

    min_side: px that it must have a side; decode: read every pixel, not the headers alone.
    """

    def size(path):
        return read_image(path, sample.box).shape[:0:-1] if decode else image_size(path, sample.box)

    try:
        check_sizes(sample, [size(path) for path in sample.files], min_side)
    except DataError as error:
        return str(error)
    return ""


def split_usable(samples, min_side=8, decode=True, mapper=map):
    """Splits samples by `problem_of`: (usable, problems). Samples of the same files are looked at
    once. mapper(function, samples): as map."""
    unique = {(s.files, s.box): s for s in samples}
    look = partial(problem_of, min_side=min_side, decode=decode)
    problems = dict(zip(unique, mapper(look, list(unique.values()))))
    usable = [s for s in samples if not problems[s.files, s.box]]
    return usable, list(dict.fromkeys(filter(None, problems.values())))


def load_pair(sample, seed=0, epoch=0, min_side=1):
    """(degraded, gt) of a sample, both (3, H, W) in [0, 1]: the whole image.

    Synthesised degradations are those of (seed, task, name, epoch); mining and evaluation use seed
    0 and epoch 0. Raises DataError when a file is missing or broken, the two differ in size, or
    they have fewer than min_side px a side.
    """
    images = [read_image(path, sample.box) for path in sample.files]
    check_sizes(sample, [image.shape[:0:-1] for image in images], min_side)
    gt = images[0]
    if sample.degraded:
        return images[1], gt
    rng = rng_of(seed, f"{sample.task}/{sample.name}", epoch)
    try:
        return TASKS[sample.task].degrade(gt, rng), gt
    except ValueError as error:
        raise DataError(f"{sample.gt} cannot be degraded ({error})") from None


# ----------------------------------------------------------------------------------------- sources


def walk(folder):
    """os.walk through links, too, in the same order everywhere, and into no folder twice."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield parent, folders, files


def images_in(folder):
    """Paths (text) of the image files in a folder and below; none if there is no such folder."""

    def natural(path):  # 2 before 10
        return re.sub(r"\d+", lambda digits: digits[0].zfill(12), path), path

    paths = [os.path.join(parent, name) for parent, _, files in walk(folder) for name in files]
    images = [p for p in paths if os.path.splitext(p)[1].lower() in IMAGE_TYPES]
    return sorted((p for p in images if not os.path.basename(p).startswith(".")), key=natural)


def pair_up(task, degraded, clean, partners, root):
    """The pairs in two folders: each degraded file with the clean one, whatever its extension, that
    is called as `partners` says, in the folder of the same name or at the top. Returns (samples,
    problems): what has no partner is named in `problems`.
    """
    truths = images_in(clean)
    by_stem = {(os.path.relpath(os.path.dirname(p), clean), Path(p).stem): p for p in truths}
    samples, problems, used = [], [], set()
    for path in images_in(degraded):
        parent = os.path.relpath(os.path.dirname(path), degraded)
        names = partners(Path(path).stem)
        wanted = [(place, name) for name in names for place in (parent, ".")]
        truth = next((by_stem[key] for key in wanted if key in by_stem), None)
        if truth is None:
            problems.append(f"{path} has no clean image {names[0]}.* in {clean}")
        else:
            used.add(truth)
            samples.append(Sample(task, os.path.relpath(path, root), truth, path))
    problems += [f"{path} has no degraded image" for path in truths if path not in used]
    return samples, problems


def is_adair_layout(root):
    """Whether a data folder is AdaIR's; else it is one of photographs."""
    return os.path.isdir(os.path.join(root, "Train"))


def find_adair_train(root, tasks=TASKS):
    """AdaIR's training folders under root/Train, as (samples, problems)."""
    samples, problems = [], []
    for name in tasks:
        task = TASKS[name]
        folders = [os.path.join(root, "Train", folder) for folder in task.train]
        if task.has_pairs:
            found, broken = pair_up(name, *folders, task.partners, root)
            samples, problems = samples + found, problems + broken
        else:
            clean = images_in(folders[0])
            samples += [Sample(name, os.path.relpath(path, root), path) for path in clean]
    return samples, problems


def training_table(root, tasks=TASKS):
    """AdaIR's training folders beside the sets that the paper names (Sec. 4.1): (head, rows), a row
    for each, with 0 found where it is missing. No file is opened."""
    rows = {}
    for name in tasks:
        folders, (title, number) = TASKS[name].train, TASKS[name].paper
        if folders not in rows:  # those of one family train on one folder
            samples, problems = find_adair_train(root, [name])
            there = " + ".join(f"Train/{folder}" for folder in folders)
            rows[folders] = [there, len(samples), number, title, len(problems)]
    return ["folders", "found", "paper", "set", "without partner"], list(rows.values())


def list_adair_test(root, only=None):
    """AdaIR's test sets under root/test, and any other folder under root that holds input/ and
    target/, as {set name: samples}; only: the names of those to use, all by default.

    Sets of clean images stand there once for every task that is synthesised on them. Raises
    DataError for a file without partner, and for a set that is not there.
    """
    root, sets, problems, paired = Path(root), {}, {}, {}
    for name, task in TASKS.items():
        if task.has_pairs:
            paired[f"test/{task.kind}"] = name
            continue
        for folder in sorted(p for p in (root / "test" / task.kind).glob("*") if p.is_dir()):
            images = [p for p in images_in(folder) if Path(p).parent == folder]  # none further down
            samples = [Sample(name, os.path.relpath(p, root), p) for p in images]
            sets[f"{folder.name} {task.variant}"] = samples
    for folder in sorted(Path(parent) for parent, folders, _ in walk(root) if "input" in folders):
        parts = folder.relative_to(root).parts
        name = parts[-1] if parts else root.resolve().name
        name = "/".join(parts) if name in sets else name
        task = paired.get("/".join(parts[:2]))
        partners = TASKS[task].partners if task else lambda stem: [stem]
        degraded, clean = folder / "input", folder / "target"
        sets[name], problems[name] = pair_up(task or name, degraded, clean, partners, root)
    for name in only or ():
        if name not in sets:
            raise DataError(f"{root} has no test set {name!r}; it has {', '.join(sets)}")
    sets = {name: samples for name, samples in sets.items() if not only or name in only}
    broken = [problem for name in sets for problem in problems.get(name, ())]
    if broken:
        raise DataError(f"{broken[0]}; {len(broken)} such problem(s) under {root}")
    sets = {name: samples for name, samples in sets.items() if samples}
    if not sets:
        raise DataError(f"{root} holds no test images in AdaIR's layout, nor input/ + target/")
    return sets


def find_photos(folder, tasks=TASKS):
    """Photographs in a plain folder (and below), once per task, all degradations synthesised.

    Returns (samples, problems). Raises DataError for the folder of a data set: its degraded images
    are no truths.
    """
    degraded = {"input", *(os.path.basename(t.train[0]) for t in TASKS.values() if t.has_pairs)}
    names = {Path(folder).resolve().name}.union(*(folders for _, folders, _ in walk(folder)))
    if wrong := degraded & names:
        raise DataError(f"{folder} holds degraded images ({min(wrong)}/) but no Train/")
    samples, problems = [], []
    for path in images_in(folder):
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


def in_draws(samples, draws):
    """Photographs of a plain folder under several draws of every degradation, each seeded by its
    name; what comes from AdaIR's folders stays as it is."""
    if draws == 1:
        return samples
    found = []
    for s in samples:
        found += [s._replace(name=f"{s.name}#{k + 1}") for k in range(draws)] if s.box else [s]
    return found


# The demo's photographs: Kodak's 24 at half size. Fixed parts, by number.
KODAK = Path(__file__).with_name("kodak")
KODAK_HELD_OUT = (4, 8, 12, 16, 20, 24)  # to report on
KODAK_VAL = (3, 9, 15, 21)  # to choose on


def list_kodak(tasks=TASKS):
    """(train, val, held_out) of the demo's photographs; the held-out ones under two draws."""
    samples, problems = find_photos(KODAK, tasks)
    if problems or len({s.gt for s in samples}) != 24:
        raise DataError(f"{KODAK} does not hold the demo's 24 photographs: clone the project anew")
    train, val, held_out = [], [], []
    for s in samples:
        number = int(Path(s.gt).stem[-2:])
        part = held_out if number in KODAK_HELD_OUT else val if number in KODAK_VAL else train
        part.append(s)
    again = [s._replace(name=f"{s.name}#2") for s in held_out]  # the name seeds the draw
    return train, val, held_out + again


def set_aside(samples, most):
    """Splits one task's samples into (train, val): a sample of each of the last `most` clean
    images, at most a fifth of them, at least one of two. What else was made of those clean images
    (OTS has 35 hazes of each) is in neither."""
    truths = list(dict.fromkeys(s.gt for s in samples))
    n = min(most, max(1, len(truths) // 5), len(truths) - 1)
    aside = dict.fromkeys(truths[len(truths) - n :])
    val = {s.gt: s for s in reversed(samples) if s.gt in aside}  # the first of each
    return [s for s in samples if s.gt not in aside], [val[gt] for gt in aside]


class Split(NamedTuple):
    """A data set in three parts, which share no image."""

    train: list  # samples
    val: list  # that choose best.pt
    held_out: list  # that are looked at before and after
    problems: list  # sentences on what is left out of training


def list_training(root=None, aside=12, tasks=(), listed=None):
    """The training set of a folder, and what is never trained on: a Split.

    root: AdaIR's data folder (holding Train/), or a folder of photos, or None for the demo's
    photographs, whose parts are fixed. From a folder the last images of every task are held out
    (`set_aside`, at most `aside`), and of the rest the last ones, half as many, are for validation.
    tasks: those to use, each of which must be there; without them, all that are there.
    listed: a file that names the images to use (`split_listed`).
    Raises DataError when there is nothing to train on or nothing to set aside.
    """
    if root is None:
        if listed:
            raise DataError(f"{listed} goes with a data folder, not with the demo's photographs")
        return Split(*list_kodak(tasks or TASKS), [])
    if not os.path.isdir(root):
        raise DataError(f"there is no folder {root}")
    if is_adair_layout(root):
        samples, problems = find_adair_train(root, tasks or TASKS)
        none = "/Train/ holds no pairs in AdaIR's layout (Denoise/, Derain/rainy + gt/, …)"
    else:
        samples, problems = find_photos(root, tasks or TASKS)
        none = " holds neither AdaIR's Train/ nor any image that can be read"
    if not samples:
        which = f" for {', '.join(tasks)}" if tasks else ""
        first = f"; {len(problems)} file(s) cannot be used, as {problems[0]}" if problems else ""
        raise DataError(f"{root}{none}{which}{first}")
    if listed:
        _, samples = split_listed(samples, listed)
    by_task = {task: [s for s in samples if s.task == task] for task in TASKS}
    if absent := [task for task in tasks if not by_task[task]]:
        raise DataError(f"{root} has no training images for {', '.join(absent)}")
    split = Split([], [], [], problems)
    for of_task in filter(None, by_task.values()):
        rest, held_out = set_aside(of_task, aside)
        train, val = set_aside(rest, max(1, len(held_out) // 2))
        split.train.extend(train)
        split.val.extend(val)
        split.held_out.extend(held_out)
    if not split.val:
        raise DataError(f"{root} holds two images per task or fewer: at least three are needed")
    return split


def split_listed(samples, path):
    """Splits samples into (others, listed): listed are those made of a file that a text file names.

    A line names a file, clean or degraded, by the last parts of its path, as in rainy/rain-1.png:
    as many as tell it from others. Empty lines and those that begin with # say nothing. Raises
    DataError for a line that names none of the samples' files or several, and for an empty list.
    """
    wanted = {}  # the last parts of a path: where they are named
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and not line.startswith("#"):
                where = f"{path}, line {number}: {line.strip()!r:.200}"
                wanted[PurePath(line.strip()).parts] = where
    if not wanted:
        raise DataError(f"{path} names no image")
    lengths = {len(parts) for parts in wanted}
    found = {parts: set() for parts in wanted}
    others, listed = [], []
    for sample in samples:
        ends = {PurePath(file).parts[-n:]: file for file in sample.files for n in lengths}
        named = ends.keys() & wanted.keys()
        for parts in named:
            found[parts].add(os.path.realpath(ends[parts]))
        (listed if named else others).append(sample)
    for parts, where in wanted.items():
        if not found[parts]:
            raise DataError(f"{where} is no training image")
        if len(found[parts]) > 1:
            n = len(found[parts])
            raise DataError(f"{where} may be any of {n} files: give more of its path")
    return others, listed


def names_digest(samples):
    """Hash of which samples these are, whatever their files hold."""
    names = "".join(f"{s.task}/{s.name}\n" for s in samples)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


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
        self.epoch, self.order = None, None  # of the epoch asked for last: which sample comes when

    def sample_of(self, n):
        """(sample, epoch) of crop number n."""
        epoch, position = divmod(n, len(self.samples))
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.epoch, self.order = epoch, rng.permutation(len(self.samples))
        return self.samples[self.order[position]], epoch

    def of_each_task(self, most):
        """{task: numbers of `most` crops of it}, of as many different images as there are."""
        found, n = {sample.task: [] for sample in self.samples}, 0
        while any(len(numbers) < most for numbers in found.values()):
            numbers = found[self.sample_of(n)[0].task]
            if len(numbers) < most:
                numbers.append(n)
            n += 1
        return found

    def batches_of_each_task(self, most):
        """Yields a Batch of `most` crops of every task (`of_each_task`)."""
        for numbers in self.of_each_task(most).values():
            yield self.collate([self[n] for n in numbers])

    def __getitem__(self, n):
        rng = np.random.default_rng((self.seed, n, 1))
        sample, epoch = self.sample_of(n)
        if TASKS[sample.task].has_pairs:
            degraded, gt = load_pair(sample)
        else:
            degraded, gt = load_pair(sample, seed=self.seed + 1, epoch=epoch)
        top, left = self.corner(sample, gt, rng)
        window = (slice(None), slice(top, top + self.crop), slice(left, left + self.crop))
        flips = [d for d in (1, 2) if rng.random() < 0.5]
        degraded, gt = degraded[window].flip(flips), gt[window].flip(flips)
        return degraded, gt, sample.task, sample.name, n

    def corner(self, sample, image, rng):
        """Where a crop of an image (3, H, W) begins: (top, left)."""
        height, width = image.shape[1:]
        check_sizes(sample, [(width, height)], self.crop)
        return rng.integers(height - self.crop + 1), rng.integers(width - self.crop + 1)

    @staticmethod
    def collate(items):
        """A list of crops -> Batch."""
        degraded, gt, tasks, names, numbers = zip(*items)
        images = torch.stack(degraded), torch.stack(gt)
        return Batch(*images, list(tasks), list(names), list(numbers))


def adair_repeats(samples):
    """The samples as often as AdaIR's training lists repeat them in an epoch."""
    return [s for s in samples for _ in range(TASKS[s.task].repeats)]
