"""Convolutional encoder and decoder, images <-> latents (the VQGAN family; defaults are LlamaGen's VQ-16)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TokenizerConfig:
    codebook_size: int = 16_384  # K
    code_dim: int = 8  # width of a code
    channels: int = 128  # of the first level
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # a level each; every level but the last halves the resolution
    latent_channels: int = 256  # between autoencoder and quantizer
    res_blocks: int = 2  # a level in the encoder; the decoder has one more
    linear_skip: bool = False  # add one linear map from patch to latent and one back, past both networks
    init_from_data: bool = False  # PCA encoder, k-means codebook, least-squares decoder on the linear skip

    @property
    def downsampling(self):
        """Pixels a token covers along each side."""
        return 2 ** (len(self.channel_mult) - 1)


def group_norm(channels):
    """GroupNorm with the public networks' 32 groups; narrow networks keep at least four channels a group."""
    return nn.GroupNorm(min(32, max(1, channels // 4)), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Residual block: (norm, swish, 3x3 conv) twice, 1x1 conv on the shortcut where the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

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
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the public networks pad right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _level(c_in, c_out, blocks, attention):
    """`blocks` residual blocks, each followed by attention on the coarsest level."""
    layers = []
    for i in range(blocks):
        layers.append(ResBlock(c_in if i == 0 else c_out, c_out))
        if attention:
            layers.append(SpatialAttention(c_out))
    return layers


def _middle(channels):
    return [ResBlock(channels, channels), SpatialAttention(channels), ResBlock(channels, channels)]


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, latent_channels, H/f, W/f)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        layers = [nn.Conv2d(3, config.channels, 3, padding=1)]
        for i, (c_in, c_out) in enumerate(zip([config.channels, *widths], widths)):
            last = i == len(widths) - 1
            layers += _level(c_in, c_out, config.res_blocks, attention=last)
            layers += [] if last else [Downsample(c_out)]
        layers += _middle(widths[-1])
        self.layers = nn.Sequential(*layers)
        self.norm, self.out = group_norm(widths[-1]), nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images):
        return self.out(F.silu(self.norm(self.layers(images))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> images (B, 3, f h, f w)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_mult)]  # coarsest first
        layers = [nn.Conv2d(config.latent_channels, widths[0], 3, padding=1), *_middle(widths[0])]
        for i, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths)):
            layers += _level(c_in, c_out, config.res_blocks + 1, attention=i == 0)
            layers += [] if i == len(widths) - 1 else [Upsample(c_out)]
        self.layers = nn.Sequential(*layers)
        self.norm, self.out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents):
        return self.out(F.silu(self.norm(self.layers(latents))))
