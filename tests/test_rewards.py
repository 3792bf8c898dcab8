"""Appendix B against scikit-image, scipy, plain NumPy, and cases whose answer is known."""

import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import reference_files
from scipy.ndimage import correlate
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import rewards
from data import TASKS


def photo(size=96):
    """Two different crops of a photograph, (2, 3, size, size) in [0, 1]."""
    image = torch.from_numpy(astronaut().copy()).permute(2, 0, 1) / 255
    corners = (50, 180), (300, 200)
    return torch.stack([image[:, y : y + size, x : x + size] for y, x in corners])


@pytest.fixture
def pair():
    gt = photo()
    y = (gt * 0.8 + 0.05 + 0.1 * torch.randn(gt.shape)).clamp(0, 1)
    return y, gt


def as_numpy(image):
    return image.permute(1, 2, 0).double().numpy()


# ----------------------------------------------------------------------------------- general reward


def test_psnr_against_scikit_image(pair):
    pairs = [(as_numpy(g), as_numpy(y)) for y, g in zip(*pair)]
    expected = np.array([peak_signal_noise_ratio(*images, data_range=1) for images in pairs])
    assert np.allclose(rewards.r_psnr(*pair), (expected - 10) / 40, atol=1e-5)


def test_psnr_thresholds():
    gt = torch.zeros(3, 3, 16, 16)
    y = torch.tensor([0.0, 1.0, 10 ** (-30 / 20)])[:, None, None, None] * torch.ones_like(gt)
    assert torch.allclose(rewards.r_psnr(y, gt), torch.tensor([1.0, 0.0, 0.5]), atol=1e-5)
    assert rewards.r_psnr(y[2:], gt[2:], lo=20, hi=40).item() == pytest.approx(0.5, abs=1e-5)


def test_ssim_against_scikit_image(pair):
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    settings |= dict(data_range=1, channel_axis=-1)
    expected = [structural_similarity(as_numpy(g), as_numpy(y), **settings) for y, g in zip(*pair)]
    assert np.allclose(rewards.ssim(*pair), expected, atol=1e-4)
    assert torch.allclose(rewards.r_ssim(pair[1], pair[1]), torch.ones(2), atol=1e-5)


def test_ssim_is_clipped_and_wants_a_window():
    x = torch.rand(1, 3, 32, 32)
    assert rewards.r_ssim(1 - x, x).item() == 0  # anticorrelated: SSIM below 0
    with pytest.raises(ValueError, match="11 px"):
        rewards.ssim(x[..., :10], x[..., :10])


# ------------------------------------------------------------------------------------- task rewards


def np_luma(image):
    return as_numpy(image) @ np.array([0.299, 0.587, 0.114])


def np_sobel(z):
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=float)
    return correlate(z, kernel, mode="nearest"), correlate(z, kernel.T, mode="nearest")


def np_magnitude(z):
    gx, gy = np_sobel(z)
    return np.sqrt(gx**2 + gy**2 + 1e-12)


def np_closeness(a, b):
    return min(a / (b + 1e-6), b / (a + 1e-6))


def np_grad(y, g):
    m_y, m_gt = np_magnitude(np_luma(y)), np_magnitude(np_luma(g))
    return 1 - np.abs(m_y - m_gt).mean() / (m_gt.mean() + 1e-6)


def np_sharp(y, g):
    return np_closeness(np_magnitude(np_luma(y)).mean(), np_magnitude(np_luma(g)).mean())


def np_color(y, g):
    means = (as_numpy(z).mean(axis=(0, 1)) for z in (y, g))
    return 1 - np.abs(np.subtract(*means)).sum() / 0.6


NUMPY_TASK_REWARDS = {
    "grad": np_grad,
    "contrast": lambda y, g: np_closeness(np_luma(y).std(), np_luma(g).std()),
    "sharp": np_sharp,
    "exposure": lambda y, g: 1 - abs(np_luma(y).mean() - np_luma(g).mean()) / 0.5,
    "color": np_color,
}


@pytest.mark.parametrize("name", NUMPY_TASK_REWARDS)
def test_task_rewards_against_numpy(pair, name):
    y, gt = pair
    y = gt + 0.2 * (y - gt)  # near enough that nothing is clipped
    expected = [NUMPY_TASK_REWARDS[name](a, b) for a, b in zip(y, gt)]
    assert 0.05 < min(expected) and max(expected) < 0.999
    assert np.allclose(getattr(rewards, f"r_{name}")(y, gt), expected, atol=1e-5)


