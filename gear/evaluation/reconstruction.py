"""Reconstruction quality of a tokenizer: L1, PSNR, SSIM and LPIPS (Tables 5 to 9 and 18)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gear.config import UserError
from gear.images import check_finite, check_images
from gear.teachers.weights import file_hash
from gear.tokenizer.readout import full_precision

WINDOW = 7  # pixels of SSIM's uniform window
LPIPS_BACKBONE = "vgg16-397923af.pth"  # torchvision's file name


def l1(reconstruction, images):
    """Return the mean absolute difference of each image in [0, 1] units: (N, 3, H, W) in [-1, 1] -> (N,)."""
    return _difference(reconstruction, images).abs().mean((1, 2, 3))


def psnr(reconstruction, images):
    """Return 10 log10(1 / MSE) of each image, in dB: (N, 3, H, W) in [-1, 1] -> (N,); 120 dB at most.

    Average it over images: the PSNR of a pooled MSE is lower. The reconstruction is clamped, not rounded.
    """
    mse = _difference(reconstruction, images).square().mean((1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-12))


def ssim(reconstruction, images):
    """Return the structural similarity of each image: (N, 3, H, W) in [-1, 1] -> (N,), at most 1.

    A 7 x 7 uniform window, sample covariances, no padding, mean over channels, data range 1 (scikit-image's definition; a data
    range of 2 on [0, 1] images inflates it). Raises UserError for images smaller than the window.
    """
    _check(reconstruction, images)
    if min(images.shape[-2:]) < WINDOW:
        raise UserError(f"SSIM has a window of {WINDOW} px: images of {tuple(images.shape[-2:])} px are too small.")
    x, y = ((z.double().clamp(-1, 1) + 1) / 2 for z in (reconstruction, images))
    mean, unbiased = lambda z: F.avg_pool2d(z, WINDOW, 1), WINDOW**2 / (WINDOW**2 - 1)
    mx, my = mean(x), mean(y)
    vx, vy, cov = unbiased * (mean(x * x) - mx**2), unbiased * (mean(y * y) - my**2), unbiased * (mean(x * y) - mx * my)
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean((1, 2, 3))


class LPIPS(nn.Module):
    """LPIPS by its package's `network`, as a function of two (N, 3, H, W) in [-1, 1] -> (N,)."""

    def __init__(self, network, precision="float32"):
        super().__init__()
        self.network, self.precision = network, precision

    @full_precision
    def forward(self, reconstruction, images):
        """Return the distance of each pair.

        Images are looked at as for `psnr`, unless the reconstruction has a gradient: a step of training
        must not wait for the device.
        """
        if not reconstruction.requires_grad:
            _check(reconstruction, images)
        kind, is_bf16 = reconstruction.device.type, self.precision == "bf16"
        with torch.autocast(kind, torch.bfloat16, enabled=is_bf16 and kind == "cuda"):
            return self.network(reconstruction, images).flatten().float()


def load_lpips(device="cpu", precision="float32"):
    """Return an LPIPS of VGG16, or None without its backbone on this machine; with "bf16" its products on a GPU are bfloat16.

    The package would download the backbone at construction; a random one would run and mean nothing.
    """
    if not lpips_backbone().exists():
        return None
    if not file_hash(lpips_backbone()).startswith("397923af"):
        raise UserError(f"{lpips_backbone()} is damaged: its hash is not the one in its name. Delete it, and fetch it again.")
    try:
        import lpips
    except ImportError:
        raise UserError("LPIPS, of which lpips_weight is not 0, needs its package: pip install lpips") from None
    network = LPIPS(lpips.LPIPS(net="vgg", verbose=False), precision).eval().requires_grad_(False)
    layout = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
    return network.to(device, memory_format=layout)


def lpips_backbone():
    """Return where torch keeps VGG16's weights, there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE


def measure(distance, reconstructions, images, device="cpu"):
    """Return distance(reconstruction, image) of each image, (N,), on a CPU; it is computed on `device`, a few at a time."""
    pairs = zip(reconstructions.split(16), images.split(16))
    return torch.cat([distance(x.to(device), y.to(device)).cpu() for x, y in pairs])


@torch.no_grad()
def reconstruct(tokenizer, images):
    """Encode and decode images (N, 3, H, W), a few at a time: reconstructions (N, 3, H, W) and indices (N, h, w).

    The tokenizer's device computes; what is returned lies where the images do.
    """
    device, pixels = next(tokenizer.parameters()).device, images.shape[-2] * images.shape[-1]
    decoded, indices = [], []
    for x in images.split(images_at_once(device, pixels)):
        indices.append(tokenizer.encode(x.to(device)))
        decoded.append(tokenizer.decode(indices[-1]).to(images.device))
    return torch.cat(decoded), torch.cat(indices).to(images.device)


def images_at_once(device, pixels):
    """Return how many images of so many pixels a tokenizer encodes or decodes at once: 8 on a CPU, 32 of 256 px on a GPU."""
    return max(1, 2**21 // pixels) if device.type == "cuda" else 8


def _check(reconstruction, images):
    """Raise UserError unless images are floats in [-1, 1] and the reconstruction, which may exceed that, is of their shape."""
    check_images(images)
    if reconstruction.shape != images.shape:
        shapes = f"{tuple(reconstruction.shape)} and {tuple(images.shape)}"
        raise UserError(f"a reconstruction and its images have one shape, not {shapes}.")
    check_finite(reconstruction, "the reconstructions", "look at the tokenizer's weights")


def _difference(reconstruction, images):
    _check(reconstruction, images)
    return (reconstruction.float().clamp(-1, 1) - images.float()) / 2
