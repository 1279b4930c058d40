"""How near a reconstruction is to its image: L1, PSNR and SSIM (Tables 5 to 9 and 18)."""

import torch
import torch.nn.functional as F

from gear.config import UserError
from gear.images import check_finite, check_images

WINDOW = 7  # pixels of SSIM's uniform window


def l1(reconstruction, images):
    """Return the mean absolute difference of each image in [0, 1] units: (N, 3, H, W) in [-1, 1] ->
    (N,).
    """
    return _difference(reconstruction, images).abs().mean((1, 2, 3))


def psnr(reconstruction, images):
    """Return 10 log10(1 / MSE) of each image, in dB: (N, 3, H, W) in [-1, 1] -> (N,); 120 dB at
    most.

    Average it over images: the PSNR of a pooled MSE is lower. The reconstruction is clamped, not
    rounded.
    """
    mse = _difference(reconstruction, images).square().mean((1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-12))


def ssim(reconstruction, images):
    """Return the structural similarity of each image: (N, 3, H, W) in [-1, 1] -> (N,), at most 1.

    A 7 x 7 uniform window, sample covariances, no padding, mean over channels, data range 1
    (scikit-image's definition; a data range of 2 on [0, 1] images inflates it). Raises UserError
    for images smaller than the window.
    """
    check_pair(reconstruction, images)
    if min(images.shape[-2:]) < WINDOW:
        raise UserError(
            f"SSIM has a window of {WINDOW} px: images of {tuple(images.shape[-2:])} px are too "
            "small."
        )
    x, y = ((z.double().clamp(-1, 1) + 1) / 2 for z in (reconstruction, images))
    mean, unbiased = lambda z: F.avg_pool2d(z, WINDOW, 1), WINDOW**2 / (WINDOW**2 - 1)
    mx, my = mean(x), mean(y)
    vx, vy, cov = (
        unbiased * (mean(x * x) - mx**2),
        unbiased * (mean(y * y) - my**2),
        unbiased * (mean(x * y) - mx * my),
    )
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean(
        (1, 2, 3)
    )


def check_pair(reconstruction, images):
    """Raise UserError unless images are floats in [-1, 1] and the reconstruction, which may exceed
    that, is of their shape.
    """
    check_images(images)
    if reconstruction.shape != images.shape:
        shapes = f"{tuple(reconstruction.shape)} and {tuple(images.shape)}"
        raise UserError(f"a reconstruction and its images have one shape, not {shapes}.")
    check_finite(reconstruction, "the reconstructions", "look at the tokenizer's weights")


def _difference(reconstruction, images):
    check_pair(reconstruction, images)
    return (reconstruction.float().clamp(-1, 1) - images.float()) / 2
