"""The public layouts of tokenizers: LlamaGen's VQ, Open-MAGVIT2's LFQ, IBQ."""

import re
from dataclasses import dataclass

from gear.public.layout import Layout, told
from gear.tokenizer.autoencoder import SpatialAttention
from gear.tokenizer.config import TOKENIZERS, TokenizerConfig
from gear.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class TokenizerNames:
    """How a public autoencoder calls what ours has; level numbers count from the finest where
    `finest_first`.
    """

    encoder: str
    decoder: str
    res: str
    middle: tuple
    down: str
    up: str
    finest_first: bool


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


# where a file tells its channels, its latent's and its code's width
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


def _tokenizer_public(names):
    def public(tokenizer):
        prefixes = dict(_tokenizer_prefixes(tokenizer, names))
        leaves = {"shortcut": "nin_shortcut", "out": "proj_out"}
        found = {}
        for name in tokenizer.state_dict():
            prefix = next((p for p in prefixes if name.startswith(p + ".")), None)
            if prefix is None:  # quant_conv and post_quant_conv are called so everywhere
                found[name] = {"quantizer.codebook": "quantize.embedding.weight"}.get(name, name)
                continue
            parts = name[len(prefix) + 1 :].split(".")
            found[name] = ".".join([prefixes[prefix], *(leaves.get(part, part) for part in parts)])
        return found

    return public


def _tokenizer_prefixes(tokenizer, names):
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
                    last, attentions = f"attn.{attentions}", attentions + 1
                elif hasattr(layer, "norm1"):
                    last, blocks = f"{names.res}.{blocks}", blocks + 1
                else:  # the convolution of a Downsample or an Upsample
                    last = names.down if side == "encoder" else names.up
                    yield f"{side}.levels.{i}.{j}.conv", f"{side}.{levels}.{number}.{last}"
                    continue
                yield f"{side}.levels.{i}.{j}", f"{side}.{levels}.{number}.{last}"
    for i in range(len(tokenizer.decoder.adaptive)):
        number = len(tokenizer.decoder.adaptive) - 1 - i
        yield f"decoder.adaptive.{i}.scale", f"decoder.adaptive.{number}.gamma"
        yield f"decoder.adaptive.{i}.bias", f"decoder.adaptive.{number}.beta"


def _tokenizer_size(names, quantizer, backbone):
    def read(shapes):
        level = rf"encoder\.{names.encoder}\.(\d+)\.{names.res}\.(\d+)\.(norm2|conv2)\.weight"
        found = {
            name: (int(m[1]), int(m[2])) for name in shapes if (m := re.fullmatch(level, name))
        }
        first = f"encoder.{names.encoder}.{{}}.{names.res}.0"
        if not found:
            raise LookupError(f"{first.format(0)}.conv2.weight")
        depth, blocks = (1 + max(numbers) for numbers in zip(*found.values()))
        of_level = [[(name, 0) for name, (at, _) in found.items() if at == i] for i in range(depth)]
        widths = [
            told(shapes, *places, (f"{first.format(i)}.conv2.weight", 0))
            for i, places in enumerate(of_level)
        ]
        channels = told(shapes, *CHANNELS, (f"{first.format(0)}.norm1.weight", 0))
        latent = told(shapes, *LATENT)
        if quantizer == "lfq":
            codes = 2**latent, latent
        else:
            codes = told(shapes, ("quantize.embedding.weight", 0)), told(shapes, *CODE)
        mult = tuple(width // channels for width in widths)
        return TokenizerConfig(
            quantizer,
            backbone,
            *codes,
            channels,
            mult,
            256 if quantizer == "lfq" else latent,
            blocks,
        )

    return read


def _tokenizer_layout(name, marker, names, quantizer, backbone, sizes, optional="$^"):
    return Layout(
        name,
        "tokenizer",
        marker,
        _tokenizer_size(names, quantizer, backbone),
        tuple(TOKENIZERS[s] for s in sizes),
        Tokenizer,
        _tokenizer_public(names),
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
