"""report.py: what is computed for tables and pictures, on rows whose answer is known."""

import pytest
import torch

import report


def test_gains_are_against_the_first_validation_and_tasks_weigh_alike():
    history = [
        dict(step=0, psnr=dict(rain=25.0, haze=15.0), reward=dict(rain=0.50, haze=0.40)),
        dict(step=30, psnr=dict(rain=25.5, haze=14.0), reward=dict(rain=0.52, haze=0.40)),
    ]
    start, later = report.gains_since_start(history)
    assert start["psnr"] == dict(rain=0, haze=0, mean=0)
    assert later["psnr"] == pytest.approx(dict(rain=0.5, haze=-1.0, mean=-0.25))
    assert later["reward"] == pytest.approx(dict(rain=0.02, haze=0.0, mean=0.01))


def test_samples_show_the_median_of_every_task_and_the_lowest_gain_last():
    rows = [dict(task=task) for task in ("rain", "rain", "rain", "haze", "haze", "haze")]
    gains = [0.9, -0.1, 0.2, 0.0, -0.5, 0.3]
    assert report.typical_and_worst(rows, gains) == [2, 3, 4]


def test_the_crop_that_changed_most_is_shown():
    before = torch.rand(3, 100, 150)
    after = before.clone()
    after[:, 60:70, 100:110] += 0.5
    rows, columns = report.most_changed(before, after, side=32)
    assert rows.start <= 60 and rows.stop >= 70 and rows.stop - rows.start == 32
    assert columns.start <= 100 and columns.stop >= 110
    rows, columns = report.most_changed(before, after)  # all rows there are
    assert (rows.stop - rows.start, columns.stop - columns.start) == (96, 96)
    assert report.most_changed(before[:, :20, :30], after[:, :20, :30]) == (
        slice(0, 20),
        slice(0, 30),
    )


def test_the_table_splits_hard_from_the_rest():
    """One task, three images; the hard one gains 1 dB, the others lose 0.5."""
    before = [dict(task="rain", psnr_in=18, psnr=p, ssim=0.5, reward=0.4) for p in (20, 25, 30)]
    change = 1.0, -0.5, -0.5
    after = [
        row | dict(psnr=row["psnr"] + c, reward=0.4 + c / 100) for row, c in zip(before, change)
    ]
    text = report.before_after_table(before, after, [0])
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines()}
    assert [cell.strip() for cell in lines["mean of tasks"]][
        :5
    ] == "3 18.00 25.00 25.00 +0.000".split()
    assert [cell.strip() for cell in lines["mean: hard 30 %"]][0::4] == ["1", "+1.000", "0.4100"]
    assert [cell.strip() for cell in lines["mean: the rest"]][4::5] == ["-0.500", "-50.0"]
