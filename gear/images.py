"""Images as the library represents them: floats (B, 3, H, W) in [-1, 1], x = uint8 / 127.5 - 1."""

import torch

from gear.config import UserError

TOLERANCE = 1e-3  # how far rounding may push a value beyond [-1, 1]


def to_float(images):
    """Convert (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]: x = uint8 / 127.5 - 1."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_uint8(images):
    """Convert (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8: trunc(clamp(127.5 x + 128, 0, 255)).

    Halves are rounded up. Raises UserError for NaN and infinity, which no pixel represents.
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
    """Raise UserError unless images are floats (B, 3, H, W) in [-1, 1]; NaN lies outside.

    Without `values` only type and shape are checked. Reading values waits for the device, which a
    training step must not do.
    """
    description = (
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
        raise UserError(
            f"images are (B, 3, H, W) floats in [-1, 1], not {description}: uint8 / 127.5 - 1, as "
            "gear.data gives them, are expected."
        )
    if (
        values
        and not images.is_meta
        and not (largest := float(images.detach().abs().max())) <= 1 + TOLERANCE
    ):
        raise UserError(
            f"images reach {largest:.3g}: floats in [-1, 1] are expected. Convert uint8 by "
            "x / 127.5 - 1, as gear.data does, and clamp the output of a decoder."
        )


def check_finite(values, what, remedy, check=True):
    """Raise UserError if a tensor holds NaN or infinity.

    what, remedy: the message's words for the tensor and for what to do. With `check` false nothing
    is checked, since reading values waits for the device, which a training step must not do.
    """
    if check and not torch.isfinite(values).all():
        raise UserError(f"{what} hold values that are not finite: {remedy}.")


def image_grid(images, columns, gap=2):
    """Lay images (N, 3, H, W) out in rows of `columns` images with `gap` white pixels around each.

    Returns one image (3, H', W'); a single input image is returned without a frame.
    """
    if len(images) == 1:
        return images[0]
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid_height = gap + rows * (height + gap)
    grid_width = gap + min(columns, count) * (width + gap)
    grid = images.new_ones(channels, grid_height, grid_width)
    for i, image in enumerate(images):
        y = gap + i // columns * (height + gap)
        x = gap + i % columns * (width + gap)
        grid[:, y : y + height, x : x + width] = image
    return grid


def check_divides(size, downsampling):
    """Raise UserError unless the image size (H, W) is a multiple of the tokenizer's
    downsampling.
    """
    if any(side % downsampling for side in size):
        raise UserError(
            f"the image size {size[0]} x {size[1]} is not divisible by the tokenizer's "
            f"downsampling {downsampling}: use a multiple of {downsampling}."
        )
