"""Sources, degradations and crops, on images made here."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cut_off, picture, reference_files, samples_of, write
from PIL import Image

import data
import degradations
import report
from metrics import psnr

LAYOUT = "denoise15 denoise25 denoise50 derain dehaze deblur lowlight".split()


def write_pair(folder, degraded, clean, name, partner, seed=0):
    write(folder / degraded / name, seed=seed)
    write(folder / clean / partner, seed=seed)


@pytest.fixture
def adair_root(tmp_path):
    """A small data folder in AdaIR's layout, one test set and one out-of-domain set."""
    train, test = tmp_path / "Train", tmp_path / "test"
    for i in range(6):
        write(train / f"Denoise/{i}.jpg", seed=i)
        write_pair(train / "Derain", "rainy", "gt", f"rain-{i}.png", f"norain-{i}.png", i)
        hazy = f"synthetic/part{i % 2}"
        write_pair(train / "Dehaze", hazy, "original", f"00{i}_0.8_0.1.jpg", f"00{i}.png", i)
        write_pair(train / "Deblur", "blur", "sharp", f"{i}.png", f"{i}.png", i)
        write_pair(train / "Enhance", "low", "gt", f"{i}.png", f"{i}.png", i)
    for i in range(2):
        write(test / f"denoise/bsd68/{i}.png", seed=i)
        write_pair(test / "dehaze", "input", "target", f"{i}_0.9_0.2.png", f"{i}.png", i)
        for folder in (test / "derain/Rain100L", test / "enhance/lol", tmp_path / "ood/real"):
            write_pair(folder, "input", "target", f"{i}.png", f"{i}.png", i)
    return tmp_path


# ----------------------------------------------------------------------------------- reading images


