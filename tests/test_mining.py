"""Metrics by AdaIR's protocol, and hard mining (Sec. 3.2)."""

import csv

import pytest
import torch
from conftest import cut_off, picture, reference_files, samples_of, small_adair, write
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics
import mining
from data import TASKS, DataError, find_photos, in_draws, list_training, load_pair
from model import restore
from runs import RunError, Stop, Stopped


@pytest.fixture
def clean():
    return torch.from_numpy(picture(160, 128)).permute(2, 0, 1).float() / 255


def test_psnr_and_ssim_are_scikit_images(clean):
    y = (clean + 0.05 * torch.randn(clean.shape)).clamp(0, 1)
    a, b = (t.permute(1, 2, 0).numpy() for t in (clean, y))
    value = peak_signal_noise_ratio(a, b, data_range=1)
    similarity = structural_similarity(a, b, data_range=1, channel_axis=-1)
    assert metrics.psnr(y + 9 * (y == 1), clean).item() == pytest.approx(value, abs=1e-4)
    assert metrics.ssim(y + 9 * (y == 1), clean) == pytest.approx(similarity, abs=1e-6)
    both = metrics.psnr(torch.stack((y, clean)), torch.stack((clean, clean)))
    assert both.tolist() == pytest.approx([value, 100], abs=1e-4)  # of each image
    assert metrics.ssim(clean, clean) == pytest.approx(1, abs=1e-6)


def test_evaluation_crops_to_multiples_of_16(tmp_path):
    write(tmp_path / "a.png", width=83, height=70)
    seen = []
    samples = find_photos(tmp_path)[0]
    rows = [metrics.evaluate_image(lambda x: seen.append(x.shape) or x, s)[0] for s in samples]
    assert set(seen) == {(3, 64, 80)} and [row["task"] for row in rows] == [s.task for s in samples]
    assert all(row["psnr"] == pytest.approx(row["psnr_in"], abs=1e-3) for row in rows)
    image = torch.arange(19.0).expand(3, 19, 19)
    # 3 too many: the original drops one on the left and two on the right
    assert metrics.multiple_of_16(image)[0, 0].tolist() == list(range(1, 17))


def row(task, name, psnr):
    return dict(task=task, name=name, psnr=psnr)


ROWS = [row("derain", f"r{i}", 30 + i) for i in range(10)]
ROWS += [row("lowlight", f"l{i}", 10 + i) for i in range(10)]


def names_of(chosen):
    return [ROWS[i]["name"] for i in chosen]


def test_hard_samples_are_the_worst_of_every_task():
    assert names_of(mining.select(ROWS, 0.3)) == ["r0", "r1", "r2", "l0", "l1", "l2"]
    assert names_of(mining.select(ROWS, 0.3, "easy")) == ["r7", "r8", "r9", "l7", "l8", "l9"]


