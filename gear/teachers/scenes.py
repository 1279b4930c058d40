"""The packaged teacher of the procedural scenes: a small CNN that was told what each patch shows.

It stands in for DINOv2 where nothing can be downloaded, and it is supervised, not self-supervised:
its features know the factors that `gear.data.scenes` paints with. Recipe `teacher-scenes` trains
it; `make teacher` writes the packaged file.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from gear.config import UserError
from gear.data.scenes import FACTORS
from gear.files import write_atomically
from gear.images import check_images
from gear.teachers.normalise import channel_statistics
from gear.tokenizer.autoencoder import ResBlock, group_norm

PACKAGED = Path(__file__).with_name("scenes.safetensors")
NEAR, FAR, DIM = 48, 96, 64  # channels at stride 4 and at stride 8, and what the teacher hands out


class ScenesTeacher(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> patch features (B, L, 64), a patch 4 pixels wide, L in
    raster order.

    Features of two strides, standardised per channel over the scenes and projected on their 64
    principal components: a cosine between raw features, whose channels have means of their own,
    would be high for nothing.
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
        """Return the cross entropy, in nats a patch, of each factor: images, (B, h, w, 4) int64 ->
        {name: scalar}.
        """
        channels = self.channels(images)
        return {
            f"{name}_loss": F.cross_entropy(head(channels), factors[..., i])
            for i, (name, head) in enumerate(self.heads.items())
        }

    @torch.no_grad()
    def standardise(self, images):
        """Set mean, spread and principal components from images (N, 3, H, W); returns the variance
        share they keep.
        """
        rows = self.channels(images).permute(0, 2, 3, 1).flatten(0, 2).double()  # (N L, 144)
        mean, std = channel_statistics(rows)
        self.mean.copy_(mean)
        self.std.copy_(std)
        values, vectors = torch.linalg.eigh(torch.cov(((rows - self.mean) / self.std).T))
        self.components.copy_(vectors.flip(1)[:, :DIM].T)
        return float(values[-DIM:].sum() / values.sum())


def load_scenes_teacher():
    """Load the packaged teacher: eval mode, frozen. Raises UserError when its file is missing or
    broken.
    """
    if not PACKAGED.exists():
        raise UserError(
            f"the packaged scenes teacher is missing ({PACKAGED}). Reinstall gear, or make it: "
            "make teacher"
        )
    teacher = ScenesTeacher()
    try:
        teacher.load_state_dict(load_file(PACKAGED))
    except Exception as error:  # safetensors raises its own type
        raise UserError(
            f"the packaged scenes teacher {PACKAGED} cannot be read ({error}). Reinstall gear, or "
            "make it: make teacher"
        ) from None
    return teacher.eval().requires_grad_(False)


def package(teacher, card):
    """Write the teacher and its card (recipe, configuration hash, how it was made) as the packaged
    file.
    """
    tensors = {name: t.contiguous() for name, t in teacher.state_dict().items()}
    metadata, text = (
        {"card": json.dumps(card, sort_keys=True)},
        json.dumps(card, indent=1, sort_keys=True) + "\n",
    )
    write_atomically(PACKAGED, lambda path: save_file(tensors, path, metadata=metadata))
    write_atomically(PACKAGED.with_suffix(".json"), lambda path: path.write_text(text))
