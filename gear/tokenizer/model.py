"""The tokenizer: an encoder, a quantizer and a decoder between images and grids of indices."""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gear.config import UserError, check_range
from gear.images import check_divides, check_finite, check_images
from gear.tokenizer.autoencoder import Decoder, Encoder
from gear.tokenizer.config import BACKBONES
from gear.tokenizer.quantize import QUANTIZERS, Quantized


@dataclass
class Tokenized:
    """Output of one tokenizer forward: `reconstruction` (B, 3, H, W) and a Quantized."""

    reconstruction: torch.Tensor
    quantized: Quantized


class Tokenizer(nn.Module):
    """VQ, LFQ or IBQ: images (B, 3, H, W) in [-1, 1] <-> indices (B, h, w) int64 in [0, K).

    h is H / downsampling, and w is W / downsampling. Images of any float type are converted to the
    network's type.

    In evaluation mode, images out of range and values that are not finite raise UserError. These
    checks are skipped in training mode, and where `check` is false (a frozen tokenizer in a
    training step), because they would wait for the device.

    A tokenizer trained in the `precision` "bf16" always encodes in bfloat16, so that on one kind of
    device a generator is trained on the same indices that inference gives. (Compiled code, which
    trains a tokenizer on a GPU, rounds less.) With `checkpointing` the encoder and the decoder are
    computed a second time in the backward pass, which saves memory.
    """

    def __init__(self, config, precision="float32", checkpointing=False):
        super().__init__()
        self.config = config
        self.precision = precision
        self.checkpointing = checkpointing
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = QUANTIZERS[config.quantizer](config)
        c = config.autoencoder_channels
        d = config.code_dim
        f = config.downsampling
        has_quant_conv = BACKBONES[config.backbone].has_quant_conv
        self.quant_conv = nn.Conv2d(c, d, 1) if has_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(d, c, 1) if has_quant_conv else nn.Identity()
        self.skip_in = nn.Conv2d(3, d, f, f) if config.linear_skip else None
        self.skip_out = nn.ConvTranspose2d(d, 3, f, f) if config.linear_skip else None

    @property
    def identity(self):
        """The setting besides the weights that the indices depend on; "" for the default."""
        return "" if self.precision == "float32" else self.precision

    def latents(self, images, check=True):
        """Encode images to continuous latents Z: (B, 3, H, W) -> (B, code_dim, h, w).

        Raises UserError for images of a wrong type or shape, of a size that `downsampling` does not
        divide, and, unless `check` is false or in training mode, out of range.
        """
        check_images(images, check and not self.training)
        check_divides(images.shape[-2:], self.config.downsampling)
        images = images.to(self.encoder.conv_in.weight.dtype)
        autocast = (
            torch.autocast(images.device.type, torch.bfloat16)
            if self.precision == "bf16"
            else contextlib.nullcontext()
        )
        with autocast:
            z = self.quant_conv(self._run(self.encoder, images))
            z = z if self.skip_in is None else z + self.skip_in(images)
        return z.to(images.dtype)

    def affinity(self, images):
        """Return the Affinity A (Eq. 6) of every position to every code, (B, h*w, K).

        `affinity(images).dense` is the float32 matrix.
        """
        return self.quantizer.affinity(self.latents(images))

    def mean_use(self, images):
        """Return the mean code usage, (K,): the mean row of softmax(A / 0.01) over all positions.

        The entropy term of Eq. 2 raises the entropy of this distribution.
        """
        return self.affinity(images).entropies()[1]

    def encode(self, images, check=True):
        """Return the index grid (Eq. 1): (B, 3, H, W) -> (B, h, w) int64."""
        z = self.latents(images, check)
        return self.quantizer.indices(z, check).unflatten(1, z.shape[-2:])

    def decode(self, indices):
        """Decode an index grid to images: (B, h, w) -> (B, 3, H, W), approximately in [-1, 1].

        Raises UserError for indices that are no grid or out of range, and for images that are not
        finite.
        """
        if indices.ndim != 3:
            raise UserError(
                f"indices have shape {tuple(indices.shape)}: a grid (B, h, w) is expected."
            )
        check_range(indices, self.config.codebook_size, "indices")
        return self.decode_latents(self.quantizer.lookup(indices))

    def decode_latents(self, latents):
        """Decode latents to images: (B, code_dim, h, w) -> (B, 3, H, W).

        Raises UserError, in evaluation mode, for images that are not finite.
        """
        images = self._run(self.decoder, self.post_quant_conv(latents))
        images = images if self.skip_out is None else images + self.skip_out(latents)
        check_finite(
            images,
            "the decoded images",
            "look at the latents or the tokenizer's weights",
            not self.training,
        )
        return images

    def _run(self, network, x):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(network, x, use_reentrant=False)
        return network(x)

    def forward(self, images):
        """Encode, quantise and decode images (B, 3, H, W); returns a Tokenized."""
        quantized = self.quantizer(self.latents(images))
        return Tokenized(self.decode_latents(quantized.latents), quantized)


