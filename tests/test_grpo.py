"""GRPO: Eq. 6, 8–11 against closed forms, torch.distributions and finite differences."""

import math

import numpy as np
import pytest
import torch
from conftest import small_adair
from torch.distributions import Beta, kl_divergence

import grpo
from policy import beta_entropy, beta_log_prob, policy_for


def test_advantages_by_hand():
    r = torch.tensor([[0.2, 0.4, 0.6, 0.8]])
    s = math.sqrt(0.05 + 1e-6)
    assert torch.allclose(grpo.group_advantages(r), torch.tensor([[-0.3, -0.1, 0.1, 0.3]]) / s)


@pytest.mark.parametrize("rewards", [[[0.7] * 4], [[0.5]], [[0.0, 0.0]]])
def test_a_group_without_spread_has_no_advantage(rewards):
    assert grpo.group_advantages(torch.tensor(rewards)).abs().max() < 1e-3


def test_epsilon_stands_inside_the_root():
    """Rewards that differ by 1e-5 are far below √ε: their advantages stay small instead of becoming
    ±1."""
    a = grpo.group_advantages(torch.tensor([[0.5, 0.5 + 2e-5]], dtype=torch.float64))
    assert a.abs().flatten().tolist() == pytest.approx([1e-5 / math.sqrt(1e-10 + 1e-6)] * 2)


def test_a_small_epsilon_damps_no_group():
    """At ε 1e-12 a group of deviation 1e-4 has advantages of RMS 1; at 1e-6 they are 0.1."""
    r = 0.5 + torch.tensor([[1e-4, -1e-4, 1e-4, -1e-4]], dtype=torch.float64)
    for eps, rms in ((1e-12, 1.0), (1e-6, 1e-4 / math.sqrt(1e-8 + 1e-6))):
        a = grpo.group_advantages(r, eps)
        assert a.square().mean().sqrt().item() == pytest.approx(rms, rel=1e-4)
        zeros = torch.zeros(1, 4)
        metrics = grpo.grpo_loss(zeros, zeros, zeros, a, zeros)[1]
        assert metrics["advantage_rms"].item() == pytest.approx(rms, rel=1e-4)


