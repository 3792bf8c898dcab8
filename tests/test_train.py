"""train.py and experiments/pretrain.py as a user meets them: whole runs on tiny images, one step
against the equations, bad input."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import (
    cut_off,
    fails,
    logged,
    save_adair,
    small_adair,
    without_times,
    write,
)

import eval as evaluation
import judge
import mining
import runs
import study
import train
from config import DEMO_MODEL, parse
from data import TASKS, Crops, Sample, list_training, load_pair, middle
from experiments import bench, pretrain
from grpo import rollout
from metrics import evaluate_image, psnr
from model import load_adair, read_checkpoint, restore
from policy import policy_for
from rewards import Reward, parse_terms

RUN_FILES = (
    "config.json rewards.json hard.json metrics.jsonl last.pt best.pt "
    "curves.png samples.png rollouts.png report.md report.json"
).split()
METRICS = (
    "reward reward_std frac_reward_zero_std kl entropy clip_ratio advantage_abs advantage_rms "
    "ratio loss/total loss/rl loss/sup loss/cons psnr_best psnr_det grad_norm lr lr_heads "
    "step_time skipped rewards/psnr/mean rewards/task/std policy/1.r_h/mean "
    "policy/3.g_o/concentration"
).split()


# --------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_everything_a_run_folder_has(small, init, photos, tmp_path, capsys):
    assert train.main(small("run")) is None
    run, out = tmp_path / "run", capsys.readouterr().out
    assert all((run / name).stat().st_size > 0 for name in RUN_FILES)
    assert list(run.glob("events.out.tfevents*"))
    rows = logged(run)
    assert [r["step"] for r in rows] == list(range(1, 11)) and not {*METRICS} - {*rows[0]}
    on_policy = [r["ratio"] == pytest.approx(1) and r["clip_ratio"] == 0 for r in rows]
    assert all(on_policy) and rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] != 0
    for words in ("clip", "renormalised", "mean of tasks", str(run)):
        assert words in out
    stored = {r["term"]: r for r in json.loads((run / "rewards.json").read_text())}
    assert stored["psnr"]["weight"] == pytest.approx(0.381) and stored["lpips"]["weight"] == 0
    hard = json.loads((run / "hard.json").read_text())["rows"]
    assert sum(r.get("selected", False) for r in hard) == len(TASKS)  # of 4 images, for each task

    # "before" is the pre-trained model scored by hand, "after" the stored one
    report = json.loads((run / "report.json").read_text())
    _, val, held_out, _ = list_training(photos)
    net, reward = load_adair(init), Reward(parse_terms("default"))

    restorers = dict(before=lambda x: restore(net, x), after=evaluation.load(run, "cpu")[0])
    for name, restorer in restorers.items():
        for sample, found in zip(held_out, report[name], strict=True):
            row, restored, gt = evaluate_image(restorer, sample)
            rewards, _ = reward(restored[None, None], gt[None], gt[None], [sample.task])
            assert found["psnr"] == pytest.approx(row["psnr"], abs=1e-3)
            assert found["reward"] == pytest.approx(rewards.item(), abs=1e-3)
    assert report["before"] != report["after"]

    # validation, on other images, at the start, every 5 steps and at the end
    assert [found["step"] for found in report["validation"]] == [0, 5, 10]
    rows = [evaluate_image(lambda x: restore(net, x), sample)[0] for sample in val]
    start = report["validation"][0]["psnr"]
    assert start == pytest.approx({r["task"]: r["psnr"] for r in rows}, abs=1e-3)


def test_rates_rise_and_fall(small, tmp_path):
    flags = "--warm-up", 4, "--schedule", "linear", "--lr", 1e-3, "--head-lr-factor", 2
    train.main(small("run", *flags, "--ema", 0.97))
    rows = logged(tmp_path / "run")
    wanted = [1e-3 * min(1, (k + 1) / 4) * (1 - k / 10) for k in range(10)]
    assert [row["lr"] for row in rows] == pytest.approx(wanted)
    assert [row["lr_heads"] for row in rows] == pytest.approx([2 * rate for rate in wanted])


def test_the_average_of_weights():
    """An exponential moving average over (1 + n) / (10 + n) at most, and with decay 0 the last."""
    for decay in (0.97, 0.25, 0.0):
        net = torch.nn.Linear(1, 1, bias=False)
        averaged, expected = runs.averaged(net, decay), None
        for n, value in enumerate((1.0, 2.0, 4.0, 3.0)):
            net.weight.data.fill_(value)
            averaged.update_parameters(net)
            keep = min(decay, (1 + n) / (10 + n))
            expected = value if n == 0 else keep * expected + (1 - keep) * value
        assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_sft_control_moves_the_backbone_alone(small, init, tmp_path):
    train.main(small("sft", "--objective", "sft", "--steps", 3))
    stored, start = read_checkpoint(tmp_path / "sft/last.pt"), load_adair(init)
    heads = policy_for(start).state_dict()
    assert all(torch.equal(v, heads[k]) for k, v in stored["policy"].items() if "out" in k)
    assert not torch.equal(stored["model"]["output.weight"], start.output.weight)
    report = json.loads((tmp_path / "sft/report.json").read_text())
    assert all(0 < row["reward"] < 1 for row in report["after"])  # measured, not learned from


def test_without_heads_the_backbone_learns_from_the_best_or_from_any(small, init, tmp_path):
    """Frozen heads stay the pre-trained model's; a random rollout is another one than the best."""
    found = {}
    for name, flags in (("best", ()), ("random", ("--supervise", "random"))):
        train.main(small(name, "--freeze-heads", "--steps", 3, "--tasks", "derain", *flags))
        stored = read_checkpoint(tmp_path / name / "last.pt")
        assert all(torch.equal(v, stored["ref"][k]) for k, v in stored["policy"].items())
        found[name] = stored["model"]["output.weight"]
    start = load_adair(init).output.weight
    assert not torch.equal(found["best"], start) and not torch.equal(*found.values())


