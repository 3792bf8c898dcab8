"""AdaIR (Cui et al., ICLR 2025), the restorer that IRPO post-trains: four encoder levels, four
decoder levels of Restormer blocks, and three adaptive frequency learning blocks (AFLB) in the
decoder.

Two things are added to the published network and change nothing until they are used: a *controls
port*, through which someone else decides an AFLB's four controls (r_h, r_l, g_f, g_o), and a second
*mask rule*, under which the rates r_h, r_l act at every image size.

Parameter names are those of the official checkpoints, so those load as they are (`load_adair`).
"""

import hashlib
import itertools
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from diffusion import Chain

# The rates of a model whose masks were empty while it was trained, as every official one's at crops
# of 128. 0.01 rounds to an empty mask on images under 200 px. A Beta of that mean opens a mask in a
# few percent of rollouts only.
EMPTY_RATE = 0.01

Conv = partial(nn.Conv2d, bias=False)

# ------------------------------------------------------------------------------------- the network


class Encoding(NamedTuple):
    """What the encoder made of an image, no action involved: one serves all rollouts of a group."""

    x: torch.Tensor  # the degraded image (B, 3, H, W)
    skip1: torch.Tensor  # (B, dim, H, W)
    skip2: torch.Tensor  # (B, 2 dim, H/2, W/2)
    skip3: torch.Tensor  # (B, 4 dim, H/4, W/4)
    latent: torch.Tensor  # (B, 8 dim, H/8, W/8)

    def detach(self):
        return Encoding(*(t.detach() for t in self))