def test_groups_are_normalised_one_by_one_and_without_gradient():
    r = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    scale, shift = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([[0.0], [5.0], [-2.0]])
    a = grpo.group_advantages(r * scale + shift)
    assert not a.requires_grad
    assert torch.allclose(a.mean(dim=1), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(a.std(dim=1, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize(
    "ratio, advantage, expected",
    [(1.0, 2.0, 2.0), (1.5, 1.0, 1.2), (0.5, 1.0, 0.5), (1.5, -1.0, -1.5), (0.5, -1.0, -0.8)],
)
def test_clipped_surrogate_cases(ratio, advantage, expected):
    found = grpo.clipped_surrogate(torch.tensor([ratio]), torch.tensor([advantage]))
    assert found.item() == pytest.approx(expected)


def test_loss_is_equation_6():
    logp, old, ref, entropy = (torch.randn(2, 4, dtype=torch.float64) * 0.3 for _ in range(4))
    a = grpo.group_advantages(torch.rand(2, 4, dtype=torch.float64))
    expected = 0.0
    for i in range(2):
        for j in range(4):
            rho = math.exp(logp[i, j] - old[i, j])
            expected -= min(rho * a[i, j], min(max(rho, 0.8), 1.2) * a[i, j]) / 8
            expected += (0.04 * rho * (logp[i, j] - ref[i, j]) - 0.01 * entropy[i, j]) / 8
    loss, metrics = grpo.grpo_loss(logp, old, ref, a, entropy)
    assert loss.item() == pytest.approx(float(expected), rel=1e-9)
    rho = (logp - old).exp()
    binds = ((rho > 1.2) & (a > 0)) | ((rho < 0.8) & (a < 0))
    assert metrics["clip_ratio"].item() == pytest.approx(binds.double().mean().item())
    assert not any(v.requires_grad for v in metrics.values())


def test_on_policy_the_ratio_is_1_and_the_gradient_is_the_score_function():
    """At ρ = 1, ∂L/∂log π_i = −A_i/n + (β/n)(1 + log π/π_ref): the policy gradient and Eq. 11's
    product rule."""
    logp = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(1, 4, dtype=torch.float64)
    a = grpo.group_advantages(torch.rand(1, 4, dtype=torch.float64))
    loss, metrics = grpo.grpo_loss(logp, logp.detach(), ref, a, torch.zeros(1, 4), tau=0.0)
    loss.backward()
    assert metrics["ratio"].item() == 1 and metrics["clip_ratio"].item() == 0
    assert torch.allclose(logp.grad, (-a + 0.04 * (1 + logp.detach() - ref)) / 4)


def surrogate_of(theta, actions, old, ref, advantages):
    alpha, b = 1 + theta[0].exp(), 1 + theta[1].exp()
    logp = beta_log_prob(actions, alpha, b)
    return grpo.grpo_loss(logp, old, ref, advantages, beta_entropy(alpha, b).expand_as(logp))[0]


def test_gradient_against_finite_differences():
    theta = torch.tensor([1.1, 0.6], dtype=torch.float64, requires_grad=True)
    actions = Beta(4.0, 3.0).sample((2, 8)).double()
    old = beta_log_prob(actions, torch.tensor(4.1), torch.tensor(2.8)).double()
    ref = beta_log_prob(actions, torch.tensor(3.0), torch.tensor(3.0)).double()
    a = grpo.group_advantages(torch.rand(2, 8, dtype=torch.float64))

    def loss(t):
        return surrogate_of(t, actions, old, ref, a)

    assert torch.autograd.gradcheck(loss, (theta,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("old", [(6.0, 4.0), (5.0, 4.5)], ids=["on policy", "off policy"])
def test_gradient_of_equation_11_is_that_of_the_closed_form_kl(old):
    """With many samples of π_old, Eq. 11 and its gradient approach KL(π_θ ‖ π_ref); a detached ρ
    would have none."""

    def double(pair, **settings):
        return [torch.tensor(v, dtype=torch.float64, **settings) for v in pair]

    params, old_params, ref_params = (
        double((6.0, 4.0), requires_grad=True),
        double(old),
        double((3, 3)),
    )
    actions = Beta(*old_params).sample((400_000,))
    logp = beta_log_prob(actions, *params)
    ratio = (logp - beta_log_prob(actions, *old_params)).exp()
    logp_ref = beta_log_prob(actions, *ref_params)
    estimate = grpo.sampled_kl(ratio, logp, logp_ref)
    exact = kl_divergence(Beta(*params), Beta(*ref_params))
    got = torch.stack(torch.autograd.grad(estimate, params, retain_graph=True))
    wanted = torch.stack(torch.autograd.grad(exact, params))
    assert estimate.item() == pytest.approx(exact.item(), rel=0.02)
    assert torch.allclose(got, wanted, rtol=0.05, atol=2e-3)
    if old == (6.0, 4.0):
        # the trap: without ρ's gradient, on policy the estimate has none in expectation
        trap = grpo.sampled_kl(ratio.detach(), logp, logp_ref)
        detached = torch.stack(torch.autograd.grad(trap, params))
        assert detached.abs().max() < 0.1 * wanted.abs().max()


def test_exact_kl_replaces_equation_11():
    logp, zeros = torch.randn(1, 4), torch.zeros(1, 4)
    _, metrics = grpo.grpo_loss(logp, logp, zeros, zeros, zeros, exact_kl=torch.full((1, 4), 0.7))
    assert metrics["kl"].item() == pytest.approx(0.7)


def test_best_of_group_and_taking_it():
    r = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.4]])
    best = grpo.best_of_group(r)
    assert best.tolist() == [1, 0]
    group = torch.arange(6).view(2, 3)[..., None] * torch.ones(2)
    assert grpo.pick(group, best)[:, 0].tolist() == [1, 3]


@pytest.mark.parametrize(
    "progress, sup, cons", [(0.0, 0.35, 0.2), (0.5, 0.225, 0.125), (1.0, 0.1, 0.05)]
)
def test_both_weights_are_annealed_linearly(progress, sup, cons):
    assert grpo.total_loss(1.0, 10.0, 100.0, progress) == pytest.approx(1 + 10 * sup + 100 * cons)


def test_supervised_losses_and_where_their_gradient_goes():
    best, det = (torch.rand(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    gt = torch.rand(2, 3, 4, 4)
    l_sup, l_cons = grpo.supervised_losses(best, det, gt)
    assert l_sup.item() == pytest.approx((best - gt).abs().mean().item())
    assert l_cons.item() == pytest.approx((best - det).abs().mean().item())
    l_cons.backward()
    assert best.grad.abs().sum() > 0 and det.grad.abs().sum() > 0


def test_a_group_is_that_of_each_rollout_alone():
    """Five rollouts of two images: each replayed by itself."""
    net, g = small_adair(para1=0.1), torch.Generator().manual_seed(0)
    policy, x = policy_for(net), torch.rand(2, 3, 32, 32, generator=g)
    with torch.no_grad():
        group = grpo.rollout(net, policy, net.encode(x), 5, [g])
        assert group.restored.shape == (2, 5, 3, 32, 32) and group.actions.shape == (2, 5, 3, 4)
        assert len(torch.unique(group.actions[..., 0, 2])) == 10
        for b in range(2):
            for i in range(5):
                controller = policy.replay(group.actions[b : b + 1, i])
                y = net(x[b : b + 1], controller)[0]
                assert torch.allclose(y, group.restored[b, i], atol=1e-5)
                for stored, seen in zip(group.states, controller.states):
                    for s, t in zip(stored, seen):
                        assert torch.allclose(s[b, i], t[0], atol=1e-5)


def test_shuffled_advantages_stay_in_their_group():
    advantages = torch.randn(50, 4)
    generators = [torch.Generator().manual_seed(k) for k in range(50)]
    found = grpo.shuffled(advantages, generators)
    assert torch.equal(found.sort(dim=1).values, advantages.sort(dim=1).values)
    kept = (found == advantages).float().mean().item()
    assert 0.15 < kept < 0.35  # one in four stays by chance


def test_weights_are_of_images():
    """With weights (2, 0.5) the surrogate and L_sup are means of the images' own, so weighted; KL,
    entropy and L_cons stay as they are."""
    weights = torch.tensor([2.0, 0.5])
    logp, old, ref = torch.randn(3, 2, 4)
    a, entropy = grpo.group_advantages(torch.rand(2, 4)), torch.rand(2, 4)

    def loss(i=slice(None), **settings):
        return grpo.grpo_loss(logp[i], old[i], ref[i], a[i], entropy[i], **settings)[0]

    each = [loss(slice(i, i + 1), beta=0, tau=0) for i in range(2)]
    weighted = loss(beta=0, tau=0, weights=weights)
    assert weighted.item() == pytest.approx((2 * each[0] + 0.5 * each[1]).item() / 2, rel=1e-5)
    rest = [loss() - loss(beta=0, tau=0), loss(weights=weights) - weighted]
    assert rest[0].item() == pytest.approx(rest[1].item(), rel=1e-4)
    best, det, gt = torch.rand(3, 2, 3, 8, 8)
    sup, cons = grpo.supervised_losses(best, det, gt, weights)
    by_hand = (2 * (best[0] - gt[0]).abs().mean() + 0.5 * (best[1] - gt[1]).abs().mean()) / 2
    assert sup.item() == pytest.approx(by_hand.item())
    assert cons.item() == pytest.approx((best - det).abs().mean().item())


def test_difficulty_moves_weight_from_supervision_to_rl():
    rl, sup = grpo.difficulty_weights(torch.tensor([5.0, 10.0, 20.0, 30.0, 50.0, 60.0]))
    assert rl.tolist() == pytest.approx([2, 2, 1.5, 1, 0, 0])
    assert sup.tolist() == pytest.approx([0, 0, 0.5, 1, 2, 2])


def test_a_random_rollout_does_not_look_at_rewards():
    rewards = torch.tensor([[9.0, 0, 0, 0]]).repeat(400, 1)
    found = []
    for r in (rewards, -rewards):
        generators = [torch.Generator().manual_seed(i) for i in range(400)]
        found.append(grpo.random_of_group(r, generators))
    assert torch.equal(*found)
    assert found[0].bincount(minlength=4).tolist() == pytest.approx([100] * 4, abs=35)


def test_batch_advantages_are_divided_by_one_number():
    """LRPO's: the deviation of all rewards of the batch + 1e-4; a group that could not be scored
    does not count."""
    rewards = torch.tensor([[1.0, 2, 3], [10, 20, 60], [math.nan] * 3])
    found = grpo.batch_advantages(rewards)
    scale = np.std([1, 2, 3, 10, 20, 60]) + 1e-4
    assert found[0].tolist() == pytest.approx([-1 / scale, 0, 1 / scale])
    assert found[1].tolist() == pytest.approx([-20 / scale, -10 / scale, 30 / scale])
    assert found[2].isnan().all()


def test_patches_are_averaged_over_channels_and_pixels():
    x = torch.rand(2, 5, 3, 8, 12)
    found = grpo.over_patches(x, 4)
    assert found.shape == (2, 5, 2, 3)
    assert found[1, 2, 1, 2].item() == pytest.approx(x[1, 2, :, 4:, 8:].mean().item())
    assert grpo.over_patches(x, 0)[1, 2].item() == pytest.approx(x[1, 2].mean().item())
