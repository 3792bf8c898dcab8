"""The policy: six Beta heads that turn AdaIR's three frequency blocks into 12 random controls per
image (Appendix D).

At each AFLB a rate head draws (r_h, r_l), the size of the low-frequency mask, and a fuse head draws
(g_f, g_o), the weights of Eq. 5. The heads are the policy and the backbone is its environment:
states are detached and remembered with the actions, so log π can be evaluated for other heads (or
later ones) without running the backbone again.

A user of a policy knows five words of it: `fit`, `sample`, `mean`, `evaluate` and `kl`. That its
densities are Beta densities is said in this file alone.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

CONTROLS = ("r_h", "r_l", "g_f", "g_o")
GATE_MEAN = 0.5  # where the gates start: room to move both ways
USUAL = 14  # crops of each task that say what states are usual
CLIP = 3.0  # standard deviations beyond which a state is cut off
FLOOR = 1e-3  # added to a state's deviation, which is 0.003 to 0.03: few crops may be alike
EDGE = 1e-4  # actions stay in [EDGE, 1 - EDGE]: finite log-probabilities
RAW_MAX = 8.0  # raw head outputs stay below: α, β < 1 + e^8 ≈ 2982
GRID = 4  # a rate head sees the spectrum pooled to GRID × GRID
HIDDEN = 16


class PolicyError(ValueError):
    """A policy cannot be used; the text says why, in one sentence."""


# ---------------------------------------------------------------------------------- Beta densities


def log_beta(alpha, beta):
    """log B(α, β), elementwise."""
    return torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)


def beta_log_prob(a, alpha, beta):
    """log Beta(a; α, β), elementwise, the summand of Eq. 23. a in (0, 1), α, β > 0."""
    return (alpha - 1) * a.log() + (beta - 1) * (-a).log1p() - log_beta(alpha, beta)


def beta_entropy(alpha, beta):
    """Differential entropy of Beta(α, β) in nats, elementwise."""
    total = alpha + beta
    pulls = (alpha - 1) * torch.digamma(alpha) + (beta - 1) * torch.digamma(beta)
    return log_beta(alpha, beta) - pulls + (total - 2) * torch.digamma(total)


def beta_kl(alpha1, beta1, alpha2, beta2):
    """KL(Beta(α1, β1) ‖ Beta(α2, β2)) in nats, elementwise."""
    total1, total2 = alpha1 + beta1, alpha2 + beta2
    pulls = (alpha1 - alpha2) * torch.digamma(alpha1) + (beta1 - beta2) * torch.digamma(beta1)
    pulls = pulls + (total2 - total1) * torch.digamma(total1)
    return log_beta(alpha2, beta2) - log_beta(alpha1, beta1) + pulls


@torch.no_grad()
def sample_beta(alpha, beta, generator=None):
    """Draws from Beta(α, β) inside EDGE, without gradient: a pathwise term would spoil the
    score-function gradient."""
    gammas = torch._standard_gamma(torch.stack((alpha, beta)), generator=generator)
    return (gammas[0] / gammas.sum(dim=0)).clamp(EDGE, 1 - EDGE)


def soft_cap(raw):
    """raw for small values, approaching RAW_MAX from below for large ones, smoothly."""
    return RAW_MAX - F.softplus(RAW_MAX - raw)


# ----------------------------------------------------------------------------------------- policy


class Normalise(nn.Module):
    """States in standard deviations from their mean over the training set: raw ones differ so
    little between images that every image would get the same densities. Before `fit`, as they
    are."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))

    def fit(self, states):
        """Takes mean and deviation over states (N, …, size)."""
        states = states.flatten(0, -2)
        self.mean.copy_(states.mean(dim=0))
        self.deviation.copy_(states.std(dim=0, correction=0) + FLOOR)

    def forward(self, states):
        return (states - self.mean) / self.deviation


