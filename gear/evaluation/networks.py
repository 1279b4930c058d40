"""Feature networks with one interface: images -> named features, and a protocol.

`network(images)` takes images in uint8 (B, H, W, 3), or floats (B, 3, H, W) in [-1, 1] that are not
rounded, and returns {"pool": (B, D), ...} in float32. `network.protocol` states what the features
depend on: the SHA-256 of the weights, the input size and the interpolation.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from gear.config import UserError
from gear.evaluation.detector import SIDE, load_detector
from gear.files import cache_dir
from gear.images import check_images, to_float, to_uint8
from gear.teachers.efficientnet import load_network
from gear.teachers.networks import VITS, build
from gear.teachers.scenes import load_scenes_teacher
from gear.teachers.vit import fitting_weights
from gear.teachers.weights import file_hash, is_offline, read_tensors
from gear.weights import check_numbers

# the TensorFlow graph, converted by torch-fidelity
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
SPATIAL_CHANNELS = 7  # of mixed_6/conv; with 17 x 17 positions they are sFID's 2,023 features


class Inception:
    """Inception-v3 of 2015: features "pool" (2048), "spatial" (2023, for sFID) and "logits" (1008,
    without bias, for the Inception Score).

    The `resize` "tf1" is the resize of uint8 in the TensorFlow graph, as in ADM and torch-fidelity;
    "torch" is a bilinear resize of floats, as in pytorch-fid (rFID). The two give different numbers
    and are different protocols.
    """

    name = "inception"

    def __init__(self, path="", offline=False, resize="tf1"):
        try:
            import torch_fidelity.feature_extractor_inceptionv3 as inception
            import torch_fidelity.interpolate_compat_tensorflow as interpolation
        except ImportError:
            raise UserError(
                "the network 'inception' needs the package torch-fidelity: pip install "
                "torch-fidelity"
            ) from None
        path = find_inception(path, offline)
        tensors = read_tensors(path)
        # the library unpickles any object in a file, so it gets a file that holds tensors only
        only_tensors = io.BytesIO()
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
        self.enlarge = interpolation.interpolate_bilinear_2d_like_tensorflow1x
        self.resize = resize
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
        hooked = {}
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: hooked.update(spatial=output)
        )
        for name in INCEPTION_LAYERS:
            x = getattr(self.network, name)(x)
        hook.remove()
        pool = x.flatten(1)
        spatial = hooked["spatial"][:, :SPATIAL_CHANNELS].flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.network.fc.weight.T}


def find_inception(path="", offline=False):
    """Return Inception's weight file: `path`, or a file in gear's or torch's cache, or a download.

    The hash of a cached or downloaded file is checked. Raises UserError for a damaged file, and
    where there is none; the message names the file, its size and source, and the option for a path.
    """
    caches = [cache_dir() / INCEPTION, Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION]
    candidates = [Path(path).expanduser()] if path else caches
    files = [candidate for candidate in candidates if candidate.is_file()]
    reason = "that file is not there" if path else "they are not on this machine"
    if not files and not path and not is_offline(offline):
        try:
            caches[0].parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                INCEPTION_URL, str(caches[0]), hash_prefix="6726825d", progress=False
            )
            files = [caches[0]]
        except (OSError, RuntimeError) as error:
            reason = f"they could not be downloaded ({error})"
    if not files:
        raise UserError(
            "FID, sFID, IS and ADM's precision and recall need Inception's weights, but "
            f"{reason}{f': {path}' if path else ''}. The file is {INCEPTION}, 91 MB, of "
            "github.com/toshas/torch-fidelity (Apache-2.0): give it by --weights PATH, or choose "
            "another --network."
        )
    if not path and not file_hash(files[0]).startswith("6726825d"):
        raise UserError(
            f"{files[0]} is damaged: its hash does not begin with 6726825d. Delete it, and it is "
            "downloaded again."
        )
    return files[0]


class DINOv2:
    """DINOv2's class token after the last norm (GPIC protocol): "pool" (1024).

    Images are resized in uint8 to 224 px with Pillow's bicubic filter.
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
    """EfficientNet-Lite0's pooled features, "pool" (1280), and "logits" (1000).

    Its weights come with a package and need no download. Images are resized to 128 px by torch's
    filter `resize`: "bicubic" or "bilinear" with antialiasing, or "nearest".
    """

    name, side = "efficientnet-lite0", 128

    def __init__(self, path="", offline=False, resize="bicubic"):
        self.network, identity = load_network(self.name)
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


