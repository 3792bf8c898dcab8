"""Repeats the experiments: every arm with every seed, into runs/results/ARM/SEED.

    python -m experiments.run                          IRPO, SFT, RL alone and its control
    python -m experiments.run --arms main data
    python -m experiments.run --arms irpo sft --seeds 0 1 --jobs 2
    python -m experiments.run --seeds 0 1 --flags='--lr 1e-4' --out runs/sweep/1e-4

What is done is left alone, what was stopped goes on. Jobs run side by side, each on one CPU thread
if there are several; the first run goes alone, since the others take its scores of mining over.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import runs

ROOT = Path(__file__).parents[1]

# An arm is the default command, python train.py --hard-ratio 0.3 --seed SEED, with other flags.
MAIN = {
    "irpo": "",
    "sft": "--objective sft",
    "best-of-g": "--freeze-heads",
    "random-rollout": "--freeze-heads --supervise random",
    "irpo-shuffled": "--shuffle-advantages",
    "rl": "--freeze-backbone",
    "rl-shuffled": "--freeze-backbone --shuffle-advantages",
    "reward": "--objective reward",
    "reward-sft": "--objective reward+sft",
    "irpo-no-cons": "--lambda-cons 0 0",
    "irpo-difficulty": "--weighting difficulty",
}
# As long as 90 steps of irpo on two CPU cores: medians of step_time in metrics.jsonl are 0.75 s
# for irpo, 0.31 for sft, 0.32 for reward, 0.42 for rl.
STEPS = {"sft": 220, "reward": 210, "reward-sft": 210, "rl": 160, "rl-shuffled": 160}
TIME = {f"{arm}-time": f"{MAIN[arm]} --steps {steps}" for arm, steps in STEPS.items()}
DATA = {  # Figure 5: of every task, as the paper has it
    "hard-30": "--hard-scope task",
    "random-30": "--hard-scope task --select random",
    "easy-30": "--hard-scope task --select easy",
    "all-data": "--select all",
    "all-data-epochs": "--select all --steps 315",  # as many epochs as of the hard samples
    "rl-all": "--freeze-backbone --select all",
    "rl-all-shuffled": "--freeze-backbone --select all --shuffle-advantages",
    "hard-10": "--hard-scope task --hard-ratio 0.1",
    "hard-50": "--hard-scope task --hard-ratio 0.5",
}
TABLES = {  # Tables 4 and 5; measured by one reward, see measure.py
    "general-alone": "--rewards psnr,ssim",
    "task-alone": "--rewards task",
    "group-2": "--group-size 2",
    "group-8": "--group-size 8",
}
JUDGE_ALONE = "--judge http://127.0.0.1:8001/v1 --judge-model exposure --rewards qwen"
JUDGE = f"{JUDGE_ALONE} --freeze-backbone"
JUDGED = {  # by exposure_judge.py alone, which has to be running
    "judged": JUDGE,
    "judged-shuffled": f"{JUDGE} --shuffle-advantages",
}
LRPO = {  # python lrpo.py instead of train.py
    "lrpo": "",
    "lrpo-shuffled": "--shuffle-advantages",
    "lrpo-sft-time": "--objective sft --steps 130",  # as long as 80 steps of lrpo
    "lrpo-reward-time": "--objective reward --steps 130",
}
# what it is asked for is one number an image, and most of it in large blocks
LRPO_JUDGE = f"{JUDGE_ALONE} --group-size 16 --advantage-patch 0 --block 8 32 --sigma 0.02 0.02"
LRPO_JUDGED = {  # by exposure_judge.py, too
    "lrpo-judged": LRPO_JUDGE,
    "lrpo-judged-shuffled": f"{LRPO_JUDGE} --shuffle-advantages",
}
CHAIN = {  # python lrpo.py --policy chain; the controls take 15 % less than its 200 steps of 1.7 s
    "chain": "--policy chain",
    "chain-shuffled": "--policy chain --shuffle-advantages",
    "chain-sft-time": "--policy chain --objective sft --steps 1250",
    # of the reward what has a gradient
    "chain-reward-time": "--policy chain --objective reward --steps 1200"
    " --rewards ssim=0.5,lowpass=0.4",
}
CHAIN_WITHOUT = {  # what breaks without it
    "chain-one-advantage": "--policy chain --advantage-patch 0",
    "chain-own-deviation": "--policy chain --advantage-scale group",
    "chain-no-noise-levels": "--policy chain --no-noise-levels",
    "chain-no-likelihood": "--policy chain --likelihood 0",
    "chain-piqe-alone": "--policy chain --rewards piqe=1",
    "chain-no-kl": "--policy chain --kl-beta 0",
}
GROUPS = {
    "main": MAIN,
    "time": TIME,
    "data": DATA,
    "tables": TABLES,
    "judged": JUDGED,
    "pixels": LRPO,
    "pixels-judged": LRPO_JUDGED,
    "chains": CHAIN,
    "chains-without": CHAIN_WITHOUT,
}
ARMS = {name: flags for group in GROUPS.values() for name, flags in group.items()}


@dataclass
class Config:
    """Repeat the experiments."""

    arms: tuple[str, ...] = ("irpo", "sft", "rl", "rl-shuffled")
    """which of them, or groups of them: main, time, data, tables, judged, pixels, pixels-judged,
    chains, chains-without"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds of every arm"""
    out: Path = Path("runs/results")
    """folder of the run folders"""
    jobs: int = 1
    """runs side by side"""
    flags: str = ""
    """further flags of every run: --flags='--steps 40 --device cpu'"""


