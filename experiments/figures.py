"""The figures of the experiments; tables.py draws them."""

import report

TITLES = {"psnr": "PSNR gain (dB)", "reward": "reward gain (1e-4)"}
SCALES = {"psnr": 1, "reward": 1e4}
WINDOW = 40  # steps; D_hard of the demo is passed over in 46
LINES = dict(colormap="tab20", legend=False, fontsize=8)


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    report.pyplot().close(figure)


def gains(path, intervals):
    """The gains of every arm; intervals: {key: {arm: (mean, low, high)}}."""
    height = 0.3 * len(intervals["psnr"]) + 1
    figure, axes = report.pyplot().subplots(1, 2, figsize=(9, height), sharey=True)
    for axis, (key, of_arms) in zip(axes, intervals.items()):
        for arm, (mean, low, high) in of_arms.items():
            mean, below, above = (SCALES[key] * v for v in (mean, mean - low, high - mean))
            axis.errorbar(mean, arm, xerr=[[below], [above]], fmt="o")
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set_xlabel(TITLES[key])
    axes[0].invert_yaxis()
    save(figure, path)


def curves(path, rows):
    """Gains on the validation images over the steps, means over seeds; rows: of validation.csv."""
    figure, axes = report.pyplot().subplots(1, 2, figsize=(9, 3.5))
    rows = rows[rows["task"] == "mean"]
    for axis, (key, title) in zip(axes, TITLES.items()):
        means = rows.pivot_table(index="step", columns="arm", values=key, sort=False)
        (SCALES[key] * means).plot(ax=axis, ylabel=f"validation: {title}", **LINES)
        axis.axhline(0, color="black", linewidth=0.5)
    axes[1].legend(fontsize=6)
    save(figure, path)


def training(path, rows):
    """Figure 6: L_total and the mean reward of the rollouts while training, and that reward against
    the mean of the arms: a step's few crops move it more than training does. The last panel needs
    arms that train on the same samples for the same reward. Means over the seeds that arms share
    and over WINDOW steps, to the end of the shortest arm. rows: of training.csv; an arm is left out
    that lacks a reward at some step."""
    rows = rows[rows["reward"].notna().groupby(rows["arm"]).transform("all")]
    rows = rows[rows.groupby("seed")["arm"].transform("nunique") == rows["arm"].nunique()]
    means = rows.pivot_table(index="step", columns="arm", sort=False).dropna()
    if len(means) < WINDOW:
        return
    panels = {"total loss": means["loss/total"], "reward mean": means["reward"]}
    against = means["reward"].sub(means["reward"].mean(axis=1), axis=0)
    panels["reward mean, against the arms' mean"] = against
    figure, axes = report.pyplot().subplots(1, 3, figsize=(12, 3.5))
    label = f"step (mean of the last {WINDOW}, {rows['seed'].nunique()} seed(s))"
    for axis, (title, of_arms) in zip(axes, panels.items()):
        of_arms.rolling(WINDOW).mean().plot(ax=axis, title=title, xlabel=label, **LINES)
    axes[1].legend(fontsize=6)
    save(figure, path)