class EfficientNetLite2(EfficientNet):
    """EfficientNet-Lite2's pooled features, "pool" (1280), and "logits" (1000): the judge of
    photographs whose generators are aligned to EfficientNet-Lite0.
    """

    name = "efficientnet-lite2"


class ScenesFeatures:
    """The features of the packaged scenes teacher, averaged over patches: "pool" (64).

    They are meaningful for images of scenes only.
    """

    name = "scenes"

    def __init__(self, path="", offline=False):
        self.network = load_scenes_teacher()
        self.protocol = {
            "network": "scenes",
            "weights": _state_hash(self.network),
            "input": "as it is",
            "interpolation": "none",
        }

    def to(self, device):
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images):
        return {"pool": self.network(as_floats(images)).mean(1)}


class DetectorFeatures:
    """The features of the packaged scenes detector, averaged over cells: "pool" (128).

    They are meaningful for images of scenes only.
    """

    name = "detector"

    def __init__(self, path="", offline=False):
        self.network = load_detector()
        self.protocol = {
            "network": self.name,
            "weights": _state_hash(self.network),
            "input": SIDE,
            "interpolation": "area, torch",
        }

    def to(self, device):
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images):
        return {"pool": self.network.features(as_floats(images))}


def _state_hash(network):
    """Return the SHA-256 of a network's weights."""
    state = b"".join(t.cpu().numpy().tobytes() for t in network.state_dict().values())
    return hashlib.sha256(state).hexdigest()


def _protocol(name, sha256, side, interpolation):
    return {"network": name, "weights": sha256[:16], "input": side, "interpolation": interpolation}


PACKAGED = (EfficientNet, EfficientNetLite2, ScenesFeatures, DetectorFeatures)
NETWORKS = {network.name: network for network in (Inception, DINOv2, *PACKAGED)}
# teacher -> the network in whose space generators aligned to this teacher are judged as well
JUDGES = {ScenesFeatures.name: DetectorFeatures.name, EfficientNet.name: EfficientNetLite2.name}


def reference_images(name):
    """Return the default number of images for a reference and for reconstructions in the space of a
    network.

    It exceeds the number of features, which a Fréchet distance needs. Inception's is that of the
    papers.
    """
    return 50_000 if name == Inception.name else 2_000


def load_network_by_name(name, path="", offline=False, **settings):
    """Load a feature network by its name; `settings` are passed to its class.

    Raises UserError for an unknown name and for missing weights.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown feature network '{name}'. Known: {', '.join(NETWORKS)}.")
    if path and NETWORKS[name] in PACKAGED:
        raise UserError(
            f"{name} comes with its weights: --weights {path} applies to inception and dinov2-l "
            "only."
        )
    return NETWORKS[name](path, offline, **settings)


def as_floats(images):
    """Convert images, uint8 or float, to float32 (B, 3, H, W) in [-1, 1].

    Raises UserError for images of another shape, type or range.
    """
    if images.dtype == torch.uint8:
        return to_float(as_pixels(images))
    check_images(images)
    return images.float()


def as_pixels(images):
    """Convert images, uint8 or float, to uint8 (B, H, W, 3); floats in [-1, 1] are rounded.

    Raises UserError for images of another shape, type or range.
    """
    if images.dtype != torch.uint8:
        return to_uint8(as_floats(images))
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"images are {tuple(images.shape)} uint8: uint8 (B, H, W, 3) or floats (B, 3, H, W) "
            "in [-1, 1] are expected."
        )
    return images
