"""Draws assets/method.png: one step of IRPO on a real crop, with the demo model.

python -m experiments.drawing
"""

import sys
from pathlib import Path

import torch

import report
import runs
from config import DEMO_MODEL
from data import Crops, list_training
from grpo import group_advantages, rollout
from model import CheckpointError, load_pretrained
from policy import policy_for, states_on
from rewards import Reward, parse_terms

OUT = Path(__file__).parents[1] / "assets/method.png"
BOX = dict(boxstyle="round,pad=0.5", facecolor="#eef3fa", edgecolor="#4a6fa5")
ARROW = dict(arrowstyle="-|>", color="#444444", linewidth=1.2)
RL, SUP = "#b5432a", "#2a7d46"  # what trains the heads, and the backbone


@torch.no_grad()
def one_step():
    """(degraded, gt (3, H, W), restored (G, 3, H, W), actions (G, 12), rewards, advantages (G,)) of
    a hazy crop."""
    model = load_pretrained(DEMO_MODEL, "fraction")
    crops = Crops(list_training(None, tasks=["dehaze"]).val, crop=256, seed=0)
    batch = crops.collate([crops[3]])
    policy, generator = policy_for(model), torch.Generator().manual_seed(1)
    policy.fit(states_on(model, policy, [batch.degraded]))
    group = rollout(model, policy, model.encode(batch.degraded), 4, [generator])
    scores, _ = Reward(parse_terms("default"))(
        group.restored, batch.degraded, batch.gt, batch.tasks
    )
    found = (batch.degraded, batch.gt, group.restored, group.actions.flatten(2), scores)
    return *(x[0] for x in found), group_advantages(scores, 1e-12)[0]


def picture(axes, image, at, title=""):
    """An image (3, H, W) on a pair of axes in a corner of the figure: (left, bottom, width)."""
    inset = axes.inset_axes([at[0], at[1], at[2], at[2] * 3], transform=axes.transAxes)
    inset.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
    inset.set_xticks([])
    inset.set_yticks([])
    inset.set_title(title, fontsize=9)


def draw(path):
    degraded, gt, restored, actions, scores, advantages = one_step()
    figure, axes = report.pyplot().subplots(figsize=(12, 4))
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)

    def arrow(start, end, **more):
        axes.annotate("", end, start, arrowprops=ARROW | more)

    picture(axes, degraded, (0.0, 0.36, 0.11), "degraded image")
    axes.text(
        0.19, 0.52, "AdaIR's\nencoder,\nonce", ha="center", va="center", fontsize=10, bbox=BOX
    )
    arrow((0.115, 0.52), (0.155, 0.52))
    best = int(scores.argmax())
    for g in range(len(restored)):
        bottom = 0.765 - 0.253 * g
        middle = bottom + 0.115
        arrow((0.225, 0.52), (0.285, middle))
        bars = axes.inset_axes([0.29, bottom + 0.02, 0.12, 0.19], transform=axes.transAxes)
        bars.bar(range(12), actions[g].numpy(), color="#4a6fa5")
        bars.set_ylim(0, 1)
        bars.set_xticks([])
        bars.set_yticks([])
        arrow((0.415, middle), (0.455, middle))
        picture(axes, restored[g], (0.46, bottom, 0.076))
        label = f"r = {scores[g]:.4f}\nA = {advantages[g]:+.2f}"
        weight = "bold" if g == best else "normal"
        axes.text(0.555, middle, label, va="center", fontsize=10, weight=weight)
    axes.text(0.35, 1.02, "twelve sampled controls", ha="center", fontsize=10)
    axes.text(0.5, 1.02, "restored", ha="center", fontsize=10)
    axes.text(0.59, 1.02, "reward", ha="center", fontsize=10)
    axes.text(
        0.8,
        0.78,
        "RL: what had A > 0 becomes likelier\n→ six Beta heads",
        ha="center",
        va="center",
        fontsize=10,
        color=RL,
        bbox=BOX | dict(edgecolor=RL),
    )
    arrow((0.64, 0.6), (0.68, 0.75), color=RL)
    picture(axes, restored[best], (0.68, 0.08, 0.11), "best of the four")
    picture(axes, gt, (0.86, 0.08, 0.11), "ground truth")
    axes.annotate(
        "", (0.855, 0.25), (0.795, 0.25), arrowprops=ARROW | dict(arrowstyle="<|-|>", color=SUP)
    )
    axes.text(0.825, 0.29, "ℓ1", ha="center", color=SUP, fontsize=11)
    axes.text(0.825, -0.03, "→ the backbone", ha="center", color=SUP, fontsize=10)
    arrow((0.64, 0.45), (0.675, 0.3), color=SUP)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def run_program(argv):
    draw(OUT)
    print(OUT)


def main(argv=None):
    return runs.program("experiments.drawing", run_program, argv, (CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
