"""The Beta policy against scipy, and against what docs/deviations.md says of its start."""

import numpy as np
import pytest
import torch
from conftest import small_adair
from scipy import integrate, stats
from torch.distributions import Beta, kl_divergence

import grpo
import policy as policies
from model import EMPTY_RATE, read_checkpoint
from policy import beta_entropy, beta_kl, beta_log_prob, sample_beta

ALPHA = torch.tensor([1.001, 1.5, 2.0, 7.5, 60.0, 900.0])
BETA = torch.tensor([1.2, 1.001, 2.0, 22.5, 40.0, 1100.0])


def scipy_betas():
    return [stats.beta(a, b) for a, b in zip(ALPHA.double().numpy(), BETA.double().numpy())]


@pytest.mark.parametrize("quantile", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_log_prob(quantile):
    a = torch.tensor([d.ppf(quantile) for d in scipy_betas()])
    expected = [d.logpdf(x) for d, x in zip(scipy_betas(), a.numpy())]
    found = beta_log_prob(a, ALPHA.double(), BETA.double())
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_entropy():
    expected = [d.entropy() for d in scipy_betas()]
    assert np.allclose(beta_entropy(ALPHA.double(), BETA.double()), expected, rtol=1e-8, atol=1e-8)


def test_kl_by_quadrature():
    betas = scipy_betas()
    for i, p in enumerate(betas):
        for j, q in enumerate(betas):
            args = (ALPHA[i], BETA[i], ALPHA[j], BETA[j])
            got = beta_kl(*(t.double() for t in args)).item()
            mean, sd = p.mean(), p.std()
            lo, hi = max(1e-12, mean - 12 * sd), min(1 - 1e-12, mean + 12 * sd)

            def integrand(x):
                return p.pdf(x) * (p.logpdf(x) - q.logpdf(x))

            expected = integrate.quad(integrand, lo, hi, points=[mean], limit=400)[0]
            assert got == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_float32_is_enough_at_the_bound():
    """At the largest parameters a head can give, lgamma in float32 must not ruin a
    log-probability."""
    found = beta_log_prob(torch.tensor(0.493), torch.tensor(2900.0), torch.tensor(2900.0))
    assert found.item() == pytest.approx(stats.beta(2900, 2900).logpdf(0.493), abs=0.01)


@pytest.fixture
def setting():
    net = small_adair()
    return net, policies.policy_for(net), torch.rand(2, 3, 64, 64)


def rollout(net, controller, x):
    with torch.no_grad():
        return net(x, controller)


def perturb(policy):
    """Heads that have learned something."""
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return policy


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (88, 136)])
@pytest.mark.parametrize("rates", [(0.25, 0.25), (EMPTY_RATE,) * 2])
def test_attached_to_a_model_it_changes_nothing(size, rates):
    net = small_adair(rates=rates)
    x = torch.rand(1, 3, *size)
    policy = policies.policy_for(net)
    assert (rollout(net, policy.mean(), x) - rollout(net, None, x)).abs().max() < 1e-5


def test_at_empty_rates_fraction_is_the_published_model_at_128():
    """Official weights under mask rule "fraction" start where they were trained: with empty
    masks."""
    x = torch.rand(1, 3, 128, 128)
    ours = small_adair("fraction", (EMPTY_RATE,) * 2)
    assert torch.equal(rollout(ours, None, x), rollout(small_adair("adair"), None, x))


def test_starts_at_the_wanted_mean_and_concentration(setting):
    net, policy, x = setting
    control = policy.mean()
    rollout(net, control, x)
    alpha, b = policy.densities(control.states)
    assert torch.allclose(alpha + b, torch.full_like(alpha, 30.0), rtol=1e-4)
    means = torch.tensor([0.25, 0.25, 0.5, 0.5]).expand_as(alpha)
    assert torch.allclose(alpha / (alpha + b), means, rtol=1e-5)
    assert control.actions.shape == (2, 3, 4)