def test_anisotropy_against_numpy(pair):
    expected = []
    for y in pair[0]:
        ex, ey = (np.abs(g).mean() for g in np_sobel(np_luma(y)))
        expected.append(1 - abs(ex - ey) / (ex + ey))
    assert np.allclose(rewards.r_aniso(pair[0]), expected, atol=1e-5)


def test_sobel_of_a_ramp():
    """Slope 1 per pixel gives 8 inside (the kernel's weights: 4 · 2), 4 at the replicated border, 0
    across."""
    gx, gy = rewards.sobel(torch.arange(6.0).expand(1, 5, 6))
    assert gx[0, 2].tolist() == [4, 8, 8, 8, 8, 4] and torch.count_nonzero(gy) == 0


@pytest.mark.parametrize("name", NUMPY_TASK_REWARDS)
def test_identical_images_get_1(name):
    gt = photo()
    assert torch.allclose(getattr(rewards, f"r_{name}")(gt, gt), torch.ones(2), atol=1e-4)


def test_rain_streaks():
    """Pure vertical streaks have gradients along x alone: reward 0; as many in both directions:
    reward 1."""
    streaks = torch.zeros(1, 3, 32, 32)
    streaks[..., ::4] = 1
    assert rewards.r_aniso(streaks).item() == pytest.approx(0, abs=1e-6)
    assert rewards.r_aniso(streaks + streaks.transpose(2, 3)).item() == pytest.approx(1, abs=1e-5)


def test_a_hazed_image_loses_contrast_by_its_transmission():
    gt = photo()
    hazed = 0.4 * gt + 0.6 * 0.9
    assert torch.allclose(rewards.r_contrast(hazed, gt), torch.full((2,), 0.4), atol=1e-4)
    assert torch.allclose(rewards.r_contrast(gt, hazed), torch.full((2,), 0.4), atol=1e-4)
    assert torch.allclose(rewards.r_sharp(hazed, gt), torch.full((2,), 0.4), atol=1e-3)


def test_black_against_a_photo():
    gt = photo()
    black = torch.zeros_like(gt)
    for name in ("grad", "contrast", "sharp"):
        assert getattr(rewards, f"r_{name}")(black, gt).max() < 1e-3
    mean = rewards.luma(gt).mean(dim=(1, 2))
    assert torch.allclose(rewards.r_exposure(black, gt), (1 - mean / 0.5).clamp(0, 1), atol=1e-6)


def test_constant_images_give_finite_rewards():
    """No 0/0: a flat image has no gradient and no contrast."""
    flat, other = torch.full((1, 3, 16, 16), 0.3), torch.full((1, 3, 16, 16), 0.5)
    assert rewards.r_aniso(flat).item() == 1
    assert rewards.r_exposure(flat, other).item() == pytest.approx(0.6, abs=1e-5)
    assert rewards.r_color(flat, other).item() == pytest.approx(0, abs=1e-5)  # 3 · 0.2 / 0.6
    for task in TASKS:
        assert torch.isfinite(rewards.r_task(flat, other, task)).all()


def test_each_task_gets_its_own_reward(pair):
    y, gt = pair
    expected = {
        **dict.fromkeys(("denoise15", "denoise25", "denoise50"), rewards.r_grad(y, gt)),
        "derain": rewards.r_aniso(y),
        "dehaze": rewards.r_contrast(y, gt),
        "deblur": rewards.r_sharp(y, gt),
        "lowlight": 0.2 * rewards.r_exposure(y, gt) + 0.1 * rewards.r_color(y, gt),
    }
    for task, value in expected.items():
        assert torch.equal(rewards.r_task(y, gt, task), value)
    best = rewards.r_task(gt, gt, "lowlight")
    assert best.tolist() == pytest.approx([0.3, 0.3], abs=1e-6)  # as published
    assert rewards.TASK_REWARDS.keys() == TASKS.keys()


# ------------------------------------------------------------------------------------ configuration


def effective(text, judge=False):
    """The weights of the terms that are on."""
    weights = rewards.effective_weights(rewards.parse_terms(text, judge))
    return {name: weight for name, weight in weights.items() if weight}


