"""Where images come from: three sources of samples, five synthesised degradations, training crops, hard mining.

    python data.py --data-root data       what is there, what is missing, what would make a run fail

A `Sample` says which files an image is made of; nothing is decoded before it is needed. Whatever is random here is a
function of (seed, image name, epoch), so a run can be repeated, resumed and split over workers without its data changing.
"""

import contextlib
import hashlib
import math
import os
import re
import sys
import threading
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.ndimage import distance_transform_edt
from tqdm import tqdm

TASKS = ("denoise15", "denoise25", "denoise50", "derain", "dehaze", "deblur", "lowlight")
IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
# How often AdaIR's training lists repeat an image per epoch (used without hard mining).
ADAIR_REPEATS = {**{t: 3 for t in TASKS[:3]}, "derain": 120, "dehaze": 1, "deblur": 5, "lowlight": 20}
PHOTO_WINDOW = 512  # px; of a larger photo in a plain folder, this much around its centre is used
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")  # whatever a file's name says: of EPS, Pillow would run what it finds in it
MAX_PIXELS = 2**27  # of an image: a file of a few kB may claim, and on decoding fill, any size


def task_names(words):
    """The tasks, in the order of TASKS, that words as ["denoise", "dehaze"] name; "denoise" stands for its three noise levels. None of None."""
    return words and [t for t in TASKS if t in words or (t.startswith("denoise") and "denoise" in words)]


class DataError(ValueError):
    """Something is wrong with the data; its text says what, where and what to do, in one sentence."""


class Sample(NamedTuple):
    """One image of one task. Without `degraded` the degradation is synthesised from `gt`."""

    task: str  # one of TASKS, or the name of a paired test set
    name: str  # unique within its task; seeds what is random about it
    gt: str  # path of the clean image
    degraded: str = ""  # path of the degraded image
    box: tuple = ()  # (left, top, right, bottom): the part of the file that is meant; () is all of it
    disparity: str = ""  # .npz with a disparity map of the whole file, for haze of true depth


# ------------------------------------------------------------------------------------------------ reading images


def to_rgb(image):
    """A PIL image of any mode as (H, W, 3) float32 in [0, 1]: EXIF rotation applied, grey tripled, alpha dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey; PIL's own conversion would clip it to 8 bits
        pixels = np.asarray(image, dtype=np.float32) / (1 if image.mode == "F" else 65535)
        if not np.isfinite(pixels).all():
            raise ValueError("it holds values that are no numbers")
        return np.repeat(pixels.clip(0, 1)[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


@contextlib.contextmanager
def opened(path):
    """The image at `path`, its pixels not yet decoded. Raises DataError for a file that is missing, broken or absurdly large, also while
    it is decoded: Pillow's many decoders fail in many ways."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it claims {image.width}×{image.height} px; more than {MAX_PIXELS >> 20} MP are not decoded")
            yield image
    except FileNotFoundError:
        raise DataError(f"there is no image {path}") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read as an image ({reason})") from None


def read_image(path, box=()):
    """The image at `path` as a tensor (3, H, W) in [0, 1]. Raises DataError."""
    with opened(path) as image:
        pixels = to_rgb(ImageOps.exif_transpose(image).crop(box) if box else image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_size(path):
    """(width, height) from the file's header alone, EXIF rotation applied. Raises DataError."""
    with opened(path) as image:
        # Of a PNG that says nothing at its start, Pillow would decode all to look for EXIF at its end.
        silent = image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()
        turned = not silent and image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if turned else image.size


# ------------------------------------------------------------------------------------------------- degradations
# Each takes a clean image (3, H, W) in [0, 1] and a numpy generator and returns the degraded one, in 8-bit steps.


def quantise(image):
    return (image.clamp(0, 1) * 255).round() / 255


def gaussian_noise(gt, rng, sigma):
    """AdaIR's: σ in 8-bit units, clipped and truncated to integers."""
    noise = torch.from_numpy(rng.standard_normal(gt.shape, dtype=np.float32))
    return (gt * 255 + noise * sigma).clamp(0, 255).floor() / 255


def line_kernel(length, angle):
    """A normalised motion kernel (k, k), k odd: a line of `length` px at `angle` radians from the x axis."""
    half = int(math.ceil(length / 2))
    kernel = np.zeros((2 * half + 3, 2 * half + 3), dtype=np.float32)
    for s in np.linspace(-length / 2, length / 2, 4 * half + 1):
        x, y = half + 1 + s * math.cos(angle), half + 1 + s * math.sin(angle)
        i, j = int(y), int(x)
        for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):  # bilinear splat
            kernel[i + di, j + dj] += (1 - abs(y - i - di)) * (1 - abs(x - j - dj))
    return torch.from_numpy(kernel / kernel.sum())


def disk_kernel(radius):
    """A normalised defocus kernel (k, k): a disk of `radius` px with a soft rim."""
    half = int(math.ceil(radius))
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    kernel = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)
    return torch.from_numpy(kernel / kernel.sum())


