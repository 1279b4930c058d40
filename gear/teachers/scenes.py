"""The packaged teacher of the procedural scenes: a small CNN trained to classify what each patch
shows.

It replaces DINOv2 where nothing can be downloaded. Unlike DINOv2 it is supervised: its labels are
the factors from which `gear.data.scenes` draws an image. The recipe `teacher-scenes` trains it, and
`make teacher` writes the packaged file.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gear.data.scenes import FACTORS
from gear.images import check_images
from gear.teachers.normalise import channel_statistics
from gear.tokenizer.autoencoder import ResBlock, group_norm
from gear.weights import load_packaged

PACKAGED = Path(__file__).with_name("scenes.safetensors")
NEAR = 48  # channels at stride 4
FAR = 96  # channels at stride 8
DIM = 64  # channels of the teacher's features


class ScenesTeacher(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> patch features (B, L, 64), with patches of 4 pixels.

    L is in raster order. The features of two strides are standardised per channel over the scenes
    and projected onto their 64 principal components. Without this, the non-zero means of the
    channels would make the cosine between any two features high.
    """

    stride, dim = 4, DIM

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), ResBlock(32, 32))
        self.near = nn.Sequential(
            nn.Conv2d(32, NEAR, 3, 2, 1), ResBlock(NEAR, NEAR), group_norm(NEAR), nn.SiLU()
        )
        self.far = nn.Sequential(
            nn.Conv2d(NEAR, FAR, 3, 2, 1), ResBlock(FAR, FAR), group_norm(FAR), nn.SiLU()
        )
        self.heads = nn.ModuleDict(
            {name: nn.Conv2d(NEAR + FAR, n, 1) for name, n in FACTORS.items()}
        )
        self.register_buffer("mean", torch.zeros(NEAR + FAR))
        self.register_buffer("std", torch.ones(NEAR + FAR))
        self.register_buffer("components", torch.eye(NEAR + FAR)[:DIM])

    def grid(self, image_size):
        """Return the side of the feature grid at an image size in pixels."""
        return image_size // self.stride

    def channels(self, images):
        """Return the raw features of both strides, (B, 144, h, w)."""
        near = self.near(self.stem(images))
        far = F.interpolate(
            self.far(near), size=near.shape[-2:], mode="bilinear", align_corners=False
        )
        return torch.cat([near, far], 1)

    def forward(self, images, check=True):
        check_images(images, check)
        rows = self.channels(images.to(self.mean.dtype)).flatten(2).transpose(1, 2)  # (B, L, 144)
        return ((rows - self.mean) / self.std) @ self.components.T

    def factor_losses(self, images, factors):
        """Return the cross entropy of each factor, {f"{name}_loss": scalar}, in nats per patch.

        `images` are (B, 3, H, W), `factors` (B, h, w, 4) int64 in the order of FACTORS.
        """
        channels = self.channels(images)
        return {
            f"{name}_loss": F.cross_entropy(head(channels), factors[..., i])
            for i, (name, head) in enumerate(self.heads.items())
        }

    @torch.no_grad()
    def standardise(self, images):
        """Set mean, standard deviation and principal components from images (N, 3, H, W).

        Returns the share of the variance that the 64 components explain.
        """
        rows = self.channels(images).permute(0, 2, 3, 1).flatten(0, 2).double()  # (N L, 144)
        mean, std = channel_statistics(rows)
        self.mean.copy_(mean)
        self.std.copy_(std)
        values, vectors = torch.linalg.eigh(torch.cov(((rows - self.mean) / self.std).T))
        self.components.copy_(vectors.flip(1)[:, :DIM].T)
        return float(values[-DIM:].sum() / values.sum())


def load_scenes_teacher():
    """Load the packaged teacher, frozen and in evaluation mode.

    Raises UserError where its file is missing or damaged.
    """
    return load_packaged(ScenesTeacher(), PACKAGED, "scenes teacher", "make teacher")
