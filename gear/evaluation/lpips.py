"""LPIPS, a perceptual distance: a loss of the tokenizer (Eq. 2), and a score of reconstructions."""

from pathlib import Path

import torch
from torch import nn

from gear.config import UserError
from gear.measures.reconstruction import check_pair
from gear.teachers.weights import file_hash
from gear.tokenizer.readout import full_precision

LPIPS_BACKBONE = "vgg16-397923af.pth"  # torchvision's file name


class LPIPS(nn.Module):
    """LPIPS as a module: two batches of images (N, 3, H, W) in [-1, 1] -> distances (N,).

    `network` is that of the package lpips.
    """

    def __init__(self, network, precision="float32"):
        super().__init__()
        self.network, self.precision = network, precision

    @full_precision
    def forward(self, reconstruction, images):
        """Return the distance of each pair of images, (N,) float32.

        Raises UserError for images of another kind or range, as `psnr` does. Images are not checked
        where the reconstruction has a gradient: a training step must not wait for the device.
        """
        if not reconstruction.requires_grad:
            check_pair(reconstruction, images)
        device_type = reconstruction.device.type
        is_bf16 = self.precision == "bf16" and device_type == "cuda"
        with torch.autocast(device_type, torch.bfloat16, enabled=is_bf16):
            return self.network(reconstruction, images).flatten().float()


def load_lpips(device="cpu", precision="float32"):
    """Return LPIPS with VGG16, or None where VGG16's weights are not on this machine.

    With the precision "bf16", matrix products on a GPU are in bfloat16. Without the check for the
    weights, the package would download them, or compute meaningless distances with random ones.
    Raises UserError for a damaged weight file, and where the package lpips is not installed.
    """
    if not lpips_backbone().exists():
        return None
    if not file_hash(lpips_backbone()).startswith("397923af"):
        raise UserError(
            f"{lpips_backbone()} is damaged: its hash differs from the one in its name. Delete it, "
            "and download it again."
        )
    try:
        import lpips
    except ImportError:
        raise UserError(
            "LPIPS needs the package lpips, because lpips_weight is not 0: pip install lpips"
        ) from None
    network = LPIPS(lpips.LPIPS(net="vgg", verbose=False), precision).eval().requires_grad_(False)
    layout = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
    return network.to(device, memory_format=layout)


def lpips_backbone():
    """Return the path at which torch keeps VGG16's weights; the file need not exist."""
    return Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
