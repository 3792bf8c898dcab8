"""Several processes, long runs and their ends: what is shared is the same as done alone, and
nothing is lost."""

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    cut_off,
    fails,
    logged,
    samples_of,
    save_adair,
    small_adair,
    without_times,
    write,
)

import eval as evaluation
import runs
import train
from data import Crops, DataError, read_image
from model import load_adair, read_checkpoint, restore
from policy import policy_for


def start(command):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, **pipes)


def torchrun(program, flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return start([*launcher, ROOT / program, *flags])


def finish(process):
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    return output


def workers(process):
    """Process ids of what torchrun started, by rank."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ranks = {}
    for pid in children.stdout.split():
        for variable in open(f"/proc/{pid}/environ").read().split("\0"):
            if variable.startswith("RANK="):
                ranks[int(variable[5:])] = int(pid)
    return [ranks[i] for i in sorted(ranks)]


def until(happens, seconds=200):
    """Waits until happens() is true."""
    deadline = time.time() + seconds
    while not happens():
        assert time.time() < deadline, "it did not happen"
        time.sleep(0.01)


def largest_difference(a, b, parts=("model", "policy")):
    return max((a[part][k] - b[part][k]).abs().max().item() for part in parts for k in a[part])


# ------------------------------------------------------------------------------------ two processes


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A model, photographs and test sets."""
    folder = tmp_path_factory.mktemp("two")
    save_adair(folder / "init.pt", small_adair(para1=0.1))
    for i in range(6):
        write(folder / f"photos/{i}.png", width=64, height=48, seed=i)
    for i in range(3):
        write(folder / f"bench/real/target/{i}.png", seed=i)
        write(folder / f"bench/real/input/{i}.png", seed=i + 5)
        write(folder / f"bench/test/denoise/bsd68/{i}.png", seed=i)
    return folder


def flags_in(folder, name, *more):
    base = ["--init", folder / "init.pt", "--data-root", folder / "photos", "--device", "cpu"]
    return [
        str(flag) for flag in (*base, "--out", folder / name, "--crop", 32, "--draws", 1, *more)
    ]


def test_two_processes_equal_one_with_twice_the_batch(once):
    """28 images mined in two shares, 7 hard ones trained on, the last step filled from the next
    epoch, 7 measured on; ended by SIGTERM to both on the way, and resumed by two."""
    flags = ["--epochs", 1, "--eval-every", 2, "--inner-epochs", 2, "--save-every", 1000]
    flags += ["--lr", 1e-5]
    both = torchrun("train.py", flags_in(once, "two", *flags, "--batch-size", 1))
    until(lambda: logged(once / "two"))
    for pid in workers(both):
        os.kill(pid, signal.SIGTERM)
    output = finish(both)
    step = read_checkpoint(once / "two/last.pt")["step"]
    again = f"--resume {once / 'two'} goes on"
    assert 1 <= step < 4 and f"stopped by SIGTERM, after step {step}; {again}" in output
    output = finish(torchrun("train.py", ["--resume", once / "two"]))
    assert "mean of tasks" in output and "not equal to the bit" not in output
    train.main(flags_in(once, "one", *flags, "--batch-size", 2))
    one, two = (read_checkpoint(once / name / "last.pt") for name in ("one", "two"))
    started = dict(policy=policy_for(load_adair(once / "init.pt")).state_dict())
    assert largest_difference(one, two) < 1e-5 < largest_difference(one, started, ["policy"])
    assert one["step"] == two["step"] == 4 and one["seen"] == two["seen"] == 8
    rows = zip(*(without_times(logged(once / name)) for name in ("one", "two")), strict=True)
    assert all(a == pytest.approx(b, rel=1e-2, abs=1e-3) for a, b in rows)
    files = [json.loads((once / name / "hard.json").read_text()) for name in ("one", "two")]
    hard = [[(r["name"], r["stamp"], r.get("selected")) for r in file["rows"]] for file in files]
    assert hard[0] == hard[1]
    reports = [json.loads((once / name / "report.json").read_text()) for name in ("one", "two")]
    reports = [report["before"] + report["after"] for report in reports]
    for a, b in zip(*reports, strict=True):
        assert a["name"] == b["name"] and a["psnr"] == pytest.approx(b["psnr"], abs=1e-3)


def test_an_evaluation_by_two_processes_is_that_of_one(once):
    """Files equal to the byte, and a saved image equal to the restored one."""
    flags = [
        "--ckpt",
        once / "init.pt",
        "--data-root",
        once / "bench",
        "--device",
        "cpu",
        "--save-images",
    ]
    finish(torchrun("eval.py", [*flags, "--out", once / "e2"]))
    evaluation.main([str(flag) for flag in [*flags, "--out", once / "e1"]])
    for name in ("eval.md", "eval.csv", "eval-images.csv", "eval.png"):
        assert (once / "e1" / name).read_bytes() == (once / "e2" / name).read_bytes(), name
    folders = [once / e / "images" for e in ("e1", "e2")]
    images = [sorted(p.relative_to(f) for p in f.rglob("*.png")) for f in folders]
    assert images[0] == images[1] and len(images[0]) == 3 * 3 + 3
    saved = read_image(once / "e2/images/real/model/1.png")
    degraded = read_image(once / "bench/real/input/1.png")
    restored = restore(load_adair(once / "init.pt"), degraded)
    assert (saved - restored.clamp(0, 1)).abs().max() < 0.51 / 255
    assert "| Method |" in (once / "e1/eval.md").read_text()


def test_a_process_that_dies_ends_the_run_and_one_alone_goes_on(once):
    run = once / "dies"
    flags = "--steps", 60, "--save-every", 1000, "--batch-size", 1
    both = torchrun("train.py", flags_in(once, "dies", *flags))
    until(lambda: len(logged(run)) >= 3)
    os.kill(workers(both)[1], signal.SIGKILL)
    output = both.communicate(timeout=100)[0].decode()
    assert both.returncode != 0
    assert "another process of this run" in output and f"--resume {run} goes on" in output
    stored = read_checkpoint(run / "last.pt")  # of its own: none was due before step 1000
    assert 3 <= stored["step"] < 60 and stored["step"] - len(logged(run)) in (0, 1)
    assert stored["seen"] == 2 * stored["step"]
    stored["total"] = stored["seen"] + 3  # enough has been shown
    torch.save(stored, run / "last.pt")
    assert train.main(["--resume", str(run)]) is None and (run / "report.md").exists()
    assert read_checkpoint(run / "last.pt")["step"] == stored["step"] + 3


# -------------------------------------------------------------------------------------- ways to end


def test_killed_at_random_moments_it_ends_with_the_same_weights(small, tmp_path):
    """SIGKILL once in training, then at a moment of chance anywhere: the same weights, log and
    report as in one go."""
    train.main(small("whole", "--keep-every", 5))
    run, moments, begun = tmp_path / "killed", random.Random(time.time_ns()), time.time()
    killed = start([ROOT / "train.py", *small("killed")])
    until(lambda: len(logged(run)) >= 6)
    takes = time.time() - begun
    killed.kill(), killed.wait()
    killed, moment = start([ROOT / "train.py", "--resume", run]), moments.uniform(0.3, 1.2) * takes
    print(f"killed after {moment:.2f} s of some {takes:.2f}")
    time.sleep(moment)
    killed.kill(), killed.wait()
    train.main(["--resume", str(run)])
    folders = tmp_path / "whole", run
    whole, resumed = (read_checkpoint(folder / "last.pt") for folder in folders)
    assert largest_difference(whole, resumed, ("model", "policy", "ref")) == 0
    whole, resumed = (read_checkpoint(folder / "best.pt") for folder in folders)
    assert largest_difference(whole, resumed) == 0
    rows = [without_times(logged(folder)) for folder in folders]
    assert rows[0] == rows[1] and [row["step"] for row in rows[1]] == list(range(1, 11))
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    assert reports[0] == reports[1]
    assert read_checkpoint(tmp_path / "whole/step-000005.pt")["step"] == 5


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "--max-minutes"])
def test_a_run_that_is_asked_to_end_does_so_with_a_checkpoint(small, tmp_path, capsys, how):
    flags = small("run", "--steps", 500, "--save-every", 1000)
    if how == "--max-minutes":
        flags += [how, "0.06"]
    else:
        number = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}[how]

        def ask():
            until(lambda: len(logged(tmp_path / "run")) >= 3)
            os.kill(os.getpid(), number)

        threading.Thread(target=ask, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    assert train.main(flags) is None
    out, step = capsys.readouterr().out, read_checkpoint(tmp_path / "run/last.pt")["step"]
    assert f"stopped by {how}" in out
    assert f", after step {step}; --resume {tmp_path / 'run'} goes on" in out
    assert step == len(logged(tmp_path / "run")) < 500
    assert not (tmp_path / "run/report.md").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["training"]["max_minutes"] is None  # the next part of the run has its own


def test_a_validation_that_was_ended_is_done_again(small, tmp_path, monkeypatch):
    """Asked to end between two images of the validation at step 5: best.pt and the report are as in
    one go."""
    train.main(small("whole"))
    seen, look = [], runs.Stop.check

    def check(stop):
        state = (tmp_path / "run/metrics.jsonl").exists() and len(logged(tmp_path / "run"))
        seen.append(state)
        if seen.count(5) == 4:  # the fourth image
            stop.notice(signal.SIGTERM, None)
        look(stop)

    monkeypatch.setattr(runs.Stop, "check", check)
    train.main(small("run"))
    stored = read_checkpoint(tmp_path / "run/last.pt")
    assert stored["step"] == 5 and [v["step"] for v in stored["history"]] == [0]
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "run")])
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "run")]
    assert reports[0] == reports[1]
    best = [read_checkpoint(tmp_path / n / "best.pt") for n in ("whole", "run")]
    assert largest_difference(*best) == 0 and best[0]["history"] == best[1]["history"]