def test_reward_ascent_follows_the_gradient_of_the_reward(small, tmp_path):
    """Adam's first step has the sign of the gradient: for PSNR alone, that of the squared error."""
    net = small_adair()
    net.output.weight.data *= 0.1  # what it adds is small: a PSNR above 10 dB
    save_adair(tmp_path / "near.pt", net)
    flags = ["--objective", "reward", "--rewards", "psnr", "--init", tmp_path / "near.pt"]
    flags += ["--tasks", "denoise", "--steps", 1, "--batch-size", 1, "--lr", 1e-4]
    train.main(small("run", *flags))
    folder = tmp_path / "run"
    config = parse(small("again", *flags))
    samples = study.usable_samples(config.samples, 1)[0]
    hard = mining.load_hard(folder / "hard.json", mining.model_digest(net), samples)
    degraded, gt, *_ = Crops(hard, config.samples.crop, config.seed)[0]
    (net(degraded[None]).clamp(0, 1) - gt).square().mean().backward()
    moved = load_adair(folder / "last.pt").output.weight - net.output.weight
    certain = net.output.weight.grad.abs() > 1e-6
    assert certain.float().mean() > 0.9
    assert torch.equal(moved.sign()[certain], -net.output.weight.grad.sign()[certain])


def test_without_consistency_and_with_difficulty(small, tmp_path):
    """λ_cons = 0 takes L_cons out of the sum; difficulty weighs a crop by the PSNR that its
    deterministic output has, by hand."""
    flags = "--steps", 1, "--tasks", "derain", "--init", DEMO_MODEL
    train.main(small("plain", *flags))
    train.main(small("alone", *flags, "--lambda-cons", 0, 0))
    train.main(small("weighed", *flags, "--weighting", "difficulty"))
    plain, alone, weighed = (logged(tmp_path / n)[0] for n in ("plain", "alone", "weighed"))
    assert alone["loss/total"] == pytest.approx(alone["loss/rl"] + 0.35 * alone["loss/sup"])
    assert plain["loss/total"] == pytest.approx(alone["loss/total"] + 0.2 * plain["loss/cons"])
    close = (plain["psnr_det"] - 10) / 40
    assert 0.1 < close < 0.9 and abs(close - 0.5) > 0.01
    assert weighed["loss/sup"] == pytest.approx(2 * close * plain["loss/sup"], rel=1e-3)
    wanted = 2 * (1 - close) * plain["advantage_abs"]
    assert weighed["advantage_abs"] == pytest.approx(wanted, rel=1e-3)