def test_the_published_weights():
    paper = dict(clip=0.15, lpips=0.15, aes=0.09, psnr=0.12, ssim=0.09, qwen=0.1, task=0.3)
    assert effective("paper", judge=True) == pytest.approx(paper)


def test_the_default_renormalises_over_what_needs_no_download():
    general = 0.6 / 0.9
    expected = dict(psnr=general * 0.2 / 0.35, ssim=general * 0.15 / 0.35, task=0.3 / 0.9)
    assert effective("default") == pytest.approx(expected)


def test_own_weights():
    own = effective("psnr=1,ssim=3,gen=0.8,task=0.2")
    assert own == pytest.approx(dict(psnr=0.2, ssim=0.6, task=0.2))
    assert effective("task") == {"task": 1}


@pytest.mark.parametrize(
    "text", ["psnr,sharpness", "psnr=much", "psnr=-1", "psnr=nan", "psnr=0", "qwen,psnr", ""]
)
def test_impossible_terms_are_refused(text):
    with pytest.raises(rewards.RewardError, match="--rewards"):
        rewards.parse_terms(text)


def test_the_table_says_why_a_term_is_off():
    rows = {row["term"]: row for row in rewards.describe_terms(rewards.parse_terms("default"))}
    assert rows["psnr"]["state"] == "on" and "open_clip_model.safetensors" in rows["clip"]["state"]
    assert sum(row["weight"] for row in rows.values()) == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------------------- rewards of a user


def plug(folder, body, name="mine"):
    """A file with the reward `mine` of this body, as --rewards wants it."""
    path = folder / "my_rewards.py"
    path.write_text(f"def mine(restored, gt):\n    {body}\n")
    return f"{path}:{name}"


@pytest.fixture
def no_plugs():
    """Takes the user's rewards out of the table again."""
    yield
    for name in [name for name, term in rewards.TERMS.items() if ".py:" in term.plug]:
        del rewards.TERMS[name]


def test_a_reward_of_the_users_is_a_general_term(tmp_path, no_plugs, pair):
    """R of psnr (0.2) and mine (0.3) inside R_gen, and of the task, by hand."""
    source = plug(tmp_path, "return 1 - (restored - gt).abs().mean(dim=(1, 2, 3))")
    reward = rewards.Reward(rewards.parse_terms(f"psnr,task,{source}=0.3"))
    y, gt = pair
    r, terms = reward(y[:, None], y, gt, ["dehaze"] * 2)
    mine = 1 - (y - gt).abs().flatten(1).mean(dim=1)
    assert torch.allclose(terms["mine"][:, 0], mine)
    general = (0.2 * rewards.r_psnr(y, gt) + 0.3 * mine) / 0.5
    assert torch.allclose(r[:, 0], (0.6 * general + 0.3 * rewards.r_contrast(y, gt)) / 0.9)
    alone = [reward.of_image(y[i], gt[i], "dehaze") for i in range(2)]
    assert alone == pytest.approx(r[:, 0].tolist())
    reward.try_plugs(gt[0], has_gradient=True)


def test_a_reward_of_the_users_may_leave_torch_and_lie_anywhere(tmp_path, no_plugs, pair):
    """NumPy, which has no gradient; a folder with = in its name; an annotated dataclass."""
    folder = tmp_path / "a=b"
    folder.mkdir()
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n"
    head += "@dataclass\nclass Scale:\n    by: float = 1.0\n"
    source = plug(folder, "return torch.from_numpy(restored.numpy().mean((1, 2, 3)) * Scale().by)")
    path = folder / "my_rewards.py"
    path.write_text(head + path.read_text())
    reward = rewards.Reward(rewards.parse_terms(f"psnr,{source}=0.3"))
    reward.try_plugs(pair[1][0], has_gradient=False)
    _, terms = reward(pair[0][:, None], pair[0], pair[1], ["dehaze"] * 2)
    assert torch.allclose(terms["mine"][:, 0], pair[0].mean(dim=(1, 2, 3)))
    other = plug(tmp_path, "return gt.mean(dim=(1, 2, 3))")
    with pytest.raises(rewards.RewardError, match="two functions mine"):
        rewards.parse_terms(f"{source}=0.3,{other}=0.3")


