"""Public vision transformers as teachers: DINOv2, DINOv3, SigLIP 2, V-JEPA 2 and 2.1, and CLIP,
each with its original preprocessing.

A teacher is named NAME[@LAYER][=PATH]: "dinov2-b", "dinov2-b@8",
"siglip2-b=/weights/siglip2.safetensors".
"""

import re
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn

from gear.config import UserError
from gear.images import check_images
from gear.teachers.cache import FeatureCache
from gear.teachers.networks import VITS, blocks, build, input_side, renamed
from gear.teachers.normalise import ALPHA, spatially_normalised
from gear.teachers.weights import file_hash, find_weights, named_for, read_tensors
from gear.weights import check_fit


class ViTTeacher(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> patch features (B, L, dim) float32, with patches of
    `stride` pixels, L in raster order.

    `side` is the side of the network's input in pixels. `layer` is a block counted from 1, or -1
    for the last one, which is read after the final norm if `vit.last_norm`. `identity` is a text of
    everything on which the features depend, with the weights' `sha256`. On a CPU a FeatureCache
    stores the features.
    """

    def __init__(self, name, network, sha256, image_size, stride, layer=-1):
        super().__init__()
        self.vit = VITS[name]
        self.network = network
        self.sha256 = sha256
        self.image_size = image_size
        self.stride = stride
        self.dim = self.vit.dim
        self.side = input_side(name, image_size, stride)
        self.layer = len(blocks(network)) if layer == -1 and not self.vit.last_norm else layer
        normalisation = f"z-score {ALPHA}" if self.vit.spatial else "none"
        self.identity = (
            f"{name} {sha256}, {self.vit.library} {version(self.vit.library)}, layer {self.layer}, "
            f"normalisation {normalisation}, input {self.side} px"
        )
        self.cached = FeatureCache(self.identity, self.dim, self.features)
        for statistic, values in zip(("mean", "std"), self.vit.norm):
            self.register_buffer(statistic, torch.tensor(values).view(3, 1, 1), persistent=False)

    def grid(self, image_size):
        """Return the side of the feature grid at an image size in pixels; CLIP's is always 16."""
        return (
            self.side // self.vit.patch
            if self.vit.sides == (self.side,)
            else image_size // self.stride
        )

    def preprocess(self, images):
        """Return the network's input, (B, 3, side, side)."""
        pixels = (images + 1) / 2
        for step in self.vit.steps:
            if step == "normalise":
                pixels = (pixels - self.mean) / self.std
            else:
                pixels = F.interpolate(
                    pixels,
                    (self.side, self.side),
                    mode="bicubic",
                    align_corners=False,
                    antialias=False,
                )
        return pixels

    def raw(self, images):
        """Return the network's features without the special tokens, (B, L, dim)."""
        network, pixels = self.network, self.preprocess(images)
        if self.vit.library == "transformers":
            # an image is a video of one frame, which V-JEPA 2 repeats
            hidden = network.embeddings(pixels[:, None])
            for block in network.layer[: None if self.layer == -1 else self.layer]:
                hidden = block(hidden)[0]
            return network.layernorm(hidden) if self.layer == -1 else hidden
        if self.layer == -1:
            return network.forward_features(pixels)[:, network.num_prefix_tokens :]
        options = dict(output_fmt="NLC", intermediates_only=True, stop_early=True)
        return network.forward_intermediates(pixels, indices=[self.layer - 1], **options)[0]

    def features(self, images):
        """Return the features that `forward` returns, without its checks and cache."""
        raw = self.raw(images).float()
        return spatially_normalised(raw) if self.vit.spatial else raw

    def forward(self, images, check=True):
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"a teacher of {self.image_size} px images got {images.shape[-2]} x "
                f"{images.shape[-1]} px: load the teacher for this size."
            )
        check_images(images, check)
        images = images.to(self.mean.dtype)
        return self.cached(images).float() if images.device.type == "cpu" else self.features(images)


def parse(spec):
    """Split NAME[@LAYER][=PATH] into (name, layer, path), with -1 and "" for absent parts.

    Raises UserError for a layer that is not a number.
    """
    head, _, path = spec.partition("=")
    name, separator, layer = head.partition("@")
    if separator and not re.fullmatch(r"-1|\d+", layer):
        raise UserError(
            f"the layer of the teacher '{spec}' is '{layer}': a number is expected, as in {name}@8."
        )
    return name, int(layer) if separator else -1, path


def load_vit_teacher(spec, data, stride, offline=False):
    """Load a teacher NAME[@LAYER][=PATH] for the images of a DataConfig and patches of `stride`
    pixels, frozen and in evaluation mode.

    Raises UserError where its grid cannot match, or its library or weights are missing or do not
    fit.
    """
    name, layer, _ = parse(spec)
    side = input_side(name, data.image_size, stride)
    path, tensors = fitting_weights(spec, side, offline)
    # the library draws random weights, which must not change the random numbers of the caller
    with torch.random.fork_rng(devices=[]):
        network = build(name, side)
    network.load_state_dict(tensors)
    return (
        ViTTeacher(name, network, file_hash(path), data.image_size, stride, layer)
        .eval()
        .requires_grad_(False)
    )


def check(spec, data=None, stride=None, offline=False):
    """Raise UserError unless a teacher's weights can be found and fit.

    With a DataConfig and a stride, its grid has to match, too. Without, and where the weights
    depend on the image size, only the network and a given file are looked for.
    """
    name, _, path = parse(spec)
    sides = VITS[name].sides or (16 * VITS[name].patch,)
    if data is not None or len(sides) == 1:
        fitting_weights(
            spec, sides[0] if data is None else input_side(name, data.image_size, stride), offline
        )
    else:  # the weights depend on the image size, which is not known
        with torch.device("meta"):
            build(name, sides[0])
        if path:
            find_weights(name, "", "", path)


def fitting_weights(spec, side, offline=False, flag=""):
    """Return (path, {library's name: tensor}) of a teacher's weights for inputs of `side` pixels.

    `flag` is the option that takes a path, for an error message, if it is not --teacher. Raises
    UserError for a layer that does not exist, weights that are missing, and tensors that do not
    fit, which it lists.
    """
    name, layer, path = parse(spec)
    vit = VITS[name]
    with torch.device("meta"):
        network = build(name, side)
    if layer != -1 and not 1 <= layer <= len(blocks(network)):
        raise UserError(
            f"the teacher {name} has no layer {layer}: it has 1 to {len(blocks(network))}, and -1 "
            "stands for the last."
        )
    about = f"about {vit.megabytes} MB, from {vit.source.format(side=side)}"
    path = find_weights(name, vit.repo.format(side=side), about, path, offline, flag, vit.file)
    tensors = named_for(network, read_tensors(path), lambda tensors: renamed(tensors, vit.names))
    check_fit(network, tensors, path, f"teacher {name}")
    return path, tensors
