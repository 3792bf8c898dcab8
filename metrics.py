"""PSNR and SSIM by AdaIR's protocol."""

from data import load_pair


def psnr(restored, gt):
    """PSNR in dB of (…, 3, H, W) against (…, 3, H, W), of each image: (…,), with graph. Clipped to
    [0, 1] and not quantised; at most 100."""
    mse = (restored.clamp(0, 1) - gt).square().mean(dim=(-3, -2, -1))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(restored, gt):
    """SSIM of (3, H, W) against (3, H, W), clipped to [0, 1]: scikit-image's, with a uniform 7×7
    window."""
    from skimage.metrics import structural_similarity  # late: it takes a second to load

    restored, gt = (t.clamp(0, 1).permute(1, 2, 0).numpy() for t in (restored, gt))
    return float(structural_similarity(gt, restored, data_range=1, channel_axis=-1))


def multiple_of_16(image):
    """The centre of an image, its sides cut to multiples of 16: AdaIR's evaluation crop."""
    h, w = image.shape[-2:]
    if min(h, w) < 16:
        return image
    top, left = h % 16 // 2, w % 16 // 2
    return image[..., top : top + h // 16 * 16, left : left + w // 16 * 16]


def evaluation_pair(sample):
    """(degraded, gt) of a sample as AdaIR's protocol wants them: sides cut to multiples of 16,
    noise seeded per image. Raises DataError for images that cannot be used."""
    degraded, gt = load_pair(sample)
    return multiple_of_16(degraded), multiple_of_16(gt)


def evaluate_image(restore, sample):
    """AdaIR's protocol on one sample: (row, restored, gt), the row {task, name, psnr_in, psnr,
    ssim}. restore: (3, H, W) -> (3, H, W) on the CPU. Raises DataError: an evaluation leaves
    nothing out."""
    degraded, gt = evaluation_pair(sample)
    restored = restore(degraded)
    row = dict(task=sample.task, name=sample.name, psnr_in=psnr(degraded, gt).item())
    row |= dict(psnr=psnr(restored, gt).item(), ssim=ssim(restored, gt))
    return row, restored, gt
