"""Sources, degradations, crops and hard mining, on images made here."""

import numpy as np
import pytest
import torch
from conftest import reference_files
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import data
import runs


def picture(width=80, height=64, seed=0):
    """Smooth random colours with an edge, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(4, 15) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(4, 15)) for _ in range(3)]
    image = 0.5 + 0.4 * np.stack(waves, axis=-1)
    image[height // 2 :, : width // 3] *= 0.4
    return (image.clip(0, 1) * 255).astype(np.uint8)


def write(path, pixels=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(**kwargs) if pixels is None else pixels).save(path)
    return path


@pytest.fixture
def adair_root(tmp_path):
    """A small data folder in AdaIR's layout, one test set and one out-of-domain set."""
    t = tmp_path / "Train"
    for i in range(6):
        write(t / f"Denoise/{i}.jpg", seed=i)
        write(t / f"Derain/rainy/rain-{i}.png", seed=i), write(t / f"Derain/gt/norain-{i}.png", seed=i + 10)
        write(t / f"Dehaze/synthetic/part{i % 2}/00{i}_0.8_0.1.jpg", seed=i), write(t / f"Dehaze/original/00{i}.png", seed=i)
        write(t / f"Deblur/blur/{i}.png", seed=i), write(t / f"Deblur/sharp/{i}.png", seed=i)
        write(t / f"Enhance/low/{i}.png", seed=i), write(t / f"Enhance/gt/{i}.png", seed=i)
    e = tmp_path / "test"
    for i in range(2):
        write(e / f"denoise/bsd68/{i}.png", seed=i)
        for folder, a, b in (("derain/Rain100L", f"{i}", f"{i}"), ("dehaze", f"{i}_0.9_0.2", f"{i}"), ("enhance/lol", f"{i}", f"{i}")):
            write(e / folder / f"input/{a}.png", seed=i), write(e / folder / f"target/{b}.png", seed=i)
        write(tmp_path / f"ood/real/input/{i}.png", seed=i), write(tmp_path / f"ood/real/target/{i}.png", seed=i)
    return tmp_path


# ------------------------------------------------------------------------------------------------ reading images


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
    image = data.read_image(tmp_path / "x.png")
    assert image.shape == (3, 64, 80) and torch.allclose(image[1], torch.from_numpy(values / 65535).float(), atol=1e-6)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(picture()).save(tmp_path / "x.png", exif=exif)
    assert data.read_image(tmp_path / "x.png").shape == (3, 80, 64)
    assert data.image_size(tmp_path / "x.png") == (64, 80)