@pytest.mark.parametrize("kind", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_is_read_as_rgb(tmp_path, kind):
    original = Image.fromarray(picture()).convert(kind)
    path = tmp_path / ("x.tif" if kind == "CMYK" else "x.png")
    original.save(path)
    image = data.read_image(path)
    assert image.shape == (3, 64, 80) and image.dtype == torch.float32
    expected = torch.from_numpy(np.asarray(original.convert("RGB")) / 255).permute(2, 0, 1)
    assert torch.allclose(image, expected.float(), atol=1e-6)


def test_16_bit_grey_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 64 * 80).reshape(64, 80).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    image, expected = data.read_image(tmp_path / "x.png"), torch.from_numpy(values / 65535).float()
    assert image.shape == (3, 64, 80) and torch.allclose(image[1], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_exif_rotation_is_applied_and_a_box_is_cut_after_it(tmp_path, kind):
    path, exif = tmp_path / f"x.{kind}", Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(picture()).save(path, exif=exif)
    whole = data.read_image(path)
    assert whole.shape == (3, 80, 64) and data.image_size(path) == (64, 80)
    assert torch.equal(data.read_image(path, (8, 2, 30, 20)), whole[:, 2:20, 8:30])


def test_a_truncated_image_is_named(tmp_path):
    path = write(tmp_path / "cut.png")
    cut_off(path)
    with pytest.raises(data.DataError, match="cut.png cannot be read"):
        data.read_image(path)


def test_writing_rounds(tmp_path):
    image = torch.full((3, 8, 8), 100.7 / 255)
    (tmp_path / "x.png").write_bytes(report.to_png(image))
    assert np.asarray(Image.open(tmp_path / "x.png")).max() == 101


# ------------------------------------------------------------------------------------------ sources


def test_adair_layout(adair_root):
    samples, problems = data.find_adair_train(adair_root)
    assert not problems and [s.task for s in samples] == [task for task in LAYOUT for _ in range(6)]
    haze = [s for s in samples if s.task == "dehaze"]
    assert haze[0].gt.endswith("000.png") and haze[0].degraded.endswith("part0/000_0.8_0.1.jpg")
    rain = next(s for s in samples if s.task == "derain")
    assert rain.degraded.endswith("rain-0.png") and rain.gt.endswith("norain-0.png")
    assert all(not s.degraded for s in samples if s.task.startswith("denoise"))


def test_adair_test_sets(adair_root):
    sets = data.list_adair_test(adair_root)
    denoising = {"bsd68 σ=15", "bsd68 σ=25", "bsd68 σ=50"}
    assert set(sets) == {*denoising, "Rain100L", "dehaze", "lol", "real"}
    found = [sets[name][0].task for name in ("dehaze", "lol", "real")]
    assert found == ["dehaze", "lowlight", "real"]


def test_half_of_a_pair_is_named_in_training_and_an_error_in_evaluation(adair_root):
    (adair_root / "Train/Derain/gt/norain-3.png").unlink()
    samples, problems = data.find_adair_train(adair_root)
    assert sum(s.task == "derain" for s in samples) == 5
    assert len(problems) == 1 and "rain-3.png" in problems[0]
    (adair_root / "test/enhance/lol/target/1.png").unlink()
    with pytest.raises(data.DataError, match="lol/input/1.png has no clean image"):
        data.list_adair_test(adair_root)


def test_sets_of_the_same_name_are_both_kept(adair_root):
    write_pair(adair_root / "ood/lol", "input", "target", "0.png", "0.png")
    sets = data.list_adair_test(adair_root)
    assert sets["lol"][0].task == "lol" and sets["test/enhance/lol"][0].task == "lowlight"


def test_validation_is_apart_from_training(adair_root):
    train, val, held_out, _ = data.list_training(adair_root)
    assert {s.task for s in val} == {s.task for s in held_out} == {*LAYOUT}
    assert len({*train, *val, *held_out}) == len(train + val + held_out) == 6 * len(LAYOUT)


def test_the_demos_photographs_have_fixed_parts():
    train, val, held_out, problems = data.list_training(None)
    numbers = [sorted({int(Path(s.gt).stem[-2:]) for s in part}) for part in (train, val, held_out)]
    assert numbers[1:] == [[3, 9, 15, 21], [4, 8, 12, 16, 20, 24]] and not problems
    assert sorted(sum(numbers, [])) == [*range(1, 25)]
    assert all({s.task for s in part} == {*data.TASKS} for part in (train, val, held_out))
    assert len(held_out) == 6 * 2 * len(data.TASKS)  # two draws of each
    first, second = (s for s in held_out if s.task == "derain" and "kodim04" in s.gt)
    (one, gt), (two, same) = data.load_pair(first), data.load_pair(second)
    assert torch.equal(gt, same) and not torch.equal(one, two)


def test_a_photo_stands_under_several_draws_of_every_degradation(tmp_path):
    write(tmp_path / "a.png", width=384, height=256)
    photos = data.find_photos(tmp_path)[0]
    found = data.in_draws(photos, 3)
    assert len(found) == 3 * len(data.TASKS) == len({(s.task, s.name) for s in found})
    for task in data.TASKS:
        degraded, gt = zip(*(data.load_pair(s) for s in found if s.task == task))
        assert gt[0].shape == (3, 256, 384) and all(torch.equal(gt[0], other) for other in gt)
        assert not torch.equal(degraded[0], degraded[1])
    assert data.in_draws(photos, 1) == photos
    of_adair = [data.Sample("derain", "1", "a.png", "b.png"), data.Sample("denoise15", "1", "x")]
    assert data.in_draws(of_adair, 6) == of_adair


def test_missing_empty_and_foreign_folders(tmp_path):
    with pytest.raises(data.DataError, match="there is no folder"):
        data.list_training(tmp_path / "none")
    with pytest.raises(data.DataError, match="neither AdaIR's Train/ nor any image"):
        data.list_training(tmp_path)
    (tmp_path / "Train").mkdir()
    with pytest.raises(data.DataError, match="no pairs in AdaIR's layout"):
        data.list_training(tmp_path)
    with pytest.raises(data.DataError, match="no test images"):
        data.list_adair_test(tmp_path)


def test_a_folder_of_photos(tmp_path):
    for i in range(10):
        write(tmp_path / f"{i}.png", seed=i)
    write(tmp_path / "large.png", width=1300, height=700)
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "broken.png").write_bytes(b"no image")
    train, val, held_out, problems = data.list_training(tmp_path)
    val = val + held_out
    assert len(train) + len(val) == 11 * len(data.TASKS)
    assert len(problems) == 1 and "broken.png" in problems[0]
    large = next(s for s in train + val if s.name == "large.png")
    assert data.load_pair(large)[1].shape == (3, 512, 512)


