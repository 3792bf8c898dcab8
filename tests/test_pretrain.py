"""Pre-training: its crops, its optimizers, its schedule, and that a stop changes nothing."""

import math
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, logged, samples_of, small_adair, without_times, write

import data
from diffusion import Chain
from experiments import pretrain
from metrics import psnr
from model import Encoding, load_adair, load_restorer, read_checkpoint

# ------------------------------------------------------------------------------------------- crops


def test_crops_follow_the_cycle_and_mix_real_and_synthesised_pairs(tmp_path):
    samples = samples_of(tmp_path / "photos", 3)
    for i in range(3):
        for folder, name in (("rainy", f"rain-{i}"), ("gt", f"norain-{i}")):
            write(tmp_path / f"data/Train/Derain/{folder}/{name}.png", seed=i)
    samples += data.find_adair_train(tmp_path / "data", ["derain"])[0]
    crops = pretrain.VariedCrops(samples, 32, 0, ["derain", "camera"])
    names = [crops[n][2:4] for n in range(100)]
    assert [task for task, _ in names] == ["derain", "camera"] * 50
    real = sum("rain-" in name for task, name in names if task == "derain")
    assert 15 < real < 35  # half of 50
    assert not any("rain-" in name for task, name in names if task == "camera")


def test_crops_stay_aligned_and_vary_in_strength_and_exposure(tmp_path):
    """At σ = 15 and a strength s a crop differs from its truth by noise of 15 s."""
    samples = [s for s in samples_of(tmp_path, 1) if s.task == "denoise15"]
    crops = pretrain.VariedCrops(samples, 48, 0, ["denoise15"])
    pairs = [crops[n][:2] for n in range(200)]
    distances = [psnr(*pair) for pair in pairs]
    assert min(distances) > 22 and sum(d > 50 for d in distances) >= 1  # clean but for 8 bits
    assert sum(d < 28 for d in distances) > 130 and sum(28 < d < 50 for d in distances) > 5
    brightness = [gt.mean().item() for _, gt in pairs]
    assert max(brightness) > 1.5 * min(brightness)


def test_a_real_pair_is_shown_in_one_look(tmp_path):
    """Whatever exposure and colour: what differs is the degradation, here none."""
    same = str(write(tmp_path / "a.png"))
    crops = pretrain.VariedCrops([data.Sample("deblur", "a", same, same)], 48, 0, ["deblur"])
    for n in range(8):
        degraded, gt, *_ = crops[n]
        assert (degraded - gt).abs().max() < 0.003  # rounding to 8 bits
    assert not torch.allclose(crops[0][1].mean(), crops[1][1].mean(), atol=1e-3)


def test_black_is_raised_for_both_images_alike_but_never_for_haze_or_in_low_light():
    """look(x) is linear in x where there is no gamma: what an edge of 0.5 becomes says the veil,
    and what black becomes its light. Of blur two truths in five are pale, of
    other tasks one in five."""
    black, white = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    shares = dict(derain=(0.2, 0.35), camera=(0.2, 0.35), deblur=(0.4, 0.6), dehaze=(0, 0))
    for task, (share, most) in (shares | dict(lowlight=(0, 0))).items():
        raised = 0
        for n in range(400):
            rng = np.random.default_rng(n)
            look = pretrain.another_look(0.5 * white, rng, task)
            dark, bright = look(black), look(white)
            raised += bool((dark > 0).any())
            assert torch.equal(dark, dark[:1, :1, :1].expand_as(dark)) and dark.max() <= most
            if not (dark > 0).any():
                continue
            grey = look(0.5 * white)  # between them, by the gamma
            power = (((grey - dark) / (bright - dark)).log() / math.log(0.5)).mean().item()
            images = torch.rand(2, 3, 8, 8)  # of a pair
            wanted = dark + (bright - dark) * images**power
            assert torch.allclose(torch.stack([*map(look, images)]), wanted, atol=1e-5)
            assert (bright - dark).min() >= (1 - most) * 0.9 - 1e-6  # what is left of the contrast
        assert raised == pytest.approx(400 * share, abs=40 * (share > 0))
        seldom = 0
        for n in range(400):
            look = pretrain.another_look(0.5 * white, np.random.default_rng(n), task, pale=0.5)
            seldom += bool((look(black) > 0).any())
        assert seldom == pytest.approx(200 * share, abs=30 * (share > 0))


# ------------------------------------------------------------------------- skips and optimizers


