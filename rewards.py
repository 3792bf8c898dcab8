"""The composite reward of Appendix B: R = 0.6 R_gen + 0.1 R_qwen + 0.3 R_task (Eq. 22), term by term.

Images are (B, 3, H, W) RGB in [0, 1]; `y` is restored, `gt` the ground truth. Every reward returns (B,) values in [0, 1].
"""

import itertools
import math
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

EPS = 1e-6
# Weights inside R_gen (B.1) and of the three parts of R (Eq. 22).
GENERAL = {"clip": 0.25, "lpips": 0.25, "aes": 0.15, "psnr": 0.20, "ssim": 0.15}
PARTS = {"gen": 0.6, "qwen": 0.1, "task": 0.3}
TERMS = (*GENERAL, "qwen", "task")
PRESETS = {"default": ("psnr", "ssim", "task"), "paper": TERMS}

# Weights no package brings along: file name, address, which term wants it.
DOWNLOADS = {
    "clip": ("open_clip_model.safetensors", "https://huggingface.co/timm/vit_large_patch14_clip_224.openai/resolve/main/"),
    "lpips": ("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/"),
    "aes": (
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/",
    ),
}


# px a side below which a term cannot be computed: SSIM's window, the poolings of LPIPS' AlexNet.
SMALLEST_SIDE = {"ssim": 11, "lpips": 32}


class RewardError(ValueError):
    """A reward that was asked for cannot be computed; its text says why and what to do."""


# --------------------------------------------------------------------------------- general reward, Appendix B.1


def r_psnr(y, gt, lo=10.0, hi=50.0):
    """clip((PSNR − lo)/(hi − lo)), thresholds in dB."""
    psnr = -10 * (y - gt).square().mean(dim=(1, 2, 3)).log10()
    return ((psnr - lo) / (hi - lo)).clamp(0, 1)


def ssim(y, gt, sigma=1.5, radius=5):
    """SSIM of Wang et al. (2004): Gaussian windows of 2·radius + 1 px wholly inside the image, mean over RGB; (B,)."""
    if min(y.shape[-2:]) <= 2 * radius:
        raise ValueError(f"SSIM needs images of {2 * radius + 1} px or more, not {tuple(y.shape[-2:])}")
    x = torch.arange(-radius, radius + 1, dtype=y.dtype, device=y.device)
    window = (-x.square() / (2 * sigma**2)).exp()
    window = window / window.sum()

    # Filtering a side of n px is a product with a matrix of one row per window: ten times faster than a convolution here.
    def filters(n):  # (n - 2 radius, n)
        shift = torch.arange(n, device=y.device) - torch.arange(n - 2 * radius, device=y.device)[:, None]
        return torch.where((shift >= 0) & (shift <= 2 * radius), window[shift.clamp(0, 2 * radius)], 0)

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
    """Unit-normalised AlexNet features of an lpips.LPIPS for images in [0, 1] (LPIPS itself wants [−1, 1])."""
    from lpips import normalize_tensor

    return [normalize_tensor(f) for f in net.net(net.scaling_layer(2 * images - 1))]


def r_lpips(net, features_y, features_gt):
    """1 − clip(LPIPS) from the features of both images; those of the truth may be computed once per group."""
    layers = zip(net.lins, features_y, features_gt)
    return 1 - sum(lin((f - g).square()).mean(dim=(1, 2, 3)) for lin, f, g in layers).clamp(0, 1)


