"""experiments.headroom: what it measures, on a small model whose gates are known to be off."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import fails, small_adair, write

from data import Crops, list_training
from experiments import headroom
from policy import policy_for
from rewards import Reward, parse_terms


@pytest.fixture
def scene():
    net = small_adair(para1=0.1).requires_grad_(False)
    net.output.weight *= 0.1  # what it adds to an image is small: a PSNR above 10 dB
    reward = Reward(parse_terms("psnr"))
    config = headroom.Config(images=2, crop=32, device="cpu")
    samples = [s for s in list_training(None).val if s.task == "denoise25"]
    return net, reward, headroom.crops_to_measure(net, reward, samples, config)[0]


def test_the_mean_action_gains_nothing_and_sampling_more_gains_more(scene):
    net, reward, crop = scene
    policy = policy_for(net)
    for controller in (policy.mean(), headroom.with_graph(policy)):
        gains = headroom.gains(reward, crop, net.decode(crop.encoding, controller))
        assert all(abs(gain.item()) < 1e-4 for gain in gains)
    generator = torch.Generator().manual_seed(0)
    found = headroom.best_of_sampled(net, reward, policy, crop, generator)
    values = [found[f"best of {n}"] for n in headroom.BEST_OF]
    assert values[0][0] < values[1][0] < values[2][0]


def test_the_oracle_finds_what_a_grid_finds(scene):
    """Of two gates on a grid of 9 × 9; the oracle has all six, and the reward is PSNR here."""
    net, reward, crop = scene
    factors = torch.linspace(0.6, 1.4, 9)
    controls = torch.tensor([*net.config["rates"], 1.0, 1.0]).repeat(81, 3, 1)
    controls[:, 2, 2:] = torch.cartesian_prod(factors, factors)
    with torch.no_grad():
        restored = net.decode(crop.encoding, lambda level, f, y: controls[:, level], copies=81)
    of_grid = headroom.gains(reward, crop, restored)[0].max().item()
    psnr, value = headroom.best_gates(net, reward, crop, 60)
    assert psnr > of_grid - 0.01 and of_grid > 0.01
    assert value == pytest.approx(psnr / 40, rel=0.2)  # 40 dB are the whole reward


def test_means_have_the_interval_of_the_photographs():
    """Four photographs under two tasks: Student's, three degrees of freedom."""
    gains = np.array([0.1, 0.5, 0.3, 0.9])
    rows = pd.DataFrame(dict(photo=[*"abcd"], what="learnable", psnr=gains, reward=gains / 1e3))
    rows = pd.concat([rows.assign(task=task) for task in ("rain", "haze")])
    low, high = scipy.stats.t.interval(0.95, 3, gains.mean(), scipy.stats.sem(gains))
    wanted = dict(psnr=f"+0.450 [{low:+.3f}, {high:+.3f}]")
    wanted |= dict(reward=f"+4.5 [{10 * low:+.1f}, {10 * high:+.1f}]")
    for key, words in wanted.items():
        *_, haze, last = headroom.table(rows, key).splitlines()
        assert haze.split()[:4] == ["|", "haze", "|", words.split()[0]]
        assert last.split("|")[2].strip() == words


def test_backpropagation_moves_the_gates_uphill(scene):
    net, reward, _ = scene
    samples = [s for s in list_training(None).train if s.task == "denoise25"]
    crops, policy = Crops(samples, 32, 0), policy_for(net)
    config = headroom.Config(learning=30, device="cpu")

    def value():
        batch = crops.collate([crops[n] for n in range(12)])
        with torch.no_grad():
            return reward.differentiable(net(batch.degraded, policy.mean()), batch.gt, batch.tasks)

    before = value().mean()
    headroom.learn(net, reward, policy, crops, config)
    assert value().mean() > before


def test_the_command_measures_every_task(init, photos, tmp_path, capsys):
    for i in range(6, 20):
        write(photos / f"{i}.png", width=64, height=48, seed=i)
    flags = ["--images", 2, "--crop", 32, "--ascent", 2, "--learning", 2, "--device", "cpu"]
    flags += ["--rewards", "psnr", "--data-root", photos, "--out", tmp_path / "out"]
    assert headroom.main([str(flag) for flag in ["--ckpt", init, *flags]]) is None
    assert f"Crops of 32 px of {photos}, rewards\npsnr" in capsys.readouterr().out
    stored = pd.read_csv(tmp_path / "out/headroom.csv")
    assert len(stored) == 7 * 2 * 5 and stored.notna().all(axis=None)
    assert "there is no checkpoint" in fails(capsys, headroom.main, ["--ckpt", photos])
    said = fails(capsys, headroom.main, ["--ckpt", init, *flags, "--crop", 256])
    assert f"no image of {photos} can be used with --crop 256" in said