def test_a_truncated_image_is_named(tmp_path):
    path = write(tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(data.DataError, match="cut.png cannot be read"):
        data.read_image(path)


def test_writing_rounds(tmp_path):
    image = torch.full((3, 8, 8), 100.7 / 255)
    runs.write_image(tmp_path / "x.png", image)
    assert np.asarray(Image.open(tmp_path / "x.png")).max() == 101


# ------------------------------------------------------------------------------------------------------- sources


def test_adair_layout(adair_root):
    samples, problems = data.list_adair_train(adair_root)
    assert not problems and len(samples) == 6 * 7
    haze = [s for s in samples if s.task == "dehaze"]
    assert haze[0].gt.endswith("000.png") and haze[0].degraded.endswith("part0/000_0.8_0.1.jpg")
    rain = next(s for s in samples if s.task == "derain")
    assert rain.degraded.endswith("rain-0.png") and rain.gt.endswith("norain-0.png")
    assert all(not s.degraded for s in samples if s.task.startswith("denoise"))


def test_adair_test_sets(adair_root):
    sets = data.list_adair_test(adair_root)
    assert set(sets) == {"bsd68 σ=15", "bsd68 σ=25", "bsd68 σ=50", "Rain100L", "dehaze", "lol", "real"}
    assert sets["dehaze"][0].task == "dehaze" and sets["lol"][0].task == "lowlight" and sets["real"][0].task == "real"


def test_half_of_a_pair_is_named_in_training_and_an_error_in_evaluation(adair_root):
    (adair_root / "Train/Derain/gt/norain-3.png").unlink()
    samples, problems = data.list_adair_train(adair_root)
    assert sum(s.task == "derain" for s in samples) == 5 and len(problems) == 1 and "rain-3.png" in problems[0]
    (adair_root / "test/enhance/lol/target/1.png").unlink()
    with pytest.raises(data.DataError, match="lol/input/1.png has no clean image"):
        data.list_adair_test(adair_root)


def test_sets_of_the_same_name_are_both_kept(adair_root):
    write(adair_root / "ood/lol/input/0.png"), write(adair_root / "ood/lol/target/0.png")
    sets = data.list_adair_test(adair_root)
    assert {"lol", "test/enhance/lol"} <= set(sets) and sets["test/enhance/lol"][0].task == "lowlight"


def test_validation_is_apart_from_training(adair_root):
    train, val, _ = data.list_training(adair_root)
    assert {s.task for s in val} == set(data.TASKS) and not set(train) & set(val) and len(train) + len(val) == 42
    train, val, _ = data.list_training(None)
    assert {s.task for s in val} == set(data.TASKS) and not {s.gt for s in train} & {s.gt for s in val}


def test_the_cut_does_not_fall_inside_a_scene(tmp_path):
    for name in [f"street_{i}" for i in range(17)] + [f"tower_{i}" for i in range(3)]:
        for folder in ("blur", "sharp"):
            write(tmp_path / f"Train/Deblur/{folder}/{name}.png")
    _, val, _ = data.list_training(tmp_path)
    assert [s.name.split("/")[-1] for s in val] == ["tower_0.png", "tower_1.png", "tower_2.png"]  # not four, a fifth


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
    train, val, problems = data.list_training(tmp_path)
    assert len(train) + len(val) == 11 * 7 and len(problems) == 1 and "broken.png" in problems[0]
    large = next(s for s in train + val if s.name == "large.png")
    assert data.load_pair(large)[1].shape == (3, 512, 512)


def test_headers_tell_sizes_before_anything_is_decoded(adair_root):
    write(adair_root / "Train/Deblur/blur/2.png", width=72)
    write(adair_root / "Train/Enhance/low/4.png", width=20, height=20)
    write(adair_root / "Train/Enhance/gt/4.png", width=20, height=20)
    usable, problems = data.check_headers(data.list_adair_train(adair_root)[0], 32)
    assert len(usable) == 40 and len(problems) == 2
    assert any("blur/2.png is 72×64 px but its clean image" in p for p in problems)
    assert any("gt/4.png is 20×20 px, smaller than the crop of 32" in p for p in problems)


def test_pairs_of_different_size_are_an_error_when_loaded(adair_root):
    path = write(adair_root / "x.png", width=72)
    with pytest.raises(data.DataError, match="is 72×64 px but its clean image"):
        data.load_pair(data.Sample("derain", "x", str(adair_root / "Train/Deblur/sharp/0.png"), str(path)))


def test_the_layout_on_real_pairs():
    root = reference_files("data")
    samples, problems = data.list_adair_train(root)
    count = {t: sum(s.task == t for s in samples) for t in data.TASKS}
    assert count == {"denoise15": 333, "denoise25": 333, "denoise50": 333, "derain": 100, "dehaze": 96, "deblur": 115, "lowlight": 95}
    assert not problems and data.check_headers(samples, 128)[1] == []
    counts = {name: len(s) for name, s in data.list_adair_test(root).items()}
    assert counts["Rain100L"] == 51 and counts["dehaze"] == 24 and counts["polyu"] == 50 and counts["bsd68 σ=25"] == 68


# ------------------------------------------------------------------------------------------- python data.py --data-root


PUBLISHED = {  # file names as the data sets' authors gave them, in AdaIR's folders
    "Train/Denoise": ["100075.jpg", "8023.jpg", "00001.bmp", "04744.bmp"],
    "Train/Derain/rainy": ["rain-1.png", "rain-2.png", "rain-200.png"],
    "Train/Derain/gt": ["norain-1.png", "norain-2.png", "norain-200.png"],
    "Train/Dehaze/synthetic/part1": ["0005_0.8_0.04.jpg", "0005_1_0.2.jpg"],
    "Train/Dehaze/synthetic/part4": ["8970_0.95_0.16.jpg"],
    "Train/Dehaze/original": ["0005.jpg", "8970.jpg"],
    "Train/Deblur/blur": ["GOPR0372_07_00-000047.png", "GOPR0884_11_00-000047.png"],
    "Train/Deblur/sharp": ["GOPR0372_07_00-000047.png", "GOPR0884_11_00-000047.png"],
    "Train/Enhance/low": ["2.png", "779.png"],
    "Train/Enhance/gt": ["2.png", "779.png"],
    "test/denoise/CBSD68": ["3096.jpg", "101085.jpg"],
    "test/denoise/Urban100": ["img_001.png"],
    "test/denoise/Kodak24": ["kodim01.PNG"],
    "test/derain/Rain100L/input": ["rain-001.png", "rain-100.png"],
    "test/derain/Rain100L/target": ["norain-001.png", "norain-100.png"],
    "test/dehaze/SOTS/input": ["0001_0.8_0.2.jpg"],
    "test/dehaze/SOTS/target": ["0001.png"],
    "test/deblur/gopro/input": ["GOPR0384_11_00-000001.png"],
    "test/deblur/gopro/target": ["GOPR0384_11_00-000001.png"],
    "test/enhance/lol/input": ["1.png"],
    "test/enhance/lol/target": ["1.png"],
    **{f"{name}/{part}": ["1.png"] for name in ("ood/RRSHID", "GT-RAIN", "SIDD", "ReLoBlur", "LoLi_Street") for part in ("input", "target")},
}


@pytest.fixture
def published(tmp_path):
    for folder, names in PUBLISHED.items():
        for i, name in enumerate(names):
            write(tmp_path / folder / name, seed=i)
    return tmp_path


def look(root, capsys, *flags):
    """(exit code, lines) of the command."""
    code = data.main(["--data-root", str(root), "--crop", "32", *flags])
    return code, capsys.readouterr().out.splitlines()


def test_a_complete_tree_is_counted_against_the_published_numbers(published, capsys):
    code, lines = look(published, capsys)
    assert code == 0 and not any("not there" in line or "problem" in line for line in lines)
    counts = {line.split()[0]: line.split()[1:3] for line in lines if len(line.split()) > 2}
    assert counts["Train/Denoise"] == ["4", "5144"] and counts["Train/Dehaze"] == ["3", "72135"] and counts["Train/Derain"] == ["3", "200"]
    assert counts["Train/Deblur"] == ["2", "2103"] and counts["Train/Enhance"] == ["2", "485"]
    assert counts["test/denoise/CBSD68"] == ["2", "68"] and counts["test/dehaze/SOTS"] == ["1", "500"] and counts["test/derain/Rain100L"] == ["2", "100"]
    assert counts["test/deblur/gopro"] == ["1", "1111"] and counts["test/enhance/lol"] == ["1", "15"] and counts["LoLi_Street"] == ["1", "-"]
    assert any("LoLi-Street, out of domain" in line for line in lines) and any("67 of BSD400" in line for line in lines)
    gts = {s.name: s.gt for s in data.list_adair_test(published)["Rain100L"]}
    assert gts["test/derain/Rain100L/input/rain-001.png"].endswith("target/norain-001.png")


def test_what_is_wrong_is_named_and_decides_the_exit_code(published, capsys):
    low = published / "Train/Enhance/low/2.png"
    low.write_bytes(low.read_bytes()[:300])  # header whole, pixels cut off
    (published / "Train/Derain/gt/norain-2.png").unlink()
    code, lines = look(published, capsys)
    assert code == 0  # training leaves both out
    assert any("rain-2.png has no clean image norain-2.*" in line for line in lines) and any("low/2.png cannot be read" in line for line in lines)
    assert not any("low/2.png cannot be read" in line for line in look(published, capsys, "--headers")[1])
    (published / "test/deblur/gopro/target/GOPR0384_11_00-000001.png").unlink()
    code, lines = look(published, capsys)
    assert code == 1 and "eval.py would fail on test/deblur/gopro" in lines
    assert look(published, capsys, "--tasks", "dehaze", "derain")[0] == 0
    for name in ("2.png", "779.png"):
        (published / "Train/Enhance/gt" / name).unlink()
    code, lines = look(published, capsys, "--tasks", "lowlight")
    assert code == 1 and any("train.py would fail: " in line for line in lines)
    assert any(line.split() == ["Train/Enhance", "0", "485", "LOL;", "2", "problem(s)"] for line in lines)
    for name in ("2.png", "779.png"):
        (published / "Train/Enhance/low" / name).unlink()
    assert any("Train/Enhance/low/NAME, gt/NAME: LOL, 485" in line for line in look(published, capsys, "--tasks", "lowlight")[1])


def test_pairs_in_folders_of_scenes(tmp_path):
    """GoPro as its authors packed it has a 000047.png in every scene's folder."""
    for scene in ("GOPR0372_07_00", "GOPR0374_11_00"):
        write(tmp_path / f"Train/Deblur/blur/{scene}/000047.png"), write(tmp_path / f"Train/Deblur/sharp/{scene}/000047.png")
    samples, problems = data.list_adair_train(tmp_path, ["deblur"])
    assert len(samples) == 2 and not problems and all(s.degraded.replace("/blur/", "/sharp/") == s.gt for s in samples)


def test_a_folder_that_links_to_its_parent_ends(tmp_path):
    write(tmp_path / "a/1.png")
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert data.images_in(tmp_path, recursive=True) == [str(tmp_path / "a/1.png")]
    assert data.images_in(tmp_path / "a", recursive=True)[0] == str(tmp_path / "a/1.png")


def test_files_that_number_alike_are_sorted_alike_everywhere(tmp_path):
    for name in ("a01", "a1", "a10", "a2"):
        write(tmp_path / f"{name}.png")
    assert [data.stem(p) for p in data.images_in(tmp_path)] == ["a01", "a1", "a2", "a10"]


def test_a_folder_without_one_pair_is_not_called_absent(published, capsys):
    for name in ("1", "2", "200"):
        (published / f"Train/Derain/gt/norain-{name}.png").rename(published / f"Train/Derain/gt/rain-{name}.png")
    code, lines = look(published, capsys, "--tasks", "derain")
    assert code == 1 and any(line.split() == ["Train/Derain", "0", "200", "Rain100L;", "6", "problem(s)"] for line in lines)
    assert any("rain-1.png has no clean image norain-1.*" in line for line in lines) and not any("not there" in line for line in lines[:3])
    with pytest.raises(data.DataError, match="no pairs in AdaIR's layout .* for derain; 6 file.s. have no partner, as .*rainy/rain-1.png has no clean image"):
        data.list_training(published, tasks=["derain"])


def test_the_program_on_real_pairs(capsys):
    code, lines = look(reference_files("data"), capsys, "--headers")
    counts = {line.split()[0]: line.split()[1:3] for line in lines if len(line.split()) > 2}
    assert code == 0 and counts["Train/Dehaze"] == ["96", "72135"] and counts["test/derain/Rain100L"] == ["51", "100"] and counts["ood/polyu"] == ["50", "-"]
    assert any("test/denoise/Urban100/*: Urban100, 100" in line for line in lines)


# -------------------------------------------------------------------------------------------------- degradations


@pytest.fixture
def clean():
    return torch.from_numpy(picture(160, 128)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("task", data.TASKS)
def test_degradations_are_deterministic_8_bit_and_degrade(clean, task):
    a, b, other = (data.degrade(clean, task, data.rng_of(0, name, 0)) for name in ("x", "x", "y"))
    assert torch.equal(a, b) and not torch.equal(a, other) and a.shape == clean.shape
    assert a.min() >= 0 and a.max() <= 1 and torch.allclose(a * 255, (a * 255).round(), atol=1e-3)
    assert data.psnr(a, clean) < 35


@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_noise_has_the_stated_sigma_and_is_truncated(sigma):
    gt = torch.full((3, 200, 200), 128 / 255)
    noisy = data.gaussian_noise(gt, np.random.default_rng(0), sigma) * 255
    assert noisy.std().item() == pytest.approx(sigma, rel=0.02)
    assert noisy.mean().item() == pytest.approx(127.5, abs=0.5)  # truncation costs half a step


def test_haze_obeys_the_scattering_model(clean):
    """With depth 0 nothing happens; with unit depth I − A is a constant multiple of J − A."""
    assert torch.allclose(data.haze(clean, np.random.default_rng(1), torch.zeros(128, 160)), clean, atol=0.003)
    hazed = data.haze(clean, np.random.default_rng(1), torch.ones(128, 160))
    for c in range(3):
        slope, offset = np.polyfit(clean[c].flatten(), hazed[c].flatten(), 1)
        assert 0.05 < slope < 0.5 and 0.65 < offset / (1 - slope) < 1.05
        assert (hazed[c] - (slope * clean[c] + offset)).abs().max() < 0.005


@pytest.mark.parametrize("kernel", [data.line_kernel(9.3, 0.7), data.line_kernel(5, 0), data.disk_kernel(2.4)])
def test_kernels_keep_brightness_and_position(kernel):
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5) and kernel.shape[0] % 2 == 1
    i = torch.arange(kernel.shape[0]) - kernel.shape[0] // 2
    assert abs((kernel.sum(1) * i).sum()) < 0.05 and abs((kernel.sum(0) * i).sum()) < 0.05


def test_true_depth_is_nearer_for_larger_disparity():
    sample = next(s for s in data.list_embedded(["motorcycle_left.png"]) if s.task == "dehaze")
    depth = data.load_depth(sample)
    assert depth.shape == (192, 192) and 0 < depth.min() and depth.max() <= 1 and torch.isfinite(depth).all()
    with np.load(sample.disparity) as file:
        left, top, right, bottom = sample.box
        disparity = file["arr_0"][top:bottom, left:right]
    known = np.isfinite(disparity) & (disparity > 0)
    product = depth.numpy()[known] * disparity[known]  # depth is inversely proportional to disparity
    assert known.mean() > 0.5 and product.std() < 1e-4 * product.mean()
    assert not next(s for s in data.list_embedded(["motorcycle_left.png"]) if s.task == "derain").disparity


# --------------------------------------------------------------------------------------------------------- crops


def test_a_box_is_cut_after_the_exif_rotation(tmp_path):
    pixels = np.arange(40 * 24 * 3, dtype=np.uint32).reshape(40, 24, 3) % 251
    image = Image.fromarray(pixels.astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90° clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    whole = data.read_image(tmp_path / "turned.png")
    assert whole.shape == (3, 24, 40)
    assert torch.equal(data.read_image(tmp_path / "turned.png", (8, 2, 30, 20)), whole[:, 2:20, 8:30])


def test_a_folder_of_degraded_images_is_no_folder_of_photos(tmp_path):
    write(tmp_path / "Derain/rainy/rain-1.png"), write(tmp_path / "Derain/gt/norain-1.png")
    for folder in ("", "Derain", "Derain/rainy"):
        with pytest.raises(data.DataError, match="rainy/. but no Train/"):
            data.list_training(tmp_path / folder)


def samples_of(folder, n=5):
    for i in range(n):
        write(folder / f"{i}.png", seed=i)
    return data.list_photos(folder)[0]


def test_crops_follow_from_seed_and_number(tmp_path):
    samples = samples_of(tmp_path)
    one, two, other = (data.Crops(samples, 32, seed, 100) for seed in (0, 0, 1))
    for n in (0, 7, 40):  # 40 is in the second epoch
        assert all(torch.equal(a, b) for a, b in zip(one[n][:2], two[n][:2])) and one[n][2:] == two[n][2:]
    assert any(one[n][3] != other[n][3] for n in range(10))
    assert one[0][0].shape == one[0][1].shape == (3, 32, 32)


def test_an_epoch_visits_every_sample_once(tmp_path):
    samples = samples_of(tmp_path, 2)
    crops = data.Crops(samples, 32, 0, 28)
    seen = [crops[n][2:4] for n in range(28)]
    assert sorted(seen[:14]) == sorted(seen[14:]) == sorted((s.task, s.name) for s in samples) and seen[:14] != seen[14:]


def test_crop_and_truth_stay_aligned(tmp_path):
    """At σ = 15 a crop differs from its truth by noise alone, whatever the crop and flips."""
    crops = data.Crops([s for s in samples_of(tmp_path) if s.task == "denoise15"], 48, 0, 10)
    assert all(22 < data.psnr(*crops[n][:2]) < 28 for n in range(10))


def test_mined_images_keep_their_degradation_and_noise_is_new(tmp_path):
    samples = [s for s in samples_of(tmp_path, 1) if s.task in ("dehaze", "denoise50")]
    noisy = [data.load_pair(samples[0], epoch=e)[0] for e in (0, 1)]
    assert not torch.equal(*noisy)
    sample = next(s for s in samples if s.task == "dehaze")
    whole, _ = data.load_pair(sample)
    crops = data.Crops([sample], 64, 0, 6)  # as high as the image
    columns = whole.permute(2, 0, 1).flatten(1)
    for n in range(6):
        crop = crops[n][0]
        variants = [crop.flip(d) for d in ([], [1], [2], [1, 2])]
        assert any((columns - v.permute(2, 0, 1).flatten(1)[0]).abs().sum(dim=1).min() < 1e-6 for v in variants)


def test_fresh_crops_cycle_through_tasks_and_kinds(adair_root):
    samples = data.list_adair_train(adair_root)[0] + data.list_photos(adair_root / "Train/Denoise")[0]
    crops = data.Crops(samples, 32, 0, 200, fresh=True, cycle=["derain", "deblur"])
    names = [crops[n][2:4] for n in range(100)]
    assert [task for task, _ in names] == ["derain", "deblur"] * 50
    real = sum("rain-" in name for task, name in names if task == "derain")
    assert 10 < real < 40  # half of 50


def test_fresh_crops_stay_aligned_and_vary_in_exposure(tmp_path):
    samples = [s for s in samples_of(tmp_path, 1) if s.task == "denoise15"]
    crops = data.Crops(samples, 48, 0, 40, fresh=True)
    assert all(22 < data.psnr(*crops[n][:2]) < 29 for n in range(40))
    brightness = [crops[n][1].mean().item() for n in range(40)]
    assert max(brightness) > 1.5 * min(brightness)


def test_a_broken_file_is_passed_on_by_name(tmp_path):
    samples = [s for s in samples_of(tmp_path, 2) if s.task == "derain"]
    path = tmp_path / "1.png"
    path.write_bytes(path.read_bytes()[:300])
    crops = data.Crops(samples, 32, 0, 2)
    degraded, gt, tasks, names, numbers, problems = data.collate([crops[0], crops[1]])
    assert len(degraded) == len(gt) == len(tasks) == 1 and names == ["0.png"] and "1.png cannot be read" in problems[0]
    assert data.collate([data.DataError("x")])[0] is None


# ------------------------------------------------------------------------------------------------ scores, mining


def test_psnr_and_ssim_are_scikit_images(clean):
    y = (clean + 0.05 * torch.randn(clean.shape)).clamp(0, 1)
    a, b = (t.permute(1, 2, 0).numpy() for t in (clean, y))
    assert data.psnr(y, clean) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3)
    value, similarity = data.psnr_ssim(y, clean)
    assert value == pytest.approx(data.psnr(y, clean), abs=1e-3)
    assert similarity == pytest.approx(structural_similarity(a, b, data_range=1, channel_axis=-1), abs=1e-6)
    assert data.psnr(clean, clean) == 100 and data.psnr_ssim(clean, clean) == (100, 1)


def test_evaluation_crops_to_multiples_of_16(tmp_path):
    write(tmp_path / "a.png", width=83, height=70)
    seen = []
    rows, kept = data.evaluate(lambda x: seen.append(x.shape) or x, data.list_photos(tmp_path)[0], keep=[2])
    assert set(seen) == {(3, 64, 80)} and len(rows) == 7 and list(kept) == [2]
    assert all(row["psnr"] == pytest.approx(row["psnr_in"], abs=1e-3) for row in rows)
    image = torch.arange(19.0).expand(3, 19, 19)  # 3 too many: the original drops one on the left and two on the right
    assert data.multiple_of_16(image)[0, 0].tolist() == list(range(1, 17))


def row(task, name, psnr):
    return dict(task=task, name=name, psnr=psnr)


ROWS = [row("derain", f"r{i}", 30 + i) for i in range(10)] + [row("lowlight", f"l{i}", 10 + i) for i in range(10)]


def names_of(chosen):
    return [ROWS[i]["name"] for i in chosen]


def test_hard_samples_are_the_worst_of_every_task():
    assert names_of(data.select(ROWS, 0.3)) == ["r0", "r1", "r2", "l0", "l1", "l2"]
    assert names_of(data.select(ROWS, 0.3, "easy")) == ["r7", "r8", "r9", "l7", "l8", "l9"]


def test_a_global_ranking_takes_the_dark_task_alone():
    assert names_of(data.select(ROWS, 0.3, scope="global")) == [f"l{i}" for i in range(6)]


def test_random_selection_follows_the_seed():
    a, b, c = (data.select(ROWS, 0.3, "random", seed=s) for s in (1, 1, 2))
    assert a == b != c and len(a) == 6
    assert [i % 10 for i in a[:3]] != [i % 10 for i in a[3:]]  # every task draws its own


def test_ratios_ties_and_single_images():
    assert len(data.select(ROWS, 1.0)) == 20 and len(data.select(ROWS, 0.01)) == 2
    assert len(data.select(ROWS, 0.2, "all")) == 20
    ties = [row("derain", name, 30.0) for name in "dcba"]
    assert [ties[i]["name"] for i in data.select(ties, 0.5)] == ["b", "a"]
    assert data.select([row("derain", "only", 1.0)], 0.3) == [0]
    for ratio in (0, 1.5, -1, float("nan")):
        with pytest.raises(data.DataError, match="hard ratio"):
            data.select(ROWS, ratio)


def test_mining_is_repeatable_reuses_scores_and_names_what_it_skips(tmp_path):
    samples = samples_of(tmp_path, 3)
    path = tmp_path / "2.png"
    path.write_bytes(path.read_bytes()[:300])
    rows, problems = data.mine(lambda x: x, samples)
    assert len(rows) == 14 and len(problems) == 7 and "2.png" in problems[0]
    assert rows == data.mine(lambda x: x, samples)[0]

    def never(x):
        raise AssertionError("scored again")

    known = {r["digest"]: r["psnr"] for r in rows}
    assert data.mine(never, samples[:2], known)[0] == rows[:2]


def test_content_decides_what_is_reused_not_time(tmp_path):
    samples = samples_of(tmp_path, 2)
    before = [data.sample_digest(s) for s in samples]
    (tmp_path / "0.png").touch()
    data.file_digest.cache_clear()
    assert before == [data.sample_digest(s) for s in samples]
    write(tmp_path / "0.png", seed=99)
    data.file_digest.cache_clear()
    changed = [a != b for a, b in zip(before, (data.sample_digest(s) for s in samples))]
    assert changed == [s.name == "0.png" for s in samples]


def test_repeats_are_adairs():
    samples = [data.Sample(t, "x", "x") for t in data.TASKS]
    repeated = data.adair_repeats(samples)
    assert [sum(s.task == t for s in repeated) for t in data.TASKS] == [3, 3, 3, 120, 1, 5, 20]