class AdaIR(nn.Module):
    """The network. Defaults are the paper's Table 6 (28,784,824 parameters).

    mask_rule: "adair" or "fraction", see `AFLB`; rates: the constants (r_h, r_l) that a model under
    "fraction" uses when nobody controls it.
    """

    multiple, minimum = 8, 8  # of an image's sides, in px

    def __init__(
        self,
        dim=48,
        num_blocks=(4, 6, 6, 8),
        num_refinement_blocks=4,
        heads=(1, 2, 4, 8),
        ffn_expansion=2.66,
        mask_rule="adair",
        rates=(EMPTY_RATE, EMPTY_RATE),
    ):
        super().__init__()
        if mask_rule not in ("adair", "fraction"):
            raise ValueError(f'mask_rule is {mask_rule!r}; it must be "adair" or "fraction"')
        self.config = dict(dim=dim, num_blocks=list(num_blocks), heads=list(heads))
        self.config |= dict(num_refinement_blocks=num_refinement_blocks)
        self.config |= dict(ffn_expansion=ffn_expansion, mask_rule=mask_rule, rates=list(rates))

        def blocks(n, width, heads):
            return nn.Sequential(*(TransformerBlock(width, heads, ffn_expansion) for _ in range(n)))

        n1, n2, n3, n4 = num_blocks
        h1, h2, h3, h4 = heads
        self.patch_embed = nn.Sequential(OrderedDict(proj=Conv(3, dim, 3, padding=1)))
        self.encoder_level1 = blocks(n1, dim, h1)
        self.down1_2 = Resample(dim, dim // 2, nn.PixelUnshuffle)
        self.encoder_level2 = blocks(n2, 2 * dim, h2)
        self.down2_3 = Resample(2 * dim, dim, nn.PixelUnshuffle)
        self.encoder_level3 = blocks(n3, 4 * dim, h3)
        self.down3_4 = Resample(4 * dim, 2 * dim, nn.PixelUnshuffle)
        self.latent = blocks(n4, 8 * dim, h4)

        self.fre1, self.fre2, self.fre3 = AFLB(8 * dim), AFLB(4 * dim), AFLB(2 * dim)
        self.up4_3 = Resample(8 * dim, 16 * dim, nn.PixelShuffle)
        self.reduce_chan_level3 = Conv(8 * dim, 4 * dim, 1)
        self.decoder_level3 = blocks(n3, 4 * dim, h3)
        self.up3_2 = Resample(4 * dim, 8 * dim, nn.PixelShuffle)
        self.reduce_chan_level2 = Conv(4 * dim, 2 * dim, 1)
        self.decoder_level2 = blocks(n2, 2 * dim, h2)
        self.up2_1 = Resample(2 * dim, 4 * dim, nn.PixelShuffle)
        self.decoder_level1 = blocks(n1, 2 * dim, h1)
        self.refinement = blocks(num_refinement_blocks, 2 * dim, h1)
        self.output = Conv(2 * dim, 3, 3, padding=1)

    @property
    def channels(self):
        """Channels of the latent at each of the three AFLBs, in decoding order."""
        return [width * self.config["dim"] for width in (8, 4, 2)]

    def encode(self, x):
        """The `Encoding` of x (B, 3, H, W) in [0, 1], H and W multiples of 8."""
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(f"AdaIR takes (B, 3, 8 h, 8 w), not {tuple(x.shape)}; see restore()")
        x = x.contiguous(memory_format=torch.channels_last)  # so are all maps from here on
        skip1 = self.encoder_level1(self.patch_embed(x))
        skip2 = self.encoder_level2(self.down1_2(skip1))
        skip3 = self.encoder_level3(self.down2_3(skip2))
        latent = self.latent(self.down3_4(skip3))
        return Encoding(x, skip1, skip2, skip3, latent)

    def decode(self, encoding, controller=None, copies=1):
        """The restored images (B n, 3, H, W), not clamped: every image n = `copies` times in a row,
        its features f and their spectrum computed once.

        controller(level, f, y), asked at AFLB number `level` (0, 1, 2) with the images' features f
        (B, C, H, W) and the latents y (B n, C, H, W), returns (B n, 4): r_h, r_l, g_f, g_o. Without
        a controller: the original's gates of 1, and rates by the mask rule.
        """
        x, *maps = encoding
        if copies > 1:
            maps = [t.repeat_interleave(copies, dim=0) for t in maps]
            maps = [t.contiguous(memory_format=torch.channels_last) for t in maps]
        skip1, skip2, skip3, latent = maps

        def aflb(level, block, y):
            control = partial(controller, level) if controller else None
            return block(x, y, self.config["mask_rule"], self.config["rates"], control)

        y = self.up4_3(aflb(0, self.fre1, latent))
        y = self.decoder_level3(self.reduce_chan_level3(torch.cat((y, skip3), dim=1)))
        y = self.up3_2(aflb(1, self.fre2, y))
        y = self.decoder_level2(self.reduce_chan_level2(torch.cat((y, skip2), dim=1)))
        y = self.up2_1(aflb(2, self.fre3, y))
        y = self.decoder_level1(torch.cat((y, skip1), dim=1))
        return self.output(self.refinement(y)) + x.repeat_interleave(copies, dim=0)

    def forward(self, x, controller=None):
        """The restored images (B, 3, H, W) of x (B, 3, H, W): `encode`, then `decode`."""
        return self.decode(self.encode(x), controller)


class Resample(nn.Module):
    """3×3 convolution and pixel (un)shuffle: half the size at twice the channels, or back."""

    def __init__(self, dim, conv_out, shuffle):
        super().__init__()
        self.body = nn.Sequential(Conv(dim, conv_out, 3, padding=1), shuffle(2))

    def forward(self, x):
        # on a GPU, shuffles return another layout
        return self.body(x).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------- the AFLB


class AFLB(nn.Module):
    """Adaptive frequency learning block: splits features of the input image into two bands at a
    mask, lets each attend to the latent, and adds what they say to it.

    `mask_rule` tells how a rate r in (0, 1) becomes the mask's half-size on a map of side H:
      "adair"     int((H // 128) · r): the original; 0, an empty mask, on every map under 128 px.
      "fraction"  round(r · H / 2): a share of the spectrum, at every size.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv1 = Conv(3, dim, 3, padding=1)
        self.channel_cross_l, self.channel_cross_h = CrossAttention(dim), CrossAttention(dim)
        self.channel_cross_agg = CrossAttention(dim)
        self.frequency_refine = FrequencyRefine(dim)
        self.rate_conv = nn.Sequential(Conv(dim, dim // 8, 1), nn.GELU(), Conv(dim // 8, 2, 1))
        self.para1 = nn.Parameter(torch.zeros(dim, 1, 1))
        self.para2 = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x, y, mask_rule, rates, control=None):
        """The latents y' (B n, C, H, W) of an input image x (B, 3, ·, ·) and latents y (B n, C, H,
        W), n of every image in a row.

        rates: (r_h, r_l) of a model without controller, under "fraction".
        control(f, y) -> (B n, 4) with r_h, r_l, g_f, g_o.
        """
        h, w = y.shape[-2:]
        f = self.conv1(F.interpolate(x, (h, w), mode="bilinear", align_corners=False))
        if control is None:
            rate = self.own_rates(f, len(y) // len(x), mask_rule, rates).float()
            g_f = g_o = 1.0
        else:
            controls = control(f, y)
            rate = controls[:, :2].float()
            g_f, g_o = controls[:, 2:, None, None, None].unbind(1)  # (B n, 1, 1, 1) each
        half_height = self.half_size(rate[:, 0], h, mask_rule)
        half_width = self.half_size(rate[:, 1], w, mask_rule)
        low, high = split_bands(f, band_mask(half_height, half_width, h, w))
        # The published names are crossed (…_l serves the high band), and so are the weights.
        high, low = self.channel_cross_l(high, y), self.channel_cross_h(low, y)
        o = self.channel_cross_agg(y, self.frequency_refine(low, high))
        return g_f * (self.para2 * y) + g_o * (self.para1 * o)  # Eq. 5

    def own_rates(self, f, n, mask_rule, rates):
        """(B n, 2): the rates r_h, r_l where nobody controls them, the same for n latents each."""
        if mask_rule != "adair":
            return torch.tensor(rates, device=f.device).expand(len(f) * n, 2)
        with torch.autocast(f.device.type, enabled=False):  # half a precision could be a mask's row
            pooled = f.to(self.para1.dtype).mean(dim=(2, 3), keepdim=True)
            return self.rate_conv(pooled).flatten(1).sigmoid().repeat_interleave(n, dim=0)

    def half_size(self, rate, side, mask_rule):
        """The mask's half-size, an integer, on a side of so many px."""
        if mask_rule == "adair":
            return (side // 128 * rate).int()
        # + 1e-4: 0.25 and 0.24999999 agree where r · H / 2 is a tie
        return (rate * side / 2 + 1e-4).round().int()


def band_mask(half_height, half_width, height, width):
    """The low-frequency mask of a (height, width) spectrum as `torch.fft.fft2` lays it out.

    half_height, half_width: (B,) integers a, b. Returns (B, 1, height, width) booleans, true on the
    rows -a ... a-1 and the columns -b ... b-1 around the zero frequency: what a centred spectrum
    holds in H//2 ± a, W//2 ± b.
    """

    def inside(half, n):
        k = torch.fft.fftfreq(n, 1 / n, device=half.device).round()  # signed frequency numbers
        return (k >= -half[:, None]) & (k < half[:, None])  # (B, n)

    rows, columns = inside(half_height, height), inside(half_width, width)
    return rows[:, None, :, None] & columns[:, None, None, :]


def split_bands(f, mask):
    """|low| and |high| frequencies of f (B, C, H, W), each (B n, C, H, W): n masks (B n, 1, H, W)
    for every image. The bands add up to f before the absolute value is taken, which saves the
    second inverse FFT."""
    f = f.to(torch.promote_types(f.dtype, torch.float32))  # no half-precision FFT for most sizes
    f, mask = f[:, None], mask.unflatten(0, (len(f), -1))  # (B, 1, C, H, W), (B, n, 1, H, W)
    low = torch.fft.ifft2(torch.fft.fft2(f, norm="forward") * mask, norm="forward")
    low, high = low.abs().flatten(0, 1), (f - low).abs().flatten(0, 1)
    last = torch.channels_last
    return low.contiguous(memory_format=last), high.contiguous(memory_format=last)


class FrequencyRefine(nn.Module):
    """FMoM: each band gated by what the other holds."""

    def __init__(self, dim):
        super().__init__()
        self.SpatialGate = nn.Sequential(OrderedDict(spatial=Conv(2, 1, 7, padding=3)))
        mlp = nn.Sequential(Conv(dim, dim // 16, 1), nn.ReLU(), Conv(dim // 16, dim, 1))
        self.ChannelGate = nn.Sequential(OrderedDict(mlp=mlp))
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, low, high):
        mean, peak = low.mean(dim=(2, 3), keepdim=True), low.amax(dim=(2, 3), keepdim=True)
        of_channels = (self.ChannelGate(mean) + self.ChannelGate(peak)).sigmoid()  # (B, C, 1, 1)
        pooled = torch.stack((high.amax(dim=1), high.mean(dim=1)), dim=1)  # (B, 2, H, W)
        of_places = self.SpatialGate(pooled).sigmoid()  # (B, 1, H, W)
        return self.proj(high * of_channels + low * of_places)


# ------------------------------------------------------------------------------- Restormer's blocks


class TransformerBlock(nn.Module):
    def __init__(self, dim, heads, ffn_expansion):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn, self.ffn = Attention(dim, heads), FeedForward(dim, ffn_expansion)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class LayerNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W): biased variance, eps 1e-5."""

    def __init__(self, dim):
        super().__init__()
        self.body = nn.LayerNorm(dim)

    def forward(self, x):
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """MDTA, Restormer's self-attention over channels."""

    def __init__(self, dim, heads):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = Conv(dim, 3 * dim, 1)
        self.qkv_dwconv = Conv(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.project_out = Conv(dim, dim, 1)

    def forward(self, x):
        q, k, v = pointwise_depthwise(x, self.qkv, self.qkv_dwconv, parts=3)
        return channel_attention(q, k, v, self.temperature, self.project_out)


class CrossAttention(nn.Module):
    """The same with the query from one map and key and value from another."""

    def __init__(self, dim, heads=4):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q = Conv(dim, dim, 1)
        self.q_dwconv = Conv(dim, dim, 3, padding=1, groups=dim)
        self.kv = Conv(dim, 2 * dim, 1)
        self.kv_dwconv = Conv(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.project_out = Conv(dim, dim, 1)

    def forward(self, x, y):
        q = self.q_dwconv(self.q(x))
        k, v = pointwise_depthwise(y, self.kv, self.kv_dwconv, parts=2)
        return channel_attention(q, k, v, self.temperature, self.project_out)


class FeedForward(nn.Module):
    """GDFN, Restormer's gated feed-forward."""

    def __init__(self, dim, ffn_expansion):
        super().__init__()
        hidden = int(dim * ffn_expansion)
        self.project_in = Conv(dim, 2 * hidden, 1)
        self.dwconv = Conv(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project_out = Conv(hidden, dim, 1)

    def forward(self, x):
        gate, value = pointwise_depthwise(x, self.project_in, self.dwconv, parts=2)
        return self.project_out(F.gelu(gate) * value)


# ------------------------------------------------------------------------------- what makes it fast
# The figures are how many times as long the demo model takes with the plain form: forward and
# backward of two crops of 128 px | forward of 384×256 px, on one CPU core with AVX-512.


def pointwise_depthwise(x, pointwise, depthwise, parts):
    """depthwise(pointwise(x)).chunk(parts, dim=1), a 1×1 convolution and a 3×3 one.

    On a CPU every part is convolved by itself (1.17 | 1.17): parts of one channels-last tensor are
    strided, and what reads them next, or joins their gradients, is slower for it.
    """
    if x.is_cuda:
        return depthwise(pointwise(x)).chunk(parts, dim=1)
    weights = zip(pointwise.weight.chunk(parts), depthwise.weight.chunk(parts))
    return [F.conv2d(F.conv2d(x, w1), w3, padding=1, groups=len(w3)) for w1, w3 in weights]


def channel_attention(q, k, v, temperature, project_out):
    """Attention between channels, and the 1×1 convolution P after it:

        P · softmax(τ · q̂ k̂ᵀ) · v        q̂ = q/|q|, k̂ = k/|k|, normalised over space

    q, k, v: (B, C, H, W), C split into temperature.shape[0] heads, each with its own τ.
    """
    b, c, h, w = v.shape
    heads = len(temperature)
    q, k = (t.reshape(b, heads, -1, h * w) for t in (q, k))

    # Norms divide the small scores, not the maps: q̂·k̂ = q·k/(|q||k|). (1.09 | 1.21)
    q_norm, k_norm = (t.square().sum(dim=-1, keepdim=True).clamp(min=1e-24).sqrt() for t in (q, k))
    cosines = q @ k.mT / (q_norm * k_norm.mT)
    attention = (cosines * temperature).softmax(dim=-1)  # (B, heads, C/heads, C/heads)

    # The attention A meets the projection before it meets v: P (A v) = (P A) v. (1.05 | 1.06)
    projection = project_out.weight.reshape(c, heads, -1)
    combined = torch.einsum("onc,bncd->bond", projection, attention).flatten(2)  # (B, C, C)
    y = v.permute(0, 2, 3, 1).flatten(1, 2) @ combined.mT  # (B, H·W, C)
    return y.unflatten(1, (h, w)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------- images of any size


@torch.no_grad()
def restore(model, image, tile=None, controller=None, overlap=32, progress=False):
    """Restores an image of any size, from 8 px a side up.

    image: (3, H, W) or (B, 3, H, W) in [0, 1], on any device; the result lies beside it, has its
    shape and is not clamped. controller: as for `AdaIR.decode`, `policy.mean()` for a post-trained
    model. tile: px, a multiple of 8, of tiles that are faded into each other over `overlap` px,
    which bounds the memory; attention, FFT and controls, of a chain levels and norms, then know a
    tile only, and that changes the numbers. Raises ValueError for a shape or tile it cannot take.
    """
    batch = image if image.dim() == 4 else image[None]
    if batch.dim() != 4 or batch.shape[1] != 3 or min(batch.shape[-2:]) < 8:
        raise ValueError(f"restore() takes (B, 3, H, W) from 8 px a side, not {tuple(image.shape)}")
    multiple, minimum = getattr(model, "multiple", 8), getattr(model, "minimum", 8)
    unit = max(8, multiple)
    if tile is not None and (tile % unit or tile <= 2 * overlap):
        raise ValueError(f"a tile is a multiple of {unit} px above {2 * overlap}, not {tile} px")
    h, w = batch.shape[-2:]
    weight = next(model.parameters())
    right, below = (max(-side % multiple, minimum - side) for side in (w, h))
    if right >= w or below >= h:
        raise ValueError(f"an image of {w}×{h} px is too small for this model")
    padded = F.pad(batch.to(weight.device, weight.dtype), (0, right, 0, below), mode="reflect")
    run = partial(model, controller=controller) if controller else model
    if tile is None or max(h, w) <= tile:
        result = run(padded)
    else:
        result = _restore_tiles(run, padded, tile, overlap, progress)
    return result[..., :h, :w].reshape(image.shape).to(image.device)


def _restore_tiles(run, padded, tile, overlap, progress):
    def starts(side):
        last = max(side - tile, 0)
        return [min(i, last) for i in range(0, max(side - overlap, 1), tile - overlap)]

    def window(n):  # rises and falls over the overlap; never 0, so that every pixel has weight
        ramp = (torch.arange(n, device=padded.device) + 1.0) / (overlap + 1)
        return torch.minimum(ramp, ramp.flip(0)).clamp(max=1)

    total, weight = torch.zeros_like(padded), torch.zeros_like(padded[:1, :1])
    corners = list(itertools.product(*map(starts, padded.shape[-2:])))
    for top, left in tqdm(corners, desc="tiles", unit="tile", disable=not progress, leave=False):
        here = (..., slice(top, top + tile), slice(left, left + tile))
        patch = padded[here]
        fade = window(patch.shape[-2])[:, None] * window(patch.shape[-1])
        total[here] += fade * run(patch)
        weight[here] += fade
    return total / weight


# -------------------------------------------------------------------------------------- checkpoints

# The original has these in every AFLB and never uses them: accepted when loading, not kept.
UNUSED = re.compile(r"fre[123]\.(conv\.weight|score_gen\.weight|score_gen\.bias)")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the text says which and why, in one sentence."""


def read_checkpoint(path):
    """The object a checkpoint file holds: tensors and plain values only, nothing in it is executed.
    Raises CheckpointError for a file that is missing, is no checkpoint or holds code."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = type(error).__name__  # torch's own text advises to load the file unguarded
        raise CheckpointError(f"{path} holds no tensors that can be read ({kind})") from None


def load_adair(path, checkpoint=None):
    """The AdaIR stored at `path`, in eval mode and float32: an official checkpoint (Lightning with
    `net.` keys, a bare state dict, .safetensors) or one of ours, which says its mask rule and
    rates. An official one is the original (`mask_rule` "adair"). checkpoint: what
    `read_checkpoint(path)` gave, where it is read already.

    Raises CheckpointError, naming any tensor that is missing, unknown or of the wrong shape.
    """
    stored = read_checkpoint(path) if checkpoint is None else checkpoint
    try:
        state = stored.get("model", stored.get("state_dict", stored))  # ours, Lightning's, bare
        state = {key.removeprefix("net."): value for key, value in state.items()}
        model = AdaIR(**{**adair_config(state), **stored.get("config", {})})
        model.load_state_dict({k: v for k, v in state.items() if not UNUSED.fullmatch(k)})
    except Exception as error:  # another network's tensors, or another version's configuration
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.600}"
        raise CheckpointError(f"{path} is not an AdaIR ({reason})") from None
    return model.float().eval()


def load_pretrained(path, wanted_rule):
    """The AdaIR to start from, under the mask rule it was trained with. Raises CheckpointError for
    one that is post-trained, and for one trained under "fraction" when the original's is wanted."""
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, dict) and "policy" in checkpoint:
        raise CheckpointError(
            f"{path} is post-trained, its policy would be lost: start from another"
        )
    model = load_adair(path, checkpoint=checkpoint)
    if model.config["mask_rule"] == "fraction" != wanted_rule:
        raise CheckpointError(f"{path}: --mask-rule {wanted_rule} would change what it computes")
    return model


def adair_config(state):
    """Reads AdaIR's configuration off the names and shapes of an official state dict."""
    dim = len(state["patch_embed.proj.weight"])

    def count(name):  # of the blocks name.0, name.1, …
        return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})

    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    hidden = [state[f"{name}.0.ffn.project_out.weight"].shape[1] for name in levels]

    def gives_hidden(expansion):
        return hidden == [int((dim << i) * expansion) for i in range(4)]

    return dict(
        dim=dim,
        num_blocks=[count(name) for name in levels],
        num_refinement_blocks=count("refinement"),
        heads=[len(state[f"{name}.0.attn.temperature"]) for name in levels],
        ffn_expansion=next(filter(gives_hidden, (n / 100 for n in range(100, 1000)))),
    )


def load_restorer(path):
    """The restorer at `path`, in eval mode and float32: a module (B, 3, H, W) -> (B, 3, H, W) of
    images in [0, 1] whose sides are a multiple of its `multiple` and at least its `minimum`. An
    AdaIR, a diffusion.Chain, or any architecture that spandrel tells from its weights.

    Nothing in the file is executed: it is read as tensors and plain values alone. Raises
    CheckpointError for one that is unknown or is no restorer of RGB images.
    """
    import spandrel  # late: it knows some forty architectures

    stored = read_checkpoint(path)
    if isinstance(stored, dict) and "policy" in stored:
        raise CheckpointError(f"{path} holds a policy, which would be lost: start from another")
    try:
        state = stored.get("model", stored.get("state_dict", stored))  # ours, Lightning's, others'
        is_adair = any(key.endswith("fre1.para1") for key in state)
        is_chain = "kappa" in stored.get("config", {})
        loader = spandrel.ModelLoader("cpu")
        found = (
            is_adair
            or is_chain
            or loader.load_from_state_dict(spandrel.canonicalize_state_dict(state))
        )
    except Exception as error:  # an architecture that it does not know, or no weights at all
        raise CheckpointError(
            f"{path} is no restorer that spandrel knows ({error!r:.200})"
        ) from None
    if is_adair:
        return load_adair(path, checkpoint=stored)
    if is_chain:
        return load_chain(path, stored)
    name, sizes = found.architecture.name, found.size_requirements
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.scale != 1:
        raise CheckpointError(f"{path} is a {name} of scale {found.scale}, not an image restorer")
    net = found.model.float().eval()
    net.multiple = max(sizes.multiple_of, 1)
    net.minimum = -(-max(sizes.minimum, 8) // net.multiple) * net.multiple
    side = max(net.minimum, 4 * net.multiple, 32)
    x = torch.rand(2, 3, side, side + (0 if sizes.square else net.multiple))
    try:  # the descriptor's own call clamps and has no gradient: the network must do without it
        same = torch.allclose(
            net(x).clamp(0, 1), torch.cat([found(i) for i in x.split(1)]), atol=1e-4
        )
    except Exception:  # not of RGB images, or not of batches
        same = False
    if not same or sizes.square:
        raise CheckpointError(f"{path} is a {name}, which is no plain network of RGB images")
    return net


def load_chain(path, stored):
    """The diffusion.Chain of a checkpoint of ours. Raises CheckpointError."""
    try:
        chain = Chain(**stored["config"])
        chain.load_state_dict(stored["model"])
    except Exception as error:
        raise CheckpointError(f"{path} holds no chain of this version ({error!r:.200})") from None
    return chain.float().eval()


def model_state(model):
    """What a checkpoint holds of a model: its weights, and of one of ours its configuration."""
    config = dict(config=model.config) if isinstance(model, (AdaIR, Chain)) else {}
    return dict(model=model.state_dict(), **config)


def model_digest(model):
    """Hash of what a model computes: its configuration, its tensors' names and values."""
    digest = hashlib.sha256(repr(sorted(getattr(model, "config", {}).items())).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
