"""train.py and eval.py as a user meets them: whole runs on tiny images, kill and resume, and bad input."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, small_adair
from PIL import Image
from test_data import write

import data
import eval as evaluation
import model as adair
import policy as policies
import rewards
import runs
import train

RUN_FILES = ("config.json", "rewards.json", "hard.json", "metrics.jsonl", "last.pt", "best.pt", "curves.png", "samples.png", "report.md")


@pytest.fixture
def init(tmp_path):
    net = small_adair(para1=0.1)
    torch.save(dict(model=net.state_dict(), config=net.config), tmp_path / "init.pt")
    return tmp_path / "init.pt"


@pytest.fixture
def photos(tmp_path):
    for i in range(5):
        write(tmp_path / f"photos/{i}.png", width=64, height=48, seed=i)
    return tmp_path / "photos"


@pytest.fixture
def small(init, photos, tmp_path):
    """Flags of a run that takes seconds."""

    def flags(name, *more):
        base = ("--init", init, "--data-root", photos, "--out", tmp_path / name, "--crop", 32, "--save-every", 4, "--eval-every", 5)
        return [str(v) for v in (*base, "--steps", 10, "--device", "cpu", *more)]

    return flags


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_everything_a_run_folder_has(small, tmp_path, capsys):
    assert train.main(small("run")) is None
    run, out = tmp_path / "run", capsys.readouterr().out
    assert all((run / name).stat().st_size > 0 for name in RUN_FILES) and list(run.glob("events.out.tfevents*"))
    rows = metrics(run)
    assert [r["step"] for r in rows] == list(range(1, 11))
    wanted = "reward reward_std frac_reward_zero_std kl entropy clip_ratio advantage_abs ratio loss/total loss/rl loss/sup loss/cons"
    wanted += " psnr_best psnr_det grad_norm lr step_time rewards/psnr/mean rewards/task/std policy/1.r_h/mean policy/3.g_o/concentration"
    assert not set(wanted.split()) - set(rows[0])
    assert all(r["ratio"] == pytest.approx(1) and r["clip_ratio"] == 0 for r in rows)  # on policy
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] != 0
    assert "clip" in out and "renormalised" in out and "mean of tasks" in out and str(run) in out
    stored = {r["term"]: r for r in json.loads((run / "rewards.json").read_text())}
    assert stored["psnr"]["weight"] == pytest.approx(0.381) and stored["lpips"]["weight"] == 0
    hard = json.loads((run / "hard.json").read_text())["rows"]
    assert sum(r.get("selected", False) for r in hard) == 7  # 4 training images, 30 % of them, for each of 7 tasks


def test_before_is_the_pre_trained_model(small, init, tmp_path):
    """The report's "before" equals scoring the pre-trained checkpoint by hand, and "after" the stored one."""
    train.main(small("run"))
    report = json.loads((tmp_path / "run/report.json").read_text())
    val = data.list_training(tmp_path / "photos")[1]
    net = adair.load_adair(init)
    expected, _ = data.evaluate(lambda x: adair.restore(net, x), val)
    assert [r["psnr"] for r in report["before"]] == pytest.approx([r["psnr"] for r in expected], abs=1e-3)
    restore, _ = evaluation.load(tmp_path / "run", "cpu")
    after, _ = data.evaluate(restore, val)
    assert [r["psnr"] for r in report["after"]] == pytest.approx([r["psnr"] for r in after], abs=1e-3)
    assert report["before"] != report["after"]


def test_the_sft_control_moves_the_backbone_alone(small, init, tmp_path):
    train.main(small("sft", "--objective", "sft"))
    stored = adair.read_checkpoint(tmp_path / "sft/last.pt")
    start = policies.policy_for(adair.load_adair(init)).state_dict()
    assert all(torch.equal(v, start[k]) for k, v in stored["policy"].items() if "out" in k)
    assert not torch.equal(stored["model"]["output.weight"], adair.load_adair(init).state_dict()["output.weight"])
    assert not (tmp_path / "sft/rewards.json").exists()