def test_workers_and_reused_scores_change_nothing(small, tmp_path):
    """Loading in other processes; mining taken from an earlier run's file."""
    flags = "--batch-size", 2, "--steps", 2
    train.main(small("a", *flags))
    edited = json.loads((tmp_path / "a/hard.json").read_text())
    for row in edited["rows"]:
        row["psnr"] += 100
    (tmp_path / "scores.json").write_text(json.dumps(edited))
    train.main(small("b", *flags, "--workers", 2, "--scores", tmp_path / "scores.json"))
    assert json.loads((tmp_path / "b/hard.json").read_text()) == edited
    a, b = (without_times(logged(tmp_path / name)) for name in "ab")
    assert a == b and len(a) == 2


def test_what_was_measured_before_is_taken_over_from_a_run_of_the_same_start(
    small, tmp_path, photos, capsys
):
    """Of the run whose hard.json is given; not for another reward, nor for images that changed."""
    flags = ["--steps", 1, "--tasks", "derain", "--scores", tmp_path / "a/hard.json"]
    train.main(small("a", *flags[:4]))
    marked = json.loads((tmp_path / "a/report.json").read_text())
    marked["before"][0]["psnr"] += 100
    (tmp_path / "a/report.json").write_text(json.dumps(marked))
    capsys.readouterr()
    train.main(small("b", *flags))
    assert f"before: taken over from {tmp_path / 'a/report.json'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "b/report.json").read_text())["before"] == marked["before"]
    train.main(small("c", *flags, "--rewards", "psnr"))
    write(photos / "5.png", width=64, height=48, seed=9)
    train.main(small("d", *flags))
    assert "taken over from" not in capsys.readouterr().out


def test_the_middle_is_measured_where_it_is_asked_for(small, tmp_path):
    """Of images of 64×48 px the middle 32."""
    train.main(small("run", "--steps", 0, "--epochs", 1, "--tasks", "derain", "--measure-crop", 32))
    row = json.loads((tmp_path / "run/report.json").read_text())["after"][0]
    sample = list_training(tmp_path / "photos", tasks=["derain"]).held_out[0]
    degraded, gt = load_pair(sample._replace(box=(16, 8, 48, 40)))
    assert degraded.shape == (3, 32, 32)
    assert row["psnr_in"] == pytest.approx(psnr(degraded, gt).item())
    assert middle(sample, 500).box == (0, 0, 64, 48)


