"""The public layouts of tokenizers: LlamaGen's VQ, Open-MAGVIT2's LFQ, IBQ."""

import re
from dataclasses import dataclass

from gear.public.layout import Layout, agreed_size
from gear.tokenizer.autoencoder import SpatialAttention
from gear.tokenizer.config import TOKENIZERS, TokenizerConfig
from gear.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class TokenizerNames:
    """The names in a public autoencoder of the layers that ours has."""

    encoder: str  # list of the encoder's levels
    decoder: str  # list of the decoder's levels
    res: str  # list of a level's residual blocks
    middle: tuple  # layers of the middle, in order
    down: str  # convolution that halves the resolution
    up: str  # convolution that doubles the resolution
    finest_first: bool  # whether the decoder's levels are numbered from the finest one


VQ_NAMES = TokenizerNames(
    "conv_blocks",
    "conv_blocks",
    "res",
    ("mid.0", "mid.1", "mid.2"),
    "downsample.conv",
    "upsample.conv",
    False,
)
IBQ_NAMES = TokenizerNames(
    "down",
    "up",
    "block",
    ("mid.block_1", "mid.attn_1", "mid.block_2"),
    "downsample.conv",
    "upsample.conv",
    True,
)
LFQ_NAMES = TokenizerNames(
    "down",
    "up",
    "block",
    tuple(f"mid_block.{i}" for i in range(9)),
    "downsample",
    "upsample.conv1",
    True,
)

# the tensors, and their axes, from which a file's sizes are read: `channels`, the width between
# autoencoder and quantizer, and `code_dim`
CHANNELS = (
    ("encoder.conv_in.weight", 0),
    ("decoder.norm_out.weight", 0),
    ("decoder.conv_out.weight", 1),
)
LATENT = (
    ("encoder.conv_out.weight", 0),
    ("encoder.conv_out.bias", 0),
    ("decoder.conv_in.weight", 1),
    ("quant_conv.weight", 1),
    ("post_quant_conv.bias", 0),
    ("post_quant_conv.weight", 0),
)
CODE = (
    ("quantize.embedding.weight", 1),
    ("quant_conv.weight", 0),
    ("quant_conv.bias", 0),
    ("post_quant_conv.weight", 1),
)


def _public_names(names):
    """Return a function from a Tokenizer to {our name: public name}, for a TokenizerNames."""
    layer_names = {"shortcut": "nin_shortcut", "out": "proj_out"}
    outer_names = {"quantizer.codebook": "quantize.embedding.weight"}

    def public(tokenizer):
        prefixes = dict(_layer_prefixes(tokenizer, names))
        public_names = {}
        for name in tokenizer.state_dict():
            prefix = next((p for p in prefixes if name.startswith(p + ".")), None)
            if prefix is None:  # quant_conv and post_quant_conv have the same name everywhere
                public_names[name] = outer_names.get(name, name)
                continue
            parts = [layer_names.get(part, part) for part in name[len(prefix) + 1 :].split(".")]
            public_names[name] = ".".join([prefixes[prefix], *parts])
        return public_names

    return public


def _layer_prefixes(tokenizer, names):
    """Yield (our prefix, public prefix) of every layer."""
    for side, levels in (("encoder", names.encoder), ("decoder", names.decoder)):
        network = getattr(tokenizer, side)
        yield from (
            (f"{side}.middle.{i}", f"{side}.{names.middle[i]}") for i in range(len(network.middle))
        )
        count = len(network.levels)
        for i, level in enumerate(network.levels):
            number = count - 1 - i if names.finest_first and side == "decoder" else i
            blocks = attentions = 0
            for j, layer in enumerate(level):
                if isinstance(layer, SpatialAttention):
                    layer_name = f"attn.{attentions}"
                    attentions += 1
                elif hasattr(layer, "norm1"):
                    layer_name = f"{names.res}.{blocks}"
                    blocks += 1
                else:  # the convolution of a Downsample or an Upsample
                    layer_name = names.down if side == "encoder" else names.up
                    yield f"{side}.levels.{i}.{j}.conv", f"{side}.{levels}.{number}.{layer_name}"
                    continue
                yield f"{side}.levels.{i}.{j}", f"{side}.{levels}.{number}.{layer_name}"
    for i in range(len(tokenizer.decoder.adaptive)):
        number = len(tokenizer.decoder.adaptive) - 1 - i
        yield f"decoder.adaptive.{i}.scale", f"decoder.adaptive.{number}.gamma"
        yield f"decoder.adaptive.{i}.bias", f"decoder.adaptive.{number}.beta"


def _size_reader(names, quantizer, backbone):
    """Return a function from {public name: shape} to a TokenizerConfig, for a TokenizerNames."""

    def read(shapes):
        pattern = rf"encoder\.{names.encoder}\.(\d+)\.{names.res}\.(\d+)\.(norm2|conv2)\.weight"
        numbers = {  # {name: (level, residual block)}
            name: (int(m[1]), int(m[2])) for name in shapes if (m := re.fullmatch(pattern, name))
        }
        first_block = f"encoder.{names.encoder}.{{}}.{names.res}.0"
        if not numbers:
            raise LookupError(f"{first_block.format(0)}.conv2.weight")
        num_levels, num_blocks = (1 + max(column) for column in zip(*numbers.values()))
        axes = [
            [(name, 0) for name, (level, _) in numbers.items() if level == i]
            for i in range(num_levels)
        ]
        widths = [
            agreed_size(shapes, *level_axes, (f"{first_block.format(i)}.conv2.weight", 0))
            for i, level_axes in enumerate(axes)
        ]
        channels = agreed_size(shapes, *CHANNELS, (f"{first_block.format(0)}.norm1.weight", 0))
        latent_channels = agreed_size(shapes, *LATENT)
        if quantizer == "lfq":  # the encoder ends in the code
            code_dim = latent_channels
            codebook_size = 2**code_dim
            latent_channels = 256  # the default; LFQ does not use it
        else:
            codebook_size = agreed_size(shapes, ("quantize.embedding.weight", 0))
            code_dim = agreed_size(shapes, *CODE)
        return TokenizerConfig(
            quantizer,
            backbone,
            codebook_size,
            code_dim,
            channels,
            tuple(width // channels for width in widths),
            latent_channels,
            num_blocks,
        )

    return read


def _tokenizer_layout(name, marker, names, quantizer, backbone, sizes, optional="$^"):
    return Layout(
        name,
        "tokenizer",
        marker,
        _size_reader(names, quantizer, backbone),
        tuple(TOKENIZERS[s] for s in sizes),
        Tokenizer,
        _public_names(names),
        optional,
    )


TOKENIZER_LAYOUTS = (
    _tokenizer_layout(
        "LlamaGen VQ",
        r"encoder\.conv_blocks\.",
        VQ_NAMES,
        "vq",
        "vqgan",
        ["VQ-16", "VQ-8"],
        r"^quantize\.codebook_used$",
    ),
    _tokenizer_layout(
        "Open-MAGVIT2 LFQ", r"decoder\.adaptive\.", LFQ_NAMES, "lfq", "magvit2", ["LFQ-16"]
    ),
    _tokenizer_layout("IBQ", r"encoder\.mid\.block_1\.", IBQ_NAMES, "ibq", "vqgan", ["IBQ-16"]),
)