def convolve(image, kernel):
    """(C, H, W) with one kernel (k, k), borders reflected."""
    pad = kernel.shape[0] // 2
    if min(image.shape[-2:]) <= pad:
        raise DataError(f"an image of {image.shape[2]}×{image.shape[1]} px is too small for a blur of {kernel.shape[0]} px")
    padded = F.pad(image[:, None], (pad,) * 4, mode="reflect")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def rain(gt, rng):
    """Streaks of one random angle, length and density, added and clipped."""
    density, strength = rng.uniform(0.003, 0.015), rng.uniform(0.4, 0.9)
    length, angle = rng.uniform(9, 25), math.pi / 2 + rng.uniform(-0.6, 0.6)
    drops = rng.random(gt.shape[1:], dtype=np.float32)
    drops = torch.from_numpy(np.where(drops < density, rng.random(gt.shape[1:], dtype=np.float32), 0))
    streaks = convolve(drops[None], line_kernel(length, angle)) * length
    return quantise(gt + (strength * streaks).clamp(max=0.8))


def smooth_field(rng, height, width, cell=96):
    """A random field (height, width) in [0, 1] that varies over about `cell` px."""
    grid = rng.random((1, 1, height // cell + 3, width // cell + 3), dtype=np.float32)
    size = (grid.shape[2] * cell, grid.shape[3] * cell)
    field = F.interpolate(torch.from_numpy(grid), size, mode="bicubic", align_corners=False)[0, 0]
    top, left = rng.integers(cell // 2, cell), rng.integers(cell // 2, cell)
    return field[top : top + height, left : left + width].clamp(0, 1)


def haze(gt, rng, depth=None):
    """The scattering model I = J·t + A(1 − t), t = exp(−β·depth); depth (H, W) in [0, 1], else a smooth random one."""
    beta, light = rng.uniform(0.8, 2.2), rng.uniform(0.7, 1.0) + rng.uniform(-0.03, 0.03, 3)
    if depth is None:
        depth = 0.3 + 0.7 * smooth_field(rng, *gt.shape[1:])
    t = torch.exp(-beta * depth)
    light = torch.tensor(light, dtype=torch.float32).clamp(max=1)[:, None, None]
    return quantise(gt * t + light * (1 - t))


def blur(gt, rng):
    """Motion along a line, or defocus over a disk, in equal parts."""
    if rng.random() < 0.5:
        return quantise(convolve(gt, line_kernel(rng.uniform(5, 15), rng.uniform(0, math.pi))))
    return quantise(convolve(gt, disk_kernel(rng.uniform(1.5, 3.5))))


def low_light(gt, rng):
    """Gamma and gain, then shot noise (variance proportional to the signal) and read noise."""
    dark = rng.uniform(0.1, 0.4) * gt ** rng.uniform(1.2, 2.0)
    shot, read = rng.uniform(0.005, 0.02), rng.uniform(0.002, 0.008)
    noise = torch.from_numpy(rng.standard_normal(gt.shape, dtype=np.float32))
    return quantise(dark + noise * (shot**2 * dark + read**2).sqrt())


def degrade(gt, task, rng, depth=None):
    """Synthesises `task` on a clean image (3, H, W) in [0, 1]."""
    if task.startswith("denoise"):
        return gaussian_noise(gt, rng, int(task.removeprefix("denoise")))
    if task == "dehaze":
        return haze(gt, rng, depth)
    return {"derain": rain, "deblur": blur, "lowlight": low_light}[task](gt, rng)


def rng_of(seed, name, epoch):
    return np.random.default_rng((seed, zlib.crc32(name.encode()), epoch))


def load_depth(sample):
    """The depth (H, W) in [0, 1], 1 the farthest point of the file, that goes with a sample of known disparity."""
    depth = _read_depth(sample.disparity)
    left, top, right, bottom = sample.box or (0, 0, depth.shape[1], depth.shape[0])
    return torch.from_numpy(depth[top:bottom, left:right])


@lru_cache(maxsize=2)
def _read_depth(path):
    with np.load(path) as file:
        disparity = file["arr_0"]
    known = np.isfinite(disparity) & (disparity > 0)
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)  # fills what stereo missed
    disparity = disparity[tuple(nearest)]
    return (disparity.min() / disparity).astype(np.float32)


def load_pair(sample, seed=0, epoch=0):
    """(degraded, gt), both (3, H, W) in [0, 1]: the whole image. Synthesised degradations are those of (seed, task, name,
    epoch); mining and evaluation use seed 0 and epoch 0.

    Raises DataError when a file is missing or broken, or the two differ in size.
    """
    gt = read_image(sample.gt, sample.box)
    if sample.degraded:
        degraded = read_image(sample.degraded, sample.box)
        if degraded.shape != gt.shape:
            raise DataError(_size_problem(sample, degraded.shape[:0:-1], gt.shape[:0:-1]))
        return degraded, gt
    depth = load_depth(sample) if sample.disparity else None
    return degrade(gt, sample.task, rng_of(seed, f"{sample.task}/{sample.name}", epoch), depth), gt


def _size_problem(sample, degraded, gt):
    return f"{sample.degraded} is {degraded[0]}×{degraded[1]} px but its clean image {sample.gt} is {gt[0]}×{gt[1]}"


# ------------------------------------------------------------------------------------------------------ sources


def natural(path):
    """Sort key under which 2 comes before 10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(12), path)


def walk(folder):
    """os.walk through links, too, but into no folder twice; in the same order everywhere."""
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = [name for name in real if real[name] not in seen and not seen.add(real[name])]
        yield parent, folders, files


def images_in(folder, recursive=False):
    """Paths (text) of the image files of a folder, naturally sorted; none if there is no such folder."""
    found = []
    for parent, _, files in walk(folder):
        found += [os.path.join(parent, name) for name in files if os.path.splitext(name)[1].lower() in IMAGE_TYPES and name[0] != "."]
        if not recursive:
            break
    return sorted(found, key=lambda path: (natural(path), path))


def stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def pair_up(task, degraded, clean, keys, root):
    """Pairs each degraded file of a folder with a clean one of another, whatever the extensions: the one in the folder of the same name, or
    right at the top, whose stem is one of keys(its own stem). degraded, clean: folders.

    Returns (samples, problems): what has no partner is named in `problems`.
    """
    truths = images_in(clean, recursive=True)
    by_stem = {(os.path.relpath(os.path.dirname(path), clean), stem(path)): path for path in truths}
    samples, problems, used = [], [], set()
    for path in images_in(degraded, recursive=True):
        parent = os.path.relpath(os.path.dirname(path), degraded)
        wanted = [(folder, key) for key in keys(stem(path)) for folder in (parent, ".")]
        partner = next((by_stem[key] for key in wanted if key in by_stem), None)
        if partner is None:
            problems.append(f"{path} has no clean image {wanted[0][1]}.* in {clean}")
        else:
            used.add(partner)
            samples.append(Sample(task, os.path.relpath(path, root), partner, path))
    problems += [f"{path} has no degraded image" for path in truths if path not in used]
    return samples, problems


# How AdaIR's folders name the partner: what a degraded file's stem says of the clean one's.
TRAIN_FOLDERS = (
    ("derain", "Derain/rainy", "Derain/gt", lambda stem: ["no" + stem]),
    ("dehaze", "Dehaze/synthetic", "Dehaze/original", lambda stem: [stem.split("_")[0]]),
    ("deblur", "Deblur/blur", "Deblur/sharp", lambda stem: [stem]),
    ("lowlight", "Enhance/low", "Enhance/gt", lambda stem: [stem]),
)
TEST_FOLDERS = {
    "derain": ("derain", lambda stem: [stem, "no" + stem]),
    "dehaze": ("dehaze", lambda stem: [stem.split("_")[0]]),
    "deblur": ("deblur", lambda stem: [stem]),
    "enhance": ("lowlight", lambda stem: [stem]),
}


def find_adair_train(root, tasks=TASKS):
    """AdaIR's training folders under root/Train, as (samples, problems)."""
    train = os.path.join(root, "Train")
    clean = images_in(os.path.join(train, "Denoise"), recursive=True) if {*TASKS[:3]} & {*tasks} else []
    names = [os.path.relpath(path, root) for path in clean]
    samples = [Sample(task, *pair) for task in TASKS[:3] if task in tasks for pair in zip(names, clean)]
    problems = []
    for task, degraded, gt, keys in TRAIN_FOLDERS:
        if task in tasks:
            found = pair_up(task, os.path.join(train, degraded), os.path.join(train, gt), keys, root)
            samples, problems = samples + found[0], problems + found[1]
    return samples, problems


def list_adair_train(root, tasks=TASKS):
    """`find_adair_train`. Raises DataError if there is nothing to train on."""
    samples, problems = find_adair_train(root, tasks)
    if not samples:
        hint = f"; {len(problems)} file(s) have no partner, as {problems[0]}" if problems else ""
        which = "" if tuple(tasks) == TASKS else f" for {', '.join(tasks)}"
        raise DataError(f"{root}/Train holds no pairs in AdaIR's layout (Denoise/, Derain/rainy + gt/, …; see the README){which}{hint}")
    return samples, problems


def find_adair_test(root):
    """AdaIR's test sets under root/test, and any other folder under root that holds input/ and target/, as
    {set name: (its folder under root, samples, problems)}; clean denoising sets appear once per σ."""
    root, sets = Path(root), {}
    for folder in sorted(p for p in (root / "test" / "denoise").glob("*") if p.is_dir()):
        clean = images_in(folder)
        for task in TASKS[:3]:
            samples = [Sample(task, os.path.relpath(path, root), path) for path in clean]
            sets[f"{folder.name} σ={task.removeprefix('denoise')}"] = str(folder.relative_to(root)), samples, []
    holding_input = (Path(parent) for parent, folders, _ in walk(root) if "input" in folders)
    for folder in sorted(holding_input):
        parts = folder.relative_to(root).parts
        name = parts[-1] if parts else root.resolve().name
        name = "/".join(parts) if name in sets else name
        kind = parts[1] if len(parts) > 1 and parts[0] == "test" else None
        task, keys = TEST_FOLDERS.get(kind, (name, lambda stem: [stem]))
        sets[name] = "/".join(parts) or ".", *pair_up(task, folder / "input", folder / "target", keys, root)
    return sets


def list_adair_test(root, only=None):
    """The test sets of `find_adair_test` that are called `only`, all by default: {set name: samples}. Raises DataError for a pair without
    a partner in one of them, and for a set that is not there."""
    found = find_adair_test(root)
    unknown = [name for name in only or () if name not in found]
    if unknown:
        raise DataError(f"{root} has no test set {unknown[0]!r}; it has {', '.join(found)}")
    chosen = {name: parts for name, parts in found.items() if only is None or name in only}
    broken = [problem for _, _, problems in chosen.values() for problem in problems]
    if broken:
        raise DataError(f"{broken[0]}; {len(broken)} such problem(s) under {root}, and an evaluation leaves nothing out")
    sets = {name: samples for name, (_, samples, _) in chosen.items() if samples}
    if not sets:
        raise DataError(f"{root} holds no test images: wanted test/denoise/SET/*, test/derain/SET/{{input,target}}, … or input/ + target/")
    return sets


def keep_listed(samples, path):
    """The samples that a list names: a text file with one path under the data root a line. Nothing else of the list is opened. Raises DataError
    for a line that is none of them, and for a list without any."""
    names, wanted = {s.name for s in samples}, set()
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(iter(lambda: file.readline(4096), ""), 1):
            name = os.path.normpath(line.strip())
            if name == ".":  # an empty line
                continue
            if name not in names:
                outside = ", which lies outside the data root" if os.path.isabs(name) or name.startswith("..") else ""
                raise DataError(f"{path}, line {number}: {line.strip()!r:.200} is no training image{outside}")
            wanted.add(name)
    if not wanted:
        raise DataError(f"{path} names no image")
    return [s for s in samples if s.name in wanted]


def list_photos(folder, tasks=TASKS):
    """Every photo of a plain folder (and below), once per task, all degradations synthesised. Returns (samples, problems).

    Raises DataError for a folder of a data set: its degraded images are no truths.
    """
    degraded = {"rainy", "synthetic", "blur", "low", "input"}
    for parent, folders, _ in walk(folder):
        for part in sorted(degraded & {*folders, *([Path(folder).resolve().name] if parent == str(folder) else [])}):
            raise DataError(f"{folder} holds degraded images ({part}/) but no Train/: give AdaIR's data folder, or one of clean photos")
    samples, problems = [], []
    for path in images_in(folder, recursive=True):
        try:
            w, h = image_size(path)
        except DataError as error:
            problems.append(str(error))
            continue
        side_w, side_h = min(w, PHOTO_WINDOW), min(h, PHOTO_WINDOW)
        left, top = (w - side_w) // 2, (h - side_h) // 2
        box = (left, top, left + side_w, top + side_h)
        samples += [Sample(task, os.path.relpath(path, folder), path, box=box) for task in tasks]
    return samples, problems


def list_embedded(photos, tile=192, tasks=TASKS):
    """Tiles of the photographs inside the scikit-image wheel, once per task. The motorcycle comes with its true depth."""
    import skimage.data

    folder, samples = Path(skimage.data.__file__).parent, []
    for photo in photos:
        path = folder / photo
        w, h = image_size(path)
        for top in range((h % tile) // 2, h - tile + 1, tile):
            for left in range((w % tile) // 2, w - tile + 1, tile):
                box, name = (left, top, left + tile, top + tile), f"{path.stem}@{left},{top}"
                depth = str(folder / "motorcycle_disp.npz") if path.stem == "motorcycle_left" else ""
                samples += [Sample(task, name, str(path), "", box, depth if task == "dehaze" else "") for task in tasks]
    return samples


EMBEDDED_TRAIN = ("astronaut.png", "coffee.png", "motorcycle_left.png")  # its right view is the same scene again
EMBEDDED_HELD_OUT = ("chelsea.png", "rocket.jpg")


def list_training(root=None, val_images=12, tasks=None, listed=None):
    """The training set and a validation part that is never trained on, as (train, val, problems): of these tasks, each of which must be there, or
    of all that are there; and of what a file names (`keep_listed`).

    root: AdaIR's data folder (holding Train/), or a folder of photos, or None for the embedded photographs. From a
    folder, the last `val_images` images of every task (at most a fifth, at least one) are set aside, fewer where the cut
    would fall among files that differ in their last number alone: neighbours are often the same scene. Nothing is known of
    one scene in the folders of two tasks. Of the embedded ones, whole photographs are set aside. Raises DataError when
    there is nothing to train on or nothing to set aside.
    """
    asked, tasks = tasks or (), tasks or TASKS
    if root is None:
        if listed:
            raise DataError(f"{listed} names files of a data folder, but the photographs inside scikit-image are trained on")
        return list_embedded(EMBEDDED_TRAIN, tasks=tasks), list_embedded(EMBEDDED_HELD_OUT, tasks=tasks), []
    if not os.path.isdir(root):
        raise DataError(f"there is no folder {root}")
    samples, problems = (list_adair_train if os.path.isdir(os.path.join(root, "Train")) else list_photos)(root, tasks)
    samples = keep_listed(samples, listed) if listed else samples
    absent = [task for task in asked if samples and task not in {s.task for s in samples}]
    if absent:
        raise DataError(f"{root} has no training images for {', '.join(absent)}")
    if not samples:
        hint = f"; {problems[0]}" if problems else ""
        raise DataError(f"{root} holds neither AdaIR's Train/ nor any image that can be read{hint}")
    train, val = [], []
    for task in TASKS:
        of_task = [s for s in samples if s.task == task]
        n = min(val_images, max(len(of_task) // 5, 1), max(len(of_task) - 1, 0))
        cut = len(of_task) - n
        scene = {i: re.sub(r"\d+(?=\D*$)", "", stem(of_task[i].gt)) for i in range(max(cut - 1, 0), len(of_task))}
        later = (i for i in range(cut, len(of_task)) if i and scene[i] != scene[i - 1])
        cut = next(later, cut)
        train, val = train + of_task[:cut], val + of_task[cut:]
    if not val:
        raise DataError(f"{root} holds one image per task: at least two are needed, one of them to measure on")
    return train, val, problems


def names_digest(samples):
    """Hash of which samples these are, whatever their files hold."""
    digest = hashlib.sha256()
    for s in samples:
        digest.update(f"{s.task}/{s.name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def sample_size(sample, size=image_size):
    """(width, height) of what is meant by a sample, from its file's header, which `size` reads. Raises DataError."""
    box = sample.box
    return (box[2] - box[0], box[3] - box[1]) if box else size(sample.gt)


def check_headers(samples, min_side, spread=lambda function, items: function(items)):
    """Splits samples by what their files' headers say: (usable, problems). Nothing is decoded yet. spread: shares the work (`runs.spread`)."""
    problems = spread(partial(_header_problems, min_side=min_side), samples)
    return [s for s, problem in zip(samples, problems) if not problem], list(dict.fromkeys(filter(None, problems)))


def _header_problems(samples, min_side):
    """What is wrong with each sample, "" if nothing."""
    size = lru_cache(maxsize=1 << 14)(image_size)

    def problem(s):
        try:
            gt = size(s.gt)
            degraded = size(s.degraded) if s.degraded else gt
            w, h = sample_size(s, size)
        except DataError as error:
            return str(error)
        if degraded != gt:
            return _size_problem(s, degraded, gt)
        return f"{s.gt} is {w}×{h} px, smaller than the crop of {min_side}" if min(w, h) < min_side else ""

    return [problem(s) for s in samples]


def check_pixels(samples):
    """Splits samples by whether their files can be decoded: (usable, problems)."""

    def problem(path):
        try:
            read_image(path)
        except DataError as error:
            return str(error)

    paths = sorted({path for s in samples for path in (s.gt, s.degraded) if path})
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(tqdm(pool.map(problem, paths), total=len(paths), desc="decode", unit="file", leave=False, disable=len(paths) < 200))
    broken = {path: text for path, text in zip(paths, found) if text}
    return [s for s in samples if s.gt not in broken and s.degraded not in broken], list(broken.values())


# ----------------------------------------------------------------------------------------------- training crops


class Crops(torch.utils.data.Dataset):
    """Crop number n of a training run: (degraded, gt, task, name, n), images (3, crop, crop) in [0, 1].

    Everything about crop n follows from (seed, n): a resumed run or one with other workers sees the same crops.
    `fresh` draws a new degradation for every crop (pre-training); otherwise an image keeps the degradation it was
    mined with and only noise is drawn anew. `cycle` names the tasks to draw in turn, real and synthesised pairs of a
    task in equal parts; without it an epoch is a permutation of the samples. A file that breaks on decoding gives the
    DataError instead of a crop, as do the crops whose numbers are in `lost`. A worker process notes in reading (workers, 2), if that is
    there, its process id and the number of the crop it is at.
    """

    def __init__(self, samples, crop, seed, total, fresh=False, cycle=()):
        self.samples, self.crop, self.seed, self.total = samples, crop, seed, total
        self.fresh, self.cycle, self.lost, self.reading = fresh, cycle, set(), None
        self.groups = defaultdict(lambda: ([], []))  # task -> (synthesised, real)
        for s in samples:
            self.groups[s.task][bool(s.degraded)].append(s)
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(samples)))

    def __len__(self):
        return self.total

    def __getstate__(self):  # for workers that are spawned: a cache cannot be pickled
        return (self.samples, self.crop, self.seed, self.total, self.fresh, self.cycle), self.lost, self.reading

    def __setstate__(self, state):
        self.__init__(*state[0])
        self.lost, self.reading = state[1:]

    def sample(self, n, rng=None):
        """What crop number n is cut from."""
        if not self.cycle:
            epoch, position = divmod(n, len(self.samples))
            return self.samples[self._order(epoch)[position]]
        rng = rng or np.random.default_rng((self.seed, n, 1))
        kinds = [kind for kind in self.groups[self.cycle[n % len(self.cycle)]] if kind]
        kind = kinds[rng.integers(len(kinds))]
        return kind[rng.integers(len(kind))]

    def __getitem__(self, n):
        self._note(n)
        try:
            return self._crop(n)
        finally:
            self._note(-1)

    def _note(self, n):
        worker = torch.utils.data.get_worker_info()
        if worker and self.reading is not None:
            self.reading[worker.id] = torch.tensor((os.getpid(), n))

    def _crop(self, n):
        rng = np.random.default_rng((self.seed, n, 1))
        sample, epoch = self.sample(n, rng), n // len(self.samples)
        try:
            if n in self.lost:
                raise DataError(f"{sample.degraded or sample.gt} was being read when a worker process died")
            degraded, gt = self._fresh_crop(sample, rng) if self.fresh else self._mined_crop(sample, epoch, rng)
        except DataError as error:
            return error
        flips = [d for d in (1, 2) if rng.random() < 0.5]
        return degraded.flip(flips), gt.flip(flips), sample.task, sample.name, n

    def _window(self, height, width, rng):
        top, left = rng.integers(height - self.crop + 1), rng.integers(width - self.crop + 1)
        return slice(None), slice(top, top + self.crop), slice(left, left + self.crop)

    def _mined_crop(self, sample, epoch, rng):
        noise = sample.task.startswith("denoise")
        degraded, gt = load_pair(sample, self.seed + 1, epoch) if noise else load_pair(sample)
        window = self._window(*gt.shape[1:], rng)
        return degraded[window], gt[window]

    def _fresh_crop(self, sample, rng, margin=16):
        if sample.degraded:
            return self._mined_crop(sample, 0, rng)
        gt = read_image(sample.gt, sample.box)
        _, rows, columns = self._window(*gt.shape[1:], rng)
        top, left = max(rows.start - margin, 0), max(columns.start - margin, 0)  # context for blur and streaks
        around = gt[:, top : rows.stop + margin, left : columns.stop + margin]
        if sample.task != "lowlight":  # photographs are well exposed: without dark truths, whatever is dark looks degraded
            around = around ** rng.choice((1.0, rng.uniform(0.6, 2.0)))
        degraded = degrade(around, sample.task, rng)
        inner = (slice(None), slice(rows.start - top, rows.start - top + self.crop), slice(columns.start - left, columns.start - left + self.crop))
        return degraded[inner], around[inner]


def collate(items):
    """A list of crops -> (degraded (B, 3, H, W), gt, tasks, names, numbers, problems); broken crops become `problems`."""
    good = [item for item in items if not isinstance(item, DataError)]
    problems = [str(item) for item in items if isinstance(item, DataError)]
    if not good:
        return None, None, [], [], [], problems
    degraded, gt, *rest = zip(*good)
    return torch.stack(degraded), torch.stack(gt), *map(list, rest), problems


# ------------------------------------------------------------------------------------------------ scores, hard mining


def psnr(y, gt):
    """PSNR in dB of (3, H, W) against (3, H, W), y clipped to [0, 1] and not quantised; at most 100."""
    mse = (y.clamp(0, 1) - gt).double().square().mean().item()
    return min(100.0, -10 * math.log10(mse)) if mse else 100.0


def psnr_ssim(y, gt):
    """AdaIR's figures, by scikit-image: PSNR in dB, and SSIM with a uniform 7×7 window, on RGB floats in [0, 1]."""
    y, gt = (t.clamp(0, 1).permute(1, 2, 0).numpy() for t in (y, gt))
    if np.array_equal(y, gt):
        return 100.0, 1.0
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # here: it takes a second to load

    ssim = structural_similarity(gt, y, data_range=1, channel_axis=-1)
    return float(peak_signal_noise_ratio(gt, y, data_range=1)), float(ssim)


def multiple_of_16(image):
    """The centre of an image, its sides cut to multiples of 16: AdaIR's evaluation crop."""
    h, w = image.shape[-2:]
    if min(h, w) < 16:
        return image
    top, left = h % 16 // 2, w % 16 // 2
    return image[..., top : top + h // 16 * 16, left : left + w // 16 * 16]


def evaluation_pair(sample):
    """`load_pair` as AdaIR's protocol wants it: cut to multiples of 16."""
    return tuple(multiple_of_16(image) for image in load_pair(sample))


def evaluate(restore, samples, desc="evaluate", keep=(), also=None):
    """AdaIR's protocol over `samples`: [{task, name, psnr_in, psnr, ssim}], and the restored images at the indices in `keep`.

    restore: (3, H, W) -> (3, H, W) on the CPU; also(sample, restored, gt) -> what else a row should have. Noise is seeded per image. Raises
    DataError for any image it cannot use.
    """
    rows, kept = [], {}
    for i, sample in enumerate(tqdm(samples, desc=desc, unit="image", leave=False)):
        degraded, gt = evaluation_pair(sample)
        y = restore(degraded)
        value, similarity = psnr_ssim(y, gt)
        rows.append(dict(task=sample.task, name=sample.name, psnr_in=psnr(degraded, gt), psnr=value, ssim=similarity))
        rows[-1] |= also(sample, y, gt) if also else {}
        if i in keep:
            kept[i] = y
    return rows, kept


@lru_cache(maxsize=1 << 14)
def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_digest(sample):
    """Hash of a sample's contents: its files' bytes (not their times) and what is done with them."""
    files = [file_digest(p) for p in (sample.gt, sample.degraded, sample.disparity) if p]
    return hashlib.sha256(repr((sample.task, sample.name, sample.box, files)).encode()).hexdigest()


def model_digest(model):
    """Hash of what a model computes: its configuration, its tensors' names and values."""
    digest = hashlib.sha256(repr(sorted(model.config.items())).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def mine(restore, samples, known=(), pixels=0, progress=None):
    """Full-image PSNR of every sample under the pre-trained model: ([{task, name, psnr, digest}], problems).

    restore: (B, 3, H, W) -> (B, 3, H, W). known: {digest: psnr} of an earlier run with the same model, reused where a
    sample's contents are unchanged. An image that cannot be used is named in `problems` and left out.
    pixels: images of one size are restored together, up to so many pixels, while others are decoded (a GPU). 0: up to four
    images side by side, on a share of the cores each (a CPU: measured on two cores, batches gained nothing).
    progress: called with the number of images just done.
    """
    scores, digests, problems = {}, {}, {}
    one_at_a_time = threading.Lock() if pixels else contextlib.nullcontext()

    @torch.inference_mode()
    def score(batch):
        pairs = {}
        for i in batch:
            try:
                digests[i] = sample_digest(samples[i])
                if digests[i] not in known:
                    pairs[i] = load_pair(samples[i])
            except (DataError, OSError) as error:
                problems[i] = str(error)
        for shape in {gt.shape for _, gt in pairs.values()}:  # one, unless a header did not tell the truth
            same = [i for i, (_, gt) in pairs.items() if gt.shape == shape]
            with one_at_a_time:
                restored = restore(torch.stack([pairs[i][0] for i in same]))
            scores.update({i: psnr(y, pairs[i][1]) for i, y in zip(same, restored)})
        return len(batch)

    batches, threads = batches_of_one_size(samples, pixels), torch.get_num_threads()
    workers = min(max(threads, 2), 4)  # each may hold a large photo's feature maps
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(threads // workers, 1),))
    try:
        for n in pool.map(score, batches):
            if progress:
                progress(n)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    used = [i for i in range(len(samples)) if i not in problems]
    values = (scores[i] if i in scores else known[digests[i]] for i in used)
    rows = [dict(task=samples[i].task, name=samples[i].name, psnr=value, digest=digests[i]) for i, value in zip(used, values)]
    return rows, [problems[i] for i in sorted(problems)]


def batches_of_one_size(samples, pixels):
    """Lists of indices of samples whose images, by their headers, have one size and together at most `pixels` (or are one)."""
    if not pixels:
        return [[i] for i in range(len(samples))]
    groups = defaultdict(list)
    for i, sample in enumerate(samples):
        try:
            groups[sample_size(sample)].append(i)
        except DataError:
            groups[i] = [i]  # whoever loads it will say what is wrong
    batches = []
    for size, members in groups.items():
        n = max(1, pixels // (size[0] * size[1])) if isinstance(size, tuple) else 1
        batches += [members[k : k + n] for k in range(0, len(members), n)]
    return batches


def select(rows, ratio=0.3, mode="hard", scope="task", seed=0):
    """Indices of D_hard: of every task (and so of every σ) the `ratio` of `rows` with the lowest PSNR, at least one.

    mode: "hard", "easy" (the highest), "random" or "all"; scope "global" ranks all tasks together, which picks the tasks
    with low PSNR rather than the failures. Ties go by name. Raises DataError unless 0 < ratio ≤ 1.
    """
    if not 0 < ratio <= 1:
        raise DataError(f"the hard ratio is {ratio}; it must be above 0 and at most 1")
    if mode == "all":
        return list(range(len(rows)))
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["task"] if scope == "task" else ""].append(i)
    chosen, rng = [], np.random.default_rng(seed)
    for members in groups.values():
        members.sort(key=lambda i: (rows[i]["psnr"] * (-1 if mode == "easy" else 1), rows[i]["task"], rows[i]["name"]))
        if mode == "random":
            members = [members[i] for i in rng.permutation(len(members))]
        chosen += members[: max(1, round(ratio * len(members)))]
    return sorted(chosen)


def adair_repeats(samples):
    """The samples as often as AdaIR's training lists repeat them per epoch."""
    return [s for s in samples for _ in range(ADAIR_REPEATS.get(s.task, 1))]


# ---------------------------------------------------------------------------------------------------- what is there

# What the paper trains and tests on (Sec. 4.1): {folder: (tasks, the set, images or pairs as stated, files)}. Of the sets out of domain it
# states no numbers.
TRAIN_SETS = {
    "Train/Denoise": (TASKS[:3], "BSD400 + WED", 5144, "*"),
    "Train/Derain": (["derain"], "Rain100L", 200, "rainy/rain-N, gt/norain-N"),
    "Train/Dehaze": (["dehaze"], "RESIDE OTS", 72135, "synthetic/**/ID_A_B, original/ID"),
    "Train/Deblur": (["deblur"], "GoPro", 2103, "blur/NAME, sharp/NAME"),
    "Train/Enhance": (["lowlight"], "LOL", 485, "low/NAME, gt/NAME"),
}
TEST_SETS = {
    "test/denoise/BSD68": (TASKS[:3], "BSD68", 68, "*"),
    "test/denoise/Urban100": (TASKS[:3], "Urban100", 100, "*"),
    "test/denoise/Kodak24": (TASKS[:3], "Kodak24", 24, "*"),
    "test/derain/Rain100L": (["derain"], "Rain100L", 100, "input/NAME, target/NAME"),
    "test/dehaze/SOTS": (["dehaze"], "SOTS", 500, "input/ID_A_B, target/ID"),
    "test/deblur/GoPro": (["deblur"], "GoPro", 1111, "input/NAME, target/NAME"),
    "test/enhance/LOL": (["lowlight"], "LOL", 15, "input/NAME, target/NAME"),
    "RRSHID": (["dehaze"], "RRSHID, out of domain", None, "input/NAME, target/NAME"),
    "GT-Rain": (["derain"], "GT-Rain, out of domain", None, "input/NAME, target/NAME"),
    "SIDD": (TASKS[:3], "SIDD, out of domain", None, "input/NAME, target/NAME"),
    "ReLoBlur": (["deblur"], "ReLoBlur, out of domain", None, "input/NAME, target/NAME"),
    "LoLi-Street": (["lowlight"], "LoLi-Street, out of domain", None, "input/NAME, target/NAME"),
}
OVERLAP = "67 of BSD400's images are the backgrounds of 75 of Rain100L's test images: what is gained there is partly remembered"


def known_set(folder):
    """The key in TEST_SETS of a test set's folder, relative to the data root, or the folder itself."""

    def plain(path):
        return re.sub(r"[^a-z0-9]", "", os.path.basename(path).lower())

    if folder == "test/dehaze":  # AdaIR's users keep SOTS right there
        return "test/dehaze/SOTS"
    kind = os.path.dirname(folder) if folder.startswith("test/") else ""
    return next((known for known in TEST_SETS if os.path.dirname(known) == kind and plain(known) in plain(folder)), folder)


def inventory(root, tasks=None, crop=128, decode=True):
    """What a data folder holds, in lines of text, and why a training or an evaluation on it would fail: (lines, failures)."""
    lines, missing, problems, failures, there, broken = [], [], [], [], set(), set()  # broken: (gt, degraded) that cannot be decoded

    def take(folder, samples, found, known, min_side):
        _, title, stated, _ = known or ((), "out of domain", None, "")
        usable, more = check_headers(samples, min_side)
        decoded, undecodable = check_pixels(usable) if decode else (usable, [])
        found = found + more + undecodable
        broken.update({(s.gt, s.degraded) for s in usable} - {(s.gt, s.degraded) for s in decoded})
        problems.extend(found)
        lines.append(f"{folder:28} {len(samples):>7} {stated or '-':>7}  {title}" + (f"; {len(found)} problem(s)" if found else ""))
        return found

    def is_wanted(known):
        return not tasks or {*known[0]} & {*tasks}

    for folder, known in TRAIN_SETS.items():
        if is_wanted(known):
            samples, found = find_adair_train(root, known[0][:1])
            if samples or found:
                there.add(folder)
                take(folder, samples, found, known, crop)
            else:
                missing.append(f"{folder}/{known[3]}: {known[1]}, {known[2]}")
    for name, (folder, samples, found) in find_adair_test(root).items():
        if name.endswith((" σ=25", " σ=50")):  # the same images as σ = 15
            continue
        known = known_set(os.path.basename(os.path.abspath(root)) if folder == "." else folder)
        there.add(known)
        if is_wanted(TEST_SETS.get(known, [tasks])) and take(folder, samples, found, TEST_SETS.get(known), 8):
            failures.append(f"eval.py would fail on {folder}")
    missing += [f"{name}/{known[3]}: {known[1]}" + (f", {known[2]}" if known[2] else "") for name, known in TEST_SETS.items() if is_wanted(known) and name not in there]
    try:
        train, val, _ = list_training(root, tasks=tasks)
        train, val = check_headers(train, crop)[0], check_pixels(check_headers(val, 16)[0])[0]
        train = [s for s in train if (s.gt, s.degraded) not in broken]
        if not train or not val:
            raise DataError(f"no {'image to measure on' if train else f'training image of {crop} px'} is left")
        lines.append(f"\ntrain.py would train on {len(train)} samples and set {len(val)} aside (a clean image is three: σ 15, 25, 50)")
    except DataError as error:
        failures.append(f"train.py would fail: {error}")
    sections = [f"{'':28} {'found':>7} {'stated':>7}", *lines]
    sections += ["\nnot there:", *missing] if missing else []
    sections += [f"\n{len(problems)} problem(s):", *problems[:50], *(["…"] if len(problems) > 50 else [])] if problems else []
    if {"Train/Denoise", "Train/Derain"} <= there or "test/derain/Rain100L" in there:
        sections.append(f"\nnote: {OVERLAP}")
    return sections + [""] + failures, failures


def main(argv):
    import runs  # the program alone: to whoever imports this file, imports point one way

    p = runs.Parser(prog="data.py", description=__doc__, formatter_class=runs.HelpFormatter)
    p.add_argument("--data-root", required=True, help="folder in AdaIR's layout, as train.py and eval.py take it")
    p.add_argument("--tasks", choices=("denoise", *TASKS), nargs="+", help="look at these alone (default: all)")
    p.add_argument("--crop", type=runs.multiple_of_8, default=128, help="px that training images need a side")
    p.add_argument("--headers", action="store_true", help="do not decode every file: fast, but misses files that are cut off")
    args = p.parse_args(argv)
    if not os.path.isdir(args.data_root):
        p.error(f"there is no folder {args.data_root}")
    lines, failures = inventory(args.data_root, task_names(args.tasks), args.crop, not args.headers)
    print("\n".join(lines).rstrip())
    return int(bool(failures))


if __name__ == "__main__":
    import data  # this very file, as runs.py knows it

    sys.exit(data.main(sys.argv[1:]))