def test_groups_of_several_images_workers_and_reused_scores(small, tmp_path, capsys):
    """Loading in other processes changes nothing; a later run takes its mining from an earlier one's file."""
    train.main(small("a", "--batch-size", 2, "--steps", 3))
    scores = tmp_path / "a/hard.json"
    edited = json.loads(scores.read_text())
    for row in edited["rows"]:
        row["psnr"] += 100
    (tmp_path / "scores.json").write_text(json.dumps(edited))
    train.main(small("b", "--batch-size", 2, "--steps", 3, "--workers", 2, "--scores", tmp_path / "scores.json"))
    assert json.loads((tmp_path / "b/hard.json").read_text()) == edited
    a, b = ([{k: v for k, v in r.items() if k != "step_time"} for r in metrics(tmp_path / name)] for name in "ab")
    assert a == b


def test_epochs_win_over_the_presets_steps(small, tmp_path):
    flags = small("run", "--epochs", 1)
    at = flags.index("--steps")
    train.main(flags[:at] + flags[at + 2 :])
    assert len(metrics(tmp_path / "run")) == 7  # one of four images in each of seven tasks


def test_a_resumed_run_refuses_other_images(small, photos, tmp_path, capsys):
    train.main(small("run", "--steps", 4))
    write(photos / "0.png", width=64, height=48, seed=77)
    data.file_digest.cache_clear()
    assert "changed since" in fails(capsys, train.main, ["--resume", tmp_path / "run"])


def test_a_frozen_backbone_stays(small, init, tmp_path):
    train.main(small("frozen", "--freeze-backbone", "--inner-epochs", 3, "--kl", "exact"))
    stored = adair.read_checkpoint(tmp_path / "frozen/last.pt")
    assert all(torch.equal(v, stored["model"][k]) for k, v in adair.load_adair(init).state_dict().items())
    rows = metrics(tmp_path / "frozen")
    assert any(abs(r["ratio"] - 1) > 1e-4 for r in rows)  # a group used three times is off policy
    assert rows[0]["kl"] > 0


def test_rollouts_obey_the_spread_that_the_heads_start_with(tmp_path):
    """On the demo model: the rollouts' mean PSNR within 0.5 dB of the deterministic output, and rewards that differ by
    far more than eight computations of the same rollout do."""
    net = adair.load_adair(train.DEMO_MODEL)
    policy = policies.policy_for(net)
    reward = rewards.Reward(rewards.parse_terms("default"))
    samples = [s for s in data.list_embedded(data.EMBEDDED_HELD_OUT) if s.name in ("chelsea@33,54", "rocket@32,21")]
    losses, spreads, rounding = [], [], []
    for sample in samples:
        degraded, gt = (t[None, :, :128, :128] for t in data.load_pair(sample))
        with torch.no_grad():
            encoding = net.encode(degraded)
            y_det = net.decode(encoding, policy.mean())
            group = net.decode(encoding, policy.sample([torch.Generator().manual_seed(0)]), copies=8)
            same = net.decode(encoding, policy.mean(), copies=8)
        losses.append(data.psnr(y_det[0], gt[0]) - np.mean([data.psnr(y, gt[0]) for y in group]))
        spreads.append(reward(group, gt, [sample.task])[0].std().item())
        rounding.append(reward(same, gt, [sample.task])[0].std().item())
    assert len(samples) == 14
    assert np.mean(losses) < 0.5, losses
    print(f"loss {np.mean(losses):.3f} dB, reward spread {min(spreads):.1e} to {max(spreads):.1e}, rounding {max(rounding):.1e}")
    assert min(spreads) > 20 * max(rounding) and np.median(spreads) > 1e-4, (spreads, rounding)


