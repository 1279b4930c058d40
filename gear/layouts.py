"""The layouts of the public checkpoints: how each names our tensors, and which configuration its shapes speak of.

Three tokenizers (LlamaGen's VQ, Open-MAGVIT2's LFQ, IBQ), one generator (LlamaGen, and GEAR's text-to-image hybrid), the
projectors and the discriminator. A layout is recognised by its names; loading is strict in shape and name.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from gear.config import UserError
from gear.generator.model import GENERATORS, Generator, GeneratorConfig, Projector
from gear.tokenizer.autoencoder import TOKENIZERS, SpatialAttention, TokenizerConfig
from gear.tokenizer.discriminator import Discriminator
from gear.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class Layout:
    """One public layout of one network."""

    name: str
    kind: str  # "tokenizer", "generator", "projector" or "discriminator"
    marker: str  # pattern of a name that no other layout has
    read: Callable  # {public name: shape} -> size: what `build` takes
    sizes: tuple  # the released ones, for a file whose own shapes contradict each other
    build: Callable  # size -> our module
    public: Callable  # (module) -> {our name: public name}
    optional: str = "$^"  # pattern of public names that may be absent, or have no place in our module

    def names(self, size):
        """Return ({our name: public name}, {public name: shape}) of a network of that size."""
        with torch.device("meta"):
            module = self.build(size)
        names = self.public(module)
        return names, {names[n]: tuple(t.shape) for n, t in module.state_dict().items()}

    def fit(self, shapes, source):
        """Return (size, {our name: public name}) for {public name: shape}; raises UserError listing what does not fit."""
        needed, best = {n: s for n, s in shapes.items() if not re.search(self.optional, n)}, None
        for size, names, expected in self._candidates(needed):
            expected = {n: s for n, s in expected.items() if not re.search(self.optional, n)}
            faults = mismatches(expected, needed)
            if not faults:
                return size, names
            best = min(best or faults, faults, key=len)
        raise UserError(listed(f"'{source}' has the layout {self.name}, but does not fit it", best or ["it has no tensor"]))

    def _candidates(self, shapes):
        """The size the shapes speak of, then the released ones: one wrong tensor is then named, not its neighbours."""
        with contextlib.suppress(ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):  # missing, or senseless
            size = self.read(shapes)
            yield size, *self.names(size)
        for size in self.sizes:
            yield size, *self.names(size)


def mismatches(expected, found):
    """List what is missing, unexpected or of another shape; both are {name: shape}."""
    faults = [f"missing {n} {expected[n]}" for n in expected if n not in found]
    faults += [f"unexpected {n} {found[n]}" for n in found if n not in expected]
    return faults + [f"{n} has shape {found[n]}, expected {s}" for n, s in expected.items() if n in found and found[n] != s]


def listed(what, faults):
    """Phrase a list of faults, twelve at most."""
    rest = f"\n  and {len(faults) - 12} more" if len(faults) > 12 else ""
    return f"{what}:\n  " + "\n  ".join(faults[:12]) + rest


# -- tokenizers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerNames:
    """How a public autoencoder calls what ours has; level numbers count from the finest where `finest_first`."""

    encoder: str
    decoder: str
    res: str
    middle: tuple
    down: str
    up: str
    finest_first: bool


VQ_NAMES = TokenizerNames(
    "conv_blocks", "conv_blocks", "res", ("mid.0", "mid.1", "mid.2"), "downsample.conv", "upsample.conv", False
)
IBQ_NAMES = TokenizerNames(
    "down", "up", "block", ("mid.block_1", "mid.attn_1", "mid.block_2"), "downsample.conv", "upsample.conv", True
)
LFQ_NAMES = TokenizerNames(
    "down", "up", "block", tuple(f"mid_block.{i}" for i in range(9)), "downsample", "upsample.conv1", True
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
        yield from ((f"{side}.middle.{i}", f"{side}.{names.middle[i]}") for i in range(len(network.middle)))
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
                    yield (
                        f"{side}.levels.{i}.{j}.conv",
                        f"{side}.{levels}.{number}.{names.down if side == 'encoder' else names.up}",
                    )
                    continue
                yield f"{side}.levels.{i}.{j}", f"{side}.{levels}.{number}.{last}"
    for i in range(len(tokenizer.decoder.adaptive)):
        number = len(tokenizer.decoder.adaptive) - 1 - i
        yield f"decoder.adaptive.{i}.scale", f"decoder.adaptive.{number}.gamma"
        yield f"decoder.adaptive.{i}.bias", f"decoder.adaptive.{number}.beta"


def _tokenizer_size(names, quantizer, backbone):
    def read(shapes):
        level = rf"encoder\.{names.encoder}\.(\d+)\.{names.res}\.(\d+)\.conv2\.weight"
        widths, blocks = {}, set()
        for name, shape in shapes.items():
            if match := re.fullmatch(level, name):
                widths[int(match[1])] = shape[0]
                blocks.add(int(match[2]))
        channels, latent = shapes["encoder.conv_in.weight"][0], shapes["encoder.conv_out.bias"][0]
        codes = (2**latent, latent) if quantizer == "lfq" else shapes["quantize.embedding.weight"]
        mult = tuple(widths[i] // channels for i in range(len(widths)))
        return TokenizerConfig(
            quantizer, backbone, *codes, channels, mult, latent if quantizer != "lfq" else 256, max(blocks) + 1
        )

    return read


# -- generator, projectors, discriminator ----------------------------------------------------------------------------

GENERATOR_NAMES = (  # ours, public; applied in this order
    ("class_embedding.", "cls_embedding.embedding_table."),
    ("text_embedding.0.", "cls_embedding.cap_proj.fc1."),
    ("text_embedding.2.", "cls_embedding.cap_proj.fc2."),
    ("token_embedding.", "tok_embeddings."),
    ("blocks.", "layers."),
    (".attention.qkv", ".attention.wqkv"),
    (".attention.out", ".attention.wo"),
    (".ffn.", ".feed_forward."),
    ("head.", "output."),
)
HEADS = {(c.layers, c.width): c.heads for c in GENERATORS.values()}


def _generator_public(generator):
    found = {}
    for name in generator.state_dict():
        public = name
        for ours, theirs in GENERATOR_NAMES:
            public = public.replace(ours, theirs)
        found[name] = public
    return found


def _generator_size(shapes):
    """Return (GeneratorConfig, K). Conditions have a zero rotation in every public network."""
    codes, width = shapes["tok_embeddings.weight"]
    layers = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"layers\.(\d+)\.", name)))
    fields = dict(width=width, layers=layers, heads=HEADS.get((layers, width), width // 64), tap_layer=max(1, layers // 3))
    if "cls_embedding.cap_proj.fc1.weight" in shapes:
        dual = sum(name.endswith("attention.wqkv_text.weight") for name in shapes)
        text_dim = shapes["cls_embedding.cap_proj.fc1.weight"][1]
        fields |= dict(text_slots=GENERATORS["T2I-1B"].text_slots, text_dim=text_dim, dual_layers=dual)
    else:
        fields |= dict(num_classes=shapes["cls_embedding.embedding_table.weight"][0] - 1)
    return GeneratorConfig(**fields, condition_rotation="zero"), codes


def _projector_size(shapes):
    """Return [(width, hidden, teacher's width)], one a teacher."""
    bank = [[shapes[f"projs.{e}.{i}.weight"] for i in (0, 2, 4)] for e in range(sum(n.endswith(".0.bias") for n in shapes))]
    return tuple((first[1], first[0], last[0]) for first, _, last in bank)


def _projectors(size):
    return nn.ModuleList(Projector(GeneratorConfig(width=width, projector_dim=hidden), out) for width, hidden, out in size)


def _discriminator_size(shapes):
    return shapes["main.0.weight"][0], sum(name.endswith(".running_mean") for name in shapes)


def _tokenizer_layout(name, marker, names, quantizer, backbone, sizes, optional="$^"):
    return Layout(
        name, "tokenizer", marker, _tokenizer_size(names, quantizer, backbone), tuple(TOKENIZERS[s] for s in sizes), Tokenizer,
        _tokenizer_public(names), optional,
    )  # fmt: skip


LAYOUTS = (
    _tokenizer_layout(
        "LlamaGen VQ", r"encoder\.conv_blocks\.", VQ_NAMES, "vq", "vqgan", ["VQ-16", "VQ-8"], r"^quantize\.codebook_used$"
    ),
    _tokenizer_layout("Open-MAGVIT2 LFQ", r"decoder\.adaptive\.", LFQ_NAMES, "lfq", "magvit2", ["LFQ-16"]),
    _tokenizer_layout("IBQ", r"encoder\.mid\.block_1\.", IBQ_NAMES, "ibq", "vqgan", ["IBQ-16"]),
    Layout(
        "LlamaGen", "generator", r"^(tok_embeddings|layers\.\d+\.attention)\.", _generator_size,
        tuple((c.__class__(**c.__dict__ | {"condition_rotation": "zero"}), 16_384) for c in GENERATORS.values()),
        lambda size: Generator(*size), _generator_public,
    ),
    Layout(
        "projectors", "projector", r"^projs\.\d+\.", _projector_size, (), _projectors,
        lambda bank: {name: f"projs.{name.replace('.layers.', '.')}" for name in bank.state_dict()},
    ),
    Layout(
        "PatchGAN", "discriminator", r"^main\.\d+\.", _discriminator_size, ((64, 3),),
        lambda size: Discriminator(*size, norm="batch"),
        lambda network: {name: name.replace("layers.", "main.") for name in network.state_dict()}, r"\.num_batches_tracked$",
    ),
)  # fmt: skip
UNSUPPORTED = {r"^cls_embedding\.uncond_embedding$": "LlamaGen's own text-to-image model, another network than GEAR's hybrid"}


ARCHITECTURE = {  # the fields that a public file tells by its shapes or its layout; the others concern training
    "tokenizer": (
        "quantizer",
        "backbone",
        "codebook_size",
        "code_dim",
        "channels",
        "channel_mult",
        "res_blocks",
        "linear_skip",
    ),
    "generator": ("width", "layers", "heads", "num_classes", "condition_rotation", "dual_layers"),
}


def public_layout(kind, size):
    """Return the Layout from which a network of our own would be read back as it is, or None: no linear skip, say."""
    for layout in (layout for layout in LAYOUTS if layout.kind == kind and kind in ARCHITECTURE):
        with contextlib.suppress(LookupError):  # another family's names cannot be read by this one
            ours, read = (s[0] if isinstance(s, tuple) else s for s in (size, layout.read(layout.names(size)[1])))
            if all(getattr(ours, f) == getattr(read, f) for f in ARCHITECTURE[kind]):
                return layout
    return None


def recognise(names, source):
    """Return the Layout of public tensor names, or None; raises UserError for one that is known and has no network here."""
    for pattern, what in UNSUPPORTED.items():
        if any(re.search(pattern, name) for name in names):
            raise UserError(f"'{source}' holds {what}: gear has no network for it.")
    return next((layout for layout in LAYOUTS if any(re.search(layout.marker, name) for name in names)), None)
