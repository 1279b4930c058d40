"""Reconstruction quality of a tokenizer: L1 and PSNR (Tables 5 to 9 and 18)."""

import torch


def l1(reconstruction, images):
    """Return the mean absolute difference of each image in [0, 1] units: (N, 3, H, W) in [-1, 1] -> (N,)."""
    return _difference(reconstruction, images).abs().mean((1, 2, 3))


def psnr(reconstruction, images):
    """Return 10 log10(1 / MSE) of each image, in dB: (N, 3, H, W) in [-1, 1] -> (N,); 120 dB at most.

    Average it over images: the PSNR of a pooled MSE is lower. The reconstruction is clamped, not rounded.
    """
    mse = _difference(reconstruction, images).square().mean((1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-12))


@torch.no_grad()
def reconstruct(tokenizer, images, batch=8):
    """Encode and decode images (N, 3, H, W), `batch` at a time: reconstructions (N, 3, H, W) and indices (N, h, w)."""
    indices = [tokenizer.encode(x) for x in images.split(batch)]
    return torch.cat([tokenizer.decode(grid) for grid in indices]), torch.cat(indices)


def _difference(reconstruction, images):
    return (reconstruction.float().clamp(-1, 1) - images.float()) / 2