def test_skips_are_dropped_one_by_one_and_nothing_else_is():
    whole = Encoding(*(torch.ones(2000, 1, 1, 1) for _ in range(5)))
    rngs = [np.random.default_rng(n) for n in range(2000)]
    kept = pretrain.drop_skips(whole, 0.3, rngs)
    assert torch.equal(kept.x, whole.x) and torch.equal(kept.latent, whole.latent)
    skips = torch.stack([kept.skip1, kept.skip2, kept.skip3]).flatten(1)  # (3, 2000)
    assert set(skips.unique().tolist()) == {0, 1}
    assert skips.mean(dim=1).tolist() == pytest.approx([0.7] * 3, abs=0.04)  # 4 deviations
    assert torch.corrcoef(skips).triu(1).abs().max() < 0.09  # each by itself
    everything = pretrain.drop_skips(whole, 0.0, rngs)
    assert all(map(torch.equal, everything, whole))
    again = pretrain.drop_skips(Encoding(*(t[:1] for t in whole)), 0.3, [np.random.default_rng(0)])
    assert all(torch.equal(a, k[:1]) for a, k in zip(again, kept))  # whatever else is in the batch


def test_muon_has_the_matrices_and_steps_in_all_directions_alike(tmp_path):
    """Its step on a 1×1 convolution is nearly orthogonal: singular values around the rate, where
    those of the gradient differ by far. (Newton and Schulz's steps end between 0.7 and 1.2.)"""
    net = small_adair()
    config = pretrain.Config(muon_lr=0.1, lr=0.0)
    muon, adam = pretrain.optimizers_of(net, config)
    fixed = ("rate_conv.", "para2")
    learned = {n: p for n, p in net.named_parameters() if not any(name in n for name in fixed)}
    sizes = [sum(p.numel() for p in o.param_groups[0]["params"]) for o in (muon, adam)]
    assert sum(sizes) == sum(p.numel() for p in learned.values()) and sizes[0] > sizes[1]
    before = {n: p.detach().clone() for n, p in learned.items()}
    net(torch.rand(1, 3, 32, 32)).square().mean().backward()
    muon.step(), adam.step()
    name = "encoder_level2.0.ffn.project_in.weight"
    assert torch.equal(before["output.weight"], net.output.weight)  # Adam's, at rate 0
    weight, gradient = learned[name], learned[name].grad.flatten(1)
    decayed = before[name] * (1 - 0.1 * 0.01)
    step = (decayed - weight.detach()).flatten(1)
    values = torch.linalg.svdvals(step) / 0.1 / max(1, step.shape[0] / step.shape[1]) ** 0.5
    spread = torch.linalg.svdvals(gradient)
    assert 0.5 < values.median() and values.max() < 1.3 and values.min() > 0.02
    assert spread.max() / spread.median() > 3 * values.max() / values.median()
    assert (step * gradient).sum() > 0  # downhill


def test_the_rates_rise_stay_and_fall():
    config = pretrain.Config(steps=1000, decay=100)
    factors = [pretrain.rate_factor(step, config) for step in (0, 99, 199, 500, 900, 950, 999)]
    assert factors == pytest.approx([1 / 200, 0.5, 1, 1, 1, 0.5, 0.01])


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def pretraining(photos, tmp_path):
    """Flags of a pre-training that takes seconds."""

    def flags(name, *more):
        size = "--crop 16 32 --batch-size 4 --steps 28 --decay 1".split()
        size += ["--device", "cpu"]
        base = ["--data-root", photos, "--out", tmp_path / name, *size]
        return [str(flag) for flag in (*base, *more)]

    return flags


def test_pretraining_that_was_ended_reaches_the_same_weights(
    pretraining, tmp_path, capsys, monkeypatch
):
    """SIGTERM in mid-training, in this process; kills, and those of the main job, are in
    test_runs.py."""
    new = "--dim 8 --blocks 1 1 1 1 --refinement 1".split()
    monkeypatch.setattr(pretrain, "TURN", 10)

    def ask():
        while len(logged(tmp_path / "ended")) < 20:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    pretrain.main(pretraining("ended", *new))
    step = read_checkpoint(tmp_path / "ended/last.pt")["step"]
    assert 20 <= step < 28 and f"stopped by SIGTERM, after step {step}" in capsys.readouterr().out
    pretrain.main(pretraining("ended", *new))
    pretrain.main(pretraining("whole", *new))
    whole, again = (
        read_checkpoint(tmp_path / name / "model.pt")["model"] for name in ("whole", "ended")
    )
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    assert load_adair(tmp_path / "whole/model.pt").config["rates"] == [0.25, 0.25]
    rows = [without_times(logged(tmp_path / name)) for name in ("whole", "ended")]
    assert rows[0] == rows[1] and [r["crop"] for r in rows[0]] == ([16] * 10 + [32] * 10 + [16] * 8)