@torch.no_grad()
def initialise_from_data(tokenizer, images, seed=0):
    """Initialise a tokenizer with `linear_skip` as the best linear tokenizer of `images`.

    The skip into the latents is a PCA encoder, the codebook is a k-means clustering of the encoded
    patches, and the skip back to the pixels is the least-squares decoder. The last layers of the
    encoder and the decoder are set to zero, so that at first only the skips act.

    A latent consists of a patch's first principal components p and, for VQ and IBQ, of a constant
    1. On VQ's unit sphere the angle from the constant's axis then grows with |p|, so that
    brightness and contrast survive the normalisation. `images` are (N, 3, H, W) in [-1, 1], `seed`
    is that of k-means. Raises UserError for fewer patches than codes.
    """
    config, quantizer = tokenizer.config, tokenizer.quantizer
    f, d = config.downsampling, config.code_dim
    # (N, 3 f f), in (channel, row, column) order
    patches = F.unfold(images.cpu(), f, stride=f).transpose(1, 2).flatten(0, 1)
    if len(patches) < config.codebook_size:
        raise UserError(
            f"{len(patches)} patches cannot start {config.codebook_size} codes: use more images or "
            "a smaller codebook."
        )
    mean = patches.mean(0)
    constants = quantizer.constants
    # float64, because float32 sums differ in their last bits with the alignment of memory
    covariance = torch.cov((patches - mean).T.double())
    # (D - constants, 3 f f)
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1).T[: d - constants].float()
    basis = basis / ((patches - mean) @ basis.T).square().sum(-1).mean().sqrt()  # E |p|^2 = 1
    weight = quantizer.scale * torch.cat([basis, torch.zeros(constants, basis.shape[1])])
    bias = quantizer.scale * torch.cat([-basis @ mean, torch.ones(constants)])
    tokenizer.skip_in.weight.copy_(weight.view(d, 3, f, f))
    tokenizer.skip_in.bias.copy_(bias)
    code = quantizer.start(patches @ weight.T + bias, seed).double()  # (N, D)
    colour = mean.view(3, f * f).mean(1)  # (3,)
    residual = (patches - colour.repeat_interleave(f * f)).double()
    solution = torch.linalg.solve(
        code.T @ code + 1e-9 * len(code) * torch.eye(d), code.T @ residual
    )  # (D, 3 f f)
    tokenizer.skip_out.weight.copy_(solution.view(d, 3, f, f))
    tokenizer.skip_out.bias.copy_(colour)
    has_quant_conv = isinstance(tokenizer.quant_conv, nn.Conv2d)
    encoder_output = tokenizer.quant_conv if has_quant_conv else tokenizer.encoder.conv_out
    for layer in (encoder_output, tokenizer.decoder.conv_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def reconstruct(tokenizer, images):
    """Encode and decode images (N, 3, H, W) in chunks of `images_at_once`.

    Returns reconstructions (N, 3, H, W) and indices (N, h, w). The tokenizer's device computes; the
    results are on the device of `images`.
    """
    device = next(tokenizer.parameters()).device
    pixels = images.shape[-2] * images.shape[-1]
    decoded, indices = [], []
    for x in images.split(images_at_once(device, pixels)):
        indices.append(tokenizer.encode(x.to(device)))
        decoded.append(tokenizer.decode(indices[-1]).to(images.device))
    return torch.cat(decoded), torch.cat(indices).to(images.device)


def images_at_once(device, pixels):
    """Return how many images of `pixels` pixels each a tokenizer encodes or decodes at once.

    The number is 8 on a CPU; on a GPU it is 32 for images of 256 x 256 and falls with the size.
    """
    return max(1, 2**21 // pixels) if device.type == "cuda" else 8
