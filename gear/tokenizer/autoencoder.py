"""Convolutional encoder and decoder, images <-> latents: the VQGAN (LlamaGen, IBQ) and MAGVIT-2
(Open-MAGVIT2) backbones.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from gear.config import MOST, Checked, Count, Range, UserError, Whole, from_dict, require


@dataclass(frozen=True)
class TokenizerConfig(Checked):
    """The defaults are LlamaGen's VQ-16; see `TOKENIZERS` for the other public ones."""

    quantizer: Literal["vq", "lfq", "ibq"] = "vq"
    backbone: Literal["vqgan", "magvit2"] = "vqgan"
    codebook_size: Annotated[int, Range(2, MOST)] = 16_384  # K
    code_dim: Count = 8  # width of a code
    channels: Count = 128  # of the first level
    # a level each; every level but the last halves the resolution
    channel_mult: tuple[Count, ...] = (1, 1, 2, 2, 4)
    # between autoencoder and quantizer; MAGVIT-2's autoencoder ends in the code itself
    latent_channels: Count = 256
    res_blocks: Whole = 2  # a level in the encoder; VQGAN's decoder has one more
    # add one linear map from patch to latent and one back, past both networks
    linear_skip: bool = False
    # PCA encoder, codebook of the patches, least-squares decoder on the linear skip
    init_from_data: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self.channel_mult, "channel_mult is empty: one level at least is needed.")
        require(
            self.res_blocks or set(self.channel_mult) == {1},
            "res_blocks is 0: then channel_mult has to be ones, too.",
        )
        if self.quantizer == "lfq":
            codes = (
                f"LFQ has a code for every sign of {self.code_dim} bits (code_dim): "
                f"2**{self.code_dim}"
            )
            require(
                math.log2(self.codebook_size) == self.code_dim,
                f"{codes}, not {self.codebook_size}.",
            )
        if self.init_from_data:
            require(self.linear_skip, "init_from_data starts the linear skip: set linear_skip too.")
            # there is a constant beside a patch's principal components
            least = 1 if self.quantizer == "lfq" else 2
            fits = (
                f"init_from_data fills {least} to {3 * self.downsampling**2 + least - 1} channels "
                "of a code from a patch"
            )
            require(
                least <= self.code_dim < 3 * self.downsampling**2 + least,
                f"code_dim is {self.code_dim}: {fits}.",
            )

    @property
    def downsampling(self):
        """Pixels a token covers along each side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def autoencoder_channels(self):
        """Channels in which the encoder ends and the decoder begins."""
        return self.latent_channels if BACKBONES[self.backbone].own_width else self.code_dim


TOKENIZERS = {
    "VQ-16": TokenizerConfig(),
    "VQ-8": TokenizerConfig(channel_mult=(1, 2, 2, 4)),
    "LFQ-16": TokenizerConfig("lfq", "magvit2", code_dim=14, res_blocks=4),
    "IBQ-16": TokenizerConfig("ibq", code_dim=256, res_blocks=4),
}


def token_grid(config):
    """Return the token grid (h, w) of a run's configuration, a dict."""
    tokenizer = from_dict(TokenizerConfig, config["tokenizer"])
    return (config["data"]["image_size"] // tokenizer.downsampling,) * 2


@dataclass(frozen=True)
class Backbone:
    """In what the two public backbones differ."""

    # on the coarsest level, and in the middle between two residual blocks; else as many as in a
    # level
    attention: bool
    decoder_blocks: int  # residual blocks that a level of the decoder has beyond one of the encoder
    bias: bool  # in the convolutions of residual blocks and in the encoder's first
    encoder_kernel: int  # of the encoder's last convolution
    # of a convolution that halves the resolution: left, right, top, bottom
    padding: tuple[int, int, int, int]
    # the resolution is doubled by four times the channels, dealt out, not by repeating pixels
    deals_out: bool
    adapts: bool  # a level of the decoder is normalised by the latent's statistics
    # the autoencoder ends in `latent_channels`, two 1x1 convolutions from the code; else in the
    # code
    own_width: bool


BACKBONES = {
    "vqgan": Backbone(
        True, 1, True, 3, (0, 1, 0, 1), deals_out=False, adapts=False, own_width=True
    ),
    "magvit2": Backbone(
        False, 0, False, 1, (1, 1, 1, 1), deals_out=True, adapts=True, own_width=False
    ),
}


class GroupNorm(nn.GroupNorm):
    """GroupNorm in its input's own precision; its statistics are float32 anyway, on a CPU and on a
    GPU.

    CUDA's autocast would take it to float32, which keeps twice the bytes for the gradient, and in
    another memory format.
    """

    def forward(self, x):
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            affine = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
            return F.group_norm(x, self.num_groups, *affine, self.eps)


def group_norm(channels, affine=True):
    """GroupNorm with the public networks' 32 groups; narrow and odd ones have fewer, of at least
    four channels each.
    """
    return GroupNorm(
        math.gcd(channels, min(32, max(1, channels // 4))), channels, eps=1e-6, affine=affine
    )


class ResBlock(nn.Module):
    """Residual block: (norm, swish, 3x3 conv) twice, 1x1 conv on the shortcut where the width
    changes.
    """

    def __init__(self, c_in, c_out, bias=True):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=bias) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, scale C^-1/2."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, L, C)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.out(h)


class Downsample(nn.Module):
    """Halve the resolution by a 3x3 convolution; VQGAN pads right and bottom only, MAGVIT-2 all
    round.
    """

    def __init__(self, channels, padding):
        super().__init__()
        self.conv, self.padding = nn.Conv2d(channels, channels, 3, stride=2), padding

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double the resolution: VQGAN repeats pixels and convolves, MAGVIT-2 convolves to 4 C and
    deals the channels out.
    """

    def __init__(self, channels, deals_out):
        super().__init__()
        self.deals_out = deals_out
        self.conv = nn.Conv2d(channels, 4 * channels if deals_out else channels, 3, padding=1)

    def forward(self, x):
        if not self.deals_out:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        b, c, h, w = x.shape
        # the place in a 2x2 block is the slow index, unlike pixel_shuffle's
        blocks = self.conv(x).view(b, 2, 2, c, h, w)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(b, c, 2 * h, 2 * w)


class AdaptiveNorm(nn.Module):
    """GroupNorm whose scale and bias are linear in the spread and the mean of the quantised
    latent's channels (MAGVIT-2).
    """

    def __init__(self, channels, code_dim):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.scale, self.bias = nn.Linear(code_dim, channels), nn.Linear(code_dim, channels)

    def forward(self, x, latents):
        rows = latents.flatten(2)  # (B, D, L)
        if rows.shape[-1] < 2:
            raise UserError(
                "one token has no spread, which this decoder follows: use a larger image, of two "
                "tokens at least."
            )
        scale, bias = self.scale((rows.var(-1) + 1e-6).sqrt()), self.bias(rows.mean(-1))
        return scale[..., None, None] * self.norm(x) + bias[..., None, None]


def _level(backbone, c_in, c_out, blocks, attention):
    """`blocks` residual blocks, each followed by attention where that is asked for: on the coarsest
    level.
    """
    layers = []
    for i in range(blocks):
        layers.append(ResBlock(c_in if i == 0 else c_out, c_out, bias=backbone.bias))
        if attention:
            layers.append(SpatialAttention(c_out))
    return layers


def _middle(config, channels):
    backbone = BACKBONES[config.backbone]
    if backbone.attention:
        return nn.Sequential(
            ResBlock(channels, channels), SpatialAttention(channels), ResBlock(channels, channels)
        )
    return nn.Sequential(*_level(backbone, channels, channels, config.res_blocks, attention=False))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, autoencoder_channels, H/f, W/f)."""

    def __init__(self, config):
        super().__init__()
        widths, backbone = (
            [config.channels * m for m in config.channel_mult],
            BACKBONES[config.backbone],
        )
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=backbone.bias)
        self.levels = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.channels, *widths], widths)):
            last = i == len(widths) - 1
            layers = _level(backbone, c_in, c_out, config.res_blocks, last and backbone.attention)
            self.levels.append(
                nn.Sequential(*layers, *([] if last else [Downsample(c_out, backbone.padding)]))
            )
        self.middle, self.norm_out = _middle(config, widths[-1]), group_norm(widths[-1])
        kernel = backbone.encoder_kernel
        self.conv_out = nn.Conv2d(
            widths[-1], config.autoencoder_channels, kernel, padding=kernel // 2
        )

    def forward(self, images):
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latents (B, autoencoder_channels, h, w) -> images (B, 3, f h, f w)."""

    def __init__(self, config):
        super().__init__()
        backbone = BACKBONES[config.backbone]
        widths = [config.channels * m for m in reversed(config.channel_mult)]  # coarsest first
        blocks = config.res_blocks + backbone.decoder_blocks
        self.conv_in = nn.Conv2d(config.autoencoder_channels, widths[0], 3, padding=1)
        self.middle, self.levels = _middle(config, widths[0]), nn.ModuleList()
        self.adaptive = nn.ModuleList()  # a norm before each level, MAGVIT-2's only
        for i, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths)):
            layers = _level(backbone, c_in, c_out, blocks, i == 0 and backbone.attention)
            last = i == len(widths) - 1
            self.levels.append(
                nn.Sequential(*layers, *([] if last else [Upsample(c_out, backbone.deals_out)]))
            )
            self.adaptive.extend([AdaptiveNorm(c_in, config.code_dim)] if backbone.adapts else [])
        self.norm_out, self.conv_out = (
            group_norm(widths[-1]),
            nn.Conv2d(widths[-1], 3, 3, padding=1),
        )

    def forward(self, latents):
        x = self.middle(self.conv_in(latents))
        for i, level in enumerate(self.levels):
            x = level(self.adaptive[i](x, latents) if self.adaptive else x)
        return self.conv_out(F.silu(self.norm_out(x)))
