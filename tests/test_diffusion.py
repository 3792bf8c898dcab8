"""The chain against simulation, Bayes' rule and torch.distributions."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import fails, write
from torch.distributions import Normal, kl_divergence

import diffusion
import eval as evaluation
import lrpo
from config import parse_over
from data import read_image
from diffusion import Chain, Steps, levels, schedule
from experiments import chain as chain_program
from experiments.chain import MEASURES, LastStepOf, outputs_of
from model import load_restorer, restore
from rewards import parse_terms


def chain(seed=0, **config):
    """A small chain whose network does something, float64."""
    torch.manual_seed(seed)
    net = Chain(width=8, **config).double()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


def images(n=2):
    return torch.rand(n, 3, 8, 8, dtype=torch.float64)


def seeded(n=2, seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def test_the_schedule_is_resshifts():
    roots = [math.sqrt(eta) for eta in schedule(steps=4, kappa=0.5, smallest=0.1, power=0.3)]
    assert roots == pytest.approx([0, 0.10, 0.52, 0.76, 0.99], abs=5e-3)
    roots = [math.sqrt(eta) for eta in schedule(steps=15, kappa=2, smallest=0.04, power=0.3)]
    assert roots[1] == pytest.approx(0.02) and roots[-1] == pytest.approx(0.99)


def test_a_chain_that_knows_the_truth_has_the_marginals_of_q():
    """20,000 walks of one pixel, whose network returns x_0."""
    net, n = Chain(width=8).double(), 20_000
    x0, y = torch.full((n, 3, 1, 1), 0.3).double(), torch.full((n, 3, 1, 1), -0.5).double()
    net.predict = lambda x, y, t: x0
    torch.manual_seed(0)
    for t, before, after in net.walk(y, lambda: torch.randn_like(y)):
        for step, x in ((t, before), (t - 1, after)):
            mean, deviation = net.marginal(x0, y, torch.full((n,), step))
            if step == net.steps:  # the chain starts at y, not at x_0 + 0.99² (y − x_0)
                mean = y
            assert x.mean().item() == pytest.approx(mean.mean().item(), abs=0.02)
            assert x.std().item() == pytest.approx(deviation.mean().item(), rel=0.02, abs=1e-6)


@pytest.mark.parametrize("t", [2, 3, 4])
def test_a_step_is_bayes_rule(t):
    """q(x_{t−1} | x_t, x_0, y) ∝ q(x_t | x_{t−1}, y) q(x_{t−1} | x_0, y), two Gaussians in x_{t−1};
    q(x_t | x_{t−1}, y) = N(x_{t−1} + α_t (y − x_0), κ² α_t)."""
    net, (x0, y, x) = Chain(width=8), (0.3, -0.5, 0.1)
    alpha, before, k2 = net.eta[t] - net.eta[t - 1], net.eta[t - 1], net.kappa**2
    precision = 1 / (k2 * alpha) + 1 / (k2 * before)
    prior = x0 + before * (y - x0)
    mean = ((x - alpha * (y - x0)) / (k2 * alpha) + prior / (k2 * before)) / precision
    kept, new = net.weights(t)
    assert kept * x + new * x0 == pytest.approx(mean)
    assert net.sigma(t) == pytest.approx(precision**-0.5)
    assert net.sigma(1) == 0


def test_log_prob_kl_and_likelihood_against_torch_distributions():
    net, start, y, gt = chain(0), chain(1), images(), images()
    policy = Steps(net)
    restored, path = policy.rollout(net, y, 3, seeded())
    assert restored.shape == (2, 3, 3, 8, 8) and path.before.shape == (2, 3, 3, 3, 8, 8)
    assert torch.equal(path.before[:, :, 1:], path.after[:, :, :-1])
    logp, kl = policy.log_prob(net, path), policy.kl(net, start, path)
    likelihood = policy.log_likelihood(net, path, gt)
    for g in range(3):
        for s, t in enumerate((4, 3, 2)):
            x, time = path.before[:, g, s], torch.full((2,), t)
            kept, new = net.weights(t)
            mean, other = (kept * x + new * n.predict(x, 2 * y - 1, time) for n in (net, start))
            density, reference = Normal(mean, net.sigma(t)), Normal(other, net.sigma(t))
            found = density.log_prob(path.after[:, g, s]).mean(dim=(1, 2, 3))
            assert torch.allclose(logp[:, g, s].flatten(), found)
            if g == 0:  # the KL is of the first rollout
                divergence = kl_divergence(density, reference).mean(dim=(1, 2, 3))
                assert torch.allclose(kl[:, 0, s].flatten(), divergence)
            truth = Normal(kept * x + new * (2 * gt - 1), net.sigma(t))
            # E log π = −KL(q ‖ π) − entropy of q
            wanted = -kl_divergence(truth, density) - truth.entropy()
            assert torch.allclose(likelihood[:, g, s].flatten(), wanted.mean(dim=(1, 2, 3)))
    # the last step as if it had the deviation of the one before it
    x1, last = path.after[:, 0, -1], torch.ones(2, dtype=torch.long)
    means = (n.predict(x1, 2 * y - 1, last) for n in (net, start))
    divergence = kl_divergence(*(Normal(mean, net.sigma(2)) for mean in means))
    assert torch.allclose(kl[:, 0, 3].flatten(), divergence.mean(dim=(1, 2, 3)))
    assert kl.shape == (2, 1, 4, 1, 1)
    assert flat_gradient(kl[:, :, 3].mean(), net).any()


def flat_gradient(value, net):
    parameters = [*net.parameters()]
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """Σ_t E[(r − r̄) ∇ log π] against the gradient of E[r] along the path of the walks, whose last
    step, which RL does not train, is held."""
    net, n = chain(), 1500
    y, gt = torch.rand(2, 1, 3, 8, 8, dtype=torch.float64)
    policy = Steps(net)
    restored, path = policy.rollout(net, y, n, seeded(1))
    r = -(restored - gt[:, None]).square().mean(dim=(2, 3, 4))  # (1, n)
    advantages = (r - r.mean())[:, :, None, None, None]
    # log π is a mean over 3·8·8 entries, and .mean() is one over three steps
    rl = 3 * 3 * 8 * 8 * flat_gradient((advantages * policy.log_prob(net, path)).mean(), net)

    last, many = copy.deepcopy(net).requires_grad_(False), (2 * y - 1).expand(n, -1, -1, -1)
    *_, (_, x, _) = net.walk(many, lambda: torch.randn_like(many))
    output = (last.predict(x, many, torch.ones(n, dtype=torch.long)) + 1) / 2
    wanted = flat_gradient(-(output - gt).square().mean(), net)
    assert torch.nn.functional.cosine_similarity(rl, wanted, dim=0) > 0.85
    assert (rl.norm() / wanted.norm()).item() == pytest.approx(1, abs=0.25)


def test_log_prob_of_patches_averages_to_that_of_the_image():
    net, y = chain(), images()
    policy = Steps(net)
    _, path = policy.rollout(net, y, 3, seeded())
    whole, patches = policy.log_prob(net, path), policy.log_prob(net, path, patch=4)
    assert patches.shape == (2, 3, 3, 2, 2)
    assert torch.allclose(patches.mean(dim=(3, 4), keepdim=True), whole)
    assert not torch.allclose(patches, whole)


def test_blocks_do_nothing_for_a_chain(small, tmp_path, capsys):
    net = Chain(width=8)
    torch.save({"model": net.state_dict(), "config": net.config}, tmp_path / "chain.pt")
    flags = small("run", "--init", tmp_path / "chain.pt", "--block", 2, 4)
    assert "--block does nothing under a diffusion chain" in fails(capsys, lrpo.main, flags)


def test_the_last_step_returns_the_prediction_and_noise_follows_the_generators():
    net, y = chain(), images()
    policy = Steps(net)
    (one, path), (two, _) = (policy.rollout(net, y, 4, seeded()) for _ in range(2))
    assert torch.equal(one, two)
    flat, last = path.after[:, :, -1].flatten(0, 1), torch.ones(8, dtype=torch.long)
    wanted = net.predict(flat, (2 * y - 1).repeat_interleave(4, dim=0), last)
    assert torch.allclose(one.flatten(0, 1), (wanted + 1) / 2)
    other, _ = policy.rollout(net, y, 4, [seeded()[0], *seeded(1, seed=9)])
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_the_preset_of_chains_names_the_demos_and_its_reward(tmp_path, capsys):
    """--policy chain is --preset chain; its weights and its reward can be given otherwise."""
    argv = ["--policy", "chain", "--group-size", "4", "--device", "cpu"]
    config = parse_over("lrpo.py", "", lrpo.PRESETS, argv)
    assert Path(config.init).name == "chain.pt" and config.policy.group_size == 4
    assert parse_terms(config.scoring.rewards) == parse_terms("piqe=0.1,ssim=0.5,lowpass=0.4")
    both = parse_over("lrpo.py", "", lrpo.PRESETS, ["--preset=chain", *argv[2:]])
    assert dataclasses.replace(both, out="", command="") == dataclasses.replace(
        config, out="", command=""
    )
    gone = [*argv, "--init", str(tmp_path / "gone.pt"), "--out", str(tmp_path / "run")]
    assert "gone.pt" in fails(capsys, lrpo.main, gone)


def test_what_is_measured_of_a_chain(tmp_path, capsys):
    """Outputs with and without noise, and with another's last step."""
    net, start, y = chain(), chain(1), images()
    mixed = LastStepOf(net, start)(y)
    *_, (_, x, _) = net.walk(2 * y - 1, lambda: torch.zeros_like(y))
    wanted = start.predict(x, 2 * y - 1, torch.ones(2, dtype=torch.long))
    assert torch.allclose(mixed, (wanted + 1) / 2)
    assert torch.allclose(LastStepOf(net, net)(y), net(y))
    assert [*outputs_of(net, start, ["sample"])] == ["sample"]
    rows = pd.DataFrame(dict(arm=["chain", "chain-shuffled"] * 2, seed=["0"] * 4, output="sample"))
    rows = rows.assign(task="derain", image=["a", "a", "b", "b"])
    for k, key in enumerate(MEASURES):
        rows[key], rows[f"{key}_before"] = [0.03 + k, 0.01, 0.05 + k, 0.02], 0.5
    rows.to_csv(tmp_path / "chain.csv", index=False)
    assert chain_program.main([str(tmp_path)]) is None
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    found = {line[1].strip(): line[4].strip() for line in lines if len(line) > 4}
    assert found["start"] == "0.5000" and found["chain"].startswith("+400 ")
    assert found["chain − chain-shuffled"].startswith("+250 ")
    assert "holds no ARM/SEED" in fails(capsys, chain_program.main, [str(tmp_path / "empty")])


