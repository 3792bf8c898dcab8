"""The composite reward of Appendix B: R = 0.6 R_gen + 0.1 R_qwen + 0.3 R_task (Eq. 22), term by
term.

Images are (B, 3, H, W) RGB in [0, 1]; `y` is restored, `gt` the ground truth. Every reward returns
(B,) values in [0, 1]. A new term is one function and one row of TERMS.
"""

import math
import urllib.request
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import TASKS

EPS = 1e-6


class RewardError(ValueError):
    """A reward that was asked for cannot be computed; its text says why and what to do."""


# ------------------------------------------------------------------- general reward, Appendix B.1


def r_psnr(y, gt, lo=10.0, hi=50.0):
    """clip((PSNR − lo)/(hi − lo)), thresholds in dB."""
    psnr = -10 * (y - gt).square().mean(dim=(1, 2, 3)).log10()
    return ((psnr - lo) / (hi - lo)).clamp(0, 1)


def ssim(y, gt, sigma=1.5, radius=5):
    """SSIM of Wang et al. (2004): Gaussian windows of 2·radius + 1 px wholly inside the image, mean
    over RGB; (B,)."""
    width = 2 * radius + 1
    if min(y.shape[-2:]) < width:
        raise ValueError(f"SSIM needs images of {width} px or more, not {tuple(y.shape[-2:])}")
    x = torch.arange(-radius, radius + 1, dtype=y.dtype, device=y.device)
    window = (-x.square() / (2 * sigma**2)).exp()
    window = window / window.sum()

    # Filtering a side of n px is a product with a matrix of one row per window: ten times faster
    # than a convolution here.
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
    return (luminance * structure).mean(dim=(1, 2, 3))


def r_ssim(y, gt):
    """clip(SSIM)."""
    return ssim(y, gt).clamp(0, 1)


def lpips_features(net, images):
    """Unit-normalised AlexNet features of an lpips.LPIPS for images in [0, 1] (LPIPS itself wants
    [−1, 1])."""
    from lpips import normalize_tensor

    return [normalize_tensor(f) for f in net.net(net.scaling_layer(2 * images - 1))]


def r_lpips(net, features_y, features_gt):
    """1 − clip(LPIPS) from the features of both images; those of the truth may be computed once per
    group."""
    layers = zip(net.lins, features_y, features_gt)
    return 1 - sum(lin((f - g).square()).mean(dim=(1, 2, 3)) for lin, f, g in layers).clamp(0, 1)


def clip_embedding(net, images):
    """L2-normalised CLIP image embeddings (B, D): shorter side to CLIP's input size, bicubic,
    centre crop."""
    visual = net.visual
    size = max(visual.image_size) if isinstance(visual.image_size, tuple) else visual.image_size
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
    """LAION's aesthetic predictor: an MLP on the normalised CLIP ViT-L/14 embedding; a score of
    about 1 to 10."""

    def __init__(self):
        super().__init__()
        sizes = (768, 1024, 128, 64, 16, 1)
        linears = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        # The original has dropout after its first three layers, which shifts the numbers in its
        # file's keys.
        drop = [nn.Dropout(p) for p in (0.2, 0.2, 0.1)]
        self.layers = nn.Sequential(
            linears[0], drop[0], linears[1], drop[1], linears[2], drop[2], *linears[3:]
        )

    def forward(self, embedding):
        return self.layers(embedding)[:, 0]


def r_aes(head, embedding_y):
    """clip(score/10)."""
    return (head(embedding_y) / 10).clamp(0, 1)


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
    rows, columns = (
        z[:, :-2] + 2 * z[:, 1:-1] + z[:, 2:],
        z[..., :-2] + 2 * z[..., 1:-1] + z[..., 2:],
    )  # 1 2 1
    return rows[..., 2:] - rows[..., :-2], columns[:, 2:] - columns[:, :-2]  # -1 0 1


def magnitude(z):
    """M(Z) = √(Gx² + Gy² + 1e-12)."""
    gx, gy = sobel(z)
    return (gx**2 + gy**2 + 1e-12).sqrt()


def ratio_closeness(a, b):
    """clip(min(a/(b+ε), b/(a+ε))): 1 where two positive quantities agree."""
    return torch.minimum(a / (b + EPS), b / (a + EPS)).clamp(0, 1)


