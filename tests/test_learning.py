"""Does the policy learn? A frozen backbone, a fixed handful of hazed and dark images, 120 updates."""

import pytest
import torch

import data
import grpo
import model as adair
import policy as beta
import rewards
import train

UPDATES, GROUP, SIDE = 120, 8, 32


def learn(shuffled, seed=0):
    """Mean reward of the deterministic output before and after; `shuffled` permutes the advantages inside each group."""
    torch.manual_seed(seed)
    net = adair.load_adair(train.DEMO_MODEL).requires_grad_(False)
    policy = beta.policy_for(net)
    reward = rewards.Reward(rewards.parse_terms("psnr"))
    samples = [s for s in data.list_embedded(["astronaut.png", "coffee.png"]) if s.task in ("dehaze", "lowlight")][::5]
    pairs = [data.load_pair(s) for s in samples]
    degraded, gt = (torch.stack([p[i][:, 60 : 60 + SIDE, 60 : 60 + SIDE] for p in pairs]) for i in range(2))
    tasks = [s.task for s in samples]
    encoding = net.encode(degraded)
    optimizer = torch.optim.Adam(policy.parameters(), lr=6e-3)

    def deterministic():
        return reward(net.decode(encoding, policy.mean()), gt, tasks)[0].mean().item()

    start = deterministic()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(UPDATES):
        control = policy.sample(generator)
        r, _ = reward(net.decode(encoding.repeat(GROUP), control), gt, tasks)
        advantages = grpo.group_advantages(r)
        if shuffled:
            order = torch.rand(advantages.shape, generator=generator).argsort(dim=1)
            advantages = advantages.gather(1, order)
        logp = policy.log_prob(control.states, control.actions).view_as(r)
        loss, _ = grpo.grpo_loss(logp, logp.detach(), logp.detach(), advantages, torch.zeros_like(r), beta=0.0, tau=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return start, deterministic()


def test_reward_rises_and_does_not_when_advantages_are_shuffled():
    start, learned = learn(shuffled=False)
    same_start, control = learn(shuffled=True)
    print(f"mean reward: start {start:.4f}, learned {learned:.4f}, shuffled advantages {control:.4f}")
    assert start == pytest.approx(same_start)
    assert learned > start + 0.005  # of a reward whose 0.025 is 1 dB
    assert control < start + 0.3 * (learned - start)
