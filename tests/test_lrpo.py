"""LRPO: the one-step policy against torch.distributions and closed forms; whole runs, also of a
foreign restorer."""

import json
import shlex

import pytest
import torch
from conftest import fails, logged, save_adair, small_adair, without_times, write
from torch.distributions import Normal, kl_divergence

import eval as evaluation
import grpo
import lrpo
from config import parse_over
from diffusion import Chain
from experiments import cosine, nafnet, run
from model import CheckpointError, load_restorer, read_checkpoint, restore


class Linear(torch.nn.Module):
    """f(x) = W x on the pixels of images of 4 × 4 px, one channel matrix for all three."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 16, dtype=torch.float64) / 4)

    def forward(self, x):
        return (x.flatten(2) @ self.weight.T).view(x.shape)


def seeded(n=1, seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def images(n=1):
    return torch.rand(n, 3, 4, 4, dtype=torch.float64)


# --------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("block", [1, 2])
def test_log_prob_kl_and_likelihood_against_torch_distributions(block):
    net, start, x, gt = Linear(), Linear(), images(2), images(2)
    policy = lrpo.Pixels([block], [0.05])
    restored, path = policy.rollout(net, x, 6, seeded(2), turn=0)
    assert restored.shape == (2, 6, 3, 4, 4) and not restored.requires_grad
    pool = torch.nn.AvgPool2d(block)
    density, reference = Normal(pool(net(x)), 0.05), Normal(pool(start(x)), 0.05)
    for g in range(6):
        by_hand = density.log_prob(path.actions[:, g]).mean(dim=(1, 2, 3))
        assert torch.allclose(policy.log_prob(net, path)[:, g].flatten(), by_hand)
        assert torch.allclose(pool(restored[:, g]), path.actions[:, g])  # blocks have these means
    kl = kl_divergence(density, reference).mean(dim=(1, 2, 3))
    assert torch.allclose(policy.kl(net, start, path).flatten(), kl)
    likelihood = density.log_prob(pool(gt)).mean(dim=(1, 2, 3))
    assert torch.allclose(policy.log_likelihood(net, path, gt).flatten(), likelihood)


def test_noise_comes_in_pairs_and_follows_the_density():
    policy, net, x = lrpo.Pixels([2], [0.05]), Linear(), images()
    _, path = policy.rollout(net, x, 4000, seeded(), turn=0)
    noise = (path.actions - torch.nn.functional.avg_pool2d(net(x), 2)[:, None]) / 0.05
    assert torch.allclose(noise[:, :2000], -noise[:, 2000:])
    assert noise[:, :2000].std().item() == pytest.approx(1, abs=0.02)
    odd, _ = policy.rollout(net, x, 3, seeded(), turn=0)
    assert odd.shape[1] == 3


def test_block_sizes_take_turns_and_set_the_noise_level():
    policy = lrpo.Pixels([1, 2], [0.01, 0.03])
    for turn, (block, sigma) in enumerate([(1, 0.01), (2, 0.03), (1, 0.01)]):
        _, path = policy.rollout(Linear(), images(), 2, seeded(), turn)
        assert (path.block, path.sigma) == (block, sigma)
        assert policy.noise_level(path) == pytest.approx(sigma / 0.02)


@pytest.mark.parametrize("block, patch", [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_the_estimate_of_the_gradient_is_unbiased(block, patch):
    """A linear restorer, the reward −|y − t|², advantages r − r̄ alone. The mean over many groups of
    Σ A ∇ log π is the reward's gradient in what blocks can express: in pixels, P ∇R for the
    projection P on blocks; −2 (y − t) has the same P-part as its block means spread out. The same
    where every patch of 2 px has its own advantage, for what it adds to the reward."""
    net, x, t, sigma = Linear(), images(), images(), 0.05
    policy, found, entries = lrpo.Pixels([block], [sigma]), 0, 3 * ((patch or 4) // block) ** 2
    for k in range(300):
        restored, path = policy.rollout(net, x, 64, seeded(seed=100 + k), turn=0)
        pixels = 3 * (patch or 4) ** 2
        rewards = -pixels * grpo.over_patches((restored - t[:, None]).square(), patch)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True))[:, :, None]
        logp = policy.log_prob(net, path, patch) * entries  # of the patch as a whole
        estimate = (advantages * logp).sum(dim=(2, 3, 4)).mean()
        found = found + torch.autograd.grad(estimate, net.weight)[0] / 300
    y = net(x)
    gradient = -2 * (y - t).detach()  # of R in the pixels
    spread = lrpo.enlarged(torch.nn.functional.avg_pool2d(gradient, block), block)
    (wanted,) = torch.autograd.grad((y * spread).sum(), net.weight)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
    assert cosine.item() > 0.99
    assert found.norm().item() == pytest.approx(wanted.norm().item(), rel=0.05)


# ---------------------------------------------------------------------------------------- restorers


@pytest.fixture
def foreign(tmp_path):
    """A file of a small NAFNet with random weights, as its authors' are laid out."""
    from spandrel.architectures.NAFNet import NAFNet

    net = NAFNet(width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
    for name, p in net.named_parameters():
        if name.endswith((".beta", ".gamma")):  # 0 in a fresh one: its blocks would do nothing
            torch.nn.init.constant_(p, 0.1)
    torch.save({"params": net.state_dict()}, tmp_path / "nafnet.pth")
    return tmp_path / "nafnet.pth", net.eval()


def test_a_foreign_restorer_gives_what_its_class_gives(foreign):
    path, net = foreign
    loaded, x = load_restorer(path), torch.rand(1, 3, 20, 28)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
        assert torch.equal(restore(loaded, x), net(x))
    assert torch.equal(loaded(3 * x).detach(), net(3 * x).detach())  # not clamped


def test_what_is_no_restorer_is_one_sentence(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match="linear.pt is no restorer that spandrel knows"):
        load_restorer(tmp_path / "linear.pt")
    from spandrel.architectures.Compact import Compact as SRVGGNetCompact

    net = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4)
    torch.save(net.state_dict(), tmp_path / "x4.pth")
    with pytest.raises(CheckpointError, match="of scale 4, not an image restorer"):
        load_restorer(tmp_path / "x4.pth")


