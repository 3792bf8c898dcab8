"""What a data folder holds, what is missing, and what would make a training or an evaluation fail.

    python inventory.py --data-root data

Counts every folder of AdaIR's layout against the numbers the paper states (Sec. 4.1), decodes every
image and names what cannot be used. It exits with 1 if train.py, or eval.py on the sets that are
there, would fail.
"""

import os
import re
import sys
from dataclasses import dataclass
from typing import Literal

import report
import runs
from data import (
    TASK_WORDS,
    TASKS,
    DataError,
    Pairs,
    find_adair_test,
    find_adair_train,
    list_training,
    split_usable,
    task_names,
)

OVERLAP = (
    "67 of BSD400's images are the backgrounds of 75 of Rain100L's test images: what is gained "
    "there is partly remembered"
)
MIN_TEST_SIDE = 8  # px


@dataclass
class Config:
    """Look at a data folder."""

    data_root: str
    """folder in AdaIR's layout, as train.py and eval.py take it"""
    tasks: tuple[Literal[TASK_WORDS], ...] = ()
    """look at these alone; without it, at all"""
    crop: int = 128
    """px that training images need a side"""
    headers: bool = False
    """do not decode every file: fast, but misses files that are cut off"""


def published_sets():
    """({folder: (tasks, title, number, files)} of the training sets, the same of the test sets).

    What the paper trains and tests on, and the folders of tasks that are not the paper's: title ""
    and number None. Of the sets out of domain it states no numbers.
    """
    train, test = {}, {}
    for name, task in TASKS.items():
        source = task.train
        if isinstance(source, Pairs):
            folder = os.path.dirname(source.degraded)
            parts = (os.path.basename(path) for path in (source.degraded, source.clean))
            files = ", ".join(f"{part}/{n}" for part, n in zip(parts, source.names))
        else:
            folder, files = source, "*"
        folder = f"Train/{folder}"
        tasks = [*train.get(folder, ([],))[0], name]
        train[folder] = tasks, *(task.trained_on or ("", None)), files

        names = task.test.names if isinstance(task.test, Pairs) else ()
        files = ", ".join(f"{part}/{n}" for part, n in zip(("input", "target"), names)) or "*"
        for title, number in task.tested_on.items():
            test[f"test/{task.kind}/{title}"] = tasks, title, number, files
        if task.foreign:
            title = f"{task.foreign}, out of domain"
            test[task.foreign] = tasks, title, None, "input/NAME, target/NAME"
    return train, test


def known_set(folder, published):
    """The key in `published` of a test set's folder, relative to the data root, or the folder."""

    def plain(path):
        return re.sub(r"[^a-z0-9]", "", os.path.basename(path).lower())

    if folder == "test/dehaze":  # AdaIR's users keep SOTS right there
        return "test/dehaze/SOTS"
    kind = os.path.dirname(folder) if folder.startswith("test/") else ""
    alike = [k for k in published if os.path.dirname(k) == kind and plain(k) in plain(folder)]
    return alike[0] if alike else folder


def inventory(root, tasks=(), crop=128, decode=True):
    """What a data folder holds, as text, and why a training or an evaluation on it would fail:
    (text, failures)."""
    lines, missing, problems, failures, there, unusable = [], [], [], [], set(), set()
    train_sets, test_sets = published_sets()

    def look_at(folder, samples, found, known, min_side):
        """A line of the table; returns whether all can be used."""
        usable, more = split_usable(samples, min_side, decode)
        unusable.update({*samples} - {*usable})
        found = found + more
        problems.extend(found)
        _, title, number, _ = known or ((), "out of domain", None, "")
        lines.append([folder, len(samples), number or "-", title, len(found)])
        return not found

    def is_wanted(known):
        return not tasks or {*known[0]} & {*tasks}

    for folder, known in train_sets.items():
        if is_wanted(known):
            samples, found = find_adair_train(root, known[0][:1])
            if samples or found:
                there.add(folder)
                look_at(folder, samples, found, known, crop)
            elif known[1]:
                missing.append(f"{folder}/{known[3]}: {known[1]}, {known[2]}")
    seen = set()
    for folder, samples, found in find_adair_test(root).values():
        if folder in seen:  # a set of clean images stands there once per σ
            continue
        seen.add(folder)
        name = os.path.basename(os.path.abspath(root)) if folder == "." else folder
        name = known_set(name, test_sets)
        there.add(name)
        known = test_sets.get(name)
        wanted = not known or is_wanted(known)
        if wanted and not look_at(folder, samples, found, known, MIN_TEST_SIDE):
            failures.append(f"eval.py would fail on {folder}")
    for name, known in test_sets.items():
        if is_wanted(known) and name not in there:
            number = f", {known[2]}" if known[2] else ""
            missing.append(f"{name}/{known[3]}: {known[1]}{number}")
    text = report.markdown(["folder", "found", "stated", "set", "problems"], lines)
    try:
        train, val, held_out, _ = list_training(root, tasks=tasks)
        bad = {s[2:5] for s in unusable}  # the same files stand in several tasks
        train = [s for s in train if s[2:5] not in bad]
        in_layout = os.path.isdir(os.path.join(root, "Train"))  # whose files were looked at above
        train, found = (train, []) if in_layout else split_usable(train, crop, decode)
        problems += found
        val, _ = split_usable(val + held_out, 16, decode)
        if not train or not val:
            what = "image to measure on" if train else f"training image of {crop} px"
            raise DataError(f"no {what} is left")
        numbers = f"{len(train)} samples and set {len(val)} aside"
        note = "a clean image is one for each σ; --draws multiplies photos"
        text += f"\n\ntrain.py would train on {numbers} ({note})"
    except DataError as error:
        failures.append(f"train.py would fail: {error}")
    text += "\n\nnot there:\n" + "\n".join(missing) if missing else ""
    shown = problems[:50] + (["…"] if len(problems) > 50 else [])
    text += f"\n\n{len(problems)} problem(s):\n" + "\n".join(shown) if problems else ""
    if {"Train/Denoise", "Train/Derain"} <= there or "test/derain/Rain100L" in there:
        text += f"\n\nnote: {OVERLAP}"
    return "\n\n".join([text, *failures]), failures


def run_program(argv):
    """The program with these flags; returns the exit code."""
    config = runs.flags(Config, "inventory.py", __doc__, argv)
    runs.check_multiple_of_8("--crop", config.crop)
    if not os.path.isdir(config.data_root):
        raise DataError(f"there is no folder {config.data_root}")
    tasks = task_names(config.tasks) if config.tasks else ()
    text, failures = inventory(config.data_root, tasks, config.crop, not config.headers)
    print(text)
    return int(bool(failures))


def main(argv=None):
    return runs.program("inventory.py", run_program, argv, (DataError,))


if __name__ == "__main__":
    sys.exit(main())
