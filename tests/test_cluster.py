"""Several processes, long runs and their ends: what is shared is the same as done alone, and nothing is lost."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, small_adair
from test_data import samples_of, write
from test_train import fails, finish, init, metrics, photos, small, start  # noqa: F401 (fixtures)

import data
import eval as evaluation
import model as adair
import policy as policies
import rewards
import runs
import train


def torchrun(program, flags, n=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(ROOT / program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen([*command, *map(str, flags)], env=environment, cwd=ROOT, **pipes)


def workers(process):
    """Process ids of what torchrun started, by rank."""
    pids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {int(rank[5:]): int(pid) for pid in pids for rank in open(f"/proc/{pid}/environ").read().split("\0") if rank.startswith("RANK=")}
    return [ranks[i] for i in sorted(ranks)]


def until(happens, seconds=200):
    """Waits until happens() is true."""
    deadline = time.time() + seconds
    while not happens():
        assert time.time() < deadline, "it did not happen"
        time.sleep(0.01)


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def largest_difference(a, b, parts=("model", "policy")):
    return max((a[part][k] - b[part][k]).abs().max().item() for part in parts for k in a[part])


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "step_time"} for row in rows]


# ----------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A model, photographs, and a run of two processes on them."""
    folder = tmp_path_factory.mktemp("two")
    net = small_adair(para1=0.1)
    torch.save(dict(model=net.state_dict(), config=net.config), folder / "init.pt")
    for i in range(5):
        write(folder / f"photos/{i}.png", width=64, height=48, seed=i)
    for i in range(3):
        for part in ("input", "target"):
            write(folder / f"bench/real/{part}/{i}.png", seed=i + 5 * (part == "input"))
        write(folder / f"bench/test/denoise/bsd68/{i}.png", seed=i)
    return folder


def flags_in(folder, name, *more):
    base = ("--init", folder / "init.pt", "--data-root", folder / "photos", "--out", folder / name, "--crop", 32, "--device", "cpu")
    return [str(flag) for flag in (*base, *more)]


def test_two_processes_equal_one_with_twice_the_batch(once):
    """28 images mined in two shares, 7 hard ones trained on, so that one process has no image in the last step, 7 measured on; ended by SIGTERM to both
    on the way, and resumed by two."""
    flags = ["--epochs", 1, "--eval-every", 2, "--inner-epochs", 2, "--save-every", 1000]
    both = torchrun("train.py", flags_in(once, "two", *flags, "--batch-size", 1))
    until(lambda: lines(once / "two/metrics.jsonl") >= 1)
    for pid in workers(both):
        os.kill(pid, signal.SIGTERM)
    output = finish(both)
    stopped = adair.read_checkpoint(once / "two/last.pt")
    assert 1 <= stopped["step"] < 4 and f"stopped by SIGTERM, after step {stopped['step']}; --resume {once / 'two'} goes on" in output
    output = finish(torchrun("train.py", ["--resume", once / "two"]))
    assert "mean of tasks" in output and "not equal to the bit" not in output  # the weights of both processes
    train.main(flags_in(once, "one", *flags, "--batch-size", 2))
    one, two = (adair.read_checkpoint(once / name / "last.pt") for name in ("one", "two"))
    started = policies.policy_for(adair.load_adair(once / "init.pt")).state_dict()
    assert largest_difference(one, two) < 1e-5 < largest_difference(one, dict(policy=started), ["policy"])
    assert one["step"] == two["step"] == 4 and one["total"] == two["total"] == 7
    for a, b in zip(metrics(once / "one"), metrics(once / "two"), strict=True):
        assert {k: v for k, v in a.items() if k != "step_time"} == pytest.approx({k: v for k, v in b.items() if k != "step_time"}, rel=1e-2, abs=1e-3)
    hard = [json.loads((once / name / "hard.json").read_text())["rows"] for name in ("one", "two")]
    assert [(r["name"], r["digest"], r.get("selected")) for r in hard[0]] == [(r["name"], r["digest"], r.get("selected")) for r in hard[1]]
    reports = [json.loads((once / name / "report.json").read_text()) for name in ("one", "two")]
    for a, b in zip(reports[0]["before"] + reports[0]["after"], reports[1]["before"] + reports[1]["after"], strict=True):
        assert a["name"] == b["name"] and a["psnr"] == pytest.approx(b["psnr"], abs=1e-3)