def test_log_prob_is_the_sum_over_levels_and_controls(setting):
    net, policy, x = setting
    control = perturb(policy).sample()
    rollout(net, control, x)
    alpha, b = (t.detach().numpy() for t in policy.densities(control.states))
    expected = stats.beta(alpha, b).logpdf(control.actions.numpy()).sum(axis=(1, 2))
    log_prob, entropy, statistics = policy.evaluate(control.states, control.actions)
    assert np.allclose(log_prob.detach(), expected, rtol=1e-4)
    expected = stats.beta(alpha, b).entropy().sum(axis=(1, 2))
    assert np.allclose(entropy.detach(), expected, atol=1e-4)
    wanted = {"mean": alpha / (alpha + b), "concentration": alpha + b}
    for name, value in wanted.items():
        found = statistics[f"policy/2.g_f/{name}"].item()
        assert found == pytest.approx(value[:, 1, 2].mean(), rel=1e-4)


def test_kl_to_a_reference_sums_over_levels_and_controls(setting):
    net, policy, x = setting
    control = policy.sample()
    rollout(net, control, x)
    reference = policy.frozen_copy()
    assert policy.kl(reference, control.states).abs().max() < 1e-5
    perturb(policy)
    mine, other = (Beta(*p.densities(control.states)) for p in (policy, reference))
    expected = kl_divergence(mine, other).sum(dim=(1, 2))
    assert torch.allclose(policy.kl(reference, control.states), expected, rtol=1e-3)


def test_samples_follow_the_density(setting):
    alpha, b = torch.full((20000,), 7.5), torch.full((20000,), 22.5)
    generator = torch.Generator().manual_seed(1)
    drawn = sample_beta(alpha, b, generator).numpy()
    assert stats.kstest(drawn, stats.beta(7.5, 22.5).cdf).pvalue > 0.01


def test_samples_have_no_graph_and_stay_inside(setting):
    alpha = torch.full((1000,), 1.0001, requires_grad=True)
    a = sample_beta(alpha, 3000 * torch.ones(1000))
    assert not a.requires_grad and a.min() >= 1e-4 and a.max() <= 1 - 1e-4


def test_same_generator_same_actions_and_replay_repeats_the_image(setting):
    net, policy, x = setting
    first, second = (policy.sample([torch.Generator().manual_seed(5)]) for _ in range(2))
    y = rollout(net, first, x)
    assert torch.equal(y, rollout(net, second, x)) and torch.equal(first.actions, second.actions)
    assert torch.allclose(y, rollout(net, policy.replay(first.actions), x), atol=1e-6)


def test_best_and_mean_in_one_batch(setting):
    net, policy, x = setting
    control = perturb(policy).sample()
    y_best = rollout(net, control, x)
    y_det = rollout(net, policy.mean(), x)
    with torch.no_grad():
        best, mean = grpo.decode_best_and_mean(net, policy, net.encode(x), control.actions)
    assert torch.allclose(best, y_best, atol=1e-5) and torch.allclose(mean, y_det, atol=1e-5)


def test_the_heads_learn_alone_and_the_backbone_alone(setting):
    """No gradient passes from log π to the backbone, nor from an image to the heads."""
    net, policy, x = setting
    control = policy.sample()
    y = net(x, control)
    y.mean().backward()
    assert all(p.grad is None for p in policy.parameters())
    for p in net.parameters():
        p.grad = None
    policy.evaluate(control.states, control.actions)[0].sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_rate_states_do_not_depend_on_actions_and_fuse_states_do(setting):
    net, policy, x = setting
    a, b = (policy.sample([torch.Generator().manual_seed(seed)]) for seed in (1, 2))
    rollout(net, a, x), rollout(net, b, x)
    assert all(torch.equal(s[0], t[0]) for s, t in zip(a.states, b.states))
    same = [torch.equal(s[1], t[1]) for s, t in zip(a.states, b.states)]
    assert same == [True, False, False]


def test_heads_stay_float32_under_autocast(setting):
    _, policy, _ = setting
    state = (torch.rand(2, 1, 4, 4), torch.rand(2, 64, 1, 1))
    plain = policy.densities_at(0, *state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = policy.densities_at(0, *(s.bfloat16().float() for s in state))
    assert all(t.dtype == torch.float32 for t in cast)
    assert all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(plain, cast))


def test_raw_outputs_are_bounded_and_keep_their_gradient():
    raw = torch.tensor([-3.0, 0.0, 7.9, 12.0, 100.0], requires_grad=True)
    capped = policies.soft_cap(raw)
    assert capped.max() <= policies.RAW_MAX and torch.allclose(capped[:2], raw[:2], atol=1e-3)
    capped.sum().backward()
    assert (raw.grad[:4] > 0).all()


