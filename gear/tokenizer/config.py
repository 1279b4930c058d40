"""Configuration of a tokenizer: its quantizer, backbone and sizes, and the public ones by name."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from gear.config import MOST, Checked, Count, Range, Whole, from_dict, require


@dataclass(frozen=True)
class Backbone:
    """The properties in which the two public backbones differ."""

    # attention on the coarsest level, and a middle of (residual block, attention, residual block);
    # without it the middle has `res_blocks` residual blocks, as a level has
    attention: bool
    decoder_blocks: int  # extra residual blocks in each level of the decoder
    bias: bool  # in the convolutions of residual blocks and in the encoder's first convolution
    encoder_kernel: int  # kernel size of the encoder's last convolution
    # padding of a convolution that halves the resolution: left, right, top, bottom
    padding: tuple[int, int, int, int]
    # the resolution is doubled by rearranging 4 C channels instead of repeating pixels
    deals_out: bool
    adapts: bool  # an AdaptiveNorm stands before each level of the decoder
    # the encoder ends and the decoder begins in `latent_channels`, and two 1x1 convolutions lead
    # to the code and back; otherwise both meet the code directly
    has_quant_conv: bool


BACKBONES = {
    "vqgan": Backbone(
        True, 1, True, 3, (0, 1, 0, 1), deals_out=False, adapts=False, has_quant_conv=True
    ),
    "magvit2": Backbone(
        False, 0, False, 1, (1, 1, 1, 1), deals_out=True, adapts=True, has_quant_conv=False
    ),
}


@dataclass(frozen=True)
class TokenizerConfig(Checked):
    """Configuration of a Tokenizer.

    The defaults are LlamaGen's VQ-16; `TOKENIZERS` has the other public ones.
    """

    quantizer: Literal["vq", "lfq", "ibq"] = "vq"
    backbone: Literal["vqgan", "magvit2"] = "vqgan"
    codebook_size: Annotated[int, Range(2, MOST)] = 16_384  # number of codes, K
    code_dim: Count = 8  # width of a code
    channels: Count = 128  # base width; a level has this times its channel_mult
    # width of each level in units of `channels`; every level but the last halves the resolution
    channel_mult: tuple[Count, ...] = (1, 1, 2, 2, 4)
    # width between the autoencoder and the quantizer; unused with magvit2, whose width is code_dim
    latent_channels: Count = 256
    res_blocks: Whole = 2  # residual blocks per level of the encoder; VQGAN's decoder has one more
    # add a linear map from patches to latents, and one back, in parallel to encoder and decoder
    linear_skip: bool = False
    # start the linear skip from data: PCA encoder, k-means codebook, least-squares decoder
    init_from_data: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self.channel_mult, "channel_mult is empty: at least one level is needed.")
        require(
            self.res_blocks or set(self.channel_mult) == {1},
            "res_blocks is 0: every value of channel_mult has to be 1 then, because only a "
            "residual block changes the width.",
        )
        if self.quantizer == "lfq":
            require(
                math.log2(self.codebook_size) == self.code_dim,
                f"LFQ has one code for every pattern of {self.code_dim} signs (code_dim): "
                f"codebook_size has to be 2**{self.code_dim}, not {self.codebook_size}.",
            )
        if self.init_from_data:
            require(self.linear_skip, "init_from_data starts the linear skip: set linear_skip too.")
            # VQ and IBQ need one channel for a constant beside a patch's principal components
            smallest = 1 if self.quantizer == "lfq" else 2
            largest = 3 * self.downsampling**2 + smallest - 1
            require(
                smallest <= self.code_dim <= largest,
                f"code_dim is {self.code_dim}: init_from_data needs {smallest} to {largest} "
                "channels, because it fills them with principal components of a patch.",
            )

    @property
    def downsampling(self):
        """Number of pixels that one token covers along each side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def autoencoder_channels(self):
        """Number of channels in which the encoder ends and the decoder begins."""
        return self.latent_channels if BACKBONES[self.backbone].has_quant_conv else self.code_dim


TOKENIZERS = {
    "VQ-16": TokenizerConfig(),
    "VQ-8": TokenizerConfig(channel_mult=(1, 2, 2, 4)),
    "LFQ-16": TokenizerConfig("lfq", "magvit2", code_dim=14, res_blocks=4),
    "IBQ-16": TokenizerConfig("ibq", code_dim=256, res_blocks=4),
}


def token_grid(config):
    """Return the token grid (h, w) of a run, given its configuration as a dict."""
    tokenizer = from_dict(TokenizerConfig, config["tokenizer"])
    return (config["data"]["image_size"] // tokenizer.downsampling,) * 2
