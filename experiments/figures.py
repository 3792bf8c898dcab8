"""The figures of the experiments; tables.py draws them."""

import report
from experiments.run import ARMS

TITLES = {"psnr": "PSNR gain (dB)", "reward": "reward gain (1e-4)"}
SCALES = {"psnr": 1, "reward": 1e4}
WINDOW = 40  # steps; D_hard of the demo is passed over in 46
LINES = dict(legend=False, fontsize=8)
OF_HEADS = ("rl", "judged")  # what their names begin with: arms that train the heads alone


def colours(arms):
    """A colour for every arm of run.ARMS, the same in all figures; others by their place."""
    maps = (report.pyplot().get_cmap(name).colors for name in ("tab20", "tab20b", "tab20c"))
    palette, known = [colour for colours in maps for colour in colours], [*ARMS]
    places = [known.index(arm) if arm in known else i for i, arm in enumerate(arms)]
    return [palette[place % len(palette)] for place in places]


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    report.pyplot().close(figure)


def gains(path, intervals):
    """Gains of arms, or differences between them: those that train the heads alone apart, since
    theirs are smaller by far. intervals: {key: {arm: (mean, low, high)}}."""
    arms = [*intervals["psnr"]]
    heads = [arm for arm in arms if arm.startswith(OF_HEADS)]
    parts = [part for part in ([arm for arm in arms if arm not in heads], heads) if part]
    sizes = [len(part) + 0.6 for part in parts]
    figure, axes = report.pyplot().subplots(
        len(parts), 2, figsize=(9, 0.3 * sum(sizes) + 1), squeeze=False, height_ratios=sizes
    )
    for part, row in zip(parts, axes):
        for axis, (key, of_arms) in zip(row, intervals.items()):
            for place, (arm, colour) in enumerate(zip(part, colours(part))):
                mean, low, high = (SCALES[key] * v for v in of_arms[arm])
                axis.errorbar(
                    mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour
                )
            axis.axvline(0, color="black", linewidth=0.5)
            axis.set_yticks(range(len(part)), part if key == "psnr" else [])
            axis.set_ylim(len(part) - 0.4, -0.6)
    for axis, key in zip(axes[-1], intervals):
        axis.set_xlabel(TITLES[key])
    save(figure, path)


def curves(path, rows):
    """Gains on the validation images over the steps, means over seeds; rows: of validation.csv."""
    figure, axes = report.pyplot().subplots(1, 2, figsize=(9, 3.5))
    rows = rows[rows["task"] == "mean"]
    for axis, (key, title) in zip(axes, TITLES.items()):
        means = rows.pivot_table(index="step", columns="arm", values=key, sort=False)
        colour = colours(means.columns)
        (SCALES[key] * means).plot(ax=axis, ylabel=f"validation: {title}", color=colour, **LINES)
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
        colour = colours(of_arms.columns)
        of_arms.rolling(WINDOW).mean().plot(
            ax=axis, title=title, xlabel=label, color=colour, **LINES
        )
    axes[1].legend(fontsize=6)
    save(figure, path)