def test_a_reference_copy_stays(setting):
    _, policy, _ = setting
    ref = policy.frozen_copy()
    perturb(policy)
    assert not any(p.requires_grad for p in ref.parameters())
    assert not all(torch.equal(p, q) for p, q in zip(policy.parameters(), ref.parameters()))


def test_policy_travels_in_a_checkpoint(setting, tmp_path):
    _, policy, _ = setting
    perturb(policy)
    torch.save(policies.policy_state(policy), tmp_path / "p.pt")
    stored = read_checkpoint(tmp_path / "p.pt")
    loaded = policies.load_policy(stored)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), loaded.parameters()))
    assert policies.load_policy({"model": {}}) is None


def test_a_policy_of_another_kind_is_refused_by_name(setting):
    """It might have tensors of the same names and shapes, and mean something else by them."""
    _, policy, _ = setting
    stored = policies.policy_state(policy)
    stored["policy_config"]["kind"] = "logit-normal"
    with pytest.raises(policies.PolicyError, match="of kind 'logit-normal', not 'beta'"):
        policies.load_policy(stored)


@pytest.mark.parametrize("concentration", [1.0, 9999.0])
def test_a_concentration_out_of_reach_is_refused(concentration):
    with pytest.raises(policies.PolicyError, match="out of a head's reach"):
        policies.policy_for(small_adair(), concentration)


# ------------------------------------------------------------------------- what is usual of a state


def seen(net, policy, n=12):
    """States of n images of different brightness."""
    images = torch.stack([(0.2 + 0.06 * i) * torch.rand(3, 32, 32) for i in range(n)])
    return policies.states_on(net, policy, images.split(5))


def test_fitted_heads_see_deviations_from_the_mean(setting):
    net, policy, _ = setting
    states = seen(net, perturb(policy))
    policy.fit(states)
    for head, state in policy.heads(states):
        raw = state.double().numpy()
        expected = (raw - raw.mean(axis=0)) / (raw.std(axis=0) + policies.FLOOR)
        assert np.allclose(head.normalise(state), expected, atol=1e-3)
        mean, deviation = head.normalise.mean, head.normalise.deviation
        inside, edge, far = (head((mean + k * deviation)[:, None, None]) for k in (2, 3, 1e6))
        assert all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(edge, far))  # cut off at 3
        assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(inside, far))
    assert 0 <= policy.clipped(states) < 0.1
    assert policy.clipped([tuple(1e6 * s for s in pair) for pair in states]) > 0.9


def test_a_fitted_policy_sees_images_that_differ_little(setting):
    """The same heads: unfitted, their densities are almost the same for all images; fitted, they
    are not. And a fresh policy changes nothing, fitted or not."""
    net, policy, x = setting
    blind = perturb(policies.policy_for(net))
    sighted = policies.policy_for(net)
    sighted.load_state_dict(blind.state_dict())
    states = [(rate, 0.01 * fuse) for rate, fuse in seen(net, policy)]
    sighted.fit(states)
    alphas = [p.densities(states)[0].log() for p in (blind, sighted)]
    spread = [alpha.std(dim=0)[:, 2:].mean().item() for alpha in alphas]
    assert spread[1] > 5 * spread[0]
    policy.fit(states)
    assert (rollout(net, policy.mean(), x) - rollout(net, None, x)).abs().max() < 1e-5


def test_statistics_are_frozen_with_the_reference_and_travel(setting, tmp_path):
    net, policy, _ = setting
    states = seen(net, policy)
    policy.fit(states)
    reference = policy.frozen_copy()
    torch.save(policies.policy_state(policy), tmp_path / "p.pt")
    policy.fit(seen(net, policy, 3))
    loaded = policies.load_policy(read_checkpoint(tmp_path / "p.pt"))
    pairs = zip(reference.densities(states), loaded.densities(states))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(policy.fuse[0].normalise.mean, reference.fuse[0].normalise.mean)


def test_early_checkpoints_are_refused(setting):
    """They have heads that saw raw states."""
    _, policy, _ = setting
    stored = policies.policy_state(policy)
    stored["policy"] = {k: v for k, v in stored["policy"].items() if "normalise" not in k}
    with pytest.raises(policies.PolicyError, match="no policy of this version .*normalise"):
        policies.load_policy(stored)