class BetaHead(nn.Module):
    """State (…, C, n, n) -> (α, β), each (…, 2), all > 1: one unimodal density for each of two
    controls."""

    def __init__(self, channels, grid, means, concentration):
        super().__init__()
        size = channels * grid * grid
        self.normalise = Normalise(size)
        self.embed = nn.Conv2d(size, HIDDEN, 1)
        self.out = nn.Conv2d(HIDDEN, 4, 1)
        alphas = [m * concentration for m in means]
        betas = [(1 - m) * concentration for m in means]
        if min(alphas + betas) <= 1 or max(alphas + betas) >= 1 + math.exp(RAW_MAX):
            what = f"means {means} and concentration {concentration:g}"
            raise PolicyError(f"a Beta of {what} is out of a head's reach")
        # α = 1 + exp(raw): an Adam step on raw is a relative step in α
        raw = (torch.tensor(alphas + betas) - 1).log()
        nn.init.zeros_(self.out.weight)
        self.out.bias.data = RAW_MAX - (RAW_MAX - raw).expm1().log()  # the inverse of soft_cap

    def forward(self, state):
        # 1×1 convolutions of 1×1 maps, as matrix products: a GPU's convolutions round to TF32
        seen = self.normalise(state.flatten(-3)).clamp(-CLIP, CLIP)
        hidden = F.gelu(F.linear(seen, self.embed.weight.flatten(1), self.embed.bias))
        raw = F.linear(hidden, self.out.weight.flatten(1), self.out.bias)
        return (1 + soft_cap(raw).exp()).chunk(2, dim=-1)


class BetaPolicy(nn.Module):
    """Six independent heads for a backbone whose AFLBs have `channels` (three numbers) and start at
    `rates`.

    concentration: α + β of the gates, and of the rates as far as their mean allows. Every control
    starts where the pre-trained model is: the rates' mean is what the backbone was trained with,
    and gates act divided by their initial mean, so their deterministic effect is a factor of 1.
    Raises PolicyError for a concentration that no head can give.
    """

    kind = "beta"

    def __init__(self, channels, rates, concentration=30.0):
        super().__init__()
        self.config = dict(channels=list(channels), rates=list(rates), concentration=concentration)
        narrowest = max(1.5 / min(r, 1 - r) for r in rates)  # α, β of 1.5 at least
        of_rates, gates = max(concentration, narrowest), (GATE_MEAN, GATE_MEAN)
        self.rate = nn.ModuleList(BetaHead(1, GRID, rates, of_rates) for _ in channels)
        self.fuse = nn.ModuleList(BetaHead(c, 1, gates, concentration) for c in channels)

    def heads(self, states):
        """Yields every head with its stored states (…, size)."""
        for rate, fuse, (rate_state, fuse_state) in zip(self.rate, self.fuse, states):
            yield rate, rate_state.flatten(-3)
            yield fuse, fuse_state.flatten(-3)

    def fit(self, states):
        """Learns from stored states (N, …) of the training set what is usual."""
        for head, state in self.heads(states):
            head.normalise.fit(state)

    def clipped(self, states):
        """The share of stored states that lie beyond CLIP deviations."""
        seen = [head.normalise(state).flatten() for head, state in self.heads(states)]
        return (torch.cat(seen).abs() > CLIP).float().mean().item()

    def sample(self, generators=(None,)):
        """A controller that draws its actions, from one generator for every image, so that they do
        not depend on the rest of the batch, or from one for all."""

        def act(level, alpha, beta):
            n = len(generators)
            parts = zip(alpha.chunk(n), beta.chunk(n), generators)
            return torch.cat([sample_beta(a, b, generator) for a, b, generator in parts])

        return Controller(self, act)

    def mean(self):
        """A controller that takes the mean of every density: the deterministic policy."""
        return Controller(self, lambda level, alpha, beta: alpha / (alpha + beta))

    def replay(self, actions):
        """A controller that repeats stored actions (B, 3, 4)."""
        return Controller(self, lambda level, alpha, beta: actions[:, level])

    def evaluate(self, states, actions):
        """What the heads say of stored states and actions (…, 3, 4): (log π(a|s) of Eq. 23 (…),
        entropy (…) in nats, {name: scalar} to log)."""
        alpha, beta = self.densities(states)
        log_prob = beta_log_prob(actions, alpha, beta).sum(dim=(-2, -1))
        entropy = beta_entropy(alpha, beta).sum(dim=(-2, -1))
        shown = {"mean": alpha / (alpha + beta), "concentration": alpha + beta}
        statistics = {
            f"policy/{level + 1}.{control}/{name}": value[..., level, k].detach().mean()
            for name, value in shown.items()
            for level in range(alpha.shape[-2])
            for k, control in enumerate(CONTROLS)
        }
        return log_prob, entropy, statistics

    def kl(self, reference, states):
        """KL(π ‖ reference) in nats on stored states, in closed form: (…)."""
        alpha, beta = self.densities(states)
        alpha_ref, beta_ref = reference.densities(states)
        return beta_kl(alpha, beta, alpha_ref, beta_ref).sum(dim=(-2, -1))

    def densities(self, states):
        """(α, β), each (…, 3, 4), of stored states (three pairs of rate and fuse state)."""
        levels = [self.densities_at(i, rate, fuse) for i, (rate, fuse) in enumerate(states)]
        alpha, beta = (torch.stack(of_levels, dim=-2) for of_levels in zip(*levels))
        return alpha, beta

    def densities_at(self, level, rate_state, fuse_state):
        """(α, β), each (…, 4) in the order of CONTROLS, of one AFLB. Always float32."""
        with torch.autocast(fuse_state.device.type, enabled=False):
            rate_alpha, rate_beta = self.rate[level](rate_state.float())
            fuse_alpha, fuse_beta = self.fuse[level](fuse_state.float())
        return torch.cat((rate_alpha, fuse_alpha), -1), torch.cat((rate_beta, fuse_beta), -1)

    def frozen_copy(self):
        """π_ref: the same heads, without gradient."""
        return copy.deepcopy(self).requires_grad_(False).eval()


