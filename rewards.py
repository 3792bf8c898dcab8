"""The composite reward of Appendix B: R = 0.6 R_gen + 0.1 R_qwen + 0.3 R_task (Eq. 22), term by
term.

Images are (B, 3, H, W) RGB in [0, 1]; `y` is restored, `gt` the ground truth. Every reward returns
(B,) values in [0, 1]. A new term is one function and one row of TERMS, or a function in a file of
your own (`--rewards my_rewards.py:NAME=WEIGHT`).
"""

import hashlib
import importlib.util
import math
import sys
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from grpo import over_patches

EPS = 1e-6


class RewardError(ValueError):
    """A reward that was asked for cannot be computed; its text says why and what to do."""


# ------------------------------------------------------------------------------ means over an image


def image_mean(z, border=0):
    """Mean over an image of a map (B, H, W): (B,). PSNR, SSIM and the task rewards are functions of
    such means: that is how a patch can have its share of them (`Reward.in_patches`), by a `mean` of
    another kind, `PatchMeans`. border: px that the map lacks on every side."""
    return z.mean(dim=(1, 2))


class PatchMeans:
    """Stands in for `image_mean` and remembers the means over patches, as leaves of a graph: the
    derivative of a reward in them says what a patch contributes."""

    def __init__(self, patch):
        """patch: px a side."""
        self.patch, self.seen = patch, []

    def __call__(self, z, border=0):
        whole = F.pad(z, (border,) * 4)
        whole = whole * (whole.numel() / z.numel())  # the mean stays the same
        of_patches = over_patches(whole[:, None], self.patch)
        self.seen.append(of_patches.detach().requires_grad_())
        return self.seen[-1].mean(dim=(1, 2))


# ------------------------------------------------------------------- general reward, Appendix B.1


def r_psnr(y, gt, lo=10.0, hi=50.0, mean=image_mean):
    """clip((PSNR − lo)/(hi − lo)), thresholds in dB."""
    # 100 dB at most: at equality the logarithm has no gradient
    mse = mean((y - gt).square().mean(dim=1)).clamp(min=1e-10)
    psnr = -10 * mse.log10()
    return ((psnr - lo) / (hi - lo)).clamp(0, 1)


def ssim(y, gt):
    """SSIM of Wang et al. (2004), the mean over windows and RGB; (B,)."""
    return ssim_map(y, gt).mean(dim=(1, 2, 3))


def ssim_map(y, gt, sigma=1.5, radius=5):
    """SSIM of every Gaussian window of 2·radius + 1 px that is wholly inside the image:
    (B, 3, H − 2 radius, W − 2 radius)."""
    width = 2 * radius + 1
    if min(y.shape[-2:]) < width:
        raise ValueError(f"SSIM needs images of {width} px or more, not {tuple(y.shape[-2:])}")
    x = torch.arange(-radius, radius + 1, dtype=y.dtype, device=y.device)
    window = (-x.square() / (2 * sigma**2)).exp()
    window = window / window.sum()

    # A product with a matrix of one row per window: 20 ms for 8 crops of 128 px on one CPU core,
    # where two convolutions take 83 ms.
    def filters(n):  # (n - 2 radius, n)
        pixel = torch.arange(n, device=y.device)
        place = pixel - pixel[: n - 2 * radius, None]  # of every pixel in every window
        inside = (place >= 0) & (place < width)
        return torch.where(inside, window[place.clamp(0, width - 1)], 0)

    rows, columns = filters(y.shape[-2]), filters(y.shape[-1]).T
    m_y, m_gt, yy, gg, yg = (rows @ z @ columns for z in (y, gt, y * y, gt * gt, y * gt))
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * (yg - m_y * m_gt) + c2) / (yy - m_y**2 + gg - m_gt**2 + c2)
    luminance = (2 * m_y * m_gt + c1) / (m_y**2 + m_gt**2 + c1)
    return luminance * structure


