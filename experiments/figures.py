"""The figures of the experiments; tables.py draws them."""

import numpy as np

import report

PANELS = (("psnr", 1, "PSNR gain (dB)"), ("reward", 1e4, "reward gain (1e-4)"))
WINDOW = 40  # steps; D_hard of the demo is passed over in 49


def save(plt, figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def gains(path, arms):
    """The gains of every arm; arms: {arm: {key: interval (mean, low, high)}}."""
    plt = report.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.3 * len(arms) + 1), sharey=True)
    for axis, (key, scale, title) in zip(axes, PANELS):
        for y, intervals in enumerate(arms.values()):
            mean, low, high = (scale * value for value in intervals[key])
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=f"C{y % 10}")
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set_xlabel(title)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    save(plt, figure, path)


def curves(path, arms):
    """Gains on the validation images over the steps, means over seeds; arms: rows of
    validation.csv."""
    plt = report.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, (key, scale, title) in zip(axes, PANELS):
        for i, (arm, rows) in enumerate(arms.items()):
            means = [row for row in rows if row["task"] == "mean"]
            steps = sorted({row["step"] for row in means})
            values = [scale * np.mean([r[key] for r in means if r["step"] == s]) for s in steps]
            axis.plot(steps, values, "-" if i < 10 else "--", color=f"C{i % 10}", label=arm)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xlabel("step")
        axis.set_ylabel(f"validation: {title}")
    axes[1].legend(fontsize=6)
    save(plt, figure, path)


def training(path, arms):
    """Figure 6: L_total and the mean reward of the rollouts while training, and that reward against
    the mean of the arms: a step's few crops move it more than training does. The last panel needs
    arms that train on the same samples for the same reward. Means over the seeds that arms share
    and over WINDOW steps, to the end of the shortest arm. arms: {arm: {seed: rows of
    training.csv}}, of which those are left out that lack a reward at some step."""
    arms = {arm: of for arm, of in arms.items() if all("reward" in r for r in sum(of.values(), []))}
    shared = set.intersection(*(set(seeds) for seeds in arms.values())) if arms else ()
    length = min((len(of[seed]) for of in arms.values() for seed in shared), default=0)
    if length < WINDOW:
        return

    def curve(seeds, key):
        of_seeds = [[row[key] for row in seeds[seed][:length]] for seed in shared]
        return np.convolve(np.mean(of_seeds, axis=0), np.ones(WINDOW) / WINDOW, mode="valid")

    losses, rewards = ([curve(of, key) for of in arms.values()] for key in ("loss/total", "reward"))
    panels = {"total loss": losses, "reward mean": rewards}
    panels["reward mean, against the arms' mean"] = rewards - np.mean(rewards, axis=0)
    plt = report.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5))
    of_seeds = "1 seed" if len(shared) == 1 else f"{len(shared)} seeds"
    for axis, (title, of_arms) in zip(axes, panels.items()):
        for i, (arm, values) in enumerate(zip(arms, of_arms)):
            steps = WINDOW + np.arange(len(values))
            axis.plot(steps, values, "-" if i % 2 else "--", color=f"C{i % 10}", label=arm)
        axis.set_xlabel(f"step (mean of the last {WINDOW}, {of_seeds})")
        axis.set_title(title, fontsize=9)
    axes[1].legend(fontsize=6)
    save(plt, figure, path)