def observe(f, y):
    """What the heads see of an AFLB's inputs f (B, C, H, W) and y (B n, C, H, W), n latents per
    image; detached, float32.

    Rate state: the centred magnitude spectrum of the image's features, log(1 + |F|), pooled to
    (B n, 1, GRID, GRID). It has few inputs because under Adam every input adds to how far a head
    moves in one step. The FFT is orthonormal, since under the norm "forward" of the masks |F| is so
    small that the logarithm would do nothing.

    Fuse state: the latent pooled to (B n, C, 1, 1) and compressed by sign·log(1 + |·|), whatever
    its scale.
    """
    f, y = f.detach().float(), y.detach().float()
    spectrum = torch.fft.fftshift(torch.fft.fft2(f, norm="ortho").abs(), dim=(-2, -1)).log1p()
    rate_state = F.adaptive_avg_pool2d(spectrum.mean(dim=1, keepdim=True), GRID)
    pooled = y.mean(dim=(2, 3), keepdim=True)
    fuse_state = pooled.sign() * pooled.abs().log1p()
    return rate_state.repeat_interleave(len(y) // len(f), dim=0), fuse_state


@torch.no_grad()
def states_on(model, policy, batches):
    """What the heads see of batches of images (B, 3, H, W), sides multiples of 8: three pairs of
    states (N, …) for all N images."""
    controller, weight, seen = policy.mean(), model.output.weight, []
    for batch in batches:
        model(batch.to(weight.device, weight.dtype), controller)
        seen.append(controller.states)
    return [tuple(map(torch.cat, zip(*level))) for level in zip(*seen)]


class Controller:
    """What `AdaIR.decode` asks for its controls. Remembers what it saw and did: states, three pairs
    (rate, fuse); actions, (B, 3, 4) in (0, 1)."""

    def __init__(self, policy, act):
        self.policy, self.act = policy, act
        self.states, self._actions = [], []

    @torch.no_grad()
    def __call__(self, level, f, y):
        """The controls (B, 4) of AFLB number `level`; gates are divided by their initial mean."""
        if level == 0:
            self.states, self._actions = [], []
        state = observe(f, y)
        action = self.act(level, *self.policy.densities_at(level, *state))
        self.states.append(state)
        self._actions.append(action)
        return torch.cat((action[:, :2], action[:, 2:] / GATE_MEAN), dim=1)

    @property
    def actions(self):
        return torch.stack(self._actions, dim=1)


# ------------------------------------------------------------------------------------- checkpoints


def policy_for(model, concentration=30.0):
    """A fresh policy for a backbone; with it, the deterministic output is what the backbone gives
    alone."""
    return BetaPolicy(model.channels, model.config["rates"], concentration)


def policy_state(policy):
    """What a checkpoint holds of a policy."""
    return dict(policy=policy.state_dict(), policy_config=dict(kind=policy.kind, **policy.config))


def load_policy(checkpoint):
    """The policy of a post-trained checkpoint (what `model.read_checkpoint` returns), or None of a
    pre-trained one. Raises PolicyError for one of another kind or version."""
    if not isinstance(checkpoint, dict) or "policy" not in checkpoint:
        return None
    try:
        config = dict(checkpoint["policy_config"])
        config.pop("normalised", None)  # always, since the first checkpoints
        kind = config.pop("kind")
        if kind != BetaPolicy.kind:
            raise PolicyError(f"the checkpoint holds a policy of kind {kind!r}, not 'beta'")
        policy = BetaPolicy(**config)
        policy.load_state_dict(checkpoint["policy"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise PolicyError(f"checkpoint with no policy of this version ({error!r:.200})") from None
    return policy.eval()
