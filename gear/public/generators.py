"""The public layouts of the networks other than tokenizers: the generators (LlamaGen's, and GEAR's
hybrid for captions), the projectors and the discriminator.
"""

import re

from gear.config import UserError
from gear.generator.config import GENERATORS, GeneratorConfig
from gear.generator.model import Generator, Projector, Projectors
from gear.public.layout import Layout, agreed_size
from gear.tokenizer.discriminator import Discriminator

GENERATOR_NAMES = (  # (our text, public text), replaced in this order
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
# number of heads by (layers, width), which does not follow from the shapes; these two are
# LlamaGen's 3B and 7B, which GENERATORS does not have
HEADS = {(24, 3200): 32, (32, 4096): 32}
HEADS |= {(c.layers, c.width): c.heads for c in GENERATORS.values()}


def _generator_names(generator):
    """Return {our name: public name} of a Generator."""
    public_names = {}
    for name in generator.state_dict():
        public_name = name
        for ours, public in GENERATOR_NAMES:
            public_name = public_name.replace(ours, public)
        public_names[name] = public_name
    return public_names


def _generator_size(shapes):
    """Return (GeneratorConfig, K) of a public generator.

    `condition_rotation` is "zero", as in every public network.
    """
    width = agreed_size(
        shapes, ("norm.weight", 0), ("tok_embeddings.weight", 1), ("output.weight", 1)
    )
    codes = agreed_size(shapes, ("tok_embeddings.weight", 0), ("output.weight", 0))
    layers = 1 + max(
        (int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d+)\.", name))), default=0
    )
    if (layers, width) not in HEADS and width % 64:
        raise UserError(
            f"{layers} layers of {width}: the number of heads is unknown, because no table lists "
            "this size and the width is not a multiple of 64."
        )
    fields = dict(
        width=width,
        layers=layers,
        heads=HEADS.get((layers, width), width // 64),
        tap_layer=max(1, layers // 3),
    )
    dual = {
        int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d+)\..*_text\.weight", name))
    }
    if dual or any(name.startswith("cls_embedding.cap_proj.") for name in shapes):
        fields |= dict(
            text_slots=GENERATORS["T2I-1B"].text_slots, dual_layers=1 + max(dual, default=-1)
        )
        fields |= dict(text_dim=agreed_size(shapes, ("cls_embedding.cap_proj.fc1.weight", 1)))
    else:
        fields |= dict(
            num_classes=agreed_size(shapes, ("cls_embedding.embedding_table.weight", 0)) - 1
        )
    return GeneratorConfig(**fields, condition_rotation="zero"), codes


def _projector_size(shapes):
    """Return ((width, hidden width, teacher's width), ...), one triple per teacher."""
    sizes = []
    for i in sorted({int(m[1]) for name in shapes if (m := re.match(r"projs\.(\d+)\.", name))}):
        width = agreed_size(shapes, (f"projs.{i}.0.weight", 1))
        hidden = agreed_size(
            shapes, *((f"projs.{i}.{j}.{part}", 0) for j in (0, 2) for part in ("bias", "weight"))
        )
        out = agreed_size(shapes, (f"projs.{i}.4.bias", 0), (f"projs.{i}.4.weight", 0))
        sizes.append((width, hidden, out))
    return tuple(sizes)


def _build_projectors(size):
    return Projectors(
        Projector(GeneratorConfig(width, heads=1, projector_dim=hidden), out)
        for width, hidden, out in size
    )


def _discriminator_size(shapes):
    """Return (channels, layers) of a public PatchGAN."""
    norm_positions = [
        int(m[1])
        for name in shapes
        if (m := re.fullmatch(r"main\.(\d+)\.running_(mean|var)", name))
    ]  # 3, 6, ..., 3 `layers`
    channels = agreed_size(shapes, ("main.0.bias", 0), ("main.0.weight", 0), ("main.2.weight", 1))
    return channels, max(norm_positions, default=3) // 3


GENERATOR_LAYOUTS = (
    Layout(
        "LlamaGen",
        "generator",
        r"(tok_embeddings|layers\.\d+\.attention)\.",
        _generator_size,
        tuple(
            (c.__class__(**c.__dict__ | {"condition_rotation": "zero"}), 16_384)
            for c in GENERATORS.values()
        ),
        lambda size: Generator(*size),
        _generator_names,
    ),
    Layout(
        "projectors",
        "projector",
        r"projs\.\d+\.",
        _projector_size,
        (),
        _build_projectors,
        lambda projectors: {
            name: f"projs.{name.replace('.layers.', '.')}" for name in projectors.state_dict()
        },
    ),
    Layout(
        "PatchGAN",
        "discriminator",
        r"main\.\d+\.",
        _discriminator_size,
        ((64, 3),),
        lambda size: Discriminator(*size, norm="batch"),
        lambda network: {name: name.replace("layers.", "main.") for name in network.state_dict()},
        r"\.num_batches_tracked$",
    ),
)