def test_a_network_whose_output_its_caller_scales_is_refused(tmp_path):
    from spandrel.architectures.MixDehazeNet import MixDehazeNet

    torch.save(MixDehazeNet().state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="net.pth is a MixDehazeNet, which is no plain"):
        load_restorer(tmp_path / "net.pth")


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture
def tiny(small):
    """Flags of a run of lrpo.py that takes seconds."""

    def flags(name, *more):
        return small(name, "--steps", 4, "--group-size", 8, "--tasks", "derain", *more)

    return flags


def test_a_run_trains_a_foreign_restorer_and_eval_reads_it(tiny, foreign, tmp_path):
    path, net = foreign
    assert lrpo.main(tiny("run", "--init", path)) is None
    stored = read_checkpoint(tmp_path / "run/last.pt")["model"]
    assert any(not torch.equal(p, stored[name]) for name, p in net.state_dict().items())
    restorer, init = evaluation.load(tmp_path / "run", "cpu")
    assert init == str(path.resolve())
    image = torch.rand(3, 30, 41)
    with torch.no_grad():
        wanted = load_restorer(tmp_path / "run/last.pt")(image[None])[0]
    assert torch.allclose(restorer(image), wanted, atol=1e-5)
    write(tmp_path / "photo.png")
    flags = ["restore", str(tmp_path / "photo.png"), "--ckpt", str(tmp_path / "run")]
    assert evaluation.main([*flags, "--out", str(tmp_path / "o"), "--device", "cpu"]) is None


