"""Convolutional encoder and decoder, images <-> latents: the VQGAN (LlamaGen, IBQ) and MAGVIT-2
(Open-MAGVIT2) backbones.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from gear.config import UserError
from gear.tokenizer.config import BACKBONES


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
