"""The experiments' intervals on gains whose answer is known, their tables, and their flags."""

import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import ROOT, fails, write

import judge as judges
import runs
from config import DEMO_MODEL
from data import Sample, read_image
from experiments import exposure_judge, measure, run, tables
from metrics import evaluation_pair, psnr
from model import load_pretrained, model_digest


def write_report(folder, gain, hard=(0,)):
    """A report of 3 photographs under 2 draws of 2 tasks; gain(photo, task, draw) in dB."""
    before, after = [], []
    for task in ("rain", "haze"):
        for draw in ("", "#2"):
            for photo in ("a", "b", "c"):
                row = dict(task=task, name=f"{photo}.png{draw}", psnr=20.0, ssim=0.5, reward=0.4)
                before.append(row)
                change = gain(photo, task, draw)
                after.append(row | dict(psnr=20 + change, reward=0.4 + change / 100))
    of_tasks = [dict(rain=20 + k, haze=20 + 2 * k) for k in (0, 1)]  # at the start, at the end
    validation = [dict(step=k, psnr=of, reward=of) for k, of in enumerate(of_tasks)]
    folder.mkdir(parents=True)
    stored = dict(before=before, after=after, hard=hard, validation=validation)
    (folder / "report.json").write_text(json.dumps(stored))


def collected(folder):
    """The rows of the runs in a folder."""
    tables.collect(folder)
    return tables.read(folder / "gains.csv")


def in_rows(values):
    """The rows of gains (seeds, photographs, tasks)."""
    seeds, photos, tasks = (axis.flatten() for axis in np.indices(values.shape))
    return pd.DataFrame(dict(seed=seeds, photo=photos, task=tasks, psnr=values.flatten()))


def test_tasks_weigh_alike_and_draws_are_averaged(tmp_path):
    run = tmp_path / "a/0"
    write_report(run, lambda photo, task, draw: (task == "rain") + 0.2 * (draw == "#2"))
    rows = collected(tmp_path)
    *_, gains = tables.per_task(rows, "psnr").splitlines()
    assert gains.split()[3::2] == ["+1.100", "+0.100"]
    mean, low, high = tables.interval(rows, "psnr")
    assert mean == pytest.approx(0.6) and np.isnan([low, high]).all()  # of one seed
    hard = rows[rows["hard"] == 1]
    assert len(hard) == 1 and tables.interval(hard, "psnr")[0] == 1


def test_the_interval_is_that_of_a_normal_mean():
    """Two equal seeds of many independent photographs: mean ± 1.96 standard errors."""
    values = np.random.default_rng(0).normal(0.3, 1.0, (1, 400, 1))
    mean, low, high = tables.interval(in_rows(values.repeat(2, axis=0)), "psnr")
    error = values.std() / 20
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.01)


