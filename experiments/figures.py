"""The figures of the experiments; tables.py draws them."""

import report

PANELS = (("psnr", 1, "PSNR gain (dB)"), ("reward", 1e4, "reward gain (1e-4)"))
WINDOW = 40  # steps; D_hard of the demo is passed over in 49


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    report.pyplot().close(figure)


def gains(path, arms):
    """The gains of every arm; arms: {arm: {key: interval (mean, low, high)}}."""
    figure, axes = report.pyplot().subplots(1, 2, figsize=(9, 0.3 * len(arms) + 1), sharey=True)
    for axis, (key, scale, title) in zip(axes, PANELS):
        for y, intervals in enumerate(arms.values()):
            mean, low, high = (scale * value for value in intervals[key])
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=f"C{y % 10}")
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set_xlabel(title)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    save(figure, path)


def curves(path, rows):
    """Gains on the validation images over the steps, means over seeds; rows: of validation.csv."""
    figure, axes = report.pyplot().subplots(1, 2, figsize=(9, 3.5))
    means = rows[rows["task"] == "mean"]
    for axis, (key, scale, title) in zip(axes, PANELS):
        for i, (arm, of_arm) in enumerate(means.groupby("arm", sort=False)):
            values = scale * of_arm.groupby("step")[key].mean()
            axis.plot(values, "-" if i < 10 else "--", color=f"C{i % 10}", label=arm)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xlabel("step")
        axis.set_ylabel(f"validation: {title}")
    axes[1].legend(fontsize=6)
    save(figure, path)


def training(path, rows):
    """Figure 6: L_total and the mean reward of the rollouts while training, and that reward against
    the mean of the arms: a step's few crops move it more than training does. The last panel needs
    arms that train on the same samples for the same reward. Means over the seeds that arms share
    and over WINDOW steps, to the end of the shortest arm. rows: of training.csv; an arm is left out
    that lacks a reward at some step."""
    rows = rows[rows["reward"].notna().groupby(rows["arm"]).transform("all")]
    shared = rows.groupby("seed")["arm"].transform("nunique") == rows["arm"].nunique()
    rows = rows[shared]
    keys = dict(index="step", columns="arm", sort=False)
    losses, rewards = (
        rows.pivot_table(values=key, **keys).dropna() for key in ("loss/total", "reward")
    )
    if len(rewards) < WINDOW:
        return
    panels = {"total loss": losses, "reward mean": rewards}
    panels["reward mean, against the arms' mean"] = rewards.sub(rewards.mean(axis=1), axis=0)
    figure, axes = report.pyplot().subplots(1, 3, figsize=(12, 3.5))
    for axis, (title, of_arms) in zip(axes, panels.items()):
        for i, (arm, values) in enumerate(of_arms.rolling(WINDOW).mean().items()):
            axis.plot(values, "-" if i % 2 else "--", color=f"C{i % 10}", label=arm)
        axis.set_xlabel(f"step (mean of the last {WINDOW}, {rows['seed'].nunique()} seed(s))")
        axis.set_title(title, fontsize=9)
    axes[1].legend(fontsize=6)
    save(figure, path)