@pytest.mark.parametrize(
    "body, words",
    [
        ("return restored.mean()", r"gave \(\) for 2 images: it must be \(2,\)"),
        ("return 0.5", "gave float for 2 images"),
        ("return restored.mean(dim=(1, 2, 3)) + 2", r"not in \[0, 1\]"),
        ("return gt.mean(dim=(1, 2, 3)) / 0 * 0", r"not in \[0, 1\]"),
        ("raise KeyError('scale')", r"failed \(KeyError\('scale'\)\)"),
        ("return gt.mean(dim=(1, 2, 3))", "has no gradient"),
    ],
)
def test_a_reward_of_the_users_that_does_not_work(tmp_path, no_plugs, pair, body, words):
    reward = rewards.Reward(rewards.parse_terms(f"psnr,{plug(tmp_path, body)}=0.3"))
    with pytest.raises(rewards.RewardError, match=f"my_rewards.py:mine .*{words}"):
        reward.try_plugs(pair[1][0], has_gradient=True)


def test_a_reward_of_the_users_that_is_not_there(tmp_path, no_plugs):
    source = plug(tmp_path, "return gt.mean(dim=(1, 2, 3))")
    for text, words in (
        (source, "give it a weight"),
        (f"{source}2=1", "no function mine2"),
        (f"{tmp_path}/other.py:mine=1", "there is no file"),
        (f"{plug(tmp_path, 'pass', name='psnr')}=1", "there is a term psnr already"),
    ):
        with pytest.raises(rewards.RewardError, match=words):
            rewards.parse_terms(text)
    (tmp_path / "my_rewards.py").write_text("import nothing_of_this_name")
    with pytest.raises(rewards.RewardError, match="the file fails .*nothing_of_this_name"):
        rewards.parse_terms(f"{source}=1")


def test_a_row_added_to_the_table_is_a_term(no_plugs):
    row = rewards.Term(lambda s: s.y.mean(dim=(1, 2, 3)), "gen", 0.5, plug="by hand")
    rewards.TERMS["brightness"] = row
    assert effective("psnr,brightness=0.2") == pytest.approx(dict(psnr=0.5, brightness=0.5))


# --------------------------------------------------------------------------------- composite reward


def test_composite_is_the_weighted_sum_per_group():
    gt = photo()
    y = (gt[:, None] + 0.1 * torch.randn(2, 4, 3, 96, 96)).clamp(0, 1)
    tasks = ["denoise25", "dehaze"]
    r, terms = rewards.Reward(rewards.parse_terms("default"))(y, gt, gt, tasks)
    assert r.shape == (2, 4) and set(terms) == {"psnr", "ssim", "task"}
    for i in range(2):
        for j in range(4):
            one, truth = y[i, j][None], gt[i][None]
            general = (0.20 * rewards.r_psnr(one, truth) + 0.15 * rewards.r_ssim(one, truth)) / 0.35
            expected = (0.6 * general + 0.3 * rewards.r_task(one, truth, tasks[i])) / 0.9
            assert r[i, j].item() == pytest.approx(expected.item(), abs=1e-5)


def test_outputs_are_clamped_before_scoring():
    gt = photo()
    reward = rewards.Reward(rewards.parse_terms("default"))
    wild, tasks = 3 * gt[:, None] - 1, ["derain"] * 2
    clamped = reward(wild.clamp(0, 1), gt, gt, tasks)[0]
    assert torch.equal(reward(wild, gt, gt, tasks)[0], clamped)


def test_a_group_the_judge_could_not_score_is_rewarded_without_it():
    gt = photo()
    y = (gt[:, None] + 0.1 * torch.randn(2, 2, 3, 96, 96)).clamp(0, 1)
    reward = rewards.Reward(rewards.parse_terms("psnr,ssim,qwen,task", judge=True))
    score = torch.tensor([[5.0, 1.0], [math.nan, 3.0]])

    class Scores:  # what a judge.Judge is to a reward
        def ask(self, degraded, restored, gt):
            return "pending"

        def result(self, pending):
            return score

    tasks = ["derain"] * 2
    r, terms = reward(y, gt, gt, tasks, Scores())
    without, _ = rewards.Reward(rewards.parse_terms("psnr,ssim,task"))(y, gt, gt, tasks)
    assert torch.equal(terms["qwen"][0], torch.tensor([1.0, 0.0]))
    assert torch.allclose(r[0], 0.9 * without[0] + 0.1 * terms["qwen"][0])
    assert torch.allclose(r[1], without[1])
    alone = rewards.Reward(rewards.parse_terms("qwen", judge=True))
    r, _ = alone(y, gt, gt, tasks, Scores())
    assert r[0].tolist() == [1.0, 0.0] and r[1].isnan().all()  # not scored: never a guess
    usual = rewards.Reward(rewards.parse_terms("default"))
    image = y[0, 0], gt[0], "derain"
    assert alone.of_image(*image) == usual.of_image(*image)  # what a report can measure


