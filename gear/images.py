"""What an image is inside the library: floats (B, 3, H, W) in [-1, 1], x = uint8 / 127.5 - 1."""

import torch

from gear.config import UserError

TOLERANCE = 1e-3  # beyond [-1, 1], for what rounding adds


def to_float(images):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]: x = uint8 / 127.5 - 1."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8: trunc(clamp(127.5 x + 128, 0, 255)).

    That rounds half up. Raises UserError for NaN and infinity, which have no pixel.
    """
    check_finite(images, "the images", "look at what they were computed from")
    return (
        (images.float() * 127.5 + 128)
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
    )


def check_images(images, values=True):
    """Raise UserError unless images are floats (B, 3, H, W) in [-1, 1]; NaN lies in no range.

    Without `values` only type and shape are looked at: reading values waits for the device, which a
    training step must not.
    """
    given = (
        f"{tuple(images.shape)} {images.dtype}"
        if isinstance(images, torch.Tensor)
        else type(images).__name__
    )
    is_batch = (
        isinstance(images, torch.Tensor)
        and images.ndim == 4
        and images.shape[1] == 3
        and images.numel() > 0
    )
    if not (is_batch and images.is_floating_point()):
        what = "images are (B, 3, H, W) floats in [-1, 1]"
        raise UserError(
            f"{what}, not {given}: uint8 / 127.5 - 1, as gear.data gives them, are expected."
        )
    if (
        values
        and not images.is_meta
        and not (reach := float(images.detach().abs().max())) <= 1 + TOLERANCE
    ):
        remedy = "uint8 / 127.5 - 1, as gear.data gives them, and what a decoder gave clamped"
        raise UserError(f"images reach {reach:.3g}: floats in [-1, 1] are expected, {remedy}.")


def check_finite(values, what, remedy, check=True):
    """Raise UserError, naming `what` a tensor is and the `remedy`, if a value of it is NaN or
    infinite.

    With `check` false nothing is looked at: that waits for the device, which a training step must
    not.
    """
    if check and not torch.isfinite(values).all():
        raise UserError(f"{what} hold values that are not finite: {remedy}.")


def image_grid(images, columns, gap=2):
    """Lay images (N, 3, H, W) out in rows of `columns`, `gap` white pixels around each; one alone
    is itself: (3, H', W').
    """
    if len(images) == 1:
        return images[0]
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    size = gap + rows * (height + gap), gap + min(columns, count) * (width + gap)
    grid = images.new_ones(channels, *size)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        grid[:, y : y + height, x : x + width] = image
    return grid


def check_divides(size, downsampling):
    """Raise UserError unless the image size (H, W) is a multiple of the tokenizer's
    downsampling.
    """
    if any(side % downsampling for side in size):
        raise UserError(
            f"the image size {size[0]} x {size[1]} is not divisible by the tokenizer's "
            "downsampling "
            f"{downsampling}: "
            f"use a multiple of {downsampling}."
        )