def run(config, arm, seed):
    """One run to its end; True if it reached it. What it prints goes to SEED.log."""
    folder = config.out.resolve() / arm / str(seed)
    is_lrpo = arm in LRPO | LRPO_JUDGED | CHAIN | CHAIN_WITHOUT
    program = "lrpo.py" if is_lrpo else "train.py"
    flags = ["--hard-ratio", "0.3", "--seed", str(seed), "--out", str(folder)]
    flags += shlex.split(f"{ARMS[arm]} {config.flags}")
    if (folder / "config.json").exists():
        command = runs.load_json(folder / "config.json")["command"]
        if not f"{command} ".startswith(shlex.join(["python", program, *flags]) + " "):
            print(f"{folder} was begun by another command, {command}: choose another --out")
            return False
        flags = ["--resume", str(folder)]
    elif scores := sorted(config.out.resolve().glob("*/*/hard.json")):
        flags += ["--scores", *map(str, scores)]
    report = folder / "report.json"
    if not report.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, program, *flags]
        threads = {"OMP_NUM_THREADS": "1"} if config.jobs > 1 else {}
        with open(f"{folder}.log", "a") as log:
            subprocess.run(command, cwd=ROOT, env=os.environ | threads, stdout=log, stderr=log)
        end = "done" if report.exists() else f"not done, see {folder}.log"
        print(f"{arm} {seed}: {end}", flush=True)
    return report.exists()


def run_program(argv):
    config = runs.flags(Config, "experiments.run", __doc__, argv)
    arms = [arm for name in config.arms for arm in GROUPS.get(name, [name])]
    for arm in arms:
        if arm not in ARMS:
            raise runs.RunError(f"there is no arm {arm!r}; known: {', '.join([*GROUPS, *ARMS])}")
    todo = [(arm, seed) for seed in config.seeds for arm in arms]
    done = [run(config, *todo.pop(0))]  # alone: the others take its scores over
    with ThreadPoolExecutor(config.jobs) as pool:
        futures = [pool.submit(run, config, arm, seed) for arm, seed in todo]
        done += [future.result() for future in futures]
    return 0 if all(done) else 1


def main(argv=None):
    return runs.program("experiments.run", run_program, argv)


if __name__ == "__main__":
    sys.exit(main())
