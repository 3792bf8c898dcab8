"""Does the policy learn? A frozen backbone, a fixed handful of hazed and dark images, 80 of the training loop's own steps."""

import pytest
import torch

import data
import model as adair
import policy as policies
import rewards
import train

UPDATES, SIDE = 80, 32


def learn(shuffled, seed=0):
    """Mean reward of the deterministic output before and after; `shuffled` permutes the rewards inside each group, and
    with them the advantages."""
    args = train.parse(["--freeze-backbone", "--group-size", "8", "--kl-beta", "0", "--entropy-tau", "0"])
    torch.manual_seed(seed)
    net = adair.load_adair(train.DEMO_MODEL).requires_grad_(False)
    policy = policies.policy_for(net, concentration=10)
    score = rewards.Reward(rewards.parse_terms("psnr"))
    samples = [s for s in data.list_embedded(["astronaut.png", "coffee.png"]) if s.task in ("dehaze", "lowlight")][::5]
    pairs = [data.load_pair(s) for s in samples]
    degraded, gt = (torch.stack([p[i][:, 60 : 60 + SIDE, 60 : 60 + SIDE] for p in pairs]) for i in range(2))
    batch = (degraded, gt, [s.task for s in samples])
    optimizer = torch.optim.Adam(policy.parameters(), lr=6e-3)
    generator = torch.Generator().manual_seed(seed)

    def reward(y, gt, tasks, judged=None):
        r, terms = score(y, gt, tasks)
        order = torch.rand(r.shape, generator=generator).argsort(dim=1)
        return (r.gather(1, order) if shuffled else r), terms

    def deterministic():
        with torch.no_grad():
            return score(net(degraded, policy.mean()), gt, batch[2])[0].mean().item()

    start, ref = deterministic(), policy.frozen_copy()
    for step in range(UPDATES):
        optimizer.zero_grad()
        train.irpo_step(net, policy, ref, reward, batch, args, step / UPDATES, [generator])
        optimizer.step()
    return start, deterministic()


def test_reward_rises_and_does_not_when_advantages_are_shuffled():
    start, learned = learn(shuffled=False)
    same_start, control = learn(shuffled=True)
    print(f"mean reward: start {start:.4f}, learned {learned:.4f}, shuffled advantages {control:.4f}")
    assert start == pytest.approx(same_start)
    assert learned > start + 0.01  # of a reward whose 0.025 is 1 dB
    assert control < start + 0.3 * (learned - start)