@pytest.mark.parametrize("decode", [True, False])
def test_what_cannot_be_used_is_named(adair_root, decode):
    """By the headers alone, or with every pixel read, which finds what is cut off, too."""
    write(adair_root / "Train/Deblur/blur/2.png", width=72)
    for part in ("low", "gt"):
        write(adair_root / f"Train/Enhance/{part}/4.png", width=20, height=20)
    cut_off(adair_root / "Train/Derain/gt/norain-5.png")
    usable, problems = data.split_usable(data.find_adair_train(adair_root)[0], 32, decode)
    assert len(usable) == 6 * len(LAYOUT) - 2 - decode and len(problems) == 2 + decode
    assert any("blur/2.png is 72×64 px but its clean image" in p for p in problems)
    assert any("gt/4.png is 20×20 px, smaller than the crop of 32" in p for p in problems)
    assert any("norain-5.png cannot be read" in p for p in problems) == decode


def test_pairs_of_different_size_are_an_error_when_loaded(adair_root):
    path = write(adair_root / "x.png", width=72)
    sample = data.Sample("derain", "x", str(adair_root / "Train/Deblur/sharp/0.png"), str(path))
    with pytest.raises(data.DataError, match="is 72×64 px but its clean image"):
        data.load_pair(sample)


PUBLISHED = {  # file names as the data sets' authors gave them, in AdaIR's folders
    "Train/Denoise": ["100075.jpg", "8023.jpg", "00001.bmp", "04744.bmp"],
    "Train/Derain/rainy": ["rain-1.png", "rain-2.png", "rain-200.png"],
    "Train/Derain/gt": ["norain-1.png", "norain-2.png", "norain-200.png"],
    "Train/Dehaze/synthetic/part1": ["0005_0.8_0.04.jpg", "0005_1_0.2.jpg"],
    "Train/Dehaze/synthetic/part4": ["8970_0.95_0.16.jpg"],
    "Train/Dehaze/original": ["0005.jpg", "8970.jpg"],
    "Train/Deblur/blur": ["GOPR0372_07_00-000047.png", "GOPR0884_11_00-000047.png"],
    "Train/Deblur/sharp": ["GOPR0372_07_00-000047.png", "GOPR0884_11_00-000047.png"],
    "test/denoise/CBSD68": ["3096.jpg", "101085.jpg"],
    "test/denoise/Kodak24": ["kodim01.PNG"],
    "test/derain/Rain100L/input": ["rain-001.png", "rain-100.png"],
    "test/derain/Rain100L/target": ["norain-001.png", "norain-100.png"],
    "test/dehaze/SOTS/input": ["0001_0.8_0.2.jpg"],
    "test/dehaze/SOTS/target": ["0001.png"],
    "test/deblur/gopro/input": ["GOPR0384_11_00-000001.png"],
    "test/deblur/gopro/target": ["GOPR0384_11_00-000001.png"],
}


def test_folders_are_counted_beside_the_published_numbers(tmp_path):
    for folder, names in PUBLISHED.items():
        for name in names:
            write(tmp_path / folder / name)
    (tmp_path / "Train/Derain/gt/norain-2.png").unlink()
    (tmp_path / "Train/Denoise/8023.jpg").write_bytes(b"it is not opened")
    head, rows = data.training_table(tmp_path)
    assert head == ["folders", "found", "paper", "set", "without partner"]
    assert rows == [
        ["Train/Denoise", 4, 5144, "BSD400 + WED", 0],
        ["Train/Derain/rainy + Train/Derain/gt", 2, 200, "Rain100L", 1],
        ["Train/Dehaze/synthetic + Train/Dehaze/original", 3, 72135, "RESIDE OTS", 0],
        ["Train/Deblur/blur + Train/Deblur/sharp", 2, 2103, "GoPro", 0],
        ["Train/Enhance/low + Train/Enhance/gt", 0, 485, "LOL", 0],  # it is missing
    ]
    assert data.training_table(tmp_path, ["dehaze", "deblur"])[1] == rows[2:4]
    sets = data.list_adair_test(tmp_path)
    counts = {name: len(samples) for name, samples in sets.items() if "σ" not in name}
    assert counts == {"Rain100L": 2, "SOTS": 1, "gopro": 1}
    assert sets["Rain100L"][0].gt.endswith("target/norain-001.png")