def r_ssim(y, gt, mean=image_mean):
    """clip(SSIM)."""
    # four at a time stay in a processor's cache: 0.37 s instead of 0.89 for 256 crops of 128 px
    pairs = zip(y.split(4), gt.split(4))
    maps = torch.cat([ssim_map(few, truths).mean(dim=1) for few, truths in pairs])
    return mean(maps, border=(y.shape[-1] - maps.shape[-1]) // 2).clamp(0, 1)


def lpips_features(net, images):
    """Unit-normalised AlexNet features of an lpips.LPIPS, which itself wants images in [−1, 1]."""
    from lpips import normalize_tensor

    return [normalize_tensor(f) for f in net.net(net.scaling_layer(2 * images - 1))]


def r_lpips(net, features_y, features_gt):
    """1 − clip(LPIPS) from the features of both images."""
    layers = zip(net.lins, features_y, features_gt)
    return 1 - sum(lin((f - g).square()).mean(dim=(1, 2, 3)) for lin, f, g in layers).clamp(0, 1)


def clip_embedding(net, images):
    """L2-normalised CLIP embeddings (B, D): shorter side to CLIP's, bicubic, centre crop."""
    visual = net.visual
    size = max(visual.image_size)
    scale = size / min(images.shape[-2:])
    shape = [max(size, round(side * scale)) for side in images.shape[-2:]]
    how = dict(mode="bicubic", align_corners=False, antialias=True)
    images = F.interpolate(images, shape, **how).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    channels = zip(images.unbind(dim=1), visual.image_mean, visual.image_std)
    normalised = torch.stack([(c - mean) / std for c, mean, std in channels], dim=1)
    return F.normalize(net.encode_image(normalised), dim=-1)


def r_clip(embedding_y, embedding_gt):
    """clip(cosine) of two sets of normalised embeddings."""
    return (embedding_y * embedding_gt).sum(dim=-1).clamp(0, 1)


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor: linear layers on the normalised CLIP ViT-L/14 embedding; a score
    of about 1 to 10. Numbered as in its file, whose dropouts do nothing here."""

    def __init__(self):
        super().__init__()
        sizes = {"0": (768, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
        layers = {number: nn.Linear(*size) for number, size in sizes.items()}
        self.layers = nn.Sequential(OrderedDict(layers))

    def forward(self, embedding):
        return self.layers(embedding)[:, 0]


def r_aes(head, embedding_y):
    """clip(score/10)."""
    return (head(embedding_y) / 10).clamp(0, 1)


def r_lowpass(y, gt, block=8, mean=image_mean):
    """exp(−15 ℓ1) of both images' means over blocks of `block` px: LRPO's low-pass fidelity
    (arXiv 2509.23339), whose low-pass is a wavelet's."""
    distance = (F.avg_pool2d(y, block) - F.avg_pool2d(gt, block)).abs().mean(dim=1)
    spread = distance.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
    return (-15 * mean(spread)).exp()


def r_piqe(y, mean=image_mean):
    """1 − PIQE/100 (Venkatanath et al. 2015, by the package pypiqe): no reference, no gradient.

    PIQE is (D + 1)/(N + 1): N active blocks of 16 px, D their distortions, of a block 1 − v if an
    edge of it is flat, plus v if it is noise, v its variance (`piqe_variance`). Raises RewardError
    if the package is absent.
    """
    try:
        from pypiqe import piqe
    except ImportError as error:  # it brings OpenCV, which has needs of its own
        raise RewardError(
            f"the reward piqe needs the package pypiqe ({error}): pip install pypiqe, or leave it "
            "out; where libGL is missing, opencv-python-headless in the place of opencv-python"
        ) from None
    bgr = (255 * y.flip(1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    scores, *masks = zip(*(piqe(np.ascontiguousarray(image)) for image in bgr))
    if mean is image_mean:
        return 1 - torch.tensor(scores, device=y.device).float() / 100
    flat, noise, active = (torch.from_numpy(np.stack(mask)).to(y) for mask in masks)
    v = piqe_variance(y)
    blocks = y.shape[-2] * y.shape[-1] / 256
    distortion = blocks * mean(flat * (1 - v) + noise * v)
    return 1 - (distortion + 1) / (blocks * mean(active) + 1)


def piqe_variance(y):
    """Variance of every block of 16 px, its pixels normalised by their neighbourhood as in PIQE, at
    every pixel: (B, H, W). Blocks at the right and below are filled up by mirroring."""
    (height, width), gray = y.shape[-2:], (255 * luma(y)).round()
    gray = torch.cat((gray, gray.flip(1)[:, : -height % 16]), dim=1)
    gray = torch.cat((gray, gray.flip(2)[:, :, : -width % 16]), dim=2)
    gray = (255 * gray / gray.amax(dim=(1, 2), keepdim=True).clamp(min=1)).round()
    around = F.pad(torch.stack((gray, gray**2), dim=1), (6, 6, 6, 6), mode="replicate")
    mean, square = gaussian_blur(around, 7, 7 / 6)[..., 6:-6, 6:-6].unbind(dim=1)
    normal = (gray - mean) / ((square - mean**2).abs().sqrt() + 1)
    blocks = normal.unflatten(1, (-1, 16)).unflatten(3, (-1, 16))  # (B, h, 16, w, 16)
    variance = blocks.var(dim=(2, 4))
    everywhere = variance.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    return everywhere[:, :height, :width]


def r_qwen(score):
    """The judge's score of 1 to 5 as (score − 1)/4, Appendix B.2."""
    return (score - 1) / 4


# ------------------------------------------------------------------- task rewards, Appendix B.3


def luma(image):
    """Y = .299 R + .587 G + .114 B, (B, H, W)."""
    r, g, b = image.unbind(dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def sobel(z):
    """(Gx, Gy) of (B, H, W) with the plain 3×3 Sobel kernels, borders replicated."""
    z = F.pad(z[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    rows = z[:, :-2] + 2 * z[:, 1:-1] + z[:, 2:]  # 1 2 1
    columns = z[..., :-2] + 2 * z[..., 1:-1] + z[..., 2:]
    return rows[..., 2:] - rows[..., :-2], columns[:, 2:] - columns[:, :-2]  # -1 0 1


def magnitude(z):
    """M(Z) = √(Gx² + Gy² + 1e-12)."""
    gx, gy = sobel(z)
    return (gx**2 + gy**2 + 1e-12).sqrt()


def ratio_closeness(a, b):
    """clip(min(a/(b+ε), b/(a+ε))): 1 where two positive quantities agree."""
    return torch.minimum(a / (b + EPS), b / (a + EPS)).clamp(0, 1)


def r_grad(y, gt, mean=image_mean):
    """Denoising: 1 − mean|M_y − M_gt| / mean M_gt."""
    m_y, m_gt = magnitude(luma(y)), magnitude(luma(gt))
    baseline, deviation = mean(m_gt), mean((m_y - m_gt).abs())  # Eq. 12
    return (1 - deviation / (baseline + EPS)).clamp(0, 1)  # Eq. 13


def r_aniso(y, gt=None, mean=image_mean):
    """Deraining: 1 − |Ex − Ey|/(Ex + Ey). Knows no ground truth: an isotropic image gets 1."""
    ex, ey = (mean(g.abs()) for g in sobel(luma(y)))  # Eq. 14
    return 1 - ((ex - ey).abs() / (ex + ey).clamp(min=EPS)).clamp(0, 1)  # Eq. 15, 16


def r_contrast(y, gt, mean=image_mean):
    """Dehazing: closeness of the (population) standard deviations of Y. Eq. 17."""
    deviations = []
    for z in (luma(y), luma(gt)):
        centred = z - z.mean(dim=(1, 2), keepdim=True)
        # mean(centred) is 0; a flat image has no derivative at 0
        deviations.append(mean(centred.square()).clamp(min=1e-14).sqrt())
    return ratio_closeness(*deviations)


def r_sharp(y, gt, mean=image_mean):
    """Deblurring: closeness of the mean gradient magnitudes. Eq. 18."""
    return ratio_closeness(*(mean(magnitude(luma(z))) for z in (y, gt)))


def r_exposure(y, gt, mean=image_mean):
    """Low light: 1 − |mean Y_y − mean Y_gt|/0.5. Eq. 19."""
    return (1 - (mean(luma(y)) - mean(luma(gt))).abs() / 0.5).clamp(0, 1)


def r_color(y, gt, mean=image_mean):
    """Low light: 1 − Σ_c |mean c_y − mean c_gt|/0.6. Eq. 20."""
    off = sum((mean(a) - mean(b)).abs() for a, b in zip(y.unbind(dim=1), gt.unbind(dim=1)))
    return (1 - off / 0.6).clamp(0, 1)


def r_lowlight(y, gt, mean=image_mean):
    """Low light: reaches 0.3 at most, as published. Eq. 21."""
    return 0.2 * r_exposure(y, gt, mean) + 0.1 * r_color(y, gt, mean)


TASK_REWARDS = {
    "denoise15": r_grad,
    "denoise25": r_grad,
    "denoise50": r_grad,
    "derain": r_aniso,
    "dehaze": r_contrast,
    "deblur": r_sharp,
    "lowlight": r_lowlight,
}


def r_task(y, gt, task, mean=image_mean):
    """The task's own reward, Eq. 21; `task` is one of data.TASKS."""
    return TASK_REWARDS[task](y, gt, mean=mean)


# ---------------------------------------------------------------------------- networks behind terms


def weight_path(net, weights_dir=None):
    """Where the weights of a network are, or would be."""
    return Path(weights_dir or Path(torch.hub.get_dir()) / "checkpoints") / NETS[net].file


def weight_file(net, weights_dir=None):
    """Path of the weights of a network, downloaded once. Raises RewardError if they cannot be."""
    path = weight_path(net, weights_dir)
    if path.is_file():
        return path
    url = NETS[net].base + path.name.replace("+", "%2B")
    try:
        urllib.request.urlopen(url, timeout=5).close()  # the download itself would wait for minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        users = " and ".join(name for name, term in TERMS.items() if net in term.nets)
        raise RewardError(
            f"the reward {users} needs {path}, which cannot be fetched ({error}): put {url} there, "
            f"name its folder with --weights-dir, or leave {users} out of --rewards"
        ) from None
    return path


def load_clip(path, name="ViT-L-14-quickgelu"):
    """An open_clip model from a local file. OpenAI trained its weights with QuickGELU."""
    import open_clip

    return open_clip.create_model(name, pretrained=str(path)).eval().requires_grad_(False)


def load_lpips(trunk_path):
    """LPIPS-alex: linear layers from the package, convolutions from torchvision's file."""
    import lpips

    with warnings.catch_warnings():  # it calls torchvision in a way that is deprecated there
        warnings.simplefilter("ignore", UserWarning)
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = torch.load(trunk_path, map_location="cpu", weights_only=True)
    # lpips keeps torchvision's layer numbers: slice2.3.weight is features.3.weight
    names = {key: "features." + key.split(".", 1)[1] for key in net.net.state_dict()}
    net.net.load_state_dict({key: trunk[name] for key, name in names.items()})
    return net.eval().requires_grad_(False)


def load_aesthetic(path):
    head = AestheticHead()
    head.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return head.eval().requires_grad_(False)


class Net(NamedTuple):
    """A network whose weights no package brings along."""

    file: str
    base: str  # the address of the folder it lies in
    load: Callable


OPENAI = "https://huggingface.co/timm/vit_large_patch14_clip_224.openai/resolve/main/"
TORCH = "https://download.pytorch.org/models/"
LAION = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
NETS = {
    "clip": Net("open_clip_model.safetensors", OPENAI, load_clip),
    "lpips": Net("alexnet-owt-7be5be79.pth", TORCH, load_lpips),
    "aes": Net("sac+logos+ava1-l14-linearMSE.pth", LAION, load_aesthetic),
}


def load_net(name, path):
    """A network of NETS from its file. Raises RewardError for a file of something else."""
    try:
        return NETS[name].load(path)
    except Exception as error:
        raise RewardError(f"{path} does not hold the weights of {name} ({error!r:.99})") from None


# ------------------------------------------------------------------------------- the table of terms


class Scene:
    """What a term may look at: G rollouts of each of B images, their truths and tasks. What depends
    on the truth alone is computed once per image, and what several terms need once for all."""

    def __init__(self, restored, gt, tasks, nets, mean=image_mean):
        """restored: (B, G, 3, H, W), clamped here; gt: (B, 3, H, W); nets: {name: network}."""
        self.group, self.nets, self.tasks, self.mean = restored.shape[1], nets, tasks, mean
        self.y = restored.flatten(0, 1).float().clamp(0, 1)  # (B·G, 3, H, W), image by image
        self.truth = gt.float()
        self.gt = self.repeat(self.truth)  # (B·G, 3, H, W)

    def repeat(self, of_truth):
        """What is known of the truths, for every rollout of their groups: (B, …) -> (B·G, …)."""
        return of_truth.repeat_interleave(self.group, dim=0)

    @cached_property
    def embedding(self):
        return clip_embedding(self.nets["clip"], self.y)

    def clip(self):
        return r_clip(self.embedding, self.repeat(clip_embedding(self.nets["clip"], self.truth)))

    def lpips(self):
        net = self.nets["lpips"]
        of_truth = [self.repeat(f) for f in lpips_features(net, self.truth)]
        return r_lpips(net, lpips_features(net, self.y), of_truth)

    def task(self):
        groups = zip(self.y.split(self.group), self.gt.split(self.group), self.tasks)
        return torch.cat([r_task(y, gt, task, self.mean) for y, gt, task in groups])


class Term(NamedTuple):
    """One term of Eq. 22."""

    value: Callable | None  # Scene -> (B·G,) in [0, 1]
    part: str  # of PARTS: a new term belongs to "gen"
    weight: float  # inside its part: as published, or what a new term is worth; NaN: must be given
    nets: tuple = ()  # of NETS, that it needs
    side: int = 1  # px a side below which it cannot be computed
    plug: str = ""  # FILE:NAME of a function of the user's, or a package: tried before the run


# The published weights: those of the three parts (Eq. 22), and of the terms inside them (B.1).
PARTS = {"gen": 0.6, "qwen": 0.1, "task": 0.3}
TERMS = {
    "clip": Term(Scene.clip, "gen", 0.25, ("clip",)),
    "lpips": Term(Scene.lpips, "gen", 0.25, ("lpips",), side=32),
    "aes": Term(lambda s: r_aes(s.nets["aes"], s.embedding), "gen", 0.15, ("clip", "aes")),
    "psnr": Term(lambda s: r_psnr(s.y, s.gt, mean=s.mean), "gen", 0.20),
    "ssim": Term(lambda s: r_ssim(s.y, s.gt, mean=s.mean), "gen", 0.15, side=11),
    # of LRPO: low-pass fidelity, and a measure that knows no truth
    "lowpass": Term(lambda s: r_lowpass(s.y, s.gt, mean=s.mean), "gen", math.nan, side=8),
    "piqe": Term(lambda s: r_piqe(s.y, mean=s.mean), "gen", math.nan, side=16, plug="pypiqe"),
    "task": Term(Scene.task, "task", 1.0),
    "qwen": Term(None, "qwen", 1.0),  # the judge is asked by `Reward`
}
PAPER = ("clip", "lpips", "aes", "psnr", "ssim", "task", "qwen")
PRESETS = {"default": ("psnr", "ssim", "task"), "paper": PAPER}


def parse_terms(text, judge=False):
    """What `--rewards` says: {name: weight} for all of TERMS and PARTS; weight 0 is off.

    text: a preset ("default": what needs no download; "paper": everything) or a comma-separated
    list of terms, each with the published weight or its own: "psnr,ssim=0.3,task". "gen=W" sets the
    weight of R_gen as a whole. "FILE.py:NAME=W" adds the function NAME of a Python file to R_gen,
    and to TERMS. R_qwen goes with a judge: a preset has it if there is one, a list must name it
    then, and only then. Raises RewardError.
    """
    weights = dict.fromkeys(TERMS, 0.0) | dict.fromkeys(PARTS, 0.0) | {"gen": PARTS["gen"]}
    own = {}  # {name: source} of the user's
    for item in PRESETS.get(text, text.split(",")):
        cut = item.find("=", max(item.rfind(".py:"), 0))  # a path may hold one, too
        given, value = (item, "") if cut < 0 else (item[:cut], item[cut + 1 :])
        name = given.strip()
        if ".py:" in name:
            source, name = name, add_plug(name)
            if own.setdefault(name, source) != source:
                raise RewardError(f"--rewards has two functions {name}: rename one")
        if name not in TERMS and name not in PARTS:
            known = ", ".join([*TERMS, "gen=WEIGHT", "FILE.py:FUNCTION=WEIGHT"])
            raise RewardError(f"--rewards knows no term {name!r}; the terms are {known}")
        try:
            weights[name] = float(value or PARTS.get(name) or TERMS[name].weight)
        except ValueError:
            weights[name] = math.nan
        if not 0 <= weights[name] < math.inf:
            raise RewardError(
                f"--rewards {item}: give it a weight of 0 or more, as {given.strip()}=0.2"
            )
    if text in PRESETS:
        weights["qwen"] = PARTS["qwen"] if judge else 0.0
    if weights["qwen"] and not judge:
        raise RewardError("--rewards has qwen but there is no judge: name one with --judge")
    if judge and not weights["qwen"]:
        raise RewardError("there is a --judge, but --rewards leaves its term qwen out: name it")
    if not any(effective_weights(weights).values()):
        raise RewardError(f"--rewards {text!r} leaves no term with a weight above 0")
    return weights


# -------------------------------------------------------------------- terms in files of the user's


def add_plug(source):
    """Adds the function of "FILE.py:NAME" to TERMS, as a general term; returns NAME. The file is
    executed. Raises RewardError."""
    path, _, name = source.rpartition(":")
    plugs_of(source)  # that it is there
    if name in PARTS or (name in TERMS and ".py:" not in TERMS[name].plug):
        raise RewardError(f"--rewards {source}: there is a term {name} already, rename yours")
    spec = importlib.util.spec_from_file_location(f"plug_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"--rewards {source}: the file fails ({error!r:.200})") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"--rewards {source}: the file has no function {name}")

    def value(scene):
        try:
            values = function(scene.y, scene.gt)
        except Exception as error:
            raise RewardError(f"the reward {source} failed ({error!r:.200})") from None
        n = len(scene.y)
        shape = tuple(values.shape) if torch.is_tensor(values) else type(values).__name__
        if shape != (n,):
            raise RewardError(f"the reward {source} gave {shape} for {n} images: it must be ({n},)")
        if not ((values > -1e-3) & (values < 1 + 1e-3)).all():  # but for rounding
            raise RewardError(f"the reward {source} gave a value that is not in [0, 1]")
        return values.to(scene.y.device, torch.float32).clamp(0, 1)

    TERMS[name] = Term(value, "gen", math.nan, plug=source)
    return name


def plugs_of(text):
    """{file: hash} of the Python files that `--rewards` names. Raises RewardError."""
    hashes = {}
    for item in text.split(","):
        if ".py:" in item:
            path = item.rpartition(":")[0].strip()
            if not Path(path).is_file():
                raise RewardError(f"--rewards {item.strip()}: there is no file {path}")
            hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return hashes


# ----------------------------------------------------------------------------- the composite reward


def effective_weights(weights, without=None):
    """The weight of every term in R, summing to 1.

    Missing terms of R_gen leave their share to the rest of R_gen, a missing part to the other
    parts. without: a term to leave out, "qwen" for a group the judge could not score.
    """
    shares = dict.fromkeys(TERMS, 0.0)
    for part in PARTS:
        members = [t for t, term in TERMS.items() if term.part == part and t != without]
        total = sum(weights.get(t, 0.0) for t in members) or 1.0
        shares |= {t: weights[part] * weights.get(t, 0.0) / total for t in members}
    whole = sum(shares.values()) or 1.0
    return {t: share / whole for t, share in shares.items()}


def smallest_side(weights):
    """px a side that images need for the terms that are on."""
    return max(term.side if weights.get(name) else 1 for name, term in TERMS.items())


def describe_terms(weights, judge=None):
    """The table of terms a run prints and stores: one dict per term; judge: what to call it."""
    effective, paper = effective_weights(weights), effective_weights(parse_terms("paper", True))
    rows = []
    for name, term in TERMS.items():
        if effective[name]:
            state = ["on", judge if name == "qwen" else term.plug]
        else:
            needs = ["--judge"] if name == "qwen" else [NETS[net].file for net in term.nets]
            state = ["off", needs and f"needs {', '.join(needs)}"]
        row = dict(term=name, weight=round(effective[name], 4), paper=round(paper[name], 4))
        rows.append(row | dict(state="; ".join(filter(None, state))))
    return rows


class Reward:
    """The composite reward. Raises RewardError if a network that its terms need cannot be had."""

    def __init__(self, weights, device="cpu", weights_dir=None):
        """weights: as `parse_terms` gives them."""
        self.weights, self.device = weights, device
        # whether R_qwen is the only term
        self.is_judge_alone = not any(effective_weights(weights, without="qwen").values())
        on = [TERMS[name] for name, weight in effective_weights(weights).items() if weight]
        paths = {net: weight_file(net, weights_dir) for term in on for net in term.nets}
        self.nets = {net: load_net(net, path).to(device) for net, path in paths.items()}

    @torch.no_grad()
    def __call__(self, restored, degraded, gt, tasks, judge=None):
        """Rewards a group of rollouts, Eq. 22: (R (B, G), {term: (B, G)}).

        restored: (B, G, 3, H, W), clamped to [0, 1] here; degraded, gt: (B, 3, H, W); tasks: B
        names. judge: judge.Judge, asked first and waited for last; a group with a rollout that it
        could not score is rewarded without R_qwen, and is NaN where there is no other term.
        """
        pending = judge.ask(degraded, restored, gt) if judge else None
        terms = self.terms(Scene(restored, gt, tasks, self.nets), effective_weights(self.weights))
        terms = {name: value.view(restored.shape[:2]) for name, value in terms.items()}
        return self.judged(terms, judge, pending)

    def judged(self, terms, judge, pending):
        """(R, terms) of the terms {name: (B, G)}, R_qwen among them where there is a judge."""
        effective = effective_weights(self.weights)
        if not judge:
            return weighted_sum(terms, effective), terms
        terms["qwen"] = r_qwen(judge.result(pending))  # it worked while the others were computed
        judged = terms["qwen"].isfinite().all(dim=1, keepdim=True)
        whole = weighted_sum(terms, effective)
        if self.is_judge_alone:
            return torch.where(judged, whole, math.nan), terms
        unjudged = weighted_sum(terms, effective_weights(self.weights, without="qwen"))
        return torch.where(judged, whole, unjudged), terms

    def terms(self, scene, weights):
        """{term: (B·G,)} of a Scene, of the terms with a weight but R_qwen."""
        on = [name for name, weight in weights.items() if weight and name != "qwen"]
        return {name: TERMS[name].value(scene) for name in on}

    @torch.no_grad()
    def in_patches(self, restored, degraded, gt, tasks, judge, patch):
        """Like calling it, and what every patch of `patch` px a side contributes to R:
        (R (B, G), {term: (B, G)}, credit (B, G, H/patch, W/patch)).

        A term that is a function of means over the image, R_k = φ(mean of z), is to first order a
        sum over patches: φ′ · (mean of z in the patch) / patches, φ′ the mean over the group. Of
        the other terms every patch has the whole. patch 0: the image is one patch, with R itself.
        """
        if not patch:
            scores, terms = self(restored, degraded, gt, tasks, judge)
            return scores, terms, scores[:, :, None, None]
        pending = judge.ask(degraded, restored, gt) if judge else None
        names = [n for n, w in effective_weights(self.weights).items() if w and n != "qwen"]
        values, shares = {name: [] for name in names}, []
        for b, task in enumerate(tasks):
            of_image, scene = {}, Scene(restored[b : b + 1], gt[b : b + 1], [task], self.nets)
            for name in names:
                scene.mean = means = PatchMeans(patch)
                with torch.enable_grad():  # of what follows the means over patches
                    value = TERMS[name].value(scene)
                    slopes = means.seen and torch.autograd.grad(value.sum(), means.seen)
                values[name].append(value.detach())
                if slopes:
                    of_patches = zip(slopes, means.seen)
                    of_image[name] = sum(slope.mean(dim=0) * z.detach() for slope, z in of_patches)
            shares.append(of_image)
        terms = {name: torch.stack(of_images) for name, of_images in values.items()}
        scores, terms = self.judged(terms, judge, pending)
        whole = {name: value[:, :, None, None] for name, value in terms.items()}
        sides, credit = [side // patch for side in restored.shape[-2:]], []
        for b, of_image in enumerate(shares):
            failed = "qwen" in terms and not terms["qwen"][b].isfinite().all()
            weights = effective_weights(self.weights, without="qwen" if failed else None)
            parts = {name: of_image.get(name, value[b]) for name, value in whole.items()}
            total = weighted_sum(parts, weights) if any(weights.values()) else whole["qwen"][b]
            credit.append(total.expand(-1, *sides))
        return scores, terms, torch.stack(credit)

    def differentiable(self, restored, gt, tasks):
        """R of images (B, 3, H, W), (B,), with graph. Without R_qwen, which has no gradient: its
        weight goes to the other terms, to those of --rewards default where it is alone."""
        weights = parse_terms("default") if self.is_judge_alone else self.weights
        effective = effective_weights(weights, without="qwen")
        terms = self.terms(Scene(restored[:, None], gt, tasks, self.nets), effective)
        return weighted_sum(terms, effective)

    def try_plugs(self, gt, has_gradient):
        """Tries terms of users' files and of packages on one crop (3, H, W). has_gradient: whether
        they must have one. Raises RewardError for one that does not work."""
        y = torch.stack([gt, gt.flip(-1)]).to(self.device)[:, None].requires_grad_(has_gradient)
        scene = Scene(y, y.detach()[:, 0].flip(0), ["", ""], self.nets)
        for name, term in TERMS.items():
            if not (term.plug and self.weights.get(name)):
                continue
            if not term.value(scene).requires_grad and has_gradient:
                named = term.plug if ".py:" in term.plug else name
                raise RewardError(
                    f"the reward {named} has no gradient, which is needed here: leave it out of "
                    "--rewards"
                )

    @torch.no_grad()
    def of_image(self, restored, gt, task):
        """`differentiable` of one image (3, H, W), as a number."""
        images = (image[None].to(self.device) for image in (restored, gt))
        return self.differentiable(*images, [task]).item()


def weighted_sum(terms, weights):
    """Σ w·r over the terms of a weight above 0, Eq. 22."""
    return sum(weights[name] * value for name, value in terms.items() if weights[name])