# ---------------------------------------------------------------------------- networks behind terms


VISION = dict(layers=2, width=64, head_width=32, patch_size=16, image_size=64)
TEXT = dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1)


def tiny_clip():
    import open_clip

    return open_clip.CLIP(768, VISION, TEXT, quick_gelu=True).eval()


def test_clip_and_aesthetic_share_one_normalised_embedding(pair):
    net, head = tiny_clip(), rewards.AestheticHead().eval()
    net.visual.image_mean = (0.48145466, 0.4578275, 0.40821073)
    net.visual.image_std = (0.26862954, 0.26130258, 0.27577711)
    with torch.no_grad():
        e_y, e_gt = (rewards.clip_embedding(net, z) for z in pair)
        assert torch.allclose(e_y.norm(dim=1), torch.ones(2), atol=1e-5)
        cosine = torch.cosine_similarity(e_y, e_gt).clamp(0, 1)
        assert torch.allclose(rewards.r_clip(e_y, e_gt), cosine, atol=1e-6)
        assert torch.allclose(rewards.r_aes(head, e_y), (head(e_y) / 10).clamp(0, 1))


def test_clip_sees_what_its_own_preprocessing_shows(pair):
    """Tensor resizing against open_clip's published preprocessing of the PIL image."""
    from open_clip.transform import image_transform
    from PIL import Image

    seen = []

    class Eye(torch.nn.Module):
        class visual:
            image_size, image_mean, image_std = (64, 64), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

        def encode_image(self, x):
            seen.append(x)
            return x.flatten(1)

    image = (photo()[:1] * 255).round() / 255
    wide = torch.cat((image, image.flip(3)), dim=3)
    rewards.clip_embedding(Eye(), wide)
    pil = Image.fromarray((wide[0].permute(1, 2, 0) * 255).round().byte().numpy())
    colours = dict(mean=Eye.visual.image_mean, std=Eye.visual.image_std)
    expected = image_transform(64, is_train=False, **colours)(pil)
    assert (seen[0][0] - expected).abs().max() < 0.05  # bicubic in 8 bits there, in floats here


def test_lpips_against_the_package(pair):
    import lpips

    torch.manual_seed(3)
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    y, gt = (z[..., :64, :64] for z in pair)
    with torch.no_grad():
        expected = 1 - net(2 * y - 1, 2 * gt - 1).flatten().clamp(0, 1)
        got = rewards.r_lpips(net, rewards.lpips_features(net, y), rewards.lpips_features(net, gt))
    assert torch.allclose(got, expected, atol=1e-5) and (expected < 0.9999).all()


@pytest.fixture
def weights_dir(tmp_path):
    """Random weights under the names the real ones have."""
    import open_clip
    import torchvision
    from safetensors.torch import save_file

    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / rewards.NETS["lpips"].file)
    torch.save(rewards.AestheticHead().state_dict(), tmp_path / rewards.NETS["aes"].file)
    config = dict(embed_dim=768, quick_gelu=True, vision_cfg=VISION, text_cfg=TEXT)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny.json")
    save_file(tiny_clip().state_dict(), tmp_path / rewards.NETS["clip"].file)
    return tmp_path