@pytest.mark.parametrize("n_seeds, of_seeds", [(5, 0.0), (5, 1.0), (2, 0.4)])
def test_six_photographs_are_covered_as_often_as_stated(n_seeds, of_seeds):
    """95 % intervals of six photographs hold the true mean about 95 times in 100, whether seeds
    matter as much as photographs or not at all."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        values = rng.normal(0, 1, (1, 6, 1)) + rng.normal(0, of_seeds, (n_seeds, 1, 1))
        values = values + rng.normal(0, 0.2, (n_seeds, 6, 1))
        _, low, high = tables.interval(in_rows(values), "psnr")
        held += low < 0 < high
    assert 0.92 <= held / 200 <= 0.99


def test_few_photographs_widen_the_interval_however_many_draws():
    """Draws of a photograph are no new photographs: what differs between photographs counts."""
    of_photos = np.array([-1.0, 0.0, 1.0])[None, :, None].repeat(2, axis=0)
    one, many = (tables.interval(in_rows(np.repeat(of_photos, n, axis=2)), "psnr") for n in (1, 50))
    assert one == pytest.approx(many) and one[2] > 0.6


def test_over_photographs_alone_it_is_students():
    """One task: the usual interval. The same photographs under two tasks: no narrower. Others under
    the second: half the variance, and seven degrees of freedom."""
    gains = np.array([0.1, 0.5, 0.3, 0.9])
    rows = pd.DataFrame(dict(seed=0, photo=[*"abcd"], task="rain", psnr=gains))
    expected = scipy.stats.t.interval(0.95, 3, gains.mean(), scipy.stats.sem(gains))
    for more in ([], [rows.assign(task="haze")]):
        found = tables.interval(pd.concat([rows, *more]), "psnr", over=["photo"])
        assert found == pytest.approx((0.45, *expected))
    more = rows.assign(task="haze", photo=[*"efgh"])
    found = tables.interval(pd.concat([rows, more]), "psnr", over=["photo"])
    error = scipy.stats.sem(gains) / 2**0.5
    assert found[1:] == pytest.approx(scipy.stats.t.interval(0.95, 7, 0.45, error))


def test_arms_are_compared_on_the_seeds_they_share(tmp_path, capsys):
    for seed in (0, 1):
        write_report(tmp_path / f"a/{seed}", lambda photo, *_, s=seed: s + 0.5)
        write_report(tmp_path / f"b/{seed}", lambda photo, *_, s=seed: s)
    write_report(tmp_path / "b/7", lambda *_: 9.0)
    assert tables.difference(collected(tmp_path), "a", "b") == (
        "a minus b, 2 seeds: +0.500 [+0.500, +0.500] dB, +0.0 [+0.0, +0.0] 1e-4 of SSIM, "
        "+50.0 [+50.0, +50.0] 1e-4 of reward"
    )
    command = [sys.executable, "-m", "experiments.tables", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "| b " in done.stdout and "hard 30 %" in done.stdout
    assert "+1.500 (+1.500 to +1.500)" in done.stdout  # of the validations
    rows = (tmp_path / "gains.csv").read_text().splitlines()
    assert len(rows) == 1 + 5 * 12  # five runs of 12 images
    assert rows[1] == "a,0,rain,a.png,20.000000,0.400000,1,0.500000,0.000000,0.005000,"
    validations = tables.read(tmp_path / "validation.csv")
    same = "+0.000 (0 of 2 above 0) dB, +0.0 (0 of 2 above 0) 1e-4"
    assert tables.in_validation(validations, "a", "b") == same
    rows = (tmp_path / "validation.csv").read_text().splitlines()
    assert len(rows) == 1 + 5 * 2 * 3  # two validations of two tasks and their mean
    assert rows[6] == "a,0,1,mean,1.500000,1.500000"
    # the two files alone say the same
    (tmp_path / "alone").mkdir()
    for name in ("gains.csv", "validation.csv"):
        (tmp_path / name).rename(tmp_path / "alone" / name)
    assert tables.main([tmp_path / "alone"]) is None
    assert capsys.readouterr().out == done.stdout


@pytest.mark.parametrize("old, new", [("c.png", "d.png"), ('"psnr": 20.0', '"psnr": 20.1')])
def test_runs_of_other_photographs_or_models_are_not_mixed(tmp_path, old, new, capsys):
    write_report(tmp_path / "a/0", lambda *_: 0.0)
    write_report(tmp_path / "b/0", lambda *_: 0.0)
    tables.check_same(collected(tmp_path), "psnr_before", 0.01, "differs")
    path = tmp_path / "b/0/report.json"
    path.write_text(path.read_text().replace(old, new))
    said = fails(capsys, tables.main, [tmp_path])
    assert "b/0 has another start, or other images, than a/0" in said


def test_runs_of_another_reward_are_not_mixed(tmp_path, capsys):
    write_report(tmp_path / "a/0", lambda *_: 0.0)
    write_report(tmp_path / "b/0", lambda *_: 0.0)
    path = tmp_path / "b/0/report.json"
    path.write_text(path.read_text().replace('"reward": 0.4', '"reward": 0.5'))
    said = fails(capsys, tables.main, [tmp_path])
    assert "b/0 was measured by another reward than a/0" in said


def test_exposure_is_compared_where_all_runs_have_it(tmp_path):
    for arm, gain in (("a", 0.3), ("b", 0.1)):
        for seed in (0, 1):
            write_report(tmp_path / f"{arm}/{seed}", lambda *_: 0.0)
            path = tmp_path / f"{arm}/{seed}/report.json"
            stored = json.loads(path.read_text())
            for part, value in (("before", 0.5), ("after", 0.5 + gain)):
                for row in stored[part]:
                    row["exposure"] = value
            path.write_text(json.dumps(stored))
    words = tables.difference(collected(tmp_path), "a", "b")
    assert words.endswith("+2000.0 [+2000.0, +2000.0] 1e-4 of exposure")
    write_report(tmp_path / "b/2", lambda *_: 0.0)
    assert "exposure" not in tables.difference(collected(tmp_path), "a", "b")


def test_training_rewards_are_compared_late_and_by_seed():
    def rows(arm, gains):
        steps = [(seed, step) for seed in range(3) for step in range(1, 5)]
        rewards = [0.5 + n + gains[n] * (k > 2) for n, k in steps]
        return pd.DataFrame(steps, columns=["seed", "step"]).assign(arm=arm, reward=rewards)

    arms = pd.concat([rows("a", [0.01, 0.02, 0.03]), rows("b", [0, 0, 0])])
    half = scipy.stats.t.ppf(0.975, 2) * 100 / 3**0.5
    expected = f"+200.0 [{200 - half:+.1f}, {200 + half:+.1f}] 1e-4"
    assert tables.in_training(arms, "a", "b").startswith(expected)


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    for seed, steps in ((0, 120), (1, 120), (2, 60)):
        samples, path = dict(scores=[seed], workers=seed), tmp_path / f"a/{seed}/config.json"
        path.parent.mkdir(parents=True)
        config = dict(seed=seed, out=str(path), command=f"--seed {seed}", samples=samples)
        config |= dict(device=["cpu", "cuda"][seed % 2])
        path.write_text(json.dumps(config | dict(training=dict(steps=steps))))
        if seed == 1:
            tables.check_settings(tmp_path / "a")
    with pytest.raises(runs.RunError, match="a/2/config.json has other settings than .*a/0/config"):
        tables.check_settings(tmp_path / "a")


def test_what_has_no_interval_is_said(tmp_path):
    assert np.isnan(tables.interval(in_rows(np.zeros((5, 1, 2))), "psnr")[1:]).all()
    write_report(tmp_path / "a/0", lambda *_: 0.0)
    write_report(tmp_path / "b/1", lambda *_: 0.0)
    assert tables.difference(collected(tmp_path), "a", "b") == "a minus b: no seed in common"


def test_an_unknown_arm_is_named(capsys):
    assert "there is no arm 'x'" in fails(capsys, run.main, ["--arms", "x"])


def test_the_exposure_judge_says_how_close_the_mean_luminance_is():
    """Asked by the program that asks Qwen; all pixels of an image are equal, so its mean is."""
    server = exposure_judge.ThreadingHTTPServer(("127.0.0.1", 0), exposure_judge.Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    asked = judges.ServerJudge(judges.Config("exposure", address))
    red = np.array([100, 0, 0])
    pixels = dict(gt=red, degraded=red * 0, restored=red + [70, 0, 10])
    images = {name: np.full((16, 16, 3), value, np.uint8) for name, value in pixels.items()}
    request = {name: torch.from_numpy(image).permute(2, 0, 1) for name, image in images.items()}
    (reply,) = asked.score([request])
    server.shutdown()
    server.server_close()
    far = (0.299 * 70 + 0.114 * 10) / 255 / 0.2  # of red and blue, over FAR
    assert reply["score"] == pytest.approx(1 + 4 * (1 - far), abs=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(data_root="data"), "is no run of the demo model"),
        (dict(tasks=["dehaze"]), "is no run of the demo model"),
        (dict(), "there is no checkpoint"),
        (None, "name folders of arms"),
    ],
)
def test_only_whole_runs_of_the_demo_are_measured_again(tmp_path, change, words, capsys):
    if change is not None:
        write_report(tmp_path / "a/0", lambda *_: 0.0)
        samples = dict(data_root=None, tasks=[]) | change
        config = dict(init="/somewhere/weights/demo.pt", samples=samples)
        (tmp_path / "a/0/config.json").write_text(json.dumps(config))
    assert words in fails(capsys, measure.main, [tmp_path / "a"])


def test_other_photographs_are_measured_on_their_middle(tmp_path):
    """The demo model itself as a run: it gains nothing, and pixels outside the middle do not
    count."""
    folder = tmp_path / "arms/same/0"
    write_report(folder, lambda *_: 0.0)
    shutil.copy(DEMO_MODEL, folder / "last.pt")
    config = dict(init=str(DEMO_MODEL), samples=dict(data_root=None, tasks=[]))
    (folder / "config.json").write_text(json.dumps(config))
    digest = model_digest(load_pretrained(DEMO_MODEL, "fraction"))
    (folder / "hard.json").write_text(json.dumps(dict(model=digest)))
    write(tmp_path / "photos/a.png", width=272, height=48)
    flags = [tmp_path / "arms/same", "--measure-on", tmp_path / "photos"]
    assert measure.main([str(flag) for flag in flags]) is None
    stored = json.loads((folder / "report.json").read_text())
    before, after = stored["photographs_before"], stored["photographs_after"]
    assert len(before) == 7
    for old, new in zip(before, after):
        assert new["psnr"] == pytest.approx(old["psnr"], abs=1e-4)
    image = read_image(tmp_path / "photos/a.png", (8, 0, 264, 48))
    by_hand = Sample("dehaze", "a.png", str(tmp_path / "photos/a.png"), box=(8, 0, 264, 48))
    assert torch.equal(evaluation_pair(by_hand)[1], image)
    row = next(row for row in before if row["task"] == "dehaze")
    assert row["psnr_in"] == pytest.approx(psnr(*evaluation_pair(by_hand)).item())


def test_an_arm_begun_with_other_flags_is_not_gone_on_with(tmp_path, capsys):
    folder = tmp_path / "sft/0"
    write_report(folder, lambda *_: 0.0)
    command = f"python train.py --hard-ratio 0.3 --seed 0 --out {folder} --objective sft"
    (folder / "config.json").write_text(json.dumps(dict(command=command)))
    (folder / "hard.json").write_text("{}")
    again = ["--arms", "sft", "--seeds", "0", "--out", str(tmp_path)]
    assert run.main(again) == 0  # it is there, and by this command
    assert run.main([*again, "--flags=--lr 1"]) == 1
    assert "was begun by another command" in capsys.readouterr().out


def write_evaluation(folder, gain, sets=("Rain100L", "BSD68 σ=25", "BSD68 σ=15", "PolyU")):
    """A run with eval-images.csv of two sets of Table 2 with 1 and 3 images, of a σ that has no
    column there, and of one set out of domain; gain(image number) in dB."""
    tasks = {"Rain100L": "derain", "BSD68 σ=25": "denoise25", "BSD68 σ=15": "denoise15"}
    lines = ["set,method,task,image,psnr_in,psnr,ssim"]
    for name in sets:
        for image in range(1 if name == "Rain100L" else 3):
            start, names = 20 + len(name), f"{tasks.get(name, name)},{name}/{image}.png"
            lines.append(f"{name},before,{names},10,{start},0.5")
            lines.append(f"{name},after,{names},10,{start + gain(image)},0.51")
    write_report(folder, lambda *_: 0.0)
    (folder / "eval-images.csv").write_text("\n".join(lines))


def test_sets_weigh_alike_in_the_tables_of_several_runs(tmp_path, capsys):
    for seed in (0, 1):
        write_evaluation(tmp_path / f"sft/{seed}", lambda image, s=seed: 0.1 * (image + s))
    assert tables.main([tmp_path]) is None
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    first = lines.index("| Method | Deraining Rain100L | Denoising BSD68 σ=25 | Average |")
    assert lines[first + 2] == "| pre-trained | 28.00/0.500 | 30.00/0.500 | 29.00/0.500 |"
    assert lines[first + 3] == "| sft | 28.05/0.510 | 30.15/0.510 | 29.10/0.510 |"
    for title, gain in (("in domain", "+0.100 ["), ("PolyU", "+0.150 [")):
        (head,) = (i for i, line in enumerate(lines) if line.startswith(f"| {title}: gain"))
        assert lines[head + 2].startswith(f"| sft | 2 | {gain}")
        assert lines[head + 2].endswith("+100.0 [+100.0, +100.0] |")


def test_runs_are_compared_set_by_set_in_whatever_order(tmp_path):
    sets = ("PolyU", "BSD68 σ=25", "Rain100L")
    for seed in (0, 1):
        write_evaluation(tmp_path / f"irpo/{seed}", lambda image: 0.3)
        write_evaluation(tmp_path / f"sft/{seed}", lambda image: 0.1, sets)
    write_evaluation(tmp_path / "sft/2", lambda image: 9.0)
    write_evaluation(tmp_path / "rl/3", lambda image: 0.0)
    tables.collect(tmp_path)
    rows = tables.read(tmp_path / "tests.csv")
    with pytest.raises(runs.RunError, match="sft/0 differs than irpo/0"):
        tables.check_same(rows, "psnr_before", 0.01, "differs")
    assert tables.difference(rows, "irpo", "rl") == "irpo minus rl: no seed in common"
    parts = tables.sets_of(rows)
    assert [*parts] == ["in domain", "PolyU"]
    for of_sets in parts.values():
        words = tables.difference(of_sets, "irpo", "sft").replace("-0.0", "+0.0")
        gain = "+0.200 [+0.200, +0.200] dB, +0.0 [+0.0, +0.0] 1e-4 of SSIM"
        assert words == f"irpo minus sft, 2 seeds: {gain}"