def test_one_step_is_what_the_equations_say():
    """Loss and gradients of irpo_step on two images, recomputed image by image with torch.distributions."""
    flags = "--group-size 3 --kl-beta 0.5 --entropy-tau 0.02"
    args, g = train.parse(flags.split()), torch.Generator().manual_seed(1)
    net, score = small_adair(para1=0.1), rewards.Reward(rewards.parse_terms("default"))
    policy, ref = policies.policy_for(net), policies.policy_for(net)
    for parameter in ref.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    degraded, gt, tasks = torch.rand(2, 3, 32, 32, generator=g), torch.rand(2, 3, 32, 32, generator=g), ["deblur", "derain"]
    metrics, (states, actions, *_) = train.irpo_step(net, policy, ref, score, (degraded, gt, tasks), args, 0.25, [g])
    found = {name: p.grad.clone() for module in (net, policy) for name, p in module.named_parameters() if p.grad is not None}
    net.zero_grad(), policy.zero_grad()

    def densities(heads):
        return torch.distributions.Beta(*heads(states))

    sup, cons, advantages = 0.0, 0.0, []
    for b in range(2):
        group = [net(degraded[b : b + 1], policy.replay(actions[i : i + 1])) for i in range(3 * b, 3 * b + 3)]
        r = torch.cat([score(y.detach(), gt[b : b + 1], tasks[b : b + 1])[0] for y in group]).flatten()
        advantages.append((r - r.mean()) / (((r - r.mean()) ** 2).mean() + 1e-6).sqrt())  # Eq. 8
        y_best, y_det = group[r.argmax()], net(degraded[b : b + 1], policy.mean())
        sup, cons = sup + (y_best - gt[b]).abs().mean() / 2, cons + (y_best - y_det).abs().mean() / 2
    logp, logp_ref = (densities(heads).log_prob(actions).sum(dim=(1, 2)) for heads in (policy, ref))
    entropy = densities(policy).entropy().sum(dim=(1, 2)).mean()
    ratio, gap = (logp - logp.detach()).exp(), logp - logp_ref.detach()
    rl = -(ratio * torch.cat(advantages)).mean() + 0.5 * (ratio * gap).mean() - 0.02 * entropy
    loss = rl + 0.2875 * sup + 0.1625 * cons  # a quarter of the way from 0.35 to 0.1 and from 0.2 to 0.05
    loss.backward()
    assert metrics["loss/total"].item() == pytest.approx(loss.item(), rel=1e-4)
    wanted = {name: p.grad for module in (net, policy) for name, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 100
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item() + 1e-7), name


# ------------------------------------------------------------------------------------------------ kill and resume


def start(flags, threads=1):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def finish(process):
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    return output


def test_pretraining_that_was_ended_reaches_the_same_weights(photos, tmp_path):
    """SIGTERM in mid-training, in this process; kills, and those of the main job, are in test_cluster.py."""

    def flags(name):
        size = "--dim 8 --blocks 1 1 1 1 --refinement 1 --crop 16 32 --batch-size 4 --steps 28 --save-every 1000 --device cpu"
        return ["pretrain", "--data-root", str(photos), "--out", str(tmp_path / name), *size.split()]

    def ask():
        while not (path := tmp_path / "ended/pretrain.jsonl").exists() or not path.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    train.main(flags("ended"))
    assert 20 <= adair.read_checkpoint(tmp_path / "ended/pretrain.pt")["step"] < 28
    train.main(flags("ended"))
    train.main(flags("whole"))
    whole, again = (adair.read_checkpoint(tmp_path / name / "model.pt") for name in ("whole", "ended"))
    assert all(torch.equal(v, again["model"][k]) for k, v in whole["model"].items())
    assert adair.load_adair(tmp_path / "whole/model.pt").config["rates"] == [0.25, 0.25]
    assert (tmp_path / "whole/pretrain.jsonl").read_text() == (tmp_path / "ended/pretrain.jsonl").read_text()


# ----------------------------------------------------------------------------------------------------- bad input


