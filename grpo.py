"""Group relative policy optimisation: Eq. 6 and 8–11, and the supervised side of the objective, Eq. 1, 2 and 7.

Pure functions of tensors. Rewards, log-probabilities and advantages are (B, G): B images with a group of G rollouts each.
"""

import torch


def group_advantages(rewards, eps=1e-6):
    """A = (r − r̄)/s, s = √(mean (r − r̄)² + ε) over each group; (B, G) -> (B, G), without gradient. Eq. 8.

    ε stands inside the root: a group of equal rewards gets advantage 0, and differences far below √ε = 0.001 stay small.
    """
    centred = rewards.detach() - rewards.detach().mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def clipped_surrogate(ratio, advantages, clip=0.2):
    """mean min(ρA, clip(ρ, 1−ϵ, 1+ϵ)A), to be maximised: the first term of Eq. 10."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def sampled_kl(ratio, logp, logp_ref):
    """mean ρ[log π_θ(a|s) − log π_ref(a|s)], Eq. 11. ρ keeps its graph: its value is 1 on policy, and without its
    gradient the estimate would have none in expectation."""
    return (ratio * (logp - logp_ref)).mean()


def grpo_loss(logp, logp_old, logp_ref, advantages, entropy, clip=0.2, beta=0.04, tau=0.01, exact_kl=None):
    """The loss of the policy's heads, Eq. 6, and its metrics.

    logp, logp_old, logp_ref, advantages, entropy: (B, G), the log-probabilities of whole actions (Eq. 23) under π_θ,
    π_old and π_ref and the entropy of π_θ, all on the stored states. clip ϵ, beta β and tau τ weigh as in Eq. 6.
    exact_kl: closed-form KL(π_θ ‖ π_ref), (B, G), to use instead of Eq. 11: same expectation, no sampling noise.
    Returns (loss, metrics): a scalar with graph, and a dict of scalar tensors without.
    """
    ratio = (logp - logp_old.detach()).exp()  # Eq. 9
    surrogate = clipped_surrogate(ratio, advantages.detach(), clip)
    kl = sampled_kl(ratio, logp, logp_ref.detach()) if exact_kl is None else exact_kl.mean()
    loss = -surrogate + beta * kl - tau * entropy.mean()  # Eq. 6
    binds = ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))
    metrics = {
        "loss/rl": loss,
        "kl": kl,
        "entropy": entropy.mean(),
        "ratio": ratio.mean(),
        "clip_ratio": binds.float().mean(),
        "advantage_abs": advantages.abs().mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def best_of_group(rewards):
    """g* = argmax r over each group: (B, G) -> (B,) indices."""
    return rewards.argmax(dim=-1)


def take(group, index):
    """Of group (B·G, …), laid out image by image, the member index[b] of each image b: (B, …)."""
    b = len(index)
    return group.reshape(b, -1, *group.shape[1:])[torch.arange(b, device=group.device), index]


def anneal(start, end, progress):
    """Linear from start to end as progress goes from 0 to 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def supervised_losses(y_best, y_det, gt):
    """L_sup = ℓ1(y_g*, ŷ) (Eq. 1) and L_cons = ℓ1(y_g*, y_det), gradient through both (Eq. 2); images (B, 3, H, W)."""
    return (y_best - gt).abs().mean(), (y_best - y_det).abs().mean()


def total_loss(rl, sup, cons, progress, sup_weights=(0.35, 0.1), cons_weights=(0.2, 0.05)):
    """L = L_RL + λ_sup L_sup + λ_cons L_cons, both λ annealed over training (progress 0 … 1). Eq. 7."""
    return rl + anneal(*sup_weights, progress) * sup + anneal(*cons_weights, progress) * cons