@pytest.mark.parametrize("kind", ["one step", "chain"])
def test_a_resumed_run_is_the_same_to_the_bit(tiny, tmp_path, kind):
    flags = ["--save-every", 3, "--keep-every", 3, "--kl-beta", 0.1]
    if kind == "chain":
        net = Chain(width=8)
        torch.save({"model": net.state_dict(), "config": net.config}, tmp_path / "chain.pt")
        flags += ["--init", tmp_path / "chain.pt", "--group-size", 3, "--likelihood", 0.1]
    for name in ("whole", "parts"):
        lrpo.main(tiny(name, *flags))
    step_3 = (tmp_path / "parts/step-000003.pt").read_bytes()  # after an odd one: b = 2 is next
    (tmp_path / "parts/last.pt").write_bytes(step_3)
    lrpo.main(["--resume", str(tmp_path / "parts")])
    whole, parts = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(v, parts["live"][k]) for k, v in whole["live"].items())
    rows = [without_times(logged(tmp_path / name)) for name in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_one_step_is_what_the_equations_say(tiny, tmp_path):
    """Loss of a first step on one crop: A log π at ratio 1 is −mean A = 0, so what is left is the
    KL (0 at the start), the likelihood and ℓ1."""
    flags = "--kl-beta 1 --likelihood 0.5 --lambda-sup 2 --steps 1 --lr 0".split()
    flags += ["--advantage-scale", "group"]
    lrpo.main(tiny("run", *flags))
    row = logged(tmp_path / "run")[0]
    assert row["ratio"] == pytest.approx(1) and row["kl"] == pytest.approx(0, abs=1e-6)
    rest = 0.5 * (1 - torch.tensor(row["log_likelihood"] / 40).exp().item())
    assert row["loss/total"] == pytest.approx(rest + 2 * row["loss/sup"], abs=1e-3)
    assert row["advantage_rms"] == pytest.approx(1, rel=1e-3)


def test_rl_raises_a_reward_that_has_no_gradient(tmp_path):
    """A reward of the user's that counts bright pixels, by RL and with shuffled advantages."""
    (tmp_path / "mine.py").write_text(
        "def bright(restored, gt):\n    return (restored > 0.5).float().mean(dim=(1, 2, 3))\n"
    )
    save_adair(tmp_path / "init.pt", small_adair(para1=0.1))
    for i in range(6):
        write(tmp_path / f"photos/{i}.png", width=64, height=48, seed=i)
    base = ["--init", tmp_path / "init.pt", "--data-root", tmp_path / "photos", "--device", "cpu"]
    base += ["--rewards", f"{tmp_path}/mine.py:bright=1", "--tasks", "derain", "--crop", 32]
    base += "--draws 1 --steps 30 --lr 1e-3 --warm-up 0 --schedule constant --ema 0".split()
    base += "--batch-size 2 --block 8 --sigma 0.1 --eval-every 30".split()
    base += "--advantage-patch 0 --advantage-scale group".split()
    gains = {}
    for arm, more in (("rl", []), ("shuffled", ["--shuffle-advantages"])):
        assert lrpo.main([str(f) for f in [*base, "--out", tmp_path / arm, *more]]) is None
        report = json.loads((tmp_path / arm / "report.json").read_text())
        before, after = (report[k][0]["reward"] for k in ("before", "after"))
        gains[arm] = after - before
    assert gains["rl"] > 0.02 and gains["rl"] > 2 * abs(gains["shuffled"])


@pytest.mark.parametrize("preset", ["demo", "paper"])
@pytest.mark.parametrize("objective", ["lrpo", "sft", "reward"])
def test_the_presets_have_their_controls(preset, objective):
    flags = ["--preset", preset, "--objective", objective, "--device", "cpu"]
    presets = dict(demo=lrpo.Config(), paper=lrpo.paper())
    config = parse_over("lrpo.py", "", presets, flags)
    lrpo.check(config)
    assert config.policy == presets[preset].policy


def test_strategies_and_inner_epochs_run_together(tiny, tmp_path):
    """The batch's deviation, the likelihood, difficulty and several updates a group: ρ leaves 1."""
    flags = "--advantage-patch 0 --likelihood 0.001 --weighting difficulty --lambda-sup 0.1"
    more = "--inner-epochs 2 --kl-beta 0.1 --group-size 7 --steps 3 --lr 1e-3 --clip 0.2"
    assert lrpo.main(tiny("run", *flags.split(), *more.split())) is None
    rows = logged(tmp_path / "run")
    assert all(row["ratio"] != 1 for row in rows) and rows[-1]["kl"] > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sigma", "0.1"], "--sigma takes one value for each --block"),
        (["--block", "3", "--sigma", "0.1"], "--block 3 does not divide --crop 32"),
        (["--sigma", "0", "0.1"], "--sigma is 0.0: it should be greater than 0"),
        (["--objective", "sft", "--group-size", "4"], "does nothing under --objective sft"),
        (["--block", "16", "--sigma", "0.1"], "--advantage-patch 8 is no multiple of --block 16"),
        (["--advantage-patch", "20"], "--advantage-patch 20 does not divide --crop 32"),
        (["--hard-ratio", "0.5"], "--hard-ratio does nothing under --select all"),
        (["--group-size", "1"], "--group-size is 1: it should be greater than or equal to 2"),
        (["--amp", "bf16"], "log π needs float32"),
    ],
)
def test_impossible_flags_are_one_sentence(small, capsys, flags, words):
    assert words in fails(capsys, lrpo.main, small("run", *flags))


