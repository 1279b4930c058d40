"""Tokenizer = encoder + quantizer + decoder: images <-> a grid of indices."""

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
    """One tokenizer forward: `reconstruction` (B, 3, H, W) and what the quantizer gave."""

    reconstruction: torch.Tensor
    quantized: Quantized


class Tokenizer(nn.Module):
    """VQ, LFQ or IBQ: images (B, 3, H, W) in [-1, 1] <-> indices (B, h, w) int64 in [0, K).

    h is H / downsampling.

    Images of any float type are taken as the network's own. In evaluation mode an image out of
    range and a value that is not finite raise UserError; training, and a frozen tokenizer in it
    (`check` false), must not wait for the device to say so. One that was trained in the `precision`
    "bf16" encodes in it, whoever asks: on one kind of device the indices that a generator is
    trained on are those at inference. (Compiled code, which trains a tokenizer on a GPU, rounds
    less.) With `checkpointing` encoder and decoder are computed again in backward, which saves
    memory.
    """

    def __init__(self, config, precision="float32", checkpointing=False):
        super().__init__()
        self.config, self.precision, self.checkpointing = config, precision, checkpointing
        self.encoder, self.decoder, self.quantizer = (
            Encoder(config),
            Decoder(config),
            QUANTIZERS[config.quantizer](config),
        )
        c, d, f = config.autoencoder_channels, config.code_dim, config.downsampling
        has_convs = BACKBONES[config.backbone].own_width
        self.quant_conv = nn.Conv2d(c, d, 1) if has_convs else nn.Identity()
        self.post_quant_conv = nn.Conv2d(d, c, 1) if has_convs else nn.Identity()
        self.skip_in = nn.Conv2d(3, d, f, f) if config.linear_skip else None
        self.skip_out = nn.ConvTranspose2d(d, 3, f, f) if config.linear_skip else None

    @property
    def identity(self):
        """What the indices depend on besides the weights; "" where it is the default."""
        return "" if self.precision == "float32" else self.precision

    def latents(self, images, check=True):
        """Encode images to continuous latents Z: (B, code_dim, h, w). Raises UserError for images
        that it cannot take.
        """
        check_images(images, check and not self.training)
        check_divides(images.shape[-2:], self.config.downsampling)
        images = images.to(self.encoder.conv_in.weight.dtype)
        bf16 = (
            torch.autocast(images.device.type, torch.bfloat16)
            if self.precision == "bf16"
            else contextlib.nullcontext()
        )
        with bf16:
            z = self.quant_conv(self._run(self.encoder, images))
            z = z if self.skip_in is None else z + self.skip_in(images)
        return z.to(images.dtype)

    def affinity(self, images):
        """Return the Affinity A (Eq. 6) of every position to every code, (B, h*w, K), whose
        `.dense` is the float32 matrix.
        """
        return self.quantizer.affinity(self.latents(images))

    def mean_use(self, images):
        """Return the mean row of softmax(A / 0.01) over images, (K,): what the entropy term is
        about (Eq. 2).
        """
        return self.affinity(images).entropies()[1]

    def encode(self, images, check=True):
        """Return the index grid (Eq. 1): (B, 3, H, W) -> (B, h, w) int64."""
        z = self.latents(images, check)
        return self.quantizer.indices(z, check).unflatten(1, z.shape[-2:])

    def decode(self, indices):
        """Render an index grid: (B, h, w) -> (B, 3, H, W), about in [-1, 1]. Raises UserError for
        an index out of range.
        """
        if indices.ndim != 3:
            raise UserError(
                f"indices have shape {tuple(indices.shape)}: a grid (B, h, w) can be decoded."
            )
        check_range(indices, self.config.codebook_size, "indices")
        return self.decode_latents(self.quantizer.lookup(indices))

    def decode_latents(self, latents):
        """Render latents (B, code_dim, h, w): (B, 3, H, W). Raises UserError for images that are
        not finite.
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
        """Encode, quantise and decode once; returns a Tokenized."""
        quantized = self.quantizer(self.latents(images))
        return Tokenized(self.decode_latents(quantized.latents), quantized)


@torch.no_grad()
def initialise_from_data(tokenizer, images, seed=0):
    """Start a tokenizer with `linear_skip` at the best linear one: PCA encoder, codebook of the
    patches, least-squares decoder.

    A latent is a patch's first principal components p and, where codes are compared by distance, a
    constant 1: on VQ's unit sphere the angle then grows with |p|, so brightness and contrast
    survive the normalisation. Both networks start at zero.
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
    mean, constants = patches.mean(0), quantizer.constants
    # float64: the start must not depend on how memory was aligned
    spread = torch.cov((patches - mean).T.double())
    # (D - 1 or D, 3 f f)
    basis = torch.linalg.eigh(spread).eigenvectors.flip(1).T[: d - constants].float()
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
    has_convs = isinstance(tokenizer.quant_conv, nn.Conv2d)
    last_of_encoder = tokenizer.quant_conv if has_convs else tokenizer.encoder.conv_out
    for last in (last_of_encoder, tokenizer.decoder.conv_out):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


@torch.no_grad()
def reconstruct(tokenizer, images):
    """Encode and decode images (N, 3, H, W), a few at a time: reconstructions (N, 3, H, W) and
    indices (N, h, w).

    The tokenizer's device computes; what is returned lies where the images do.
    """
    device, pixels = next(tokenizer.parameters()).device, images.shape[-2] * images.shape[-1]
    decoded, indices = [], []
    for x in images.split(images_at_once(device, pixels)):
        indices.append(tokenizer.encode(x.to(device)))
        decoded.append(tokenizer.decode(indices[-1]).to(images.device))
    return torch.cat(decoded), torch.cat(indices).to(images.device)


def images_at_once(device, pixels):
    """Return how many images of so many pixels a tokenizer encodes or decodes at once: 8 on a CPU,
    32 of 256 px on a GPU.
    """
    return max(1, 2**21 // pixels) if device.type == "cuda" else 8
