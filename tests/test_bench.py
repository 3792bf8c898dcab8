"""What bench.py compares must be the same thing twice, and what makes a step fast must not change
its numbers."""

import pytest
import torch
from conftest import small_adair

import bench
import data
import model as adair
import policy as policies
import rewards
import runs
import train


def data_of(folder, i):
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(i)
    image = torch.nn.functional.interpolate(
        torch.rand(1, 3, 8, 8, generator=generator), (64, 64), mode="bicubic"
    )
    runs.write_image(folder / f"{i}x.png", image[0])


def batch_of(b, side, generator, dtype=torch.float32):
    degraded, gt = (
        torch.rand(b, 3, side, side, generator=generator, dtype=dtype) for _ in range(2)
    )
    return degraded, gt, ["dehaze", "derain", "deblur"][:b]


def test_the_plain_model_is_adair():
    net, x = small_adair(para1=0.1).double(), torch.rand(2, 3, 48, 72, dtype=torch.float64)
    plain, controls = (
        bench.plain_adair(net),
        torch.tensor([[0.4, 0.6, 1.2, 0.7], [0.1, 0.9, 0.8, 1.1]], dtype=torch.float64),
    )
    for controller in (None, lambda level, f, y: controls):
        assert torch.allclose(net(x, controller), plain(x, controller), atol=1e-12)
    assert plain.patch_embed(x).is_contiguous() and net.encode(x).skip1.is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize(
    "group, dtype", [(3, torch.float64), (6, torch.float64), (3, torch.float32)]
)  # 6: drawn as 4 and 2
def test_our_step_is_the_plain_step(group, dtype):
    """Loss and gradient as one vector to 1e-4 in float32; every tensor of the gradient to 1e-6 in
    float64, where policy and rewards stay float32."""
    args, g = train.parse(["--group-size", str(group)]), torch.Generator().manual_seed(0)
    net, reward = small_adair(para1=0.1).to(dtype), rewards.Reward(rewards.parse_terms("default"))
    policy, batch = policies.policy_for(net), batch_of(2, 32, g, dtype)
    ref = policies.policy_for(net, concentration=20)
    plain, plain_policy = bench.plain_adair(net), policies.policy_for(net)
    plain_policy.load_state_dict(policy.state_dict())
    metrics, (_, actions, *_) = train.irpo_step(net, policy, ref, reward, batch, args, 0.5, [g])
    loss = bench.plain_step(plain, plain_policy, ref, reward, batch, args, 0.5, actions)
    assert metrics["loss/total"].item() == pytest.approx(loss.item(), rel=1e-4)
    whole, worst, name = bench.distance(bench.gradients(net), bench.gradients(plain))
    if dtype == torch.float64:
        assert whole < 1e-9 and worst < 1e-6, name
    assert whole < 1e-4
    whole, worst, name = bench.distance(bench.gradients(policy), bench.gradients(plain_policy))
    assert whole < 1e-3, name