def r_grad(y, gt):
    """Denoising: 1 − mean|M_y − M_gt| / mean M_gt."""
    m_y, m_gt = magnitude(luma(y)), magnitude(luma(gt))
    baseline, deviation = m_gt.mean(dim=(1, 2)), (m_y - m_gt).abs().mean(dim=(1, 2))  # Eq. 12
    return (1 - deviation / (baseline + EPS)).clamp(0, 1)  # Eq. 13


def r_aniso(y):
    """Deraining: 1 − |Ex − Ey|/(Ex + Ey). Knows no ground truth: an isotropic image gets 1."""
    ex, ey = (g.abs().mean(dim=(1, 2)) for g in sobel(luma(y)))  # Eq. 14
    return 1 - ((ex - ey).abs() / (ex + ey).clamp(min=EPS)).clamp(0, 1)  # Eq. 15, 16


def r_contrast(y, gt):
    """Dehazing: closeness of the (population) standard deviations of Y. Eq. 17."""
    return ratio_closeness(*(luma(z).std(dim=(1, 2), correction=0) for z in (y, gt)))


def r_sharp(y, gt):
    """Deblurring: closeness of the mean gradient magnitudes. Eq. 18."""
    return ratio_closeness(*(magnitude(luma(z)).mean(dim=(1, 2)) for z in (y, gt)))


def r_exposure(y, gt):
    """Low light: 1 − |mean Y_y − mean Y_gt|/0.5. Eq. 19."""
    return (1 - (luma(y).mean(dim=(1, 2)) - luma(gt).mean(dim=(1, 2))).abs() / 0.5).clamp(0, 1)


def r_color(y, gt):
    """Low light: 1 − Σ_c |mean c_y − mean c_gt|/0.6. Eq. 20."""
    return (1 - (y.mean(dim=(2, 3)) - gt.mean(dim=(2, 3))).abs().sum(dim=1) / 0.6).clamp(0, 1)


def r_lowlight(y, gt):
    """Low light: reaches 0.3 at most, as published. Eq. 21."""
    return 0.2 * r_exposure(y, gt) + 0.1 * r_color(y, gt)


# What a task's row in data.TASKS may name as its reward.
TASK_REWARDS = {
    "grad": r_grad,
    "aniso": lambda y, gt: r_aniso(y),
    "contrast": r_contrast,
    "sharp": r_sharp,
    "lowlight": r_lowlight,
}


def r_task(y, gt, task):
    """The task's own reward, Eq. 21; `task` is one of data.TASKS."""
    return TASK_REWARDS[TASKS[task].reward](y, gt)


# ---------------------------------------------------------------------------- networks behind terms


def default_weights_dir():
    return Path(torch.hub.get_dir()) / "checkpoints"


def weight_path(net, weights_dir=None):
    """Where the weights of a network are, or would be."""
    return Path(weights_dir or default_weights_dir()) / NETS[net].file


def weight_file(net, weights_dir=None):
    """Path of the weights of a network, downloaded once. Raises RewardError, within seconds when
    there is no network."""
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
            f"the reward {users} needs {path}, which is not there and cannot be fetched ({error}): "
            f"put the file from {url} there, name its folder with --weights-dir, "
            f"or leave {users} out of --rewards"
        ) from None
    return path


def load_clip(path, name="ViT-L-14-quickgelu"):
    """An open_clip model from a local file. OpenAI's weights were trained with QuickGELU, hence the
    name."""
    import open_clip

    return open_clip.create_model(name, pretrained=str(path)).eval().requires_grad_(False)


def load_lpips(trunk_path):
    """LPIPS-alex: linear layers from the package, AlexNet's convolutions from torchvision's
    file."""
    import lpips

    with warnings.catch_warnings():  # it calls torchvision in a way that is deprecated there
        warnings.simplefilter("ignore", UserWarning)
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = torch.load(trunk_path, map_location="cpu", weights_only=True)
    # lpips keeps torchvision's layer numbers: slice2.3.weight is features.3.weight
    net.net.load_state_dict(
        {key: trunk["features." + key.split(".", 1)[1]] for key in net.net.state_dict()}
    )
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