def test_the_first_loss_without_skips_is_that_of_the_latent_alone(pretraining, tmp_path, init):
    """--drop-skip 1: what the model of --init returns when its three skips are 0."""
    flags = pretraining("p", "--init", init, "--steps", 1, "--drop-skip", 1, "--batch-size", 1)
    pretrain.main(flags)
    (row,), config = logged(tmp_path / "p"), pretrain.Config(data_root=flags[1], crop=(16, 32))
    net, (samples, _) = load_adair(init), pretrain.find_samples(config, None)
    crops = pretrain.VariedCrops(samples, 32, 0, config.cycle)
    crops.crop = 16
    batch = crops.collate([crops[0]])
    x, *skips, latent = net.encode(batch.degraded)
    without = net.decode(Encoding(x, *(torch.zeros_like(skip) for skip in skips), latent))
    assert row["loss/total"] == pytest.approx((without - batch.gt).abs().mean().item(), rel=1e-5)


def test_validation_tells_sources_apart(tmp_path, capsys):
    """Of a model that returns what it is given: input PSNRs in closed form, gains of 0."""
    net = small_adair(para1=0.1).requires_grad_(False)
    net.output.weight.zero_()  # what it adds to an image is nothing
    samples = []
    for name, offset in (("GOPR01_2", 10), ("GOPR01_3", 20), ("reds_train7", 40)):
        paths = [write(tmp_path / kind / f"{name}.png", seed=1) for kind in ("blur", "sharp")]
        flat = np.full((32, 32, 3), 100, np.uint8)
        write(paths[0], flat + np.uint8(offset)), write(paths[1], flat)
        samples.append(data.Sample("deblur", f"blur/{name}.png", *map(str, paths[::-1])))
    samples.append(samples[0]._replace(task="dehaze"))
    rows = pretrain.validate(net, samples, stop=None)
    assert rows["source"].tolist() == ["GOPR", "GOPR", "reds_train", "GOPR"]
    expected = [-20 * math.log10(offset / 255) for offset in (10, 20, 40, 10)]
    assert rows["input"].tolist() == pytest.approx(expected, abs=1e-3)
    assert rows["gain"].abs().max() < 1e-4
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for name, of in (("", 3), (", GOPR", 2)):  # pale, differences are three quarters as large
        mean = np.mean(expected[:of])
        cells = f"{mean:.2f} | 0.00 | 100.00 | {mean - 20 * math.log10(0.75):.2f} | 0.00 | 100.00"
        assert f"| deblur{name} | {of} | {cells} |" in said
    assert any(line.startswith("| deblur, reds_train | 1 |") for line in said)
    assert not any(line.startswith("| dehaze, ") for line in said)


def test_pretraining_goes_on_with_the_same_settings_only(pretraining, init, tmp_path, capsys):
    flags = pretraining("p", "--batch-size", 1, "--steps", 1, "--init", init)
    said = fails(capsys, pretrain.main, [*flags, "--dim", 8])
    assert "--dim goes with a new model" in said
    pretrain.main(flags)
    assert "began with other seed" in fails(capsys, pretrain.main, [*flags, "--seed", 5])
    torch.save({"step": 1}, tmp_path / "p/last.pt")
    assert "holds another model" in fails(capsys, pretrain.main, flags)


def test_a_chain_learns_from_the_marginals_of_its_steps_and_from_what_it_predicts():
    """x_t has the mean and the deviation of q, or, one time in two, less noise around the line from
    y to what the network predicts first; at t = T it is drawn around y, where the chain starts."""
    net, n = Chain(width=8), 800
    gt, degraded = torch.rand(n, 3, 8, 8), torch.rand(n, 3, 8, 8)
    batch = data.Batch(degraded, gt, ["derain"] * n, [""] * n, range(n))
    seen = []
    net.predict = lambda x, y, t: seen.append((x, t)) or y / 2
    rngs = [np.random.default_rng((0, i)) for i in range(n)]
    loss = pretrain.chain_loss(net, batch, None, rngs)
    (first, times), (x, t) = seen
    x0, y = 2 * gt - 1, 2 * degraded - 1
    assert torch.equal(first, y) and set(times.tolist()) == {4}
    assert loss.item() == pytest.approx(
        (y / 2 - x0).square().mean(dim=(1, 2, 3)).sqrt().mean().item()
    )
    assert (t == 4).float().mean().item() == pytest.approx(5 / 8, abs=0.06)
    for step in (1, 2, 3, 4):
        eta = net.eta[step] if step < 4 else 1.0
        off = [(x - a - eta * (y - a))[t == step] for a in (x0, y / 2)]
        of_truth, of_own = (z.flatten(1).std(dim=1) / net.kappa / net.eta[step] ** 0.5 for z in off)
        full = (of_truth - 1).abs() < 0.2
        most = 0.65 if step == 1 else 0.9  # half of them; but at 1 alone the lines are far apart
        assert 0.35 < full.float().mean() < most
        assert of_own[~full].max() < 1.2 and of_own[~full].min() < 0.3