def test_a_group_drawn_in_parts_is_laid_out_image_by_image():
    net, g = small_adair(para1=0.1), torch.Generator().manual_seed(0)
    policy, x = policies.policy_for(net), torch.rand(2, 3, 32, 32, generator=g)
    with torch.no_grad():
        encoding = net.encode(x)
        y, states, actions = train.draw_group(net, policy, encoding, 5, [g], at_once=2)
        assert y.shape == (10, 3, 32, 32) and actions.shape == (10, 3, 4)
        assert len(torch.unique(actions[:, 0, 2])) == 10
        for i in range(10):  # each image alone, its action replayed
            controller = policy.replay(actions[i : i + 1])
            assert torch.allclose(net(x[i // 5 : i // 5 + 1], controller)[0], y[i], atol=1e-5)
            for (rate, fuse), (rate_i, fuse_i) in zip(states, controller.states):
                assert torch.allclose(rate[i], rate_i[0], atol=1e-5) and torch.allclose(
                    fuse[i], fuse_i[0], atol=1e-5
                )


def test_the_memory_of_a_group_does_not_grow_beyond_its_images():
    net, g = small_adair(), torch.Generator().manual_seed(0)
    policy, x = policies.policy_for(net), torch.rand(1, 3, 64, 64, generator=g)

    def peak(group):
        with torch.no_grad():
            encoding = net.encode(x)
            return (
                bench.peak_memory(
                    lambda: train.draw_group(net, policy, encoding, group, [g]), "cpu"
                )
                * 2**20
            )

    peak(4)
    images = x.numel() * 4
    assert peak(16) - peak(4) < 2.5 * 12 * images  # the images, and once more while they are joined
    assert peak(4) > 20 * images  # what a decode holds is another order of magnitude


def test_a_large_map_goes_through_the_feed_forward_in_strips(monkeypatch):
    layer, x = adair.FeedForward(8, 2.66), torch.randn(2, 8, 37, 20)
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr(adair, "STRIP", 300)
        parts = []
        monkeypatch.setattr(
            layer, "gated", lambda t, gated=layer.gated: parts.append(t.shape[2]) or gated(t)
        )
        assert torch.allclose(layer(x), whole, atol=1e-6)
    assert parts == [9, 10, 10, 10, 6]  # 8 rows each and their neighbours


def test_norms_divide_scores_as_they_would_the_maps():
    """channel_attention against softmax(q̂ k̂ᵀ τ) v and the projection after it, four heads."""
    q, k, v = torch.randn(3, 2, 16, 5, 7, dtype=torch.float64)
    q[0, 3] = 0  # a channel without content: normalise() makes 0 of it, not NaN
    project, temperature = (
        torch.nn.Conv2d(16, 16, 1, bias=False).double(),
        torch.rand(4, 1, 1, dtype=torch.float64),
    )
    wanted = project(bench.plain_channel_attention(q, k, v, temperature))
    assert torch.allclose(
        adair.channel_attention(q, k, v, temperature, project), wanted, atol=1e-12
    )


# ----------------------------------------------------------------------------------------- --amp,
# --compile, the GPU


def test_under_bf16_the_policy_computes_in_float32():
    net, g = small_adair(para1=0.1), torch.Generator().manual_seed(0)
    policy, batch = policies.policy_for(net), batch_of(2, 32, g)
    reward = rewards.Reward(rewards.parse_terms("default"))
    runs = {}
    for amp in ("fp32", "bf16"):
        args = train.parse(["--amp", amp])
        net.zero_grad(), policy.zero_grad()
        metrics, (states, actions, logp_old, logp_ref, advantages) = train.irpo_step(
            net,
            policy,
            policy.frozen_copy(),
            reward,
            batch,
            args,
            0.5,
            [torch.Generator().manual_seed(1)],
        )
        assert {t.dtype for level in states for t in level} | {
            actions.dtype,
            logp_old.dtype,
            advantages.dtype,
        } == {torch.float32}
        # what was computed under autocast and what is computed without it are one and the same
        assert torch.equal(
            policies.beta_log_prob(actions, *policy(states)).sum(dim=(1, 2)), logp_old
        )
        assert metrics["ratio"].item() == 1 and metrics["kl"].item() == 0
        assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.grad is not None)
        runs[amp] = metrics["loss/sup"].item(), actions
    assert runs["bf16"][0] == pytest.approx(runs["fp32"][0], rel=0.02)
    assert runs["bf16"][0] != runs["fp32"][0]  # it was on
    assert torch.allclose(runs["bf16"][1][:, :, :2], runs["fp32"][1][:, :, :2], atol=0.02)


def test_mask_sizes_do_not_depend_on_bf16():
    """0.7004 is 0.6992 in bfloat16: on a side of 2048 that is a row."""
    block, x = adair.AFLB(16), torch.rand(1, 3, 64, 64)
    seen = []
    block.half_size = lambda rate, side, rule: (
        seen.append(rate.clone()) or adair.AFLB.half_size(block, rate, side, rule)
    )
    y, controls = torch.rand(1, 16, 8, 8), torch.tensor([[0.7004, 0.3, 1.0, 1.0]])
    with torch.no_grad():
        block(x, y, "adair", ())
        with torch.autocast("cpu", torch.bfloat16):
            block(x, y.bfloat16(), "fraction", (), lambda f, y: controls)
            block(x, y.bfloat16(), "fraction", (0.7004, 0.3))
            block(x, y.bfloat16(), "adair", ())
    own, _, from_control, _, constant, _, own_under_bf16, _ = (rate.item() for rate in seen)
    assert from_control == constant == pytest.approx(0.7004, abs=1e-7)
    assert (
        own_under_bf16 == pytest.approx(own, abs=2e-3)
        and own_under_bf16 != torch.tensor(own_under_bf16).bfloat16().item()
    )


def test_transformer_blocks_compile_without_graph_breaks():
    net, x = small_adair(), torch.rand(1, 3, 32, 32)
    block, y = net.encoder_level1[0], net.patch_embed(x).detach()
    wanted = torch.autograd.grad(block(y).square().mean(), list(block.parameters()))
    block.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(block(y).square().mean(), list(block.parameters())), wanted
    ):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_run_with_compile_is_the_same_run(tmp_path, monkeypatch, capsys):
    """Through train.main, killed and resumed states included, with a compiler that needs no C++."""
    compiled, real = [], torch.compile

    def light(function, **options):
        compiled.append(function)
        return real(
            function, backend="aot_eager", **{k: v for k, v in options.items() if k != "backend"}
        )

    monkeypatch.setattr(torch, "compile", light)
    weights, flags = (
        {},
        [
            "--steps",
            "2",
            "--crop",
            "32",
            "--eval-every",
            "9",
            "--tasks",
            "denoise15",
            "--data-root",
        ],
    )
    for i in range(7):
        data_of(tmp_path / "photos", i)
    torch.manual_seed(0)
    runs.save_checkpoint(
        tmp_path / "init.pt", dict(model=small_adair().state_dict(), config=small_adair().config)
    )
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        argv = [
            *flags,
            str(tmp_path / "photos"),
            "--init",
            str(tmp_path / "init.pt"),
            "--out",
            str(tmp_path / name),
            *more,
        ]
        assert train.main(argv) is None
        weights[name] = adair.read_checkpoint(tmp_path / name / "last.pt")["model"]
    assert len(compiled) > 5 and weights["plain"].keys() == weights["compiled"].keys()
    for name, w in weights["plain"].items():
        assert torch.allclose(w, weights["compiled"][name], atol=3e-5), (
            name
        )  # a few steps of Adam, 1e-5 each


def test_a_compiler_that_does_not_work_is_one_sentence(monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        runs.RunError, match="--compile does not work here, leave it out .RuntimeError: no C"
    ):
        train.compile_blocks(small_adair())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree(monkeypatch):
    """float32 without TF32: outputs to 1e-4, the gradient of the pair to 1e-3."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    net, g = small_adair(para1=0.1), torch.Generator().manual_seed(0)
    policy, x = policies.policy_for(net), torch.rand(2, 3, 64, 64, generator=g)
    actions, found = torch.rand(4, 3, 4, generator=g) * 0.5 + 0.25, {}
    for device in ("cpu", "cuda"):
        net, policy = net.to(device), policy.to(device)
        net.zero_grad()
        y = net.decode(net.encode(x.to(device)), policy.replay(actions.to(device)), copies=2)
        y.square().mean().backward()
        found[device] = (
            y.detach().cpu(),
            {n: p.grad.cpu().clone() for n, p in net.named_parameters() if p.grad is not None},
        )
    assert (found["cpu"][0] - found["cuda"][0]).abs().max() < 1e-4
    assert bench.distance(found["cuda"][1], found["cpu"][1])[0] < 1e-3


# -----------------------------------------------------------------------------------------------------
# mining


@pytest.mark.parametrize("pixels", [0, 192 * 192 * 4])
def test_mining_gives_the_psnrs_of_a_loop(pixels):
    """Whether every core takes an image or a batch goes through at once."""
    net = small_adair()
    samples = data.list_embedded(["coffee.png"])[:9]
    restored = []

    def restore(images):
        restored.append(len(images))
        return adair.restore(net, images)

    rows, problems = data.mine(restore, samples, pixels=pixels)
    assert not problems and [r["name"] for r in rows] == [s.name for s in samples]
    assert sorted(restored) == ([1, 4, 4] if pixels else [1] * 9)
    for row, sample in zip(rows, samples):
        degraded, gt = data.load_pair(sample)
        assert row["psnr"] == pytest.approx(data.psnr(adair.restore(net, degraded), gt), abs=1e-3)


def test_mining_ends_at_the_first_error_that_is_not_an_images(tmp_path):
    threads = torch.get_num_threads()
    calls = []

    def broken(images):
        calls.append(1)
        raise RuntimeError("the network is broken")

    with pytest.raises(RuntimeError, match="the network is broken"):
        data.mine(broken, data.list_embedded(["coffee.png"]) * 50)
    assert len(calls) < 50 and torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------------------
# the command


@pytest.mark.parametrize("what", ["step", "inference", "mining", "scaling"])
def test_the_command_runs(what, capsys, tmp_path):
    small = [
        "--crop",
        "64",
        "--group-size",
        "2",
        "--repeats",
        "1",
        "--sizes",
        "64",
        "--groups",
        "2",
        "3",
        "--crops",
        "32",
        "--megapixels",
        "0.02",
        "--images",
        "3",
    ]
    assert bench.main([what, *small, "--plot", str(tmp_path / "cost.png")]) is None
    printed = capsys.readouterr().out
    words = {
        "step": "plain / ours",
        "inference": "64 px",
        "mining": "ratio",
        "scaling": "| 32 px |",
    }
    assert words[what] in printed and (what != "scaling" or "\n|---|---|---|\n| 32 px" in printed)
    assert (tmp_path / "cost.png").exists() == (what == "scaling")