def test_an_evaluation_by_two_processes_is_that_of_one(once):
    """Files equal to the byte, and the per-image scores equal what data.evaluate says of each image by itself."""
    flags = ["--ckpt", once / "init.pt", "--data-root", once / "bench", "--device", "cpu", "--save-images"]
    finish(torchrun("eval.py", [*flags, "--out", once / "e2"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it: the last digits depend on it
    evaluation.main([str(flag) for flag in [*flags, "--out", once / "e1"]])
    torch.set_num_threads(threads)
    for name in ("eval.txt", "eval.md", "eval.csv", "eval-images.csv"):
        assert (once / "e1" / name).read_bytes() == (once / "e2" / name).read_bytes(), name
    images = [sorted(p.relative_to(once / e) for p in (once / e / "images").rglob("*.png")) for e in ("e1", "e2")]
    assert images[0] == images[1] and len(images[0]) == 3 * 3 + 3
    saved = data.read_image(once / "e2/images/real/model/1.png")
    restored = adair.restore(adair.load_adair(once / "init.pt"), data.read_image(once / "bench/real/input/1.png"))
    assert (saved - restored.clamp(0, 1)).abs().max() < 0.51 / 255
    table = (once / "e1/eval.md").read_text()
    assert "| Method | real | Average |" in table and "| --- | ---: | ---: |" in table


def test_a_process_that_dies_ends_the_run_and_one_alone_goes_on(once):
    run = once / "dies"
    both = torchrun("train.py", flags_in(once, "dies", "--steps", 60, "--save-every", 1000))
    until(lambda: lines(run / "metrics.jsonl") >= 3)
    os.kill(workers(both)[1], signal.SIGKILL)
    killed = time.time()
    output = both.communicate(timeout=100)[0].decode()
    assert time.time() - killed < 60 and both.returncode != 0
    assert "another process of this run" in output and f"--resume {run} goes on" in output
    stored = adair.read_checkpoint(run / "last.pt")  # of its own: none was due before step 1000
    assert 3 <= stored["step"] < 60 and stored["step"] - lines(run / "metrics.jsonl") in (0, 1) and stored["seen"] == 2 * stored["step"]
    config = json.loads((run / "config.json").read_text())
    stored["total"] = stored["seen"] + 3  # enough has been shown
    torch.save(stored, run / "last.pt")
    assert config["device"] == "cpu" and train.main(["--resume", str(run)]) is None
    assert adair.read_checkpoint(run / "last.pt")["step"] == stored["step"] + 3 and (run / "report.md").exists()


def test_what_arrives_while_others_are_waited_for_is_not_forgotten(monkeypatch):
    """A signal strikes inside the exchange, after this process has told the others of none."""
    with runs.Interrupts() as interrupts:
        interrupts.hold()

        def gather(value):
            os.kill(os.getpid(), signal.SIGTERM)
            return [value, [["b.png"], ["a problem"], None, {}, None]]

        monkeypatch.setattr(runs, "gather", gather)
        assert runs.exchange((["a.png"], [0], []), None, interrupts) == (["a.png", "b.png"], ["a problem"], {})
        with pytest.raises(runs.Stopped, match="SIGTERM"):
            interrupts.release()
    assert isinstance(runs.ending(runs.Lost("gone"), interrupts, 3, ""), runs.Stopped)  # the others were asked, too


# ----------------------------------------------------------------------------------------------------- ways to end


def test_killed_at_random_moments_it_ends_with_the_same_weights(small, tmp_path):  # noqa: F811
    """SIGKILL once in training, then at two moments of chance anywhere: the same weights, log and report as in one go."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # as the others
    train.main(small("whole", "--keep-every", 5))
    run, moments, begun = tmp_path / "killed", random.Random(time.time_ns()), time.time()
    killed = start(small("killed"), 2)
    until(lambda: lines(run / "metrics.jsonl") >= 6)
    takes = time.time() - begun
    for _ in range(2):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        killed = start(["--resume", str(run)], 2)
        moment = moments.uniform(0.2, 1.4) * takes
        print(f"killed after {moment:.2f} s of some {takes:.2f}; {lines(run / 'metrics.jsonl')} steps were logged")
        time.sleep(moment)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    train.main(["--resume", str(run)])
    torch.set_num_threads(threads)
    whole, resumed = (adair.read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert largest_difference(whole, resumed, ("model", "policy", "ref")) == 0
    assert [row["step"] for row in metrics(run)] == list(range(1, 11))
    assert without_times(metrics(tmp_path / "whole")) == without_times(metrics(run))
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    assert reports[0] == reports[1]
    kept = adair.read_checkpoint(tmp_path / "whole/step-000005.pt")
    assert kept["step"] == 5 and (tmp_path / "whole/step-000010.pt").exists()
    best = [adair.read_checkpoint(tmp_path / name / "best.pt") for name in ("whole", "killed")]
    assert largest_difference(*best) == 0


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "--max-minutes"])
def test_a_run_that_is_asked_to_end_does_so_with_a_checkpoint(small, tmp_path, capsys, how):  # noqa: F811
    flags = small("run", "--steps", 500, "--save-every", 1000)
    if how == "--max-minutes":
        flags += [how, "0.06"]
    else:
        asking = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}[how]
        ask = lambda: (until(lambda: lines(tmp_path / "run/metrics.jsonl") >= 3), os.kill(os.getpid(), asking))  # noqa: E731
        threading.Thread(target=ask, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    assert train.main(flags) is None
    out, stored = capsys.readouterr().out, adair.read_checkpoint(tmp_path / "run/last.pt")
    assert f"stopped by {how}" in out and f", after step {stored['step']}; --resume {tmp_path / 'run'} goes on" in out
    assert stored["step"] == lines(tmp_path / "run/metrics.jsonl") < 500 and not (tmp_path / "run/report.md").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_mining_that_was_ended_goes_on(small, photos, tmp_path, capsys):  # noqa: F811
    for i in range(5, 15):
        write(photos / f"{i}.png", width=96, height=64, seed=i)
    scores = tmp_path / "run/mining.jsonl"
    threading.Thread(target=lambda: (until(lambda: lines(scores) > 16), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    train.main(small("run", "--steps", 1))
    assert "stopped by SIGTERM; --resume" in capsys.readouterr().out and not (tmp_path / "run/hard.json").exists()
    head, *rows = map(json.loads, scores.read_text().splitlines())
    assert 16 <= len(rows) < 12 * 7 and list(head) == ["model"]
    told = {row["digest"]: row["psnr"] + 100 for row in rows}  # what was scored is not scored again
    scores.write_text("\n".join(map(json.dumps, [head, *(dict(digest=d, psnr=v) for d, v in told.items())])) + '\n{"digest": "cut o')
    train.main(["--resume", str(tmp_path / "run")])
    mined = json.loads((tmp_path / "run/hard.json").read_text())["rows"]
    assert len(mined) == 12 * 7 and {r["digest"]: r["psnr"] for r in mined if r["psnr"] > 70} == told
    assert not scores.exists()


def test_a_full_disk_leaves_the_last_checkpoint(small, tmp_path, capsys):  # noqa: F811
    """The size of files is limited to 100 kB from step 4 on, which fails as a full disk does."""
    train.main(small("run", "--steps", 4))
    run = tmp_path / "run"
    stored = adair.read_checkpoint(run / "last.pt")
    torch.save(stored | {"total": 8}, run / "last.pt")
    before, limits = (run / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = fails(capsys, train.main, ["--resume", run])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt could not be written (File too large); what was there before is intact" in said
    assert (run / "last.pt").read_bytes() == before and not (run / "last.pt.tmp").exists()


# ------------------------------------------------------------------------------------------------- bad steps, bad images


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(bad):
    net = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)

    def step(x):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return train.optimizer_step(optimizer, {"loss/total": loss}, 1)  # as in a run

    assert step(torch.ones(2, 3))["skipped"] == 0
    before = json.dumps([p.tolist() for p in net.parameters()] + [v.tolist() for s in optimizer.state.values() for v in s.values()])
    assert step(torch.tensor([[1.0, bad, 1.0]]))["skipped"] == 1
    assert before == json.dumps([p.tolist() for p in net.parameters()] + [v.tolist() for s in optimizer.state.values() for v in s.values()])
    assert step(torch.ones(2, 3))["skipped"] == 0


def test_steps_that_are_never_finite_end_the_run_by_name(small, tmp_path, capsys):  # noqa: F811
    """A rate that throws the weights far off in the first step: all others are skipped, logged and counted."""
    said = fails(capsys, train.main, small("run", "--lr", "1e30", "--steps", 50))
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 1]
    assert "not finite 5 times in a row, the last time on " in said and ".png" in said and "after step 6; --resume" in said
    assert adair.read_checkpoint(tmp_path / "run/last.pt")["step"] == 6


def test_an_image_that_kills_its_worker_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    """The second of six images is a pipe that nobody writes to; the process that waits for it is killed. Images and order of the others stay."""
    samples = [s for s in samples_of(tmp_path, 6) if s.task == "derain"]
    crops = data.Crops(samples, 32, 0, 6)
    expected = [crops[n] for n in range(6)]
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    bad = crops.sample(1).gt
    os.unlink(bad), os.mkfifo(bad)

    def kill():
        until(lambda: crops.reading is not None and 1 in crops.reading[:, 1].tolist())
        time.sleep(0.5)
        (pid,) = (pid for pid, n in crops.reading.tolist() if n == 1)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    batches = list(runs.batches(crops, 1, 0, 2, "cpu"))
    assert [batch[4] for batch in batches] == [[0], [], [2], [3], [4], [5]]
    assert f"{bad} was being read when a worker process died" in batches[1][5][0]
    assert f"a worker process died while it read {bad}" in capsys.readouterr().out
    assert all(torch.equal(batches[n][0][0], expected[n][0]) for n in (0, 2, 3, 4, 5))


# ------------------------------------------------------------------------------------------------- which images


def test_tasks_and_lists_choose_what_is_trained_on(small, photos, tmp_path, capsys):  # noqa: F811
    (tmp_path / "list.txt").write_text("\n")
    assert "list.txt names no image" in fails(capsys, train.main, small("run", "--list", tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_bytes(b"0.png\n\xff.png\n")
    assert "list.txt, line 2: '\\udcff.png' is no training image" in fails(capsys, train.main, small("run", "--list", tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("0.png\n\n./1.png\n2.png\n")
    train.main(small("run", "--tasks", "denoise", "dehaze", "--list", tmp_path / "list.txt", "--steps", 1))
    rows = json.loads((tmp_path / "run/hard.json").read_text())["rows"]
    assert {r["task"] for r in rows} == {"denoise15", "denoise25", "denoise50", "dehaze"} and {r["name"] for r in rows} == {"0.png", "1.png"}
    write(tmp_path / "d/Train/Deblur/blur/1.png"), write(tmp_path / "d/Train/Deblur/sharp/1.png")
    flags = small("b", "--tasks", "deblur", "dehaze")
    flags[flags.index("--data-root") + 1] = str(tmp_path / "d")
    assert "has no training images for dehaze" in fails(capsys, train.main, flags)


# ------------------------------------------------------------------------------------------------- LPIPS in evaluations


def test_lpips_stands_beside_psnr_where_its_weights_are(once, tmp_path, capsys):
    import lpips
    import torchvision

    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / rewards.DOWNLOADS["lpips"][0])
    flags = ["--ckpt", once / "init.pt", "--data-root", once / "bench", "--device", "cpu", "--sets", "real", "--weights-dir", tmp_path]
    evaluation.main([str(f) for f in [*flags, "--out", tmp_path / "e"]])
    head, *rows = [line.split(",") for line in (tmp_path / "e/eval-images.csv").read_text().splitlines()]
    assert head[-1] == "lpips" and "PSNR/SSIM/LPIPS" in (tmp_path / "e/eval.txt").read_text()
    net, model = rewards.load_lpips(tmp_path / rewards.DOWNLOADS["lpips"][0]), adair.load_adair(once / "init.pt")
    assert isinstance(net, lpips.LPIPS)
    for row, i in zip(rows, range(3), strict=True):
        y, gt = (data.read_image(once / f"bench/real/{part}/{i}.png") for part in ("input", "target"))
        y = adair.restore(model, y).clamp(0, 1)
        assert float(row[-1]) == pytest.approx(net(2 * y[None] - 1, 2 * gt[None] - 1).item(), abs=1e-4)
    evaluation.main([str(f) for f in [*flags[:-1], tmp_path / "none", "--out", tmp_path / "f"]])
    assert "LPIPS is not measured" in capsys.readouterr().out and "LPIPS" not in (tmp_path / "f/eval.txt").read_text()
