"""A diffusion restorer in a few Gaussian steps: the chain of ResShift (arXiv 2307.12348) in pixels,
a small U-Net behind it, and the policy by which lrpo.py trains it.

The chain goes from the degraded image y to the truth x_0. Its images are in [−1, 1]; what
`Chain.forward` takes and gives is in [0, 1], like those of every restorer.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from grpo import over_patches

# ------------------------------------------------------------------------------------- the network


LEVELS = 12  # of three channels mean, deviation, darkest and brightest block


def levels(y):
    """(N, 12) of images (N, 3, H, W) in [−1, 1], sides multiples of 8: of every channel mean,
    deviation, darkest and brightest block of 8 × 8 px. Haze raises them, and GroupNorm takes most
    of that out of what the convolutions see. Like GroupNorm they are of all that an image shows: a
    crop has others than the whole."""
    blocks = F.avg_pool2d(y, 8)
    of_pixels = y.mean(dim=(2, 3)), y.std(dim=(2, 3))
    return torch.cat((*of_pixels, blocks.amin(dim=(2, 3)), blocks.amax(dim=(2, 3))), dim=1)


class Block(nn.Module):
    """Two convolutions around a residual, told by a bias which step it is and what the levels of
    the image are."""

    def __init__(self, channels, out, steps):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.step = nn.Embedding(steps + 1, out)
        self.level = nn.Linear(LEVELS, out, bias=False)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        nn.init.zeros_(self.step.weight)
        nn.init.zeros_(self.level.weight)

    def forward(self, x, t, of_image):
        bias = self.step(t) + self.level(of_image)
        h = self.conv1(F.silu(self.norm1(x))) + bias[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """(x, y (N, 3, H, W), t (N,)) -> (N, 3, H, W), what y lacks of x_0. Works at half the size."""

    def __init__(self, width, steps):
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.input = nn.Conv2d(24, a, 3, padding=1)
        self.down = nn.ModuleList([Block(a, a, steps), Block(b, b, steps)])
        self.smaller = nn.ModuleList([nn.Conv2d(a, b, 2, 2), nn.Conv2d(b, c, 2, 2)])
        self.middle = nn.ModuleList([Block(c, c, steps), Block(c, c, steps)])
        self.larger = nn.ModuleList(
            [nn.ConvTranspose2d(b, a, 2, 2), nn.ConvTranspose2d(c, b, 2, 2)]
        )
        self.up = nn.ModuleList([Block(2 * a, a, steps), Block(2 * b, b, steps)])
        self.last = nn.Conv2d(a, 12, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x, y, t):
        h = self.input(F.pixel_unshuffle(torch.cat((x, y), dim=1), 2))
        of_image, skips = levels(y), []
        for block, smaller in zip(self.down, self.smaller):
            h = block(h, t, of_image)
            skips.append(h)
            h = smaller(h)
        for block in self.middle:
            h = block(h, t, of_image)
        for block, larger, skip in reversed([*zip(self.up, self.larger, skips)]):
            h = block(torch.cat((larger(h), skip), dim=1), t, of_image)
        return F.pixel_shuffle(self.last(F.silu(h)), 2)


# --------------------------------------------------------------------------------------- the chain


def schedule(steps, kappa, smallest, power):
    """[η_0 = 0, η_1, …, η_T] of ResShift, T = `steps` of 2 or more: √η rises from min(m/κ, m) to
    0.99, geometrically in ((t − 1)/(T − 1))^p."""
    first = min(smallest / kappa, smallest)
    rise = 0.99 / first
    return [0.0] + [(first * rise ** ((t / (steps - 1)) ** power)) ** 2 for t in range(steps)]


class Chain(nn.Module):
    """T Gaussian steps from a degraded image to its restoration, as a restorer.

    q(x_t | x_0, y) = N(x_0 + η_t (y − x_0), κ² η_t), and it starts at x_T = y + κ √η_T ε. The
    network predicts x_0 from x_t, scaled to about unit size, y and t; a step is
    π(x_{t−1} | x_t, y) = N((η_{t−1}/η_t) x_t + (α_t/η_t) x̂_0, κ² (η_{t−1}/η_t) α_t) with
    α_t = η_t − η_{t−1}. The last one returns x̂_0 without noise.
    """

    multiple = minimum = 8

    def __init__(self, width=32, steps=4, kappa=0.5, smallest=0.1, power=0.3):
        """width: channels at half the size; the rest as in `schedule`."""
        super().__init__()
        self.config = dict(width=width, steps=steps, kappa=kappa, smallest=smallest, power=power)
        self.steps, self.kappa = steps, kappa
        self.eta = schedule(steps, kappa, smallest, power)
        self.net = UNet(width, steps)

    def eta_at(self, t, y):
        """η_t for t (N,), to be multiplied with images like y: (N, 1, 1, 1)."""
        return torch.tensor(self.eta, device=y.device, dtype=y.dtype)[t][:, None, None, None]

    def marginal(self, x0, y, t):
        """Mean and deviation of q(x_t | x_0, y) for t (N,): (N, 3, H, W), (N, 1, 1, 1)."""
        eta = self.eta_at(t, y)
        return x0 + eta * (y - x0), self.kappa * eta.sqrt()

    def predict(self, x, y, t):
        """x̂_0 of x_t and y (N, 3, H, W) at t (N,)."""
        return y + self.net(x / (3 * self.kappa * self.eta_at(t, y).sqrt() + 1), y, t)

    def weights(self, t):
        """(η_{t−1}/η_t, α_t/η_t): how much of x_t and of x̂_0 is in the mean of step t."""
        kept = self.eta[t - 1] / self.eta[t]
        return kept, 1 - kept

    def sigma(self, t):
        """Deviation of step t; 0 of the last one, t = 1."""
        kept, new = self.weights(t)
        return self.kappa * math.sqrt(kept * new * self.eta[t])

    def walk(self, y, noise):
        """Yields (t, x_t, x_{t−1}) from x_T on, for y (N, 3, H, W) in [−1, 1]; noise(): what is
        drawn, of the shape of y, of deviation 1."""
        x = y + self.kappa * math.sqrt(self.eta[-1]) * noise()
        for t in range(self.steps, 0, -1):
            kept, new = self.weights(t)
            steps = torch.full((len(y),), t, device=y.device)
            after = kept * x + new * self.predict(x, y, steps)
            if t > 1:
                after = after + self.sigma(t) * noise()
            yield t, x, after
            x = after

    def forward(self, degraded, noise=None):
        """The restoration of images (N, 3, H, W) in [0, 1]: the chain without noise, or with what
        noise() draws."""
        y = 2 * degraded - 1
        *_, (_, _, x) = self.walk(y, noise or (lambda: torch.zeros_like(y)))
        return (x + 1) / 2


class Sampled(nn.Module):
    """A chain as a restorer that draws: with noise of this temperature (1: what it was trained
    with, 0: none), from a seed, the same for every image, and for every tile of one (where tiles
    overlap, the mean of two draws is less noisy)."""

    def __init__(self, chain, temperature=1.0, seed=0):
        super().__init__()
        self.chain, self.temperature, self.seed = chain, temperature, seed

    def forward(self, degraded):
        generator = torch.Generator(degraded.device).manual_seed(self.seed)

        def noise():
            draw = torch.randn(degraded.shape, generator=generator, device=degraded.device)
            return self.temperature * draw

        return self.chain(degraded, noise)


# -------------------------------------------------------------------------------------- the policy


@dataclass
class ChainPath:
    """What rollouts went through, on their way to the last step: all that log π needs. Images are
    in [−1, 1]."""

    degraded: torch.Tensor  # (B, 3, H, W), in [0, 1]
    before: torch.Tensor  # (B, G, S, 3, H, W), x_t of the steps t = T … 2
    after: torch.Tensor  # the same, x_{t−1}
    computed: dict = field(default_factory=dict)  # by the weights as they are now, with graph


class Steps:
    """The policy of LRPO: the steps of a `Chain` that have noise, S = T − 1 of them.

    The last step makes the output and has no density, so RL does not train it. But it shares its
    weights with the others; what holds it is the KL, or ℓ1.
    """

    def __init__(self, chain):
        self.times = list(range(chain.steps, 1, -1))
        self.sigmas = torch.tensor([chain.sigma(t) for t in self.times])  # (S,)
        self.new = torch.tensor([chain.weights(t)[1] for t in self.times])  # (S,), α_t/η_t
        scale = torch.cat((self.new / self.sigmas, 1 / self.sigmas[-1:]))  # the last step: by σ_2
        self.precision = scale.square() / 2  # (S + 1,), by which x̂_0 counts in log π and KL

    @torch.no_grad()
    def rollout(self, chain, degraded, group_size, generators, turn=0):
        """(restored (B, G, 3, H, W), ChainPath) of images (B, 3, H, W) in [0, 1]. turn: as of every
        policy; not needed."""
        y = (2 * degraded - 1).repeat_interleave(group_size, dim=0)

        def noise():
            shape = (group_size, *degraded.shape[1:])
            return torch.cat([torch.randn(shape, generator=g, device=g.device) for g in generators])

        steps = [(before, after) for _, before, after in chain.walk(y, noise)]
        before, after = (torch.stack(x[:-1], dim=1) for x in zip(*steps))  # (B·G, S, …)
        restored = (steps[-1][1] + 1) / 2
        before, after, restored = (
            x.unflatten(0, (-1, group_size)) for x in (before, after, restored)
        )
        return restored, ChainPath(degraded, before, after)

    def predict(self, chain, degraded, x, times):
        """x̂_0 of x_t (B, G, n, 3, H, W) at these n times; degraded: (B, 3, H, W) in [0, 1]."""
        y = (2 * degraded - 1)[:, None, None].expand(x.shape)
        t = torch.tensor(times, device=y.device).repeat(x.shape[0] * x.shape[1])
        flat = chain.predict(x.flatten(0, 2), y.flatten(0, 2), t)
        return flat.unflatten(0, x.shape[:3])

    def predicted(self, chain, path):
        """x̂_0 at all steps of all rollouts, (B, G, S, 3, H, W)."""
        if "x0" not in path.computed:
            path.computed["x0"] = self.predict(chain, path.degraded, path.before, self.times)
        return path.computed["x0"]

    def distances(self, x0, target, patch=0):
        """(target − mean of the step)²/2σ², the mean over pixels: (B, G, S, h, w) of patches, or
        (B, G, S, 1, 1), or with the last step of S + 1. x0: x̂_0 of the steps; target: another one,
        or x_0, in its place."""
        off = over_patches((target - x0).square(), patch)
        return self.precision.to(off)[: off.shape[2], None, None] * off

    def output(self, chain, path):
        """The restoration without noise, (B, 3, H, W)."""
        if "output" not in path.computed:
            path.computed["output"] = chain(path.degraded)
        return path.computed["output"]

    def log_prob(self, chain, path, patch=0):
        """log π(x_{t−1} | x_t, y), the mean over pixels, of patches or of the whole image:
        (B, G, S, h, w)."""
        kept = (1 - self.new).to(path.before)[:, None, None, None]
        # the x̂_0 under which x_{t−1} would be the mean
        target = (path.after - kept * path.before) / (1 - kept)
        distances = self.distances(self.predicted(chain, path), target, patch)
        return -distances - self.constant(path)

    def kl(self, chain, reference, path):
        """KL(π ‖ π_ref) of the visited steps, the mean over pixels, exact; and of the last one, as
        if it drew with the deviation of the one before it. Of one rollout a group, whichever they
        are a sample of the same: (B, 1, S + 1, 1, 1)."""
        x1 = path.after[:, :1, -1:]
        x = torch.cat((path.before[:, :1], x1), dim=2)
        with torch.no_grad():
            start = self.predict(reference, path.degraded, x, [*self.times, 1])
        last = self.predict(chain, path.degraded, x1, [1])
        x0 = torch.cat((self.predicted(chain, path)[:, :1], last), dim=2)
        return self.distances(x0, start)

    def log_likelihood(self, chain, path, gt):
        """ℓ, the mean log-density of the truth's own x_{t−1} ~ q(x_{t−1} | x_t, x_0 = gt, y), in
        expectation over it: (B, G, S, 1, 1). gt: (B, 3, H, W) in [0, 1]."""
        target = (2 * gt - 1)[:, None, None]
        return -self.distances(self.predicted(chain, path), target) - 0.5 - self.constant(path)

    def constant(self, path):
        """log σ + log √2π of every step, (S, 1, 1)."""
        constant = self.sigmas.log() + 0.5 * math.log(2 * math.pi)
        return constant.to(path.before)[:, None, None]

    def noise_level(self, path):
        """σ_t / mean σ over the steps, (S, 1, 1): what LRPO multiplies advantages by."""
        return (self.sigmas / self.sigmas.mean()).to(path.before)[:, None, None]