def test_epochs_win_over_the_presets_steps_and_fill_the_last_step(small, tmp_path):
    flags = small("run", "--epochs", 1, "--batch-size", 2)
    at = flags.index("--steps")
    train.main(flags[:at] + flags[at + 2 :])
    assert len(logged(tmp_path / "run")) == -(
        -len(TASKS) // 2
    )  # of one image a task, filled up from the next epoch
    assert read_checkpoint(tmp_path / "run/last.pt")["seen"] == 2 * -(-len(TASKS) // 2)


def test_a_resumed_run_refuses_other_images(small, photos, tmp_path, capsys):
    train.main(small("run", "--steps", 1))
    stored = json.loads((tmp_path / "run/hard.json").read_text())["files"]
    assert 1 <= len(stored) <= 3
    write(tmp_path / next(iter(stored)), width=64, height=48, seed=77)
    assert "changed since" in fails(capsys, train.main, ["--resume", tmp_path / "run"])


def test_a_frozen_backbone_stays(small, init, tmp_path):
    flags = "--freeze-backbone", "--inner-epochs", 3, "--kl", "exact", "--steps", 4
    train.main(small("frozen", *flags))
    stored = read_checkpoint(tmp_path / "frozen/last.pt")["model"]
    assert all(torch.equal(v, stored[k]) for k, v in load_adair(init).state_dict().items())
    rows = logged(tmp_path / "frozen")
    assert any(abs(r["ratio"] - 1) > 1e-4 for r in rows)  # a group used three times is off policy
    assert rows[0]["kl"] > 0


def test_tasks_and_lists_choose_what_is_trained_on(small, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    for content, words in (
        (b"\n", "list.txt names no image"),
        (b"0.png\n\xff.png\n", "list.txt, line 2: '\\udcff.png' is no training image"),
    ):
        listed.write_bytes(content)
        assert words in fails(capsys, train.main, small("run", "--list", listed))
    listed.write_text("0.png\n\n./1.png\n2.png\n3.png\n")
    train.main(small("run", "--tasks", "denoise", "dehaze", "--list", listed, "--steps", 1))
    rows = json.loads((tmp_path / "run/hard.json").read_text())["rows"]
    assert {r["task"] for r in rows} == {"denoise15", "denoise25", "denoise50", "dehaze"}
    assert {r["name"] for r in rows} == {"0.png", "1.png"}
    write(tmp_path / "d/Train/Deblur/blur/1.png"), write(tmp_path / "d/Train/Deblur/sharp/1.png")
    flags = small("b", "--tasks", "deblur", "dehaze", "--data-root", tmp_path / "d")
    assert "has no training images for dehaze" in fails(capsys, train.main, flags)


def test_a_data_folder_is_counted_and_repeated_as_adair_does(small, tmp_path, capsys):
    """One flag decides on repeats, however the samples are selected."""
    for i in range(6):
        for folder in ("Derain/rainy/rain-", "Derain/gt/norain-", "Deblur/blur/", "Deblur/sharp/"):
            write(tmp_path / f"d/Train/{folder}{i}.png", width=32, height=32, seed=i)
    for select in ("hard", "random", "all"):
        for repeats, times in (("none", dict(derain=1, deblur=1)), ("adair", None)):
            times = times or dict(derain=120, deblur=5)
            flags = ["--data-root", tmp_path / "d", "--select", select, "--repeats", repeats]
            config = parse(small(f"{select}-{repeats}", *flags))
            samples, *_ = study.usable_samples(config.samples, 1)
            folder = tmp_path / f"{select}-{repeats}"
            folder.mkdir()
            with runs.Run(folder, runs.Stop(), "") as run:
                found = mining.hard_samples(config, run, small_adair(), samples)
            images = 4 if select == "all" else 1  # of 4 that are not set aside
            assert {t: sum(s.task == t for s in found) for t in times} == {
                t: images * n for t, n in times.items()
            }
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "| Train/Derain/rainy + Train/Derain/gt | 6 | 200 | Rain100L | 0 |" in lines
    assert "| Train/Denoise | 0 | 5144 | BSD400 + WED | 0 |" in lines


# -------------------------------------------------------------------------------- one step, by hand


def post_train(folder, net, reward, samples, *flags):
    """`train.post_train` on these samples, all of which are trained on: its State."""
    folder.mkdir(exist_ok=True)
    argv = ["--device", "cpu", "--hard-ratio", 1, "--warm-up", 0, "--schedule", "constant", *flags]
    config = parse([str(flag) for flag in argv])
    with runs.Run(folder, runs.Stop(), "", save_every=10_000) as run:
        return config, train.post_train(config, run, net, reward, samples, [])


def test_one_step_is_what_the_equations_say(tmp_path):
    """Loss and gradients of a step on two images against the plain step of bench.py, image by image
    with torch.distributions. Rates of 0 leave the weights where they were."""
    samples = []
    for i, task in enumerate(("deblur", "derain")):
        paths = [
            write(tmp_path / f"{i}{k}.png", width=32, height=32, seed=2 * i + k) for k in (0, 1)
        ]
        samples.append(Sample(task, str(i), *map(str, paths)))
    net, score = small_adair(para1=0.1), Reward(parse_terms("default"))
    flags = (
        "--group-size 3 --kl-beta 0.5 --entropy-tau 0.02 --crop 32 --batch-size 2 --lr 0 --steps 1"
    )
    config, state = post_train(tmp_path / "run", net, score, samples, *flags.split())
    model, policy = state.live.values()
    modules = (*model.named_parameters(), *policy.named_parameters())
    found = {name: p.grad.clone() for name, p in modules if p.grad is not None}
    model.zero_grad(), policy.zero_grad()

    crops = Crops(samples, 32, 0)
    batch = crops.collate([crops[0], crops[1]])
    with torch.no_grad():
        encoding = model.encode(batch.degraded)
        generators = study.generators_of(config, batch.numbers)
        group = rollout(model, policy, encoding, 3, generators)
    loss = bench.plain_step(
        model,
        policy,
        state.reference,
        score,
        batch=batch,
        actions=group.actions,
        beta=0.5,
        tau=0.02,
        eps=1e-12,
    )
    loss.backward()
    assert logged(tmp_path / "run")[0]["loss/total"] == pytest.approx(loss.item(), rel=1e-4)
    modules = (*model.named_parameters(), *policy.named_parameters())
    wanted = {name: p.grad for name, p in modules if p.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 100
    for name, gradient in wanted.items():
        atol = 1e-3 * gradient.abs().max().item() + 1e-7
        assert torch.allclose(found[name], gradient, rtol=1e-2, atol=atol), name


def test_reward_rises_and_does_not_when_advantages_are_shuffled(tmp_path):
    """Does the policy learn? A frozen backbone, a handful of hazed and dark images, 40 steps."""
    net, score, samples, side = load_adair(DEMO_MODEL), Reward(parse_terms("psnr")), [], 32
    photos = [s for s in list_training(None).train if s.task in ("dehaze", "lowlight")]
    for s in photos[::5]:
        paths = []
        for kind, image in zip(("degraded", "gt"), load_pair(s)):
            pixels = (image[:, 60 : 60 + side, 60 : 60 + side] * 255).round().byte()
            path = tmp_path / f"{kind}/{s.task}-{s.name}.png"
            paths.append(str(write(path, pixels.permute(1, 2, 0).numpy())))
        samples.append(Sample(s.task, s.name, paths[1], paths[0]))
    degraded, gt = (torch.stack(images) for images in zip(*map(load_pair, samples)))
    flags = (
        "--freeze-backbone --group-size 8 --kl-beta 0 --entropy-tau 0 --concentration 10 --crop 32"
    )
    flags += f" --lr 1e-3 --head-lr-factor 10 --steps 40 --batch-size {len(samples)}"

    def deterministic(policy):
        with torch.no_grad():
            restored = net(degraded, policy.mean())[:, None]
            return score(restored, degraded, gt, [s.task for s in samples])[0].mean().item()

    start = deterministic(policy_for(net))
    _, state = post_train(tmp_path / "run", net, score, samples, *flags.split())
    flags += " --shuffle-advantages"
    _, shuffled = post_train(tmp_path / "control", net, score, samples, *flags.split())
    learned, control = (deterministic(s.averaged.module["policy"]) for s in (state, shuffled))
    print(f"mean reward: start {start:.4f}, learned {learned:.4f}, shuffled {control:.4f}")
    assert learned > start + 0.005  # of a reward whose 0.025 is 1 dB
    assert control < start + 0.3 * (learned - start)


def test_rollouts_vary_as_much_as_the_heads_start_with():
    """On the demo model: the rollouts' mean PSNR within 0.5 dB of the deterministic output, and
    rewards that differ by far more than eight computations of the same rollout do."""
    net, score = load_adair(DEMO_MODEL), Reward(parse_terms("default"))
    policy, losses, deviations, rounding = policy_for(net), [], [], []
    for sample in [s for s in list_training(None).val if s.name in ("kodim03.png", "kodim15.png")]:
        degraded, gt = (t[None, :, :64, :64] for t in load_pair(sample))
        with torch.no_grad():
            encoding = net.encode(degraded)
            y_det = net.decode(encoding, policy.mean())
            same = net.decode(encoding, policy.mean(), copies=8)[None]
        group = rollout(net, policy, encoding, 8, [torch.Generator().manual_seed(0)])
        losses.append((psnr(y_det, gt) - psnr(group.restored[0], gt).mean()).item())
        for y, found in ((group.restored, deviations), (same, rounding)):
            found.append(score(y, degraded, gt, [sample.task])[0].std().item())
    assert len(losses) == 2 * len(TASKS) and np.mean(losses) < 0.5, losses
    print(f"loss {np.mean(losses):.3f} dB, from {min(deviations):.1e} to {max(deviations):.1e}")
    assert min(deviations) > 20 * max(rounding) and np.median(deviations) > 1e-4, (
        deviations,
        rounding,
    )


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hard-ratio", "0"], "--hard-ratio is 0.0: it should be greater than 0"),
        (["--hard-ratio", "1.5"], "--hard-ratio is 1.5: it should be less than or equal to 1"),
        (["--hard-ratio", "much"], "--hard-ratio"),
        (["--crop", "100"], "--crop is 100: it should be a multiple of 8"),
        (["--objective", "sft", "--freeze-backbone"], "would train nothing"),
        (["--freeze-heads", "--freeze-backbone"], "would train nothing"),
        (["--objective", "reward", "--supervise", "random"], "--supervise does nothing"),
        (["--objective", "sft", "--freeze-heads"], "leave --freeze-heads out"),
        (["--freeze-backbone", "--lambda-sup", "3", "3"], "--lambda-sup does nothing"),
        (["--freeze-heads", "--inner-epochs", "2"], "--inner-epochs does nothing"),
        (
            ["--lambda-sup", "-1", "0"],
            "--lambda-sup is -1.0: it should be greater than or equal to 0",
        ),
        (["--concentration", "9999"], "--concentration is 9999"),
        (["--scores", "/nowhere.json"], "there is no file /nowhere.json"),
        (["--rewards", "beauty"], "no term 'beauty'"),
        (["--data-root", "/nowhere"], "there is no folder /nowhere"),
        (["--init", "/nowhere.pt"], "there is no checkpoint /nowhere.pt"),
        (["--group-size", "0"], "--group-size is 0"),
        (["--steps", "0", "--epochs", "0"], "nothing would be trained"),
        (["--max-minutes", "inf"], "--max-minutes is inf: it should be a finite number"),
        (["--lr", "nan"], "--lr is nan"),
        (["--device", "cuda:99"], "'cuda:99' is no device of this machine"),
        (["--colour", "red"], "Unrecognized options: --colour"),
        (["--crop", "8"], "need 11"),
        (["--mask-rule", "adair"], "would change what it computes"),
    ],
)
def test_impossible_flags_are_one_sentence(small, capsys, flags, words):
    assert words in fails(capsys, train.main, small("run", *flags))


def test_another_seed_draws_other_actions_and_another_crop_too(small):
    drawn = {}
    for seed in (0, 1):
        config = parse(small("run", "--seed", seed))
        for n, generator in zip((7, 8), study.generators_of(config, (7, 8))):
            drawn[seed, n] = torch.rand(1, generator=generator).item()
    assert len(set(drawn.values())) == 4
    (again,) = study.generators_of(parse(small("run", "--seed", 1)), (8,))
    assert torch.rand(1, generator=again).item() == drawn[1, 8]


def test_resume_wants_a_run_folder_and_nothing_else(small, tmp_path, capsys):
    assert "/nowhere is no run folder" in fails(capsys, train.main, ["--resume", "/nowhere"])
    config = parse(small("run"))
    runs.save_json(tmp_path / "config.json", dataclasses.asdict(config))
    said = fails(capsys, train.main, ["--resume", tmp_path, "--lr", 1])
    assert "keeps its settings" in said
    again = parse(["--resume", str(tmp_path), "--max-minutes", "3"])
    assert again.training.max_minutes == 3 and again.training.lr == config.training.lr
    early = dataclasses.asdict(config)
    del early["samples"]["draws"]
    runs.save_json(tmp_path / "config.json", early)
    assert "is not of this program and version" in fails(capsys, train.main, ["--resume", tmp_path])
    (tmp_path / "config.json").write_text('{"steps": 3}')
    assert "is not of this program and version" in fails(capsys, train.main, ["--resume", tmp_path])


def test_an_existing_run_folder_is_left_alone(small, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("precious")
    assert "exists: continue it with --resume" in fails(capsys, train.main, small("run"))
    assert (tmp_path / "run/notes.txt").read_text() == "precious"


def test_broken_images_are_named_and_counted_and_the_run_goes_on(small, photos, tmp_path, capsys):
    cut_off(photos / "1.png")  # header intact, pixels cut off
    (photos / "2.png").write_bytes(b"nothing")
    write(photos / "3.png", width=24, height=24)
    for i in range(5, 12):  # the last two are set aside to measure on
        write(photos / f"{i}.png", width=64, height=48, seed=i)
    cut_off(photos / "11.png")
    assert train.main(small("run", "--select", "all", "--steps", 1)) is None
    printed = "".join(capsys.readouterr())
    assert all(f"{name}.png cannot be read" in printed for name in (1, 2, 11))
    assert "3.png is 24×24 px, smaller than the crop of 32" in printed
    assert "skipped in training" in printed
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert {r["name"] for r in report["after"]} == {"10.png"}


def test_before_is_the_pre_trained_model_under_its_own_mask_rule(small, tmp_path):
    """Official weights, whose masks are empty up to 200 px: on larger images the policy starts a
    little apart from the model, and the gain is over the model."""
    for i in range(3):
        write(tmp_path / f"large/{i}.png", width=272, height=256, seed=i)
    net = small_adair("adair", rates=(0.01, 0.01), para1=0.1)
    save_adair(tmp_path / "official.pt", net)
    flags = ["--init", tmp_path / "official.pt", "--data-root", tmp_path / "large"]
    train.main(small("run", *flags, "--tasks", "derain", "--steps", 1))
    report = json.loads((tmp_path / "run/report.json").read_text())
    held_out = list_training(tmp_path / "large", tasks=["derain"]).held_out
    rows = [evaluate_image(lambda x: restore(net, x), sample)[0] for sample in held_out]
    by_hand = [row["psnr"] for row in rows]
    assert [r["psnr"] for r in report["before"]] == pytest.approx(by_hand, abs=1e-4)


def test_refused_before_anything_is_computed(small, tmp_path, capsys):
    """What would fail late, or quietly start from something else than the user means."""
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    said = fails(capsys, train.main, small("run", "--init", tmp_path / "linear.pt"))
    assert "is not an AdaIR" in said
    train.main(small("done", "--steps", 1))
    said = fails(capsys, train.main, small("run", "--init", tmp_path / "done/last.pt"))
    assert "its policy would be lost" in said
    stored = read_checkpoint(tmp_path / "done/last.pt")
    stored["policy"]["rate.0.out.bias"] = torch.zeros(2)
    torch.save(stored, tmp_path / "done/last.pt")
    assert "no policy of this version" in fails(capsys, train.main, ["--resume", tmp_path / "done"])
    for stored, words in (
        ({"step": 1}, "holds no run of this version"),
        ([1], "is not the last.pt"),
    ):
        torch.save(stored, tmp_path / "done/last.pt")
        assert words in fails(capsys, train.main, ["--resume", tmp_path / "done"])


def test_nothing_usable_is_an_error(small, photos, capsys):
    whole = (photos / "4.png").read_bytes()
    cut_off(photos / "4.png")
    said = fails(capsys, train.main, small("run"))
    assert "none of the images set aside to measure on can be read: " in said
    (photos / "4.png").write_bytes(whole)
    assert "none of the training images" in fails(capsys, train.main, small("run", "--crop", 128))
    for path in photos.iterdir():
        path.unlink()
    assert "neither AdaIR's Train/ nor any image" in fails(capsys, train.main, small("other"))


@pytest.mark.parametrize("program", [train, pretrain, evaluation, judge, bench])
def test_help_explains_every_flag(program, capsys):
    for argv in [["--help"], ["restore", "--help"]] if program is evaluation else [["--help"]]:
        with pytest.raises(SystemExit) as end:
            program.main(argv)
        out = capsys.readouterr().out
        flags = re.findall(r"^\W*--\w\S+", out, re.MULTILINE)
        assert end.value.code == 0 and len(flags) > 2 and "(default: " in out
