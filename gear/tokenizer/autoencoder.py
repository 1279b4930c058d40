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
    """GroupNorm that computes in the precision of its input.

    Its statistics are accumulated in float32 on every device. CUDA's autocast would convert the
    input to float32, which stores twice the bytes for the backward pass and changes the memory
    format.
    """

    def forward(self, x):
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            affine = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
            return F.group_norm(x, self.num_groups, *affine, self.eps)


def group_norm(channels, affine=True):
    """Build a GroupNorm with the 32 groups of the public networks.

    A narrow layer, or one whose width is not a multiple of 32, has fewer groups of at least four
    channels each, where the width allows it.
    """
    return GroupNorm(
        math.gcd(channels, min(32, max(1, channels // 4))), channels, eps=1e-6, affine=affine
    )


class ResBlock(nn.Module):
    """Residual block: (norm, swish, 3x3 convolution) twice, added to the input.

    The shortcut is a 1x1 convolution where the width changes.
    """

    def __init__(self, c_in, c_out, bias=True):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=bias) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, with scale C^-1/2."""

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
    """Halve the resolution with a 3x3 convolution of stride 2.

    VQGAN pads the right and bottom edges only, MAGVIT-2 pads all four.
    """

    def __init__(self, channels, padding):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.padding = padding

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double the resolution.

    VQGAN repeats every pixel and then convolves. MAGVIT-2 convolves to 4 C channels and
    rearranges them into 2x2 blocks of pixels (`deals_out`).
    """

    def __init__(self, channels, deals_out):
        super().__init__()
        self.deals_out = deals_out
        self.conv = nn.Conv2d(channels, 4 * channels if deals_out else channels, 3, padding=1)

    def forward(self, x):
        if not self.deals_out:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        b, c, h, w = x.shape
        # F.pixel_shuffle does not fit: here the position in the 2x2 block is the slow index of the
        # 4 C channels, there it is the fast one
        blocks = self.conv(x).view(b, 2, 2, c, h, w)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(b, c, 2 * h, 2 * w)


class AdaptiveNorm(nn.Module):
    """GroupNorm whose scale and bias depend on the quantised latent (MAGVIT-2).

    The scale is linear in the standard deviation of each latent channel over the image, the bias
    in its mean. Raises UserError for a latent of one token, whose deviation is undefined.
    """

    def __init__(self, channels, code_dim):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.scale = nn.Linear(code_dim, channels)
        self.bias = nn.Linear(code_dim, channels)

    def forward(self, x, latents):
        rows = latents.flatten(2)  # (B, D, L)
        if rows.shape[-1] < 2:
            raise UserError(
                "this decoder needs the standard deviation over an image's tokens, and one token "
                "has none: use a larger image, with at least two tokens."
            )
        scale = self.scale((rows.var(-1) + 1e-6).sqrt())
        bias = self.bias(rows.mean(-1))
        return scale[..., None, None] * self.norm(x) + bias[..., None, None]


def _level(backbone, c_in, c_out, blocks, attention):
    """Return the layers of one level: `blocks` residual blocks, each followed by a SpatialAttention
    if `attention` is true.
    """
    layers = []
    for i in range(blocks):
        layers.append(ResBlock(c_in if i == 0 else c_out, c_out, bias=backbone.bias))
        if attention:
            layers.append(SpatialAttention(c_out))
    return layers


def _middle(config, channels):
    """Build the layers between the encoder's or the decoder's levels and its latents."""
    backbone = BACKBONES[config.backbone]
    if backbone.attention:
        return nn.Sequential(
            ResBlock(channels, channels), SpatialAttention(channels), ResBlock(channels, channels)
        )
    return nn.Sequential(*_level(backbone, channels, channels, config.res_blocks, attention=False))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, autoencoder_channels, H/f, W/f); f is `downsampling`."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        backbone = BACKBONES[config.backbone]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=backbone.bias)
        self.levels = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.channels, *widths], widths)):
            is_coarsest = i == len(widths) - 1
            attention = is_coarsest and backbone.attention
            layers = _level(backbone, c_in, c_out, config.res_blocks, attention)
            if not is_coarsest:
                layers.append(Downsample(c_out, backbone.padding))
            self.levels.append(nn.Sequential(*layers))
        self.middle = _middle(config, widths[-1])
        self.norm_out = group_norm(widths[-1])
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
        self.middle = _middle(config, widths[0])
        self.levels = nn.ModuleList()
        self.adaptive = nn.ModuleList()  # one norm before each level; empty except for MAGVIT-2
        for i, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths)):
            layers = _level(backbone, c_in, c_out, blocks, i == 0 and backbone.attention)
            is_finest = i == len(widths) - 1
            if not is_finest:
                layers.append(Upsample(c_out, backbone.deals_out))
            self.levels.append(nn.Sequential(*layers))
            if backbone.adapts:
                self.adaptive.append(AdaptiveNorm(c_in, config.code_dim))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents):
        x = self.middle(self.conv_in(latents))
        for i, level in enumerate(self.levels):
            x = level(self.adaptive[i](x, latents) if self.adaptive else x)
        return self.conv_out(F.silu(self.norm_out(x)))