def test_levels_are_those_of_every_channel():
    y = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    blocks = y[0].numpy().reshape(3, 2, 8, 3, 8).mean(axis=(2, 4))
    of_pixels = y[0].numpy().reshape(3, -1)
    wanted = [of_pixels.mean(axis=1), of_pixels.std(axis=1, ddof=1)]
    wanted += [blocks.min(axis=(1, 2)), blocks.max(axis=(1, 2))]
    assert levels(y)[0].tolist() == pytest.approx([v for part in wanted for v in part])


def test_a_chain_sees_the_levels_unless_their_weights_are_0(monkeypatch):
    net, y = chain(), torch.rand(1, 3, 16, 24, dtype=torch.float64)
    before = net(y)
    monkeypatch.setattr(diffusion, "levels", lambda y: torch.ones(1, 12, dtype=y.dtype))
    assert (net(y) - before).abs().max() > 1e-4
    for name, p in net.named_parameters():
        p.data *= not name.endswith(".level.weight")
    without = net(y)
    monkeypatch.undo()
    assert torch.equal(net(y), without)


def test_without_noise_the_chain_is_a_restorer():
    net, y = chain(), images()
    out = net(y)
    assert out.shape == y.shape and torch.equal(out, net(y)) and out.requires_grad
    assert not torch.allclose(out, y)