def clip_embedding(net, images):
    """L2-normalised CLIP image embeddings (B, D): shorter side to CLIP's input size, bicubic, centre crop."""
    visual = net.visual
    size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
    scale = size / min(images.shape[-2:])
    shape = [max(size, round(side * scale)) for side in images.shape[-2:]]
    images = F.interpolate(images, shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    channels = zip(images.unbind(dim=1), visual.image_mean, visual.image_std)
    return F.normalize(net.encode_image(torch.stack([(c - mean) / std for c, mean, std in channels], dim=1)), dim=-1)


def r_clip(embedding_y, embedding_gt):
    """clip(cosine) of two sets of normalised embeddings."""
    return (embedding_y * embedding_gt).sum(dim=-1).clamp(0, 1)


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor: an MLP on the normalised CLIP ViT-L/14 embedding; a score of about 1 to 10."""

    def __init__(self):
        super().__init__()
        sizes = (768, 1024, 128, 64, 16, 1)
        linears = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        # The original has dropout after its first three layers, which shifts the numbers in its file's keys.
        drop = [nn.Dropout(p) for p in (0.2, 0.2, 0.1)]
        self.layers = nn.Sequential(linears[0], drop[0], linears[1], drop[1], linears[2], drop[2], *linears[3:])

    def forward(self, embedding):
        return self.layers(embedding)[:, 0]


def r_aes(head, embedding_y):
    """clip(score/10)."""
    return (head(embedding_y) / 10).clamp(0, 1)


def r_qwen(score):
    """The judge's score of 1 to 5 as (score − 1)/4, Appendix B.2."""
    return (score - 1) / 4


# ------------------------------------------------------------------------------------ task rewards, Appendix B.3


def luma(image):
    """Y = .299 R + .587 G + .114 B, (B, H, W)."""
    r, g, b = image.unbind(dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def sobel(z):
    """(Gx, Gy) of (B, H, W) with the plain 3×3 Sobel kernels, borders replicated."""
    z = F.pad(z[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    rows, columns = z[:, :-2] + 2 * z[:, 1:-1] + z[:, 2:], z[..., :-2] + 2 * z[..., 1:-1] + z[..., 2:]  # 1 2 1
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


def r_task(y, gt, task):
    """The task's own reward, Eq. 21; `task` is one of data.TASKS. Low light reaches 0.3 at most, as published."""
    if task.startswith("denoise"):
        return r_grad(y, gt)
    if task == "lowlight":
        return 0.2 * r_exposure(y, gt) + 0.1 * r_color(y, gt)
    by_task = {"derain": lambda: r_aniso(y), "dehaze": lambda: r_contrast(y, gt), "deblur": lambda: r_sharp(y, gt)}
    if task not in by_task:
        raise ValueError(f"there is no task reward for {task!r}")
    return by_task[task]()


# ------------------------------------------------------------------------------------------- which terms are on


def parse_terms(text, judge=False):
    """What `--rewards` says: {term: weight} for all of TERMS and "gen"; weight 0 is off.

    text: a preset ("default": what needs no download; "paper": everything) or a comma-separated list of terms, each
    with the published weight or its own: "psnr,ssim=0.3,task". "gen=W" sets the weight of R_gen as a whole. R_qwen goes
    with a judge: a preset has it if there is one, a list must name it then, and only then. Raises RewardError.
    """
    published = {**GENERAL, **PARTS}
    chosen = {"gen": PARTS["gen"]}
    for item in PRESETS.get(text, text.split(",")):
        name, _, value = item.strip().partition("=")
        if name not in published:
            raise RewardError(f"--rewards knows no term {name!r}; the terms are {', '.join(TERMS)} (and gen=WEIGHT)")
        try:
            chosen[name] = float(value) if value else published[name]
        except ValueError:
            raise RewardError(f"--rewards {item!r}: the weight is not a number") from None
        if not (0 <= chosen[name] < math.inf):
            raise RewardError(f"--rewards {item!r}: a weight must be 0 or more")
    weights = {name: chosen.get(name, 0.0) for name in published}
    if text in PRESETS:
        weights["qwen"] = PARTS["qwen"] if judge else 0.0
    if weights["qwen"] and not judge:
        raise RewardError("--rewards asks for qwen, but there is no judge: name one with --judge, or leave the term out")
    if weights["qwen"] and not any(effective_weights(weights, qwen=False).values()):
        raise RewardError("--rewards with qwen alone: a group that the judge cannot score would have no reward, so name another term")
    if judge and not weights["qwen"]:
        raise RewardError("there is a --judge, but --rewards leaves its term qwen out: name it, or leave --judge out")
    if not any(effective_weights(weights).values()):
        raise RewardError(f"--rewards {text!r} leaves no term with a weight above 0")
    return weights


def effective_weights(weights, qwen=True):
    """The weight of every term in R, summing to 1. Missing terms of R_gen leave their share to the rest of R_gen, so
    that it stays a score in [0, 1]; a missing part leaves its share to the other parts. `qwen` False: a group the judge
    could not score."""
    general = sum(weights[t] for t in GENERAL)
    parts = {
        "gen": weights["gen"] if general else 0.0,
        "qwen": weights["qwen"] if qwen else 0.0,
        "task": weights["task"],
    }
    total = sum(parts.values()) or 1.0
    result = {t: parts["gen"] * weights[t] / general / total if general else 0.0 for t in GENERAL}
    return {**result, "qwen": parts["qwen"] / total, "task": parts["task"] / total}


def smallest_side(weights):
    """px a side that images need for the terms that are on."""
    return max(side if weights[term] else 1 for term, side in SMALLEST_SIDE.items())


def describe_terms(weights, judge=None):
    """The table of terms a run prints and stores: one dict per term; judge: what to call it."""
    effective = effective_weights(weights)
    paper = effective_weights({**GENERAL, **PARTS})
    rows = []
    for term in TERMS:
        off = "needs --judge" if term == "qwen" else "not asked for"
        if term in DOWNLOADS:
            off += f"; needs {DOWNLOADS[term][0]}"
        on = f"on ({judge})" if term == "qwen" and judge else "on"
        reason = on if effective[term] else f"off ({off})"
        rows.append(dict(term=term, weight=round(effective[term], 4), paper=round(paper[term], 4), state=reason))
    return rows


# --------------------------------------------------------------------------------------- networks behind terms


def default_weights_dir():
    return Path(torch.hub.get_dir()) / "checkpoints"


def weight_path(term, weights_dir=None):
    """Where the weights a term needs are, or would be."""
    return Path(weights_dir or default_weights_dir()) / DOWNLOADS[term][0]


def weight_file(term, weights_dir=None):
    """Path of the weights a term needs, downloaded once. Raises RewardError, within seconds when there is no network."""
    name, base = DOWNLOADS[term]
    path = weight_path(term, weights_dir)
    if path.is_file():
        return path
    url = base + name.replace("+", "%2B")
    try:
        urllib.request.urlopen(url, timeout=5).close()  # the download itself would wait for minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise RewardError(
            f"the reward term {term} needs {path}, which is not there and cannot be fetched ({error}): "
            f"put the file from {url} there, name its folder with --weights-dir, or leave {term} out of --rewards"
        ) from None
    return path


def load_clip(path, name="ViT-L-14-quickgelu"):
    """An open_clip model from a local file. OpenAI's weights were trained with QuickGELU, hence the name."""
    import open_clip

    return open_clip.create_model(name, pretrained=str(path)).eval().requires_grad_(False)


def load_lpips(trunk_path):
    """LPIPS-alex: linear layers from the package, AlexNet's convolutions from torchvision's file."""
    import lpips

    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = torch.load(trunk_path, map_location="cpu", weights_only=True)
    # lpips keeps torchvision's layer numbers: slice2.3.weight is features.3.weight
    net.net.load_state_dict({key: trunk["features." + key.split(".", 1)[1]] for key in net.net.state_dict()})
    return net.eval().requires_grad_(False)


def load_aesthetic(path):
    head = AestheticHead()
    head.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return head.eval().requires_grad_(False)


def load_net(term, path):
    """The network behind a term, from its file. Raises RewardError for a file of something else."""
    try:
        return {"clip": load_clip, "lpips": load_lpips, "aes": load_aesthetic}[term](path)
    except Exception as error:
        raise RewardError(f"{path} does not hold the weights of {term} ({str(error).splitlines()[0]})") from None


class Reward:
    """The composite reward with the networks its terms need. Raises RewardError if one of them cannot be had."""

    def __init__(self, weights, device="cpu", weights_dir=None):
        self.weights = weights
        self.nets = {}
        wanted = {t for t in DOWNLOADS if effective_weights(weights)[t]}
        wanted |= {"clip"} if "aes" in wanted else set()  # the aesthetic head reads CLIP's embedding
        paths = {term: weight_file(term, weights_dir) for term in sorted(wanted)}
        for term, path in paths.items():
            self.nets[term] = load_net(term, path).to(device)

    @torch.no_grad()
    def __call__(self, y, gt, tasks, score=None):
        """y: restored group (B·G, 3, H, W), image by image; gt: (B, 3, H, W); tasks: B names; score: function that waits
        for the judge's (B, G), NaN where it gave none, and is called when all else is computed: a group with a NaN is
        rewarded without R_qwen. Returns (R (B, G), {term: (B, G)}). y is clamped to [0, 1]."""
        b = len(gt)
        g = len(y) // b
        y, gt = y.float().clamp(0, 1), gt.float()

        def repeat(t):  # what is known of the truth, for every rollout of its group
            return t.repeat_interleave(g, dim=0)

        on = {t for t, w in effective_weights(self.weights).items() if w}
        terms, gts = {}, repeat(gt)
        if on & {"clip", "aes"}:
            embedding = clip_embedding(self.nets["clip"], y)
        if "clip" in on:
            terms["clip"] = r_clip(embedding, repeat(clip_embedding(self.nets["clip"], gt)))
        if "aes" in on:
            terms["aes"] = r_aes(self.nets["aes"], embedding)
        if "lpips" in on:
            net = self.nets["lpips"]
            terms["lpips"] = r_lpips(net, lpips_features(net, y), [repeat(f) for f in lpips_features(net, gt)])
        if "psnr" in on:
            terms["psnr"] = r_psnr(y, gts)
        if "ssim" in on:
            terms["ssim"] = r_ssim(y, gts)
        if "task" in on:
            runs = [(task, g * len(list(images))) for task, images in itertools.groupby(tasks)]  # neighbours of one task
            parts = zip(runs, *(t.split([n for _, n in runs]) for t in (y, gts)))
            terms["task"] = torch.cat([r_task(y_run, gt_run, task) for (task, _), y_run, gt_run in parts])
        terms = {name: value.reshape(b, g) for name, value in terms.items()}
        if "qwen" not in on:
            return self._sum(terms, effective_weights(self.weights)), terms
        score = score()
        terms["qwen"] = r_qwen(score)
        judged = score.isfinite().all(dim=1, keepdim=True)
        with_judge = self._sum(terms, effective_weights(self.weights))
        without = self._sum(terms, effective_weights(self.weights, qwen=False))
        return torch.where(judged, with_judge, without), terms

    def _sum(self, terms, weights):
        return sum(weights[name] * value for name, value in terms.items() if weights[name])  # Eq. 22
