import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import model as adair  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_adair(mask_rule="fraction", rates=(0.25, 0.25), para1=0.5):
    """A random AdaIR of 0.3 M parameters with weights large enough that its controls show in the output."""
    torch.manual_seed(0)
    net = adair.AdaIR(8, (1, 1, 1, 1), 1, mask_rule=mask_rule, rates=rates).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    for block in (net.fre1, net.fre2, net.fre3):
        torch.nn.init.constant_(block.para1, para1)  # 0 in a fresh one
    return net


@pytest.fixture
def net():
    return small_adair()


def reference_files(*parts):
    """Path of the reference data beside the project, if this checkout has it."""
    path = ROOT.parent.joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"reference file {'/'.join(parts)} is not beside this checkout")
    return path
