"""Group relative policy optimisation: Eq. 6 and 8–11, the supervised side of the objective, Eq. 1,
2 and 7, and the group of rollouts that both learn from.

Everything about a group is (B, G, …): B images with G rollouts each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------- the group


class Group(NamedTuple):
    """G rollouts of each of B images, without graph."""

    restored: torch.Tensor  # (B, G, 3, H, W), not clamped
    states: list  # of each AFLB the pair (rate, fuse) that the heads saw, (B, G, …)
    actions: torch.Tensor  # (B, G, 3, 4) in (0, 1)


@torch.no_grad()
def rollout(model, policy, encoding, group_size, generators):
    """A `Group` of G = `group_size` stochastic rollouts per image, Eq. 4 and 5.

    encoding: of the B images, as `AdaIR.encode` gives it. generators: B, which the actions are
    drawn from, or one for all.
    """
    controller = policy.sample(generators)
    restored = model.decode(encoding.detach(), controller, copies=group_size)  # (B·G, 3, H, W)

    def grouped(of_all):  # (B·G, …) -> (B, G, …)
        return of_all.unflatten(0, (-1, group_size))

    states = [(grouped(rate), grouped(fuse)) for rate, fuse in controller.states]
    return Group(grouped(restored), states, grouped(controller.actions))


def best_of_group(rewards):
    """g* = argmax r over each group: (B, G) -> (B,) indices."""
    return rewards.argmax(dim=-1)


def random_of_group(rewards, generators):
    """Any of each group, whatever its reward, by one generator for every group: (B, G) -> (B,)
    indices. The control that choosing the best has to beat."""
    size = rewards.shape[1]
    return torch.cat([torch.randint(size, (1,), generator=g, device=g.device) for g in generators])


def pick(group, index):
    """Of (B, G, …) the member index[b] of each group b: (B, …)."""
    return group[torch.arange(len(index), device=group.device), index]


def decode_best_and_mean(model, policy, encoding, best_actions):
    """(y_g*, y_det), each (B, 3, H, W), with graph: the best rollout's actions (B, 3, 4) replayed
    and the mean action, as one batch that holds every image twice in a row."""
    best, mean = policy.replay(best_actions), policy.mean()

    def in_turns(level, f, y):
        controls = best(level, f, y[0::2]), mean(level, f, y[1::2])
        return torch.stack(controls, dim=1).flatten(0, 1)

    restored = model.decode(encoding, in_turns, copies=2)
    return restored.unflatten(0, (-1, 2)).unbind(1)


# ------------------------------------------------------------------------------------ the objective


def group_advantages(rewards, eps=1e-6):
    """A = (r − r̄)/s, s = √(mean (r − r̄)² + ε) over each group; (…, G) -> (…, G), without
    gradient. Eq. 8.

    ε stands inside the root: a group of equal rewards gets advantage 0, and one whose rewards
    deviate by less than √ε gets small ones.
    """
    centred = rewards.detach() - rewards.detach().mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def batch_advantages(rewards, eps=1e-4):
    """The same divided by the deviation of the whole batch + ε, as LRPO has it: (…, G) -> (…, G),
    without gradient. It is mostly the spread between images."""
    rewards = rewards.detach()
    scale = rewards[rewards.isfinite()].std(correction=0) + eps
    return (rewards - rewards.mean(dim=-1, keepdim=True)) / scale


def shuffled(advantages, generators):
    """The advantages (B, G, …) in random order within each group, by one generator for every group:
    the control that learning from rewards has to beat."""
    size = advantages.shape[1]
    orders = [torch.randperm(size, generator=g, device=g.device) for g in generators]
    return torch.stack([of_group[order] for of_group, order in zip(advantages, orders)])


def over_patches(x, patch):
    """Means of maps over channels and patches of `patch` px a side, 0: over the whole map;
    (…, C, H, W) -> (…, H/patch, W/patch), or (…, 1, 1)."""
    x = x.mean(dim=-3)
    if not patch:
        return x.mean(dim=(-2, -1), keepdim=True)
    return F.avg_pool2d(x.flatten(0, -3)[:, None], patch)[:, 0].unflatten(0, x.shape[:-2])


def clipped_surrogate(ratio, advantages, clip=0.2):
    """mean min(ρA, clip(ρ, 1−ϵ, 1+ϵ)A), to be maximised: the first term of Eq. 10."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def sampled_kl(ratio, logp, logp_ref):
    """mean ρ[log π_θ(a|s) − log π_ref(a|s)], Eq. 11. ρ keeps its graph: its value is 1 on policy,
    and without its gradient the estimate would have none in expectation."""
    return (ratio * (logp - logp_ref)).mean()