def test_a_policy_of_chains_needs_one(small, capsys):
    said = fails(capsys, lrpo.main, small("run", "--policy", "chain", "--rewards", "psnr"))
    assert "--policy chain needs a diffusion chain" in said


@pytest.mark.parametrize("arm", [*run.LRPO, *run.LRPO_JUDGED, *run.CHAIN, *run.CHAIN_WITHOUT])
def test_the_arms_are_commands(arm):
    flags = ["--hard-ratio", "0.3", "--device", "cpu", *shlex.split(run.ARMS[arm])]
    lrpo.check(parse_over("lrpo.py", "", lrpo.PRESETS, flags))


def test_the_cosine_program_sees_the_signal_and_refuses_what_has_no_gradient(tmp_path, capsys):
    """Low-pass fidelity of a small AdaIR: with many rollouts and credit for patches RL's gradient
    is the reward's."""
    save_adair(tmp_path / "init.pt", small_adair(para1=0.1))
    write(tmp_path / "photos/a.png", width=64, height=48)
    for name in "bcd":
        write(tmp_path / f"photos/{name}.png", width=64, height=48)
    flags = ["--init", tmp_path / "init.pt", "--data-root", tmp_path / "photos", "--device", "cpu"]
    flags += "--images 1 --crop 32 --tasks derain --block 1 --group-size 256".split()
    flags = [str(flag) for flag in flags]
    (tmp_path / "mine.py").write_text(
        "def bright(restored, gt):\n    return (restored > 0.5).float().mean(dim=(1, 2, 3))\n"
    )
    words = fails(capsys, cosine.main, [*flags, "--rewards", f"{tmp_path}/mine.py:bright=1"])
    assert "has no gradient" in words
    # of two estimates, whose noise is independent, the cosine is the product of those to their
    # expectation, which is the truth where blocks, patches and the reward's agree
    found = []
    for against in ("true", "itself"):
        assert cosine.main([*flags, "--rewards", "lowpass=1", "--against", against]) is None
        lines = capsys.readouterr().out.splitlines()
        found.append(float(next(x for x in lines if "| derain" in x).split("|")[2]))
    assert 0.8 < found[0] < 0.95 and found[1] == pytest.approx(found[0] ** 2, abs=0.15)
    unsteady = [*flags, "--rewards", f"{tmp_path}/mine.py:bright=1", "--against", "itself"]
    assert cosine.main(unsteady) is None
    assert "nan" not in capsys.readouterr().out


def test_the_cosine_program_follows_a_chains_walks(tmp_path, capsys):
    torch.manual_seed(0)
    net = Chain(width=8)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save({"model": net.state_dict(), "config": net.config}, tmp_path / "chain.pt")
    write(tmp_path / "photos/a.png", width=64, height=48)
    for name in "bcd":
        write(tmp_path / f"photos/{name}.png", width=64, height=48)
    flags = ["--init", tmp_path / "chain.pt", "--data-root", tmp_path / "photos"]
    flags += "--device cpu --images 1 --crop 16 --tasks derain --group-size 400".split()
    flags += "--walks 64 --rewards lowpass=1 --advantage-patch 0 8".split()
    assert cosine.main([str(flag) for flag in flags]) is None
    row = next(line for line in capsys.readouterr().out.splitlines() if "| derain" in line)
    whole, patches, known = (float(cell) for cell in row.split("|")[2:5])
    assert known > 0.9 and whole > 0.5 and patches > 0.5
    flags += ["--against", "itself", "--images", "2"]
    assert cosine.main([str(flag) for flag in flags]) is None
    of_rain, together = (
        [float(cell) for cell in line.split("|")[2:4]]
        for line in capsys.readouterr().out.splitlines()[-2:]
    )
    assert min(of_rain + together) > 0.3


def test_a_nafnet_of_ours_is_a_file_that_lrpo_takes(tmp_path):
    for name in "abcd":
        write(tmp_path / f"photos/{name}.png", width=80, height=72)
    flags = ["--data-root", tmp_path / "photos", "--out", tmp_path / "naf.pth", "--device", "cpu"]
    assert nafnet.main([str(f) for f in [*flags, "--steps", 2, "--batch-size", 1]]) is None
    assert type(load_restorer(tmp_path / "naf.pth")).__name__ == "NAFNet"
