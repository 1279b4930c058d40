"""LPIPS, the perceptual distance: a loss of the tokenizer (Eq. 2), and a score of its
reconstructions.
"""

from pathlib import Path

import torch
from torch import nn

from gear.config import UserError
from gear.measures.reconstruction import check_pair
from gear.teachers.weights import file_hash
from gear.tokenizer.readout import full_precision

LPIPS_BACKBONE = "vgg16-397923af.pth"  # torchvision's file name


class LPIPS(nn.Module):
    """LPIPS by its package's `network`, as a function of two (N, 3, H, W) in [-1, 1] -> (N,)."""

    def __init__(self, network, precision="float32"):
        super().__init__()
        self.network, self.precision = network, precision

    @full_precision
    def forward(self, reconstruction, images):
        """Return the distance of each pair.

        Images are looked at as for `psnr`, unless the reconstruction has a gradient: a step of
        training must not wait for the device.
        """
        if not reconstruction.requires_grad:
            check_pair(reconstruction, images)
        kind, is_bf16 = reconstruction.device.type, self.precision == "bf16"
        with torch.autocast(kind, torch.bfloat16, enabled=is_bf16 and kind == "cuda"):
            return self.network(reconstruction, images).flatten().float()


def load_lpips(device="cpu", precision="float32"):
    """Return an LPIPS of VGG16, or None without its backbone on this machine; with "bf16" its
    products on a GPU are bfloat16.

    The package would download the backbone at construction; a random one would run and mean
    nothing.
    """
    if not lpips_backbone().exists():
        return None
    if not file_hash(lpips_backbone()).startswith("397923af"):
        raise UserError(
            f"{lpips_backbone()} is damaged: its hash is not the one in its name. Delete it, and "
            "fetch it again."
        )
    try:
        import lpips
    except ImportError:
        raise UserError(
            "LPIPS, of which lpips_weight is not 0, needs its package: pip install lpips"
        ) from None
    network = LPIPS(lpips.LPIPS(net="vgg", verbose=False), precision).eval().requires_grad_(False)
    layout = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
    return network.to(device, memory_format=layout)


def lpips_backbone():
    """Return where torch keeps VGG16's weights, there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