def grpo_loss(
    logp,
    logp_old,
    logp_ref,
    advantages,
    entropy,
    clip=0.2,
    beta=0.04,
    tau=0.01,
    exact_kl=None,
    weights=None,
):
    """The loss of the policy's heads, Eq. 6, and its metrics.

    logp, logp_old, logp_ref, advantages, entropy: (B, G), the log-probabilities of whole actions
    (Eq. 23) under π_θ, π_old and π_ref and the entropy of π_θ, all on the stored states.
    clip ϵ, beta β and tau τ weigh as in Eq. 6.
    exact_kl: closed-form KL(π_θ ‖ π_ref), (B, G), to use instead of Eq. 11: same expectation, no
    sampling noise. weights: (B,), of the images in the surrogate, 1 without it.
    Returns (loss, metrics): a scalar with graph, and a dict of scalar tensors without.
    """
    if weights is not None:
        advantages = weights[:, None] * advantages  # Eq. 10 is linear in A ≥ 0 and in A ≤ 0
    ratio = (logp - logp_old.detach()).exp()  # Eq. 9
    surrogate = clipped_surrogate(ratio, advantages.detach(), clip)  # Eq. 10
    kl = sampled_kl(ratio, logp, logp_ref.detach()) if exact_kl is None else exact_kl.mean()
    loss = -surrogate + beta * kl - tau * entropy.mean()  # Eq. 6
    rises, falls = (ratio > 1 + clip) & (advantages > 0), (ratio < 1 - clip) & (advantages < 0)
    metrics = {
        "loss/rl": loss,
        "kl": kl,
        "entropy": entropy.mean(),
        "ratio": ratio.mean(),
        "clip_ratio": (rises | falls).float().mean(),
        "advantage_abs": advantages.abs().mean(),
        "advantage_rms": advantages.square().mean().sqrt(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def supervised_losses(y_best, y_det, gt, weights=None):
    """L_sup = ℓ1(y_g*, ŷ) (Eq. 1) and L_cons = ℓ1(y_g*, y_det), gradient through both (Eq. 2);
    images (B, 3, H, W). weights: (B,), of the images in L_sup, 1 without it."""
    distance = (y_best - gt).abs()
    if weights is not None:
        distance = weights[:, None, None, None] * distance
    return distance.mean(), (y_best - y_det).abs().mean()


def difficulty_weights(psnr):
    """(w_RL, w_sup), (B,) each, of PSNRs (B,) in dB: RL weighs more the farther an output is from
    the ground truth, supervision the closer it is; 1 each at 30 dB, 2 and 0 at 10 dB, 0 and 2 at
    50 dB.

    In the spirit of "difficulty-adaptive" RL (arXiv 2511.01645), whose formulas are not public:
    this one is ours.
    """
    closeness = ((psnr - 10) / 40).clamp(0, 1)
    return 2 * (1 - closeness), 2 * closeness


def anneal(start, end, progress):
    """Linear from start to end as progress goes from 0 to 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def total_loss(rl, sup, cons, progress, sup_weights=(0.35, 0.1), cons_weights=(0.2, 0.05)):
    """L = L_RL + λ_sup L_sup + λ_cons L_cons, both λ annealed over training (progress 0 … 1).
    Eq. 7."""
    return rl + anneal(*sup_weights, progress) * sup + anneal(*cons_weights, progress) * cons