def test_a_chain_is_pretrained_and_goes_on(pretraining, tmp_path, init, capsys):
    flags = pretraining("chain", "--model", "chain", "--batch-size", 1, "--steps", 2)
    pretrain.main(flags)
    net = load_restorer(tmp_path / "chain/model.pt")
    assert isinstance(net, Chain) and len(logged(tmp_path / "chain")) == 2
    pretrain.main(flags)
    assert "goes on at step 2" in capsys.readouterr().out
    flags = pretraining("other", "--model", "chain", "--init", init)
    assert "holds no chain" in fails(capsys, pretrain.main, flags)
    flags = pretraining("other", "--model", "chain", "--dim", 8)
    assert "--dim is of AdaIR" in fails(capsys, pretrain.main, flags)
    flags = pretraining("other", "--model", "chain", "--drop-skip", 0.1)
    assert "--drop-skip is of AdaIR" in fails(capsys, pretrain.main, flags)


def test_a_list_says_what_is_set_aside(tmp_path):
    samples = samples_of(tmp_path / "photos", 3, ["derain"])
    (tmp_path / "list.txt").write_text("# these\nphotos/1.png\n")
    train, val = data.split_listed(samples, tmp_path / "list.txt")
    assert [s.name for s in val] == ["1.png"] and [s.name for s in train] == ["0.png", "2.png"]
    (tmp_path / "list.txt").write_text("other/1.png\n")
    with pytest.raises(data.DataError, match="line 1: .other/1.png. is no training image"):
        data.split_listed(samples, tmp_path / "list.txt")


def test_the_list_of_a_folder_and_of_photos_sets_both_aside(tmp_path, photos):
    """Photos stand under seven tasks: those of the list are not trained on, and do not fill the
    validation either, which the folder's own images are for."""
    for i in range(4):
        for folder, name in (("rainy", f"rain-{i}"), ("gt", f"norain-{i}")):
            write(tmp_path / f"data/Train/Derain/{folder}/{name}.png", seed=i)
    (tmp_path / "list.txt").write_text("rainy/rain-1.png\nphotos/2.png\n")
    given = dict(data_root=str(tmp_path / "data"), photos=(str(photos),), crop=(16,))
    listed = str(tmp_path / "list.txt")
    config = pretrain.Config(**given, cycle=("derain", "camera"), val_list=listed)
    train, val = pretrain.find_samples(config, stop=None)
    assert [s.name for s in val] == ["Train/Derain/rainy/rain-1.png"]
    assert not any("rain-1" in s.name or s.name == "2.png" for s in train)
    assert sum(bool(s.degraded) for s in train) == 3 and any(s.name == "1.png" for s in train)


def test_rooms_of_haze_are_photographs_for_all_tasks_unless_set_aside(tmp_path):
    for i in range(1, 5):
        write(tmp_path / f"data/Train/Dehaze/synthetic/part1/{i}_1.png", seed=i)
        write(tmp_path / f"data/Train/Dehaze/original/{i}.png", seed=i)
    (tmp_path / "list.txt").write_text("synthetic/part1/2_1.png\n")
    given = dict(data_root=str(tmp_path / "data"), crop=(16,), val_list=str(tmp_path / "list.txt"))
    given |= dict(cycle=("dehaze",))
    train, _ = pretrain.find_samples(pretrain.Config(**given), None)
    assert all(s.degraded for s in train)  # unless they are asked for
    train, _ = pretrain.find_samples(pretrain.Config(**given, rooms=("dehaze",)), None)
    rooms = [s for s in train if not s.degraded]
    assert sorted({s.task for s in rooms}) == sorted(data.TASKS) and len(rooms) == 3 * 7
    assert {Path(s.gt).name for s in rooms} == {"1.png", "3.png", "4.png"}


def test_blurred_frames_are_photographs_for_all_tasks_but_blur_and_haze(tmp_path):
    for i in range(1, 5):
        for folder in ("blur", "sharp"):
            write(tmp_path / f"data/Train/Deblur/{folder}/{i}.png", seed=i)
    given = dict(data_root=str(tmp_path / "data"), crop=(16,), cycle=("deblur",))
    train, _ = pretrain.find_samples(pretrain.Config(**given, rooms=("deblur",)), None)
    pairs = [s for s in train if s.degraded]
    sharp, blurred = (
        [s.task for s in train if not s.degraded and f"/{folder}/" in s.gt]
        for folder in ("sharp", "blur")
    )
    assert sorted(sharp) == sorted([*data.TASKS] * len(pairs))
    assert sorted(blurred) == sorted(
        [t for t in data.TASKS if t not in ("deblur", "dehaze")] * len(pairs)
    )
