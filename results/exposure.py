"""What the arms gained in closeness of exposure, which the judge of exposure_judge.py scored.

    python results/exposure_judge.py &
    python results/run.py --arms judged judged-shuffled
    python results/exposure.py [runs/results]

Restores the held-out photographs by every run of the two arms and adds "exposure" to the rows of
its report.json: the judge's known answer, in [0, 1].
"""

import json
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import tables
from exposure_judge import closeness

import report
import runs
from config import DEMO_MODEL
from data import list_training
from metrics import evaluation_pair
from model import load_adair, load_pretrained, read_checkpoint, restore
from policy import load_policy
from rewards import luma

ARMS = "judged", "judged-shuffled"


def exposures(restoring):
    """The judge's answer for every held-out photograph of the demo, as restoring(image) gives
    it."""
    found = []
    for sample in tqdm(list_training(None).held_out, leave=False):
        degraded, gt = evaluation_pair(sample)
        images = restoring(degraded).clamp(0, 1), gt
        restored, truth = (luma(image[None]).mean().item() for image in images)
        found.append(closeness(restored, truth))
    return found


def main():
    runs.check_device("cpu")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/results")
    paths = [path for arm in ARMS for path in sorted(folder.glob(f"{arm}/*/report.json"))]
    before = None
    for path in paths:
        stored = json.loads(path.read_text())
        if "exposure" in stored["after"][0]:
            continue
        before = before or exposures(partial(restore, load_pretrained(DEMO_MODEL)))
        checkpoint = read_checkpoint(path.parent / "last.pt")
        model, policy = load_adair(path.parent / "last.pt", checkpoint), load_policy(checkpoint)
        after = exposures(partial(restore, model, controller=policy.mean()))
        for part, values in (("before", before), ("after", after)):
            for row, value in zip(stored[part], values, strict=True):
                row["exposure"] = value
        runs.save_json(path, stored)
    arms = {arm: folder / arm for arm in ARMS}
    values = [tables.gains(arms[arm], "exposure")[0] for arm in ARMS]
    rows = [[arm, len(of_arm), tables.cell(of_arm, 1e4, 2)] for arm, of_arm in zip(ARMS, values)]
    rows.append(["difference", "", tables.cell(values[0] - values[1], 1e4, 2)])
    print(report.markdown(["closeness of exposure, gain", "seeds", "1e-4"], rows))


if __name__ == "__main__":
    main()
