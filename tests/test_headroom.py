"""experiments.headroom: what it measures, on a small model whose gates are known to be off."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import fails, small_adair, write

import train
from data import Crops, list_training
from experiments import headroom
from policy import GATE_MEAN, policy_for
from rewards import Reward, parse_terms


@pytest.fixture
def scene():
    net = small_adair(para1=0.1).requires_grad_(False)
    net.output.weight *= 0.1  # what it adds to an image is small: a PSNR above 10 dB
    reward = Reward(parse_terms("psnr"))
    config = headroom.Config(images=2, crop=32, ascent=60, device="cpu")
    samples = [s for s in list_training(None).val if s.task == "denoise25"]
    return net, reward, headroom.crops_to_measure(net, reward, samples, config)[0]


def test_the_start_gains_nothing_and_sampling_more_gains_more(scene):
    net, reward, crop = scene
    gains = headroom.score(net, reward, crop, headroom.start_of(net)[None])
    assert all(abs(gain.item()) < 1e-4 for gain in gains)
    generator = torch.Generator().manual_seed(0)
    found = headroom.best_of_sampled(net, reward, policy_for(net), crop, generator)
    values = [found[f"best of {n}"] for n in headroom.BEST_OF]
    assert values[0][0] < values[1][0] < values[2][0]
    swept = headroom.swept(net, reward, crop)
    assert [*swept] == headroom.GATES and all(gain >= 0 for pair in swept.values() for gain in pair)


def test_the_oracle_finds_what_a_grid_finds(scene):
    """Of two gates on a grid of 9 × 9; the oracle has all six, and the reward is PSNR here."""
    net, reward, crop = scene
    factors = torch.linspace(0.6, 1.4, 9)
    actions = headroom.start_of(net).repeat(81, 1, 1)
    grid = torch.cartesian_prod(factors, factors) * GATE_MEAN
    actions[:, 2, 2:] = grid
    of_grid = headroom.score(net, reward, crop, actions)[0].max().item()
    psnr, value = headroom.gate_oracle(net, reward, crop, 60)["best gates"]
    assert psnr > of_grid - 0.01 and of_grid > 0.01
    assert value == pytest.approx(psnr / 40, rel=0.2)  # 40 dB are the whole reward


def test_means_have_the_interval_of_the_photographs():
    """Four photographs under two tasks: Student's, three degrees of freedom."""
    gains = np.array([0.1, 0.5, 0.3, 0.9])
    rows = pd.DataFrame(dict(photo=[*"abcd"], what="learnable", psnr=gains, reward=gains / 1e3))
    rows = pd.concat([rows.assign(task=task) for task in ("rain", "haze")])
    low, high = scipy.stats.t.interval(0.95, 3, gains.mean(), scipy.stats.sem(gains))
    wanted = f"+0.450 [{low:+.3f}, {high:+.3f}]"
    assert headroom.mean_of_tasks(rows, "learnable", "psnr") == wanted
    last = headroom.table(rows, ["learnable"], "reward", "gain").splitlines()[-1]
    assert last.split("|")[2].strip() == f"+4.5 [{10 * low:+.1f}, {10 * high:+.1f}]"
    said = headroom.conclusion(pd.concat([rows, rows.assign(what="best gates")]))
    assert f"learned +4.5 [{10 * low:+.1f}, {10 * high:+.1f}] 1e-4 of reward and {wanted}" in said
    assert "of which a task has 4 or more" in said and "rates have no gradient here" in said


def test_backpropagation_moves_the_gates_uphill(scene, tmp_path):
    net, reward, crop = scene
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


def test_a_run_is_measured_against_the_model_it_began_with(small, init, photos, tmp_path, capsys):
    flags = "--freeze-backbone", "--steps", 2, "--rewards", "psnr", "--tasks", "derain", "deblur"
    train.main(small("run", *flags))
    for i in range(6, 20):
        write(photos / f"{i}.png", width=64, height=48, seed=i)
    flags = ["--images", 2, "--crop", 32, "--ascent", 2, "--learning", 2, "--device", "cpu"]
    flags += ["--out", tmp_path / "out"]
    argv = [str(flag) for flag in ["--ckpt", tmp_path / "run", *flags]]
    assert headroom.main(argv) is None
    said = capsys.readouterr().out
    assert "4 crops of 32 px of" in said and "If the truth were known" in said
    assert (tmp_path / "out/headroom.png").stat().st_size > 0
    stored = pd.read_csv(tmp_path / "out/headroom.csv")
    run = stored[stored["what"] == "this run"]
    assert len(run) == 4 and run["psnr"].notna().all() and {*run["task"]} == {"derain", "deblur"}
    assert f"of {photos}, rewards psnr," in said  # the run's own
    # of a run with a judge: what can be measured without it, on the tasks it was trained on
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    config["scoring"]["rewards"], config["samples"]["tasks"] = "psnr,qwen", ["derain"]
    path.write_text(json.dumps(config))
    given = headroom.Config(str(tmp_path / "run"))
    _, _, split = headroom.load(given)
    assert "without the judge, by --rewards psnr" in capsys.readouterr().out
    assert given.rewards == "psnr" and {s.task for s in split.val} == {"derain"}
    assert "there is no checkpoint" in fails(capsys, headroom.main, ["--ckpt", photos])
