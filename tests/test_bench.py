"""What experiments.bench compares must be the same thing twice, and what makes a step fast must not
change its numbers."""

import pytest
import torch
from conftest import small_adair

import model
import study
from config import parse
from experiments import bench
from grpo import rollout
from policy import policy_for


def test_the_plain_model_is_adair():
    x = torch.rand(2, 3, 48, 72, dtype=torch.float64)
    controls = torch.tensor([[0.4, 0.6, 1.2, 0.7], [0.1, 0.9, 0.8, 1.1]], dtype=torch.float64)
    net = small_adair(para1=0.1).double()
    for controller in (None, lambda level, f, y: controls):
        plain = bench.plain_adair(net, x, controller)
        assert torch.allclose(net(x, controller), plain, atol=1e-12)
    assert net.encode(x).skip1.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_our_step_is_the_plain_step(dtype):
    """The loop of `train.post_train` against the plain step: loss and gradient as one vector to
    1e-4 in float32; every tensor of the backbone's gradient to 1e-6 in float64, where policy and
    rewards stay float32."""
    config = bench.Config(crop=16, group_size=6, repeats=1, device="cpu")
    run = bench.time_step(config, small_adair(para1=0.1).to(dtype))
    assert run.losses[0] == pytest.approx(run.losses[1], rel=1e-4)
    heads = {name for name, _ in policy_for(small_adair()).named_parameters()}
    ours, plain = ({k: v for k, v in of.items() if k in heads} for of in run.gradients)
    assert bench.distance(ours, plain) < 1e-3 and len(plain) == 24
    ours, plain = ({k: v for k, v in of.items() if k not in heads} for of in run.gradients)
    assert bench.distance(ours, plain) < 1e-4 and len(plain) > 100
    if dtype == torch.float64:
        assert bench.distance(ours, plain) < 1e-9
        for name, gradient in plain.items():
            atol = 1e-6 * gradient.abs().max().item()
            assert torch.allclose(ours[name], gradient, rtol=0, atol=atol), name


def test_norms_divide_scores_as_they_would_the_maps():
    """channel_attention against softmax(q̂ k̂ᵀ τ) v and the projection after it, four heads."""
    q, k, v = torch.randn(3, 2, 16, 5, 7, dtype=torch.float64)
    q[0, 3] = 0  # a channel without content: normalise() makes 0 of it, not NaN
    project, temperature = (
        torch.nn.Conv2d(16, 16, 1, bias=False).double(),
        torch.rand(4, 1, 1, dtype=torch.float64),
    )
    wanted = project(bench.channel_attention(q, k, v, temperature))
    assert torch.allclose(
        model.channel_attention(q, k, v, temperature, project), wanted, atol=1e-12
    )


# ----------------------------------------------------------------------------------- --amp, the GPU


def test_under_bf16_the_policy_computes_in_float32():
    net, g = small_adair(para1=0.1), torch.Generator().manual_seed(0)
    policy, x = policy_for(net), torch.rand(2, 3, 32, 32, generator=g)
    groups = {}
    for amp in ("fp32", "bf16"):
        config = parse(["--amp", amp, "--device", "cpu"])
        with torch.no_grad(), study.half_precision(config):
            encoding = net.encode(x)
            group = rollout(net, policy, encoding, 4, [torch.Generator().manual_seed(1)])
            inside = policy.evaluate(group.states, group.actions)[0]
        groups[amp] = group
        assert {t.dtype for pair in group.states for t in pair} | {group.actions.dtype} == {
            torch.float32
        }
        # what was computed under autocast and what is computed without it are one and the same
        assert torch.equal(policy.evaluate(group.states, group.actions)[0], inside)
    difference = (groups["bf16"].restored - groups["fp32"].restored).abs()
    assert 0 < difference.mean() < 0.02 * groups["fp32"].restored.abs().mean()  # it was on
    rates = [group.actions[..., :2] for group in groups.values()]
    assert torch.allclose(*rates, atol=0.02)


def test_mask_sizes_do_not_depend_on_bf16():
    """0.7004 is 0.6992 in bfloat16: on a side of 2048 that is a row."""
    block, x = model.AFLB(16), torch.rand(1, 3, 64, 64)
    seen = []
    block.half_size = lambda rate, side, rule: (
        seen.append(rate.clone()) or model.AFLB.half_size(block, rate, side, rule)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree(monkeypatch):
    """float32 without TF32: outputs to 1e-4, the gradient of the pair to 1e-3."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    net, g = small_adair(para1=0.1), torch.Generator().manual_seed(0)
    policy, x = policy_for(net), torch.rand(2, 3, 64, 64, generator=g)
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
    assert bench.distance(found["cuda"][1], found["cpu"][1]) < 1e-3


# -------------------------------------------------------------------------------------- the command


def test_the_command_runs(capsys):
    flags = "--crop 16 --group-size 2 --sizes 64 --repeats 1 --device cpu"
    assert bench.main(flags.split()) is None
    *_, step, forward = capsys.readouterr().out.splitlines()
    assert step.startswith("| step, crop 16, G = 2 ") and "gradient" in step
    assert forward.startswith("| forward at 64 px") and forward.count("|") == 9