def test_eval_and_lrpo_take_a_chain(small, tmp_path, capsys):
    """Whole photographs, seeded noise, tiles; a run of lrpo.py from a file, and what it reports."""
    torch.manual_seed(0)
    net = Chain(width=8)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    torch.save({"model": net.state_dict(), "config": net.config}, tmp_path / "chain.pt")
    flags = "--steps 2 --group-size 3 --tasks derain --advantage-patch 16 --kl-beta 0.1".split()
    flags += ["--likelihood", "0.001", "--init", tmp_path / "chain.pt"]
    assert lrpo.main(small("run", *flags)) is None
    rows = json.loads((tmp_path / "run/report.json").read_text())["after"]
    assert all(row["psnr_sample"] != row["psnr"] for row in rows)
    last = load_restorer(tmp_path / "run/last.pt")
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), last.parameters()))

    write(tmp_path / "photo.png", width=150, height=70)
    shots = {}
    for name, more in dict(
        still=[],
        one=["--temperature", "1"],
        again=["--temperature", "1"],
        other=["--temperature", "1", "--seed", "1"],
        tiles=["--tile", "72"],
    ).items():
        flags = ["restore", str(tmp_path / "photo.png"), "--ckpt", str(tmp_path / "run"), *more]
        assert evaluation.main([*flags, "--out", str(tmp_path / name), "--device", "cpu"]) is None
        shots[name] = read_image(tmp_path / name / "photo.png")
    assert torch.equal(shots["one"], shots["again"])
    assert not torch.equal(shots["one"], shots["other"])
    image = read_image(tmp_path / "photo.png")
    with torch.no_grad():
        assert torch.allclose(shots["still"], restore(last, image).clamp(0, 1), atol=3e-3)
    assert shots["tiles"].shape == image.shape
    words = fails(
        capsys, evaluation.main, [*flags[:2], "--ckpt", "weights/demo.pt", "--temperature", "1"]
    )
    assert "--temperature is of diffusion chains" in words
