"""Errors of reconstructed images: L1, PSNR and SSIM (Tables 5 to 9 and 18)."""

import torch
import torch.nn.functional as F

from gear.config import UserError
from gear.images import check_finite, check_images

WINDOW = 7  # side of SSIM's uniform window, in pixels


def l1(reconstruction, images):
    """Return the mean absolute difference per image: (N, 3, H, W) in [-1, 1] -> (N,).

    Differences are those of images in [0, 1].
    """
    return _difference(reconstruction, images).abs().mean((1, 2, 3))


def psnr(reconstruction, images):
    """Return the PSNR per image, 10 log10(1 / MSE) in dB: (N, 3, H, W) in [-1, 1] -> (N,).

    The value is at most 120 dB. Average it over images: the PSNR of a pooled MSE is lower. The
    reconstruction is clamped, not rounded.
    """
    mse = _difference(reconstruction, images).square().mean((1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-12))


def ssim(reconstruction, images):
    """Return the structural similarity per image: (N, 3, H, W) in [-1, 1] -> (N,), at most 1.

    The definition is scikit-image's: a 7 x 7 uniform window, sample covariances, no padding, mean
    over channels, data range 1 after rescaling to [0, 1]. (A data range of 2 on images in [0, 1]
    inflates the value.) Raises
    UserError for images smaller than the window.
    """
    check_pair(reconstruction, images)
    if min(images.shape[-2:]) < WINDOW:
        raise UserError(
            f"SSIM has a window of {WINDOW} px: images of {tuple(images.shape[-2:])} px are too "
            "small."
        )
    x, y = ((z.double().clamp(-1, 1) + 1) / 2 for z in (reconstruction, images))
    mean = lambda z: F.avg_pool2d(z, WINDOW, 1)  # noqa: E731
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    mx = mean(x)
    my = mean(y)
    vx = unbiased * (mean(x * x) - mx**2)
    vy = unbiased * (mean(y * y) - my**2)
    cov = unbiased * (mean(x * y) - mx * my)
    c1 = 0.01**2
    c2 = 0.03**2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean(
        (1, 2, 3)
    )


def check_pair(reconstruction, images):
    """Raise UserError unless images are floats in [-1, 1] and the reconstruction has their shape.

    The reconstruction must be finite, but may exceed [-1, 1].
    """
    check_images(images)
    if reconstruction.shape != images.shape:
        shapes = f"{tuple(reconstruction.shape)} and {tuple(images.shape)}"
        raise UserError(f"a reconstruction and its images have one shape, not {shapes}.")
    check_finite(reconstruction, "the reconstructions", "look at the tokenizer's weights")


def _difference(reconstruction, images):
    check_pair(reconstruction, images)
    return (reconstruction.float().clamp(-1, 1) - images.float()) / 2