def fails(capsys, main, argv):
    """The one sentence on standard error of a command that must end with exit code 2."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and "Traceback" not in "".join(error)
    return error[-1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hard-ratio", "0"], "--hard-ratio: it is 0; it must be above 0 and at most 1"),
        (["--hard-ratio", "1.5"], "--hard-ratio: it is 1.5"),
        (["--hard-ratio", "much"], "is not a number"),
        (["--crop", "100"], "--crop: it is 100; it must be a multiple of 8"),
        (["--objective", "sft", "--freeze-backbone"], "would train nothing"),
        (["--concentration", "9999"], "--concentration: it is 9999"),
        (["--scores", "/nowhere.json"], "there is no file /nowhere.json"),
        (["--rewards", "beauty"], "no term 'beauty'"),
        (["--data-root", "/nowhere"], "there is no folder /nowhere"),
        (["--init", "/nowhere.pt"], "there is no checkpoint /nowhere.pt"),
        (["--group-size", "0"], "--group-size: it is 0"),
        (["--steps", "0", "--epochs", "0"], "nothing would be trained"),
        (["--device", "cuda:99"], "'cuda:99' is no device of this machine"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_impossible_flags_are_one_sentence(small, capsys, flags, words):
    assert words in fails(capsys, train.main, small("run", *flags))


def test_resume_wants_a_run_folder_and_nothing_else(small, capsys):
    assert "/nowhere is no run folder" in fails(capsys, train.main, ["--resume", "/nowhere"])
    assert "keeps its settings" in fails(capsys, train.main, small("run", "--resume", "/nowhere"))


def test_an_existing_run_folder_is_left_alone(small, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("precious")
    assert "exists: continue it with --resume" in fails(capsys, train.main, small("run"))
    assert (tmp_path / "run/notes.txt").read_text() == "precious"


def test_another_models_checkpoint(small, tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    assert "is not an AdaIR" in fails(capsys, train.main, small("run", "--init", tmp_path / "linear.pt"))


def test_broken_images_are_named_and_counted_and_the_run_goes_on(small, photos, tmp_path, capsys):
    path = photos / "1.png"
    path.write_bytes(path.read_bytes()[:400])  # header intact, pixels cut off
    (photos / "2.png").write_bytes(b"nothing")
    write(photos / "3.png", width=24, height=24)
    for i in range(5, 12):  # the last two are set aside to measure on
        write(photos / f"{i}.png", width=64, height=48, seed=i)
    path = photos / "11.png"
    path.write_bytes(path.read_bytes()[:400])
    assert train.main(small("run", "--select", "all", "--steps", 3)) is None
    printed = "".join(capsys.readouterr())
    assert all(f"{name}.png cannot be read" in printed for name in (1, 2, 11))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert {r["name"] for r in report["after"]} == {"10.png"}
    assert "3.png is 24×24 px, smaller than the crop of 32" in printed and "skipped in training" in printed


def test_refused_before_anything_is_computed(small, init, tmp_path, capsys):
    """What would fail late, or quietly start from something else than the user means."""
    assert "need 11" in fails(capsys, train.main, small("run", "--crop", 8))
    assert "would change what it computes" in fails(capsys, train.main, small("run", "--mask-rule", "adair"))
    (tmp_path / "report.json").write_text("{}")
    assert "is not the hard.json of a run" in fails(capsys, train.main, small("run", "--scores", tmp_path / "report.json"))
    train.main(small("done", "--steps", 1))
    assert "its policy would be lost" in fails(capsys, train.main, small("run", "--init", tmp_path / "done/last.pt"))
    stored = adair.read_checkpoint(tmp_path / "done/last.pt")
    stored["policy"]["rate.0.out.bias"] = torch.zeros(2)
    torch.save(stored, tmp_path / "done/last.pt")
    assert "a policy this version does not know" in fails(capsys, train.main, ["--resume", tmp_path / "done"])


def test_pretraining_goes_on_with_the_same_settings_only(init, photos, tmp_path, capsys):
    flags = ["pretrain", "--data-root", photos, "--out", tmp_path / "p", "--crop", 16, 32, "--batch-size", 1, "--steps", 1]
    assert "--dim goes with a new model" in fails(capsys, train.main, [*flags, "--init", init, "--dim", 8])
    train.main([str(f) for f in [*flags, "--init", init]])
    assert "with another --lr" in fails(capsys, train.main, [*flags, "--init", init, "--lr", 0.5])
    torch.save({"step": 1}, tmp_path / "p/pretrain.pt")
    assert "not of this version" in fails(capsys, train.main, [*flags, "--init", init])


def test_nothing_usable_is_an_error(small, photos, capsys):
    whole = (photos / "4.png").read_bytes()
    (photos / "4.png").write_bytes(whole[:400])
    assert "none of the images set aside to measure on can be read: " in fails(capsys, train.main, small("run"))
    (photos / "4.png").write_bytes(whole)
    assert "none of the training images" in fails(capsys, train.main, small("run", "--crop", 128))
    for path in photos.iterdir():
        path.unlink()
    assert "neither AdaIR's Train/ nor any image" in fails(capsys, train.main, small("other"))


# ------------------------------------------------------------------------------------------------------- eval.py


@pytest.fixture
def bench(tmp_path):
    """Test sets of all five tasks and one out-of-domain set, two images each."""
    root = tmp_path / "bench"
    for i in range(2):
        write(root / f"test/denoise/bsd68/{i}.png", seed=i)
        for folder in ("test/derain/Rain100L", "test/dehaze/SOTS", "test/deblur/gopro", "test/enhance/lol", "real"):
            write(root / folder / f"input/{i}.png", seed=i + 5), write(root / folder / f"target/{i}.png", seed=i)
    return root


def test_benchmark_tables(small, bench, tmp_path, capsys):
    train.main(small("run", "--steps", 2))
    assert evaluation.main(["--ckpt", str(tmp_path / "run"), "--data-root", str(bench), "--device", "cpu"]) is None
    text, rows = (tmp_path / "run/eval.txt").read_text(), (tmp_path / "run/eval.csv").read_text().splitlines()
    assert all(w in text for w in ("Dehazing SOTS", "Low-Light lol", "Average", "before", "after", "gain", "Out of domain", "real"))
    again = ["--ckpt", tmp_path / "run", "--data-root", bench, "--device", "cpu"]
    assert "holds an evaluation" in fails(capsys, evaluation.main, again)
    assert len(rows) == 1 + 2 * 8 and len((tmp_path / "run/eval-images.csv").read_text().splitlines()) == 1 + 2 * 2 * 8
    set_, method, n, psnr_in, psnr, ssim = next(r for r in rows if r.startswith("gopro,before")).split(",")
    net = adair.load_adair(tmp_path / "init.pt")
    expected = []
    for i in range(2):
        degraded, gt = (data.multiple_of_16(data.read_image(bench / f"test/deblur/gopro/{k}/{i}.png")) for k in ("input", "target"))
        expected.append(data.psnr_ssim(adair.restore(net, degraded), gt))
    assert (float(psnr), float(ssim)) == pytest.approx(tuple(np.mean(expected, axis=0)), abs=1e-3)


def test_evaluation_leaves_nothing_out(init, bench, tmp_path, capsys):
    flags = ["--ckpt", init, "--data-root", bench, "--device", "cpu", "--out", tmp_path]
    write(bench / "real/input/0.png", width=48)
    assert "0.png is 48×64 px but its clean image" in fails(capsys, evaluation.main, flags)
    (bench / "real/input/0.png").unlink()
    assert "has no degraded image" in fails(capsys, evaluation.main, flags)
    assert evaluation.main([str(f) for f in [*flags, "--sets", "gopro"]]) is None  # a set nobody asked for does not matter
    assert "has no test set 'x'" in fails(capsys, evaluation.main, [*flags[:3], bench / "test/derain", "--sets", "x"])
    assert "there is no folder" in fails(capsys, evaluation.main, [*flags[:3], "/nowhere"])


def test_restore_a_folder_and_refuse_to_overwrite(init, photos, tmp_path, capsys):
    write(tmp_path / "photos/sub/grey.png", pixels=np.full((41, 33), 90, dtype=np.uint8))
    out = tmp_path / "out"
    flags = ["restore", photos, "--ckpt", init, "--out", out, "--device", "cpu"]
    assert evaluation.main([str(f) for f in flags]) is None
    assert Image.open(out / "sub/grey.png").size == (33, 41) and len(list(out.rglob("*.png"))) == 6
    expected = adair.restore(adair.load_adair(init), data.read_image(photos / "0.png"))
    assert (data.read_image(out / "0.png") - expected.clamp(0, 1)).abs().max() < 0.51 / 255 + 1e-4  # rounded, not truncated
    assert "exists: give --overwrite" in fails(capsys, evaluation.main, flags)
    assert evaluation.main([str(f) for f in [*flags, "--overwrite", "--tile", "72"]]) is None


def test_restore_names_what_it_cannot_read(init, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"nothing")
    flags = ["restore", photos, "--ckpt", init, "--out", tmp_path / "out", "--device", "cpu"]
    assert "1 of 6 photo(s) could not be restored" in fails(capsys, evaluation.main, flags)
    assert len(list((tmp_path / "out").iterdir())) == 5
    assert "there is no photo" in fails(capsys, evaluation.main, ["restore", "/nowhere.jpg", "--ckpt", init])


@pytest.mark.parametrize("command", [["train.py", "--help"], ["train.py", "pretrain", "--help"], ["eval.py", "--help"], ["eval.py", "restore", "--help"]])
def test_help_works(command):
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "default" in result.stdout
    if command[:2] == ["train.py", "--help"]:
        for flag in ("--hard-ratio", "--group-size", "--head-lr-factor", "--kl-beta", "--entropy-tau", "--rewards"):
            assert flag in result.stdout


@pytest.mark.parametrize("parser", [train.post_train_parser(), train.pretrain_parser()])
def test_help_explains_every_flag_with_its_default(parser):
    formatter = parser._get_formatter()
    for action in parser._actions:
        assert action.help, action.option_strings
        said = formatter._expand_help(action)
        assert "default" in said or action.default is None or action.default is False or action.default == "==SUPPRESS==", (action.option_strings, said)
        assert "%" not in said
