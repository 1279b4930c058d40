"""Feature networks behind one face: images -> named features, with all that a number computed from
them depends on.

`network(images)` takes uint8 (B, H, W, 3), or float (B, 3, H, W) in [-1, 1] that no rounding has
touched, and returns {"pool": (B, D), ...} float32. `network.protocol` names the weights by their
SHA-256, the input and the interpolation.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from gear.config import UserError
from gear.files import cache_dir
from gear.images import check_images, to_float, to_uint8
from gear.teachers.efficientnet import load_network
from gear.teachers.networks import VITS, build
from gear.teachers.scenes import load_scenes_teacher
from gear.teachers.vit import fitting_weights
from gear.teachers.weights import file_hash, is_offline, read_tensors
from gear.weights import check_numbers

# torch-fidelity's conversion of the TensorFlow graph
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
INCEPTION_LAYERS = (
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "MaxPool_1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "MaxPool_2",
    "Mixed_5b",
    "Mixed_5c",
    "Mixed_5d",
    "Mixed_6a",
    "Mixed_6b",
    "Mixed_6c",
    "Mixed_6d",
    "Mixed_6e",
    "Mixed_7a",
    "Mixed_7b",
    "Mixed_7c",
    "AvgPool",
)
SPATIAL_CHANNELS = 7  # of mixed_6/conv, 17 x 17 each: sFID's 2,023 features


class Inception:
    """Inception-v3 of 2015: "pool" (2048), "spatial" (2023, sFID) and "logits" (1008, without bias;
    Inception Score).

    `resize` "tf1" is the graph's own, of uint8, as ADM and torch-fidelity have it; "torch" is
    bilinear on floats, as pytorch-fid has it (rFID). The two give different numbers and are
    different protocols.
    """

    name = "inception"

    def __init__(self, path="", offline=False, resize="tf1"):
        try:
            import torch_fidelity.feature_extractor_inceptionv3 as inception
            import torch_fidelity.interpolate_compat_tensorflow as interpolation
        except ImportError:
            raise UserError(
                "the network 'inception' is torch-fidelity's: pip install torch-fidelity"
            ) from None
        path = find_inception(path, offline)
        tensors, only_tensors = read_tensors(path), io.BytesIO()
        # the library unpickles whatever a file holds: it gets one of tensors
        torch.save(tensors, only_tensors)
        only_tensors.seek(0)
        try:
            network = inception.FeatureExtractorInceptionV3
            self.network = network(
                "inception", ["2048"], feature_extractor_weights_path=only_tensors
            )
        except (RuntimeError, TypeError):
            raise UserError(
                f"the tensors in {path} do not fit Inception: {INCEPTION} is expected."
            ) from None
        check_numbers(self.network, tensors, path, "Inception")
        self.network.eval().requires_grad_(False)
        self.enlarge, self.resize = interpolation.interpolate_bilinear_2d_like_tensorflow1x, resize
        self.protocol = {
            "network": "inception",
            "weights": file_hash(path),
            "input": 299,
            "interpolation": f"bilinear, {resize}",
        }

    def to(self, device):
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images):
        if self.resize == "tf1":
            pixels = as_pixels(images)
            x = self.enlarge(pixels.permute(0, 3, 1, 2).float(), (299, 299), align_corners=False)
            x = (x - 128) / 128
        else:
            x = F.interpolate(as_floats(images), (299, 299), mode="bilinear", align_corners=False)
        kept = {}
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: kept.update(spatial=output)
        )
        for name in INCEPTION_LAYERS:
            x = getattr(self.network, name)(x)
        hook.remove()
        pool = x.flatten(1)
        spatial = kept["spatial"][:, :SPATIAL_CHANNELS].flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.network.fc.weight.T}


def find_inception(path="", offline=False):
    """Return Inception's weight file: `path`, else in gear's or torch's cache, else downloaded; its
    hash is checked.

    Raises UserError naming the file, its size and source, and how to give a path, where it cannot
    be had.
    """
    places = [cache_dir() / INCEPTION, Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION]
    found = [p for p in ([Path(path).expanduser()] if path else places) if p.is_file()]
    why = "that file is not there" if path else "it is not on this machine"
    if not found and not path and not is_offline(offline):
        try:
            places[0].parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                INCEPTION_URL, str(places[0]), hash_prefix="6726825d", progress=False
            )
            found = [places[0]]
        except (OSError, RuntimeError) as error:
            why = f"it could not be downloaded ({error})"
    if not found:
        raise UserError(
            "FID, sFID, IS and ADM's precision and recall need Inception's weights, and "
            f"{why}{f': {path}' if path else ''}. "
            f"{INCEPTION}, 91 MB, of github.com/toshas/torch-fidelity (Apache-2.0): give it by "
            "--weights PATH, or choose "
            f"another --network."
        )
    if not path and not file_hash(found[0]).startswith("6726825d"):
        raise UserError(
            f"{found[0]} is damaged: its hash does not begin with 6726825d. Delete it, and it is "
            "fetched again."
        )
    return found[0]


class DINOv2:
    """DINOv2's class token after the norm (GPIC protocol): "pool" (1024). Pillow's bicubic resize
    to 224 px, of uint8.
    """

    name = "dinov2-l"

    def __init__(self, path="", offline=False):
        spec = f"{self.name}={path}" if path else self.name
        path, tensors = fitting_weights(spec, 224, offline, "--weights ")
        self.network = build(self.name, 224)
        self.network.load_state_dict(tensors)
        self.network.eval().requires_grad_(False)
        self.protocol = _protocol(self.name, file_hash(path), 224, "bicubic, Pillow") | {
            "rounding": "uint8"
        }

    def to(self, device):
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images):
        device = next(self.network.parameters()).device
        pixels = as_pixels(images)
        resized = [
            Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC)
            for p in pixels.cpu().numpy()
        ]
        x = (
            torch.from_numpy(np.stack([np.asarray(p) for p in resized]))
            .permute(0, 3, 1, 2)
            .to(device)
            .float()
            / 255
        )
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in VITS[self.name].norm
        )
        return {"pool": self.network.forward_features((x - mean) / std)[:, 0]}


class EfficientNet:
    """EfficientNet-Lite0's pooled features, "pool" (1280), and "logits" (1000): the space that
    needs no download.

    Images are resized to 128 px by `resize`, torch's bicubic or bilinear with antialiasing, or
    nearest.
    """

    name, side = "efficientnet-lite0", 128

    def __init__(self, path="", offline=False, resize="bicubic"):
        self.network, identity = load_network()
        self.network.eval().requires_grad_(False)
        self.protocol = _protocol(self.name, identity.split()[-1], self.side, f"{resize}, torch")
        self.resize = resize

    def to(self, device):
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images):
        smooth = {} if self.resize == "nearest" else {"antialias": True}
        x = F.interpolate(as_floats(images), (self.side, self.side), mode=self.resize, **smooth)
        pool = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        return {"pool": pool, "logits": self.network.get_classifier()(pool)}


class ScenesFeatures:
    """The packaged scenes teacher's features, averaged over patches, "pool" (64): for scenes, and
    for nothing else.
    """

    name = "scenes"

    def __init__(self, path="", offline=False):
        self.network = load_scenes_teacher()
        state = b"".join(t.numpy().tobytes() for t in self.network.state_dict().values())
        self.protocol = {
            "network": "scenes",
            "weights": hashlib.sha256(state).hexdigest(),
            "input": "as it is",
            "interpolation": "none",
        }

    def to(self, device):
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images):
        return {"pool": self.network(as_floats(images)).mean(1)}


def _protocol(name, sha256, side, interpolation):
    return {"network": name, "weights": sha256[:16], "input": side, "interpolation": interpolation}


NETWORKS = {network.name: network for network in (Inception, DINOv2, EfficientNet, ScenesFeatures)}


def reference_images(name):
    """Return how many images a reference has, and are reconstructed, in a network's space: more
    than it has features; in Inception's as many as the papers'.
    """
    return 50_000 if name == Inception.name else 2_000


def load_network_by_name(name, path="", offline=False, **settings):
    """Load a feature network, with `settings` of its own; raises UserError for an unknown name and
    for missing weights.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown feature network '{name}'. Known: {', '.join(NETWORKS)}.")
    if path and NETWORKS[name] in (EfficientNet, ScenesFeatures):
        raise UserError(
            f"{name} comes with its weights: --weights {path} is for inception and dinov2-l."
        )
    return NETWORKS[name](path, offline, **settings)


def as_floats(images):
    """Return images as (B, 3, H, W) float32 in [-1, 1]; raises UserError for another kind or
    range.
    """
    if images.dtype == torch.uint8:
        return to_float(as_pixels(images))
    check_images(images)
    return images.float()


def as_pixels(images):
    """Return images as (B, H, W, 3) uint8, floats in [-1, 1] rounded; raises UserError for another
    kind or range.
    """
    if images.dtype != torch.uint8:
        return to_uint8(as_floats(images))
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"images are {tuple(images.shape)} uint8: (B, H, W, 3) is expected, or floats (B, 3, "
            "H, W) in [-1, 1]."
        )
    return images