def test_a_folder_without_one_pair_is_not_called_absent(tmp_path):
    write(tmp_path / "Train/Derain/rainy/rain-1.png")
    write(tmp_path / "Train/Derain/gt/clean-1.png")
    assert data.training_table(tmp_path, ["derain"])[1][0][1:] == [0, 200, "Rain100L", 2]
    words = "no pairs in AdaIR's layout .* for derain; 2 file.s. cannot be used, as .*rain-1.png"
    with pytest.raises(data.DataError, match=words):
        data.list_training(tmp_path, tasks=["derain"])


def test_the_layout_on_real_pairs():
    root = reference_files("data")
    samples, problems = data.find_adair_train(root)
    count = Counter(s.task for s in samples)
    paired = dict(derain=100, dehaze=96, deblur=115, lowlight=95)
    assert count == dict(denoise15=333, denoise25=333, denoise50=333) | paired
    assert not problems and data.split_usable(samples, 128, decode=False)[1] == []
    counts = {name: len(s) for name, s in data.list_adair_test(root).items()}
    wanted = {"Rain100L": 51, "dehaze": 24, "polyu": 50, "bsd68 σ=25": 68}
    assert wanted.items() <= counts.items()


def test_pairs_in_folders_of_scenes(tmp_path):
    """GoPro as its authors packed it has a 000047.png in every scene's folder."""
    for scene in ("GOPR0372_07_00", "GOPR0374_11_00"):
        file = f"{scene}/000047.png"
        write_pair(tmp_path / "Train/Deblur", "blur", "sharp", file, file)
    samples, problems = data.find_adair_train(tmp_path, ["deblur"])
    assert len(samples) == 2 and not problems
    assert all(s.degraded.replace("/blur/", "/sharp/") == s.gt for s in samples)


def test_a_folder_that_links_to_its_parent_ends(tmp_path):
    write(tmp_path / "a/1.png")
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert data.images_in(tmp_path) == [str(tmp_path / "a/1.png")]
    assert data.images_in(tmp_path / "a")[0] == str(tmp_path / "a/1.png")


def test_files_that_number_alike_are_sorted_alike_everywhere(tmp_path):
    for name in ("a01", "a1", "a10", "a2"):
        write(tmp_path / f"{name}.png")
    assert [Path(p).stem for p in data.images_in(tmp_path)] == ["a01", "a1", "a2", "a10"]


# ------------------------------------------------------------------------------------- degradations


