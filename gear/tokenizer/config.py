"""What a tokenizer is: its quantizer, backbone and sizes; the public ones by name."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from gear.config import MOST, Checked, Count, Range, Whole, from_dict, require


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