NETS = {
    "clip": Net(
        "open_clip_model.safetensors",
        "https://huggingface.co/timm/vit_large_patch14_clip_224.openai/resolve/main/",
        load_clip,
    ),
    "lpips": Net("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/", load_lpips),
    "aes": Net(
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/",
        load_aesthetic,
    ),
}


def load_net(name, path):
    """A network of NETS from its file. Raises RewardError for a file of something else."""
    try:
        return NETS[name].load(path)
    except Exception as error:
        reason = f"{error!r:.200}"
        raise RewardError(f"{path} does not hold the weights of {name} ({reason})") from None


# ------------------------------------------------------------------------------- the table of terms


class Scene:
    """What a term may look at: G rollouts of each of B images, their truths, tasks and scores. What
    depends on the truth alone is computed once per image, and what several terms need once for all
    of them."""

    def __init__(self, restored, gt, tasks, nets, judge=None, pending=None):
        """restored: (B, G, 3, H, W), clamped here; gt: (B, 3, H, W); tasks: B names; nets: {name:
        network}; judge: judge.Judge, and what it was asked, pending."""
        self.group, self.nets, self.judge, self.pending = restored.shape[1], nets, judge, pending
        self.y = restored.flatten(0, 1).float().clamp(0, 1)  # (B·G, 3, H, W), image by image
        self.truth = gt.float()
        self.gt = self.repeat(self.truth)  # (B·G, 3, H, W)
        self.tasks = tasks

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
        return torch.cat([r_task(y, gt, task) for y, gt, task in groups])


class Term(NamedTuple):
    """One term of Eq. 22."""

    value: Callable  # Scene -> (B·G,) in [0, 1]
    part: str  # of PARTS: a new term belongs to "gen"
    weight: float  # inside its part: as published, or what a new term is worth
    nets: tuple = ()  # of NETS, that it needs
    side: int = 1  # px a side below which it cannot be computed


# The published weights: those of the three parts (Eq. 22), and of the terms inside them (B.1).
PARTS = {"gen": 0.6, "qwen": 0.1, "task": 0.3}
TERMS = {
    "clip": Term(Scene.clip, "gen", 0.25, ("clip",)),
    "lpips": Term(Scene.lpips, "gen", 0.25, ("lpips",), side=32),
    "aes": Term(lambda s: r_aes(s.nets["aes"], s.embedding), "gen", 0.15, ("clip", "aes")),
    "psnr": Term(lambda s: r_psnr(s.y, s.gt), "gen", 0.20),
    "ssim": Term(lambda s: r_ssim(s.y, s.gt), "gen", 0.15, side=11),
    "task": Term(Scene.task, "task", 1.0),
    # last: the judge is at work while the others are computed
    "qwen": Term(lambda s: r_qwen(s.judge.result(s.pending).flatten()), "qwen", 1.0),
}
PUBLISHED = {**{name: term.weight for name, term in TERMS.items()}, **PARTS}
PAPER = ("clip", "lpips", "aes", "psnr", "ssim", "task", "qwen")
PRESETS = {"default": ("psnr", "ssim", "task"), "paper": PAPER}


def parse_terms(text, judge=False):
    """What `--rewards` says: {name: weight} for all of TERMS and "gen"; weight 0 is off.

    text: a preset ("default": what needs no download; "paper": everything) or a comma-separated
    list of terms, each with the published weight or its own: "psnr,ssim=0.3,task". "gen=W" sets the
    weight of R_gen as a whole. R_qwen goes with a judge: a preset has it if there is one, a list
    must name it then, and only then. Raises RewardError.
    """
    chosen = {"gen": PARTS["gen"]}
    for item in PRESETS.get(text, text.split(",")):
        name, _, value = item.strip().partition("=")
        if name not in PUBLISHED:
            known = f"the terms are {', '.join(TERMS)} (and gen=WEIGHT)"
            raise RewardError(f"--rewards knows no term {name!r}; {known}")
        try:
            chosen[name] = float(value) if value else PUBLISHED[name]
        except ValueError:
            raise RewardError(f"--rewards {item!r}: the weight is not a number") from None
        if not (0 <= chosen[name] < math.inf):
            raise RewardError(f"--rewards {item!r}: a weight must be 0 or more, and finite")
    weights = {name: chosen.get(name, 0.0) for name in PUBLISHED}
    if text in PRESETS:
        weights["qwen"] = PARTS["qwen"] if judge else 0.0
    if weights["qwen"] and not judge:
        hint = "name one with --judge, or leave the term out"
        raise RewardError(f"--rewards asks for qwen, but there is no judge: {hint}")
    if judge and not weights["qwen"]:
        hint = "name it, or leave --judge out"
        raise RewardError(f"there is a --judge, but --rewards leaves its term qwen out: {hint}")
    if not any(effective_weights(weights).values()):
        raise RewardError(f"--rewards {text!r} leaves no term with a weight above 0")
    return weights


