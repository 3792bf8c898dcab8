"""PSNR and SSIM by AdaIR's protocol, and the evaluation of a list of samples."""

import math
from functools import partial

import numpy as np

from data import load_pair


def psnr(restored, gt):
    """PSNR in dB of (3, H, W) against (3, H, W), clipped to [0, 1] and not quantised; at most
    100."""
    mse = (restored.clamp(0, 1) - gt).double().square().mean().item()
    return min(100.0, -10 * math.log10(mse)) if mse else 100.0


def psnrs(restored, gt):
    """PSNR in dB of (B, 3, H, W) against (B, 3, H, W), clipped to [0, 1], with graph: (B,); at most
    100."""
    mse = (restored.clamp(0, 1) - gt).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return -10 * mse.log10()


def psnr_ssim(restored, gt):
    """AdaIR's figures, by scikit-image: PSNR in dB, and SSIM with a uniform 7×7 window, on RGB
    floats in [0, 1]."""
    restored, gt = (t.clamp(0, 1).permute(1, 2, 0).numpy() for t in (restored, gt))
    if np.array_equal(restored, gt):
        return 100.0, 1.0
    # late: it takes a second to load
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    value = peak_signal_noise_ratio(gt, restored, data_range=1)
    return float(value), float(structural_similarity(gt, restored, data_range=1, channel_axis=-1))


def multiple_of_16(image):
    """The centre of an image, its sides cut to multiples of 16: AdaIR's evaluation crop."""
    h, w = image.shape[-2:]
    if min(h, w) < 16:
        return image
    top, left = h % 16 // 2, w % 16 // 2
    return image[..., top : top + h // 16 * 16, left : left + w // 16 * 16]


def evaluation_pair(sample):
    """(degraded, gt) of a sample as AdaIR's protocol wants them: sides cut to multiples of 16."""
    return tuple(multiple_of_16(image) for image in load_pair(sample))


def evaluate_image(restore, also, sample):
    """One row of `evaluate`."""
    degraded, gt = evaluation_pair(sample)
    restored = restore(degraded)
    value, similarity = psnr_ssim(restored, gt)
    row = dict(task=sample.task, name=sample.name, psnr_in=psnr(degraded, gt))
    row |= dict(psnr=value, ssim=similarity)
    return row | (also(sample, degraded, restored, gt) if also else {})


def evaluate(restore, samples, also=None, mapper=map):
    """AdaIR's protocol over `samples`: a row {task, name, psnr_in, psnr, ssim} for each.

    restore: (3, H, W) -> (3, H, W) on the CPU. Noise is seeded per image.
    also(sample, degraded, restored, gt): a dict of what else the row should hold, or an empty one.
    mapper(function, samples): as map; `runs.parallel_map` divides the work between the processes.
    Raises DataError for an image that cannot be used: an evaluation leaves nothing out.
    """
    return list(mapper(partial(evaluate_image, restore, also), samples))