def test_a_full_disk_leaves_the_last_checkpoint(small, tmp_path, capsys):
    """The size of files is limited to 100 kB from step 4 on, which fails as a full disk does."""
    train.main(small("run", "--steps", 4))
    last = tmp_path / "run/last.pt"
    torch.save(read_checkpoint(last) | {"total": 8}, last)
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = fails(capsys, train.main, ["--resume", tmp_path / "run"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    words = "last.pt could not be written (File too large); what was there before is intact"
    assert (
        words in said
        and last.read_bytes() == before
        and not (tmp_path / "run/last.pt.tmp").exists()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_not_cleared_again():
    """64 MB, ten times: without, the kernel brings all of their 16,384 pages ten times."""
    code = """
import resource, torch
from runs import check_device
check_device("cpu")
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):  # the heap grows at first
    torch.ones(1 << 24)
before = pages()
for _ in range(10):
    torch.ones(1 << 24)
print(pages() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(found.stdout) < 40_000


# ---------------------------------------------------------------------------- bad steps, bad images


@pytest.fixture
def shell(tmp_path, request):
    """A run of 6 crops without a model: what stands around a loop."""
    workers = getattr(request, "param", 0)
    state = SimpleNamespace(
        live=torch.nn.Linear(1, 1),
        averaged=runs.averaged(torch.nn.Linear(1, 1), 0.0),
        step=0,
        seen=0,
        total=6,
        checkpoint=lambda: dict(step=state.step),
    )
    loading = dict(workers=workers, failures=(DataError,))
    run = runs.Run(tmp_path, runs.Stop(), "the same command", save_every=1000, **loading)
    run.start(state, "shell")
    return run


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(shell, bad):
    net = torch.nn.Linear(3, 1)
    groups = [dict(params=net.parameters(), lr=0.1, name="lr")]
    optimizer = torch.optim.Adam(groups, fused=True)
    shell.crops = 1

    def step(x):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        shell.update([optimizer], loss, {})
        return logged(shell.folder)[-1]["skipped"]

    def everything():
        moments = [v.tolist() for s in optimizer.state.values() for v in s.values()]
        return [p.tolist() for p in net.parameters()] + moments

    assert step(torch.ones(2, 3)) == 0
    before = everything()
    assert step(torch.tensor([[1.0, bad, 1.0]])) == 1 and everything() == before
    assert step(torch.ones(2, 3)) == 0 and everything() != before


def test_steps_that_are_never_finite_end_the_run_by_name(small, tmp_path, capsys):
    """A rate that throws the weights far off in the first step: all others are skipped, logged and
    counted."""
    said = fails(capsys, train.main, small("run", "--lr", "1e30", "--steps", 50))
    assert [row["skipped"] for row in logged(tmp_path / "run")] == [0, 1, 1, 1, 1, 1]
    assert "not finite 5 times in a row, the last time on " in said and ".png" in said
    assert "after step 6; --resume" in said
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] == 6


@pytest.mark.parametrize("shell", [0, 2], indirect=True)
def test_an_image_that_breaks_after_mining_ends_the_run_by_name(tmp_path, shell):
    crops = Crops([s for s in samples_of(tmp_path, 3) if s.task == "derain"], 32, 0)
    cut_off(tmp_path / "1.png", 300)
    words = (
        "images could not be loaded: .*1.png cannot be read.*after step .; the same command goes on"
    )
    with pytest.raises(runs.RunError, match=words), shell:
        for _ in shell.batches(crops, 1):
            shell.update([], torch.zeros(()), {})
    assert (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("shell", [2], indirect=True)
def test_a_loader_process_that_dies_ends_the_run(tmp_path, shell, monkeypatch):
    """The second image is a pipe that nobody writes to; the process that waits for it is killed."""
    crops = Crops([s for s in samples_of(tmp_path, 6) if s.task == "derain"], 32, 0)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    bad = crops.sample_of(1)[0].gt
    os.unlink(bad), os.mkfifo(bad)
    others = set(multiprocessing.active_children())  # perhaps, of other tests

    def kill():
        until(lambda: shell.state.step == 1)
        for child in set(multiprocessing.active_children()) - others:
            os.kill(child.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    # torch says that a worker died, or which connection to it broke: whichever it notices first
    words = "images could not be loaded: .*, after step 1; the same command goes on"
    with pytest.raises(runs.RunError, match=words), shell:
        for _ in shell.batches(crops, 1):
            shell.update([], torch.zeros(()), {})
    assert read_checkpoint(tmp_path / "last.pt") == dict(step=1)


def test_a_log_that_cannot_be_opened_is_one_sentence(tmp_path):
    state = SimpleNamespace(step=0, seen=0, total=6, checkpoint=lambda: dict(step=0))
    (tmp_path / "metrics.jsonl").mkdir()
    words = "metrics.jsonl could not be written"
    with pytest.raises(runs.RunError, match=words), runs.Run(tmp_path, runs.Stop(), "") as run:
        run.start(state, "shell")


def test_a_bug_leaves_a_checkpoint_and_its_traceback(tmp_path, shell):
    with pytest.raises(ZeroDivisionError), shell:
        1 / 0
    assert read_checkpoint(tmp_path / "last.pt") == dict(step=0)