def effective_weights(weights, without=None):
    """The weight of every term in R, summing to 1.

    Missing terms of R_gen leave their share to the rest of R_gen, so that it stays a score in [0,
    1]; a missing part leaves its share to the other parts. without: a term to leave out, "qwen" for
    a group the judge could not score.
    """
    shares = dict.fromkeys(TERMS, 0.0)
    for part in PARTS:
        members = [t for t, term in TERMS.items() if term.part == part and t != without]
        total = sum(weights[t] for t in members) or 1.0
        shares |= {t: weights[part] * weights[t] / total for t in members}
    whole = sum(shares.values()) or 1.0
    return {t: share / whole for t, share in shares.items()}


def smallest_side(weights):
    """px a side that images need for the terms that are on."""
    return max(term.side if weights[name] else 1 for name, term in TERMS.items())


def describe_terms(weights, judge=None):
    """The table of terms a run prints and stores: one dict per term; judge: what to call it."""
    effective, paper = effective_weights(weights), effective_weights(parse_terms("paper", True))
    rows = []
    for name, term in TERMS.items():
        needs = ["--judge"] if name == "qwen" else [NETS[net].file for net in term.nets]
        off = f"off; needs {', '.join(needs)}" if needs else "off"
        on = f"on; {judge}" if name == "qwen" and judge else "on"
        state = on if effective[name] else off
        numbers = dict(weight=round(effective[name], 4), paper=round(paper[name], 4))
        rows.append(dict(term=name, **numbers, state=state))
    return rows


class Reward:
    """The composite reward with the networks its terms need. Raises RewardError if one of them
    cannot be had."""

    def __init__(self, weights, device="cpu", weights_dir=None):
        self.weights, self.device = weights, device
        on = [term for name, term in TERMS.items() if effective_weights(weights)[name]]
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
        scene = Scene(restored, gt, tasks, self.nets, judge, pending)
        effective = effective_weights(self.weights)
        terms = {}
        for name, term in TERMS.items():
            if effective[name]:
                terms[name] = term.value(scene).view(restored.shape[:2])
        whole = weighted_sum(terms, effective)
        if "qwen" not in terms:
            return whole, terms
        judged = terms["qwen"].isfinite().all(dim=1, keepdim=True)
        if self.is_judge_alone:
            return torch.where(judged, whole, math.nan), terms
        unjudged = weighted_sum(terms, effective_weights(self.weights, without="qwen"))
        return torch.where(judged, whole, unjudged), terms

    @property
    def is_judge_alone(self):
        """Whether R_qwen is the only term."""
        return not any(effective_weights(self.weights, without="qwen").values())

    def differentiable(self, restored, gt, tasks):
        """R of images (B, 3, H, W) of any size, (B,), with graph. Without R_qwen, which has no
        gradient and takes long: its weight goes to the other terms, to those of --rewards default
        where it is alone."""
        scene = Scene(restored[:, None], gt, tasks, self.nets)
        weights = parse_terms("default") if self.is_judge_alone else self.weights
        effective = effective_weights(weights, without="qwen")
        terms = {name: TERMS[name].value(scene) for name, weight in effective.items() if weight}
        return weighted_sum(terms, effective)

    @torch.no_grad()
    def of_image(self, restored, gt, task):
        """`differentiable` of one image (3, H, W), as a number."""
        images = (image[None].to(self.device) for image in (restored, gt))
        return self.differentiable(*images, [task]).item()


def weighted_sum(terms, weights):
    """Σ w·r over the terms of a weight above 0, Eq. 22."""
    return sum(weights[name] * value for name, value in terms.items() if weights[name])