def test_the_loaders_on_the_real_classes(weights_dir, pair):
    """Every general term through its own loading code; only CLIP's size differs from the real
    one."""
    trunk = torch.load(weights_dir / rewards.NETS["lpips"].file, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the package's own are no user's business
        lpips_net = rewards.load_lpips(weights_dir / rewards.NETS["lpips"].file)
    assert torch.equal(lpips_net.net.state_dict()["slice2.3.weight"], trunk["features.3.weight"])
    clip_net = rewards.load_clip(weights_dir / rewards.NETS["clip"].file, "tiny")
    head = rewards.load_aesthetic(weights_dir / rewards.NETS["aes"].file)
    reward = rewards.Reward(rewards.parse_terms("psnr,task"))
    reward.weights = rewards.parse_terms("paper")
    reward.nets = {"clip": clip_net, "lpips": lpips_net, "aes": head}
    y, gt = pair
    r, terms = reward(torch.stack((y, y), dim=1), gt, gt, ["deblur", "derain"])
    assert set(terms) == set(rewards.PAPER) - {"qwen"} and r.shape == (2, 2)
    weights = rewards.effective_weights(reward.weights)
    assert torch.allclose(r, sum(weights[k] * v for k, v in terms.items()))
    assert torch.allclose(r[:, 0], r[:, 1], atol=1e-5)


def test_laions_file_fits_the_aesthetic_head():
    head = rewards.load_aesthetic(reference_files("weights", "sac+logos+ava1-l14-linearMSE.pth"))
    embedding = torch.nn.functional.normalize(torch.randn(4, 768), dim=1)
    state = head.state_dict()
    x = embedding
    for i in (0, 2, 4, 6, 7):  # the published head: linear layers without activations
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    assert torch.allclose(head(embedding), x[:, 0], atol=1e-4)
    assert ((0 < head(embedding)) & (head(embedding) < 10)).all()


def test_missing_weights_name_the_file_its_source_and_the_flag(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(rewards.RewardError) as error:
        rewards.Reward(rewards.parse_terms("lpips,psnr"), weights_dir=tmp_path)
    for part in ("alexnet-owt-7be5be79.pth", "https://", "--weights-dir", "--rewards", "lpips"):
        assert part in str(error.value)


def test_a_wrong_weights_file_is_named(tmp_path):
    torch.save({"layers.0.weight": torch.zeros(1)}, tmp_path / rewards.NETS["aes"].file)
    (tmp_path / rewards.NETS["lpips"].file).write_bytes(b"no weights")
    with pytest.raises(rewards.RewardError, match="does not hold the weights of aes"):
        rewards.load_net("aes", tmp_path / rewards.NETS["aes"].file)
    with pytest.raises(rewards.RewardError, match="does not hold the weights of lpips"):
        rewards.Reward(rewards.parse_terms("lpips,psnr"), weights_dir=tmp_path)


def test_one_image_is_rewarded_as_in_a_group(pair):
    y, gt = pair
    reward = rewards.Reward(rewards.parse_terms("default"))
    for task in ("denoise25", "derain", "lowlight"):
        found, _ = reward(y[:, None], y, gt, [task] * 2)
        alone = [reward.of_image(*images, task) for images in zip(y, gt)]
        assert found.flatten().tolist() == pytest.approx(alone, abs=1e-6)


def test_psnr_has_a_finite_gradient_at_equality():
    y = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    rewards.r_psnr(y, y.detach()).sum().backward()
    assert torch.equal(y.grad, torch.zeros_like(y))


def test_the_reward_has_a_gradient(pair):
    """Against finite differences along a random direction."""
    y, gt = (0.1 + 0.8 * t.double() for t in pair)
    reward = rewards.Reward(rewards.parse_terms("default"))
    tasks, direction = ["dehaze", "deblur"], torch.randn_like(y)

    def value(step):
        return reward.differentiable(y + step * direction, gt, tasks)

    moved = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.differentiable(moved, gt, tasks).sum(), moved)
    slope = (gradient * direction).sum(dim=(1, 2, 3))
    with torch.no_grad():
        differences = (value(1e-3) - value(-1e-3)) / 2e-3
    assert torch.allclose(slope.float(), differences, rtol=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_what_patches_contribute_adds_up_to_the_reward(task):
    """A small change of one patch changes its share by what the whole reward changes by."""
    reward = rewards.Reward(rewards.parse_terms("psnr,ssim,task,lowpass=0.2"))
    rng = torch.Generator().manual_seed(0)
    gt = torch.rand(1, 3, 8, 8, generator=rng).repeat_interleave(8, 2).repeat_interleave(8, 3)
    y = (0.8 * gt + 0.1 * torch.rand(1, 3, 64, 64, generator=rng))[:, None].repeat(1, 2, 1, 1, 1)
    change = 3e-3 * torch.randn(3, 16, 16, generator=rng) + 3e-3
    y[0, 1, :, 16:32, 32:48] += change
    whole, terms, shares = reward.in_patches(y, gt, gt, [task], None, 16)
    assert shares.shape == (1, 2, 4, 4)
    usual, usual_terms = reward(y, gt, gt, [task])
    assert torch.allclose(whole, usual) and terms.keys() == usual_terms.keys()
    found, wanted = (shares[0, 1] - shares[0, 0]).double(), (whole[0, 1] - whole[0, 0]).item()
    assert found.sum().item() == pytest.approx(wanted, rel=0.05)
    inner = found[1, 2].item()  # SSIM's windows and Sobel's reach into its neighbours
    assert inner == pytest.approx(wanted, rel=0.35) and abs(inner) > 0


def test_a_reward_of_the_users_and_the_judge_are_whole_in_every_patch(tmp_path):
    (tmp_path / "mine.py").write_text("def red(y, gt):\n    return y[:, 0].mean(dim=(1, 2))\n")
    text = f"{tmp_path}/mine.py:red=1,qwen"
    reward = rewards.Reward(rewards.parse_terms(text, judge=True))
    y, gt = torch.rand(2, 4, 3, 32, 32), torch.rand(2, 3, 32, 32)
    red, score = y[:, :, 0].mean(dim=(2, 3)), 1 + 4 * torch.rand(2, 4)
    score[1, 2] = math.nan  # the judge failed: this group is rewarded without it

    class Scores:
        """Stands for a judge whose answers are known."""

        def ask(self, degraded, restored, gt):
            return None

        def result(self, pending):
            return score

    scores, _, found = reward.in_patches(y, gt, gt, ["derain"] * 2, Scores(), 16)
    assert found.shape == (2, 4, 2, 2)
    assert torch.allclose(found[0, :, 1, 0], (0.6 * red[0] + 0.1 * (score[0] - 1) / 4) / 0.7)
    assert torch.allclose(found[1, :, 0, 1], red[1])
    assert torch.allclose(found[:, :, 0, 0], scores)


def test_lowpass_fidelity_is_that_of_block_means():
    y, gt = torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    blocks = (as_numpy(y[1]) - as_numpy(gt[1])).reshape(4, 8, 6, 8, 3).mean(axis=(1, 3))
    assert rewards.r_lowpass(y, gt)[1].item() == pytest.approx(np.exp(-15 * np.abs(blocks).mean()))
    assert rewards.r_lowpass(gt, gt).tolist() == [1, 1]


def test_piqe_is_the_packages_and_its_absence_a_sentence(monkeypatch):
    reward = rewards.Reward(rewards.parse_terms("psnr,piqe=0.4"))
    monkeypatch.setitem(sys.modules, "pypiqe", None)
    with pytest.raises(rewards.RewardError, match="pip install pypiqe"):
        reward.try_plugs(torch.rand(3, 32, 32), has_gradient=False)
    monkeypatch.undo()
    pypiqe = pytest.importorskip("pypiqe")
    photo = astronaut()[:128, :128].copy()
    images = torch.from_numpy(np.stack([photo, photo[::-1]])).permute(0, 3, 1, 2) / 255
    images[1] = (images[1] + 0.05 * torch.randn(3, 128, 128)).clamp(0, 1)
    shots = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()[..., ::-1]  # it wants BGR
    scores = [pypiqe.piqe(np.ascontiguousarray(shot))[0] for shot in shots]
    wanted = 1 - torch.tensor(scores) / 100
    assert torch.allclose(rewards.r_piqe(images).double(), wanted, atol=1e-6)
    # from its blocks, of which patches have their shares
    shares = rewards.PatchMeans(16)
    assert torch.allclose(rewards.r_piqe(images, mean=shares).double(), wanted, atol=1e-3)
    assert [tuple(z.shape) for z in shares.seen] == [(2, 8, 8)] * 2
    images = images[..., :72, :88]  # sides that 16 does not divide: their last blocks are smaller
    shares = rewards.r_piqe(images, mean=rewards.PatchMeans(8))
    assert torch.allclose(shares, rewards.r_piqe(images), atol=0.03)
    with pytest.raises(rewards.RewardError, match="has no gradient"):
        reward.try_plugs(torch.rand(3, 32, 32), has_gradient=True)
