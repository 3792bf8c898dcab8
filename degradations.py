"""The synthesised degradations: what a clean photograph looks like with noise, rain, haze, blur, in
low light.

Each takes a clean image (3, H, W) in [0, 1] and a numpy generator and returns the degraded image of
the same shape, in 8-bit steps. The result depends on the image and the generator's state alone.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def quantise(image):
    """Rounds an image to 8-bit steps inside [0, 1]."""
    return (image.clamp(0, 1) * 255).round() / 255


# ------------------------------------------------------------------------------------------- noise


def gaussian_noise(gt, rng, sigma):
    """AdaIR's noise: σ in 8-bit units, clipped and truncated to integers."""
    noise = torch.from_numpy(rng.standard_normal(gt.shape, dtype=np.float32))
    return (gt * 255 + noise * sigma).clamp(0, 255).floor() / 255


def low_light(gt, rng):
    """Gamma and gain, then shot noise (variance proportional to the signal) and read noise."""
    dark = rng.uniform(0.1, 0.4) * gt ** rng.uniform(1.2, 2.0)
    shot, read = rng.uniform(0.005, 0.02), rng.uniform(0.002, 0.008)
    noise = torch.from_numpy(rng.standard_normal(gt.shape, dtype=np.float32))
    return quantise(dark + noise * (shot**2 * dark + read**2).sqrt())


def camera(gt, rng):
    """What a camera leaves on a good photograph: weak noise, more of it in bright parts and alike
    in neighbouring pixels, then JPEG. For pre-training."""
    shot, read = rng.uniform(0, 0.03), rng.uniform(0, 0.01)
    noise = torch.from_numpy(rng.standard_normal(gt.shape, dtype=np.float32))
    smooth = convolve(noise, disk_kernel(rng.uniform(0.4, 1.2)))
    noisy = quantise(gt + smooth / smooth.std() * (shot**2 * gt + read**2).sqrt())
    file = io.BytesIO()
    pixels = (noisy * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(75, 100)))
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


# -------------------------------------------------------------------------------------------- blur


def line_kernel(length, angle):
    """A normalised motion kernel (k, k), k odd: a line of `length` px at `angle` radians from the
    x axis."""
    half = math.ceil(length / 2)
    kernel = np.zeros((2 * half + 3, 2 * half + 3), dtype=np.float32)
    for s in np.linspace(-length / 2, length / 2, 4 * half + 1):
        x, y = half + 1 + s * math.cos(angle), half + 1 + s * math.sin(angle)
        i, j = int(y), int(x)
        for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):  # bilinear splat
            kernel[i + di, j + dj] += (1 - abs(y - i - di)) * (1 - abs(x - j - dj))
    return torch.from_numpy(kernel / kernel.sum())


def disk_kernel(radius):
    """A normalised defocus kernel (k, k): a disk of `radius` px with a soft rim."""
    half = math.ceil(radius)
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    kernel = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)
    return torch.from_numpy(kernel / kernel.sum())


def convolve(image, kernel):
    """(C, H, W) with one kernel (k, k), borders reflected. Raises ValueError for a smaller
    image."""
    pad = kernel.shape[0] // 2
    if min(image.shape[-2:]) <= pad:
        height, width = image.shape[-2:]
        raise ValueError(f"{width}×{height} px are too few for a blur of {kernel.shape[0]} px")
    padded = F.pad(image[:, None], (pad,) * 4, mode="reflect")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def blur(gt, rng):
    """Motion along a line, or defocus over a disk, in equal parts."""
    if rng.random() < 0.5:
        kernel = line_kernel(rng.uniform(5, 15), rng.uniform(0, math.pi))
    else:
        kernel = disk_kernel(rng.uniform(1.5, 3.5))
    return quantise(convolve(gt, kernel))


# ------------------------------------------------------------------------------------ rain and haze


def rain(gt, rng):
    """Streaks of one random angle, length and density, added and clipped."""
    density, strength = rng.uniform(0.003, 0.015), rng.uniform(0.4, 0.9)
    length, angle = rng.uniform(9, 25), math.pi / 2 + rng.uniform(-0.6, 0.6)
    chance = rng.random(gt.shape[1:], dtype=np.float32)
    brightness = rng.random(gt.shape[1:], dtype=np.float32)
    drops = torch.from_numpy(np.where(chance < density, brightness, 0))
    streaks = convolve(drops[None], line_kernel(length, angle)) * length
    return quantise(gt + (strength * streaks).clamp(max=0.8))


def smooth_field(rng, height, width, cell=96):
    """A random field (height, width) in [0, 1] that varies over about `cell` px."""
    grid = rng.random((1, 1, height // cell + 3, width // cell + 3), dtype=np.float32)
    size = (grid.shape[2] * cell, grid.shape[3] * cell)
    field = F.interpolate(torch.from_numpy(grid), size, mode="bicubic", align_corners=False)[0, 0]
    top, left = rng.integers(cell // 2, cell), rng.integers(cell // 2, cell)
    return field[top : top + height, left : left + width].clamp(0, 1)


def scatter(gt, depth, beta, light):
    """The scattering model I = J·t + A(1 − t), t = exp(−β·depth).

    depth: (H, W); light: A, three numbers.
    """
    t = torch.exp(-beta * depth)
    light = torch.tensor(light, dtype=torch.float32).clamp(max=1)[:, None, None]
    return quantise(gt * t + light * (1 - t))


def haze(gt, rng):
    """Scattering under a smooth random depth."""
    beta, light = rng.uniform(0.8, 2.2), rng.uniform(0.7, 1.0) + rng.uniform(-0.03, 0.03, 3)
    depth = 0.3 + 0.7 * smooth_field(rng, *gt.shape[1:])
    return scatter(gt, depth, beta, light)