def test_a_global_ranking_takes_the_dark_task_alone():
    assert names_of(mining.select(ROWS, 0.3, scope="global")) == [f"l{i}" for i in range(6)]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_ratio_acts_on_the_demos_own_samples(ratio):
    """14 photographs under 2 draws of 7 tasks, made-up PSNRs: of every task the worst share."""
    samples = in_draws(list_training(None).train, 2)
    psnrs = torch.rand(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [row(s.task, s.name, 20 + 20 * value) for s, value in zip(samples, psnrs)]
    chosen = [rows[i] for i in mining.select(rows, ratio)]
    assert len(rows) == 7 * 28
    for task in TASKS:
        ranked = sorted(r["psnr"] for r in rows if r["task"] == task)
        found = sorted(r["psnr"] for r in chosen if r["task"] == task)
        assert found == ranked[: round(ratio * 28)]


def test_random_selection_follows_the_seed():
    a, b, c = (mining.select(ROWS, 0.3, "random", seed=s) for s in (1, 1, 2))
    assert a == b != c and len(a) == 6
    assert [i % 10 for i in a[:3]] != [i % 10 for i in a[3:]]  # every task draws its own


def test_ratios_ties_and_single_images():
    assert len(mining.select(ROWS, 1.0)) == 20 and len(mining.select(ROWS, 0.01)) == 2
    assert len(mining.select(ROWS, 0.2, "all")) == 20
    ties = [row("derain", name, 30.0) for name in "dcba"]
    assert [ties[i]["name"] for i in mining.select(ties, 0.5)] == ["b", "a"]
    assert mining.select([row("derain", "only", 1.0)], 0.3) == [0]
    for ratio in (0, 1.5, -1, float("nan")):
        with pytest.raises(DataError, match="hard ratio"):
            mining.select(ROWS, ratio)


def test_the_published_selection_of_low_light_images():
    """The method's authors mined LOL's 485 training pairs with the pre-trained AdaIR: from its
    PSNRs ours picks the same 146 images."""
    with open(reference_files("golden", "mining_lowlight.csv")) as file:
        rows = [row("lowlight", r["image"], float(r["psnr"])) for r in csv.DictReader(file)]
    wanted = reference_files("golden", "mining_lowlight_worst.txt").read_text().split()
    assert len(rows) == 485 and len(wanted) == 146
    assert {rows[i]["name"] for i in mining.select(rows, 0.3)} == {*wanted}


def test_mining_gives_the_psnrs_of_a_loop_and_names_what_it_skips(tmp_path):
    samples, net = samples_of(tmp_path, 3), small_adair()
    cut_off(tmp_path / "2.png", 300)
    write(tmp_path / "small.png", width=24, height=24)
    small = str(tmp_path / "small.png")
    samples.append(samples[0]._replace(name="small.png", gt=small, box=()))
    found = mining.mine(lambda x: restore(net, x), samples, min_side=32)
    rows, problems = found
    assert len(rows) == 2 * len(TASKS) and len(problems) == 2
    assert "2.png cannot be read" in problems[0]
    assert "small.png is 24×24 px, smaller than the crop of 32" in problems[1]
    for r, sample in zip(rows, samples):
        degraded, gt = load_pair(sample)
        assert r["psnr"] == pytest.approx(metrics.psnr(restore(net, degraded), gt).item(), abs=1e-3)
    assert found == mining.mine(lambda x: restore(net, x), samples, min_side=32)


def test_on_a_gpu_images_of_one_size_are_restored_together(tmp_path):
    samples = samples_of(tmp_path, 3, ["denoise15", "denoise25", "derain", "dehaze", "deblur"])
    write(tmp_path / "1.png", width=96, seed=1)
    samples = [s._replace(box=()) for s in samples]
    cut_off(tmp_path / "2.png", 10)  # not even a header
    sizes = []
    alone = mining.mine(lambda x: x, samples)
    together = mining.mine(lambda x: sizes.append(len(x)) or x, samples, pixels=4 * 80 * 64)
    assert together == alone and sorted(sizes) == [1, 2, 3, 4]


def test_scores_are_taken_over_where_name_size_and_time_agree(tmp_path):
    samples = samples_of(tmp_path, 2)
    rows, _ = mining.mine(lambda x: x, samples)
    mining.save_hard(tmp_path / "hard.json", "model", rows, [0], samples[:1])
    known = mining.known_scores([tmp_path / "hard.json"], "model")
    assert mining.known_scores([tmp_path / "hard.json"], "another model") == {}

    def never(x):
        raise AssertionError("scored again")

    again, _ = mining.mine(never, samples, known=known)
    assert [r["psnr"] for r in again] == [r["psnr"] for r in rows]
    found, problems = mining.mine(never, samples, min_side=72, known=known)
    assert not found and "smaller than the crop of 72" in problems[0]  # mined for smaller crops
    write(tmp_path / "0.png", seed=99)
    seen = []
    mining.mine(lambda x: seen.append(x) or x, samples, known=known)
    assert len(seen) == len(TASKS)  # one of two photographs
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(RunError, match="is not the hard.json of a run"):
        mining.known_scores([tmp_path / "report.json"], "model")


def test_a_run_that_goes_on_refuses_another_model_and_other_images(tmp_path):
    samples = samples_of(tmp_path, 4)
    rows, _ = mining.mine(lambda x: x, samples)
    hard = [s for s in samples if s.task == "derain"]
    chosen = [i for i, r in enumerate(rows) if r["task"] == "derain"]
    mining.save_hard(tmp_path / "hard.json", "model", rows, chosen, hard)
    assert mining.load_hard(tmp_path / "hard.json", "model", samples) == hard
    for model, there in (("another", samples), ("model", samples[8:])):
        with pytest.raises(RunError, match="changed since"):
            mining.load_hard(tmp_path / "hard.json", model, there)
    write(tmp_path / "1.png", seed=99)
    with pytest.raises(RunError, match="changed since"):
        mining.load_hard(tmp_path / "hard.json", "model", samples)


def test_mining_ends_when_it_is_asked_to(tmp_path):
    with Stop() as stop, pytest.raises(Stopped, match="SIGTERM"):
        mining.mine(lambda x: stop.notice(15, None) or x, samples_of(tmp_path, 2), stop=stop)