@pytest.fixture
def clean():
    return torch.from_numpy(picture(160, 128)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("task", data.TASKS)
def test_degradations_are_deterministic_8_bit_and_degrade(clean, task):
    a, b, other = (
        data.TASKS[task].degrade(clean, data.rng_of(0, name, 0)) for name in ("x", "x", "y")
    )
    assert torch.equal(a, b) and not torch.equal(a, other) and a.shape == clean.shape
    assert a.min() >= 0 and a.max() <= 1 and torch.allclose(a * 255, (a * 255).round(), atol=1e-3)
    assert psnr(a, clean) < 35


@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_noise_has_the_stated_sigma_and_is_truncated(sigma):
    gt = torch.full((3, 200, 200), 128 / 255)
    noisy = degradations.gaussian_noise(gt, np.random.default_rng(0), sigma) * 255
    assert noisy.std().item() == pytest.approx(sigma, rel=0.02)
    assert noisy.mean().item() == pytest.approx(127.5, abs=0.5)  # truncation costs half a step


def test_haze_obeys_the_scattering_model(clean):
    """With depth 0 nothing happens; with unit depth I − A is a constant multiple of J − A."""
    light, nothing, everything = (0.9, 0.85, 0.8), torch.zeros(128, 160), torch.ones(128, 160)
    assert torch.allclose(degradations.scatter(clean, nothing, 1.5, light), clean, atol=0.003)
    hazed = degradations.scatter(clean, everything, 1.5, light)
    for c in range(3):
        slope, offset = np.polyfit(clean[c].flatten(), hazed[c].flatten(), 1)
        assert slope == pytest.approx(np.exp(-1.5), abs=0.003)
        assert offset / (1 - slope) == pytest.approx(light[c], abs=0.005)


def test_a_camera_leaves_little(clean):
    """Weak noise and JPEG: above 24 dB, and something."""
    found = [psnr(degradations.camera(clean, np.random.default_rng(k)), clean) for k in range(20)]
    assert 24 < min(found) and max(found) < 60


def test_kernels_keep_brightness_and_position():
    lines = degradations.line_kernel(9.3, 0.7), degradations.line_kernel(5, 0)
    for kernel in (*lines, degradations.disk_kernel(2.4)):
        assert kernel.sum().item() == pytest.approx(1, abs=1e-5) and kernel.shape[0] % 2 == 1
        i = torch.arange(kernel.shape[0]) - kernel.shape[0] // 2
        assert abs((kernel.sum(1) * i).sum()) < 0.05 and abs((kernel.sum(0) * i).sum()) < 0.05


# -------------------------------------------------------------------------------------------- crops


def test_a_folder_of_degraded_images_is_no_folder_of_photos(tmp_path):
    write_pair(tmp_path / "Derain", "rainy", "gt", "rain-1.png", "norain-1.png")
    for folder in ("", "Derain", "Derain/rainy"):
        with pytest.raises(data.DataError, match="rainy/. but no Train/"):
            data.list_training(tmp_path / folder)


def test_crops_follow_from_seed_and_number(tmp_path):
    samples = samples_of(tmp_path)
    one, two, other = (data.Crops(samples, 32, seed) for seed in (0, 0, 1))
    for n in (0, 7, 40):  # 40 is in the second epoch
        assert all(torch.equal(a, b) for a, b in zip(one[n][:2], two[n][:2]))
        assert one[n][2:] == two[n][2:]
    assert any(one[n][3] != other[n][3] for n in range(10))
    assert one[0][0].shape == one[0][1].shape == (3, 32, 32)


def test_an_epoch_visits_every_sample_once(tmp_path):
    samples = samples_of(tmp_path, 2)
    crops, n = data.Crops(samples, 32, 0), len(samples)
    seen = [crops[i][2:4] for i in range(2 * n)]
    everything = sorted((s.task, s.name) for s in samples)
    assert sorted(seen[:n]) == sorted(seen[n:]) == everything and seen[:n] != seen[n:]


def test_so_many_crops_of_each_task_of_different_images(tmp_path):
    samples = samples_of(tmp_path, 3)[:-2]  # fewer of the last tasks
    crops = data.Crops(samples, 32, 0)
    found = crops.of_each_task(4)
    assert {task: len(numbers) for task, numbers in found.items()} == dict.fromkeys(data.TASKS, 4)
    assert all(crops[n][2] == task for task, numbers in found.items() for n in numbers)
    assert len({crops[n][3] for n in found["derain"]}) == 3


def test_crop_and_truth_stay_aligned(tmp_path):
    """At σ = 15 a crop differs from its truth by noise alone, whatever the crop and flips."""
    crops = data.Crops([s for s in samples_of(tmp_path) if s.task == "denoise15"], 48, 0)
    assert all(22 < psnr(*crops[n][:2]) < 28 for n in range(10))


def test_mined_images_keep_their_degradation_and_noise_is_new(tmp_path):
    samples = [s for s in samples_of(tmp_path, 1) if s.task in ("dehaze", "denoise50")]
    noisy = [data.load_pair(samples[0], epoch=e)[0] for e in (0, 1)]
    assert not torch.equal(*noisy)
    sample = next(s for s in samples if s.task == "dehaze")
    whole, _ = data.load_pair(sample)
    crops = data.Crops([sample], 64, 0)  # as high as the image
    places = [whole[..., left : left + 64] for left in range(17)]
    for n in range(6):
        variants = [crops[n][0].flip(d) for d in ([], [1], [2], [1, 2])]
        assert any(torch.allclose(place, v, atol=1e-6) for place in places for v in variants)


def test_a_file_that_breaks_later_is_named(tmp_path):
    samples = [s for s in samples_of(tmp_path, 2) if s.task == "derain"]
    cut_off(tmp_path / "1.png", 300)
    crops = data.Crops(samples, 32, 0)
    with pytest.raises(data.DataError, match="1.png cannot be read"):
        [crops[0], crops[1]]


def test_crops_become_a_batch(tmp_path):
    crops = data.Crops(samples_of(tmp_path, 1), 32, 0)
    batch = crops.collate([crops[3], crops[4]])
    assert batch.degraded.shape == batch.gt.shape == (2, 3, 32, 32) and batch.numbers == [3, 4]
    assert batch.names == ["0.png"] * 2 and batch.tasks == [crops[3][2], crops[4][2]]


def test_repeats_are_adairs():
    wanted = dict(denoise15=3, denoise25=3, denoise50=3)
    wanted |= dict(derain=120, dehaze=1, deblur=5, lowlight=20)
    repeated = data.adair_repeats([data.Sample(task, "x", "x") for task in wanted])
    assert {task: sum(s.task == task for s in repeated) for task in wanted} == wanted


def test_a_word_may_name_a_kind_of_tasks():
    denoising = ["denoise15", "denoise25", "denoise50"]
    assert data.task_names(["denoise", "dehaze"]) == [*denoising, "dehaze"]
    assert data.task_names(["denoise25"]) == ["denoise25"]
    assert data.task_names([]) == list(data.TASKS)


def test_the_hazes_of_one_truth_are_not_trained_on_and_measured_on():
    """OTS has 35 hazes of a photograph."""
    names = [(i, f"{i}_{k}") for i in range(5) for k in "abcd"]
    hazes = [data.Sample("dehaze", name, f"{i:04}.jpg", "x") for i, name in names]
    rest, held_out = data.set_aside(hazes, 3)
    assert [s.name for s in held_out] == ["4_a"] and rest == hazes[:16]
    many = [s._replace(gt=f"{n}/{s.gt}") for n in range(3) for s in hazes]
    rest, held_out = data.set_aside(many, 3)
    assert [s.gt for s in held_out] == ["2/0002.jpg", "2/0003.jpg", "2/0004.jpg"]
    assert rest == many[:48]
    assert data.set_aside(many, 2)[1] == held_out[1:]
    mixed = sorted(hazes, key=lambda s: s.name[-1])  # by haze, not by photograph
    rest, held_out = data.set_aside(mixed, 3)
    assert [s.name for s in held_out] == ["4_a"]
    assert not any(s.gt == "0004.jpg" for s in rest) and len(rest) == 16
    assert data.set_aside(hazes[:4], 1) == (hazes[:4], [])  # of one truth: nothing to set aside


def listing(folder, text):
    (folder / "list.txt").write_text(text)
    return folder / "list.txt"


def test_a_list_names_files_by_the_last_parts_of_their_paths(adair_root):
    samples = data.find_adair_train(adair_root, ["denoise15", "denoise25", "dehaze", "deblur"])[0]

    def named(text):
        others, listed = data.split_listed(samples, listing(adair_root, text))
        assert sorted(others + listed) == sorted(samples)
        return [(s.task, Path(s.gt).stem) for s in listed]

    both = [("denoise15", "0"), ("denoise25", "0")]
    assert named("# one file, two tasks\n\nDenoise/0.jpg\n") == both == named("./0.jpg")
    truth, hazy = "original/003.png", "part1/003_0.8_0.1.jpg"  # either names the pair
    assert named(truth) == named(hazy) == named(f"{hazy}\n{truth}") == [("dehaze", "003")]
    assert named("3.png") == [("deblur", "3")]
    assert named(str(adair_root / "Train/Deblur/blur/3.png")) == [("deblur", "3")]
    for text, words in (
        ("# nothing\n\n", "list.txt names no image"),
        ("0.jpg\nblur/7.png", "list.txt, line 2: 'blur/7.png' is no training image"),
        ("lur/3.png", "line 1: 'lur/3.png' is no training image"),
    ):
        with pytest.raises(data.DataError, match=words):
            named(text)
    write(adair_root / "Train/Denoise/more/0.jpg")
    samples = data.find_adair_train(adair_root, ["denoise15"])[0]
    with pytest.raises(data.DataError, match="'0.jpg' may be any of 2 files"):
        named("0.jpg")
    assert named("more/0.jpg") == named("Denoise/more/0.jpg") == [("denoise15", "0")]
