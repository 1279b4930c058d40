"""The public layouts of what stands beside a tokenizer: LlamaGen and GEAR's hybrid, the projectors,
the discriminator.
"""

import re

from gear.config import UserError
from gear.generator.config import GENERATORS, GeneratorConfig
from gear.generator.model import Generator, Projector, Projectors
from gear.public.layout import Layout, told
from gear.tokenizer.discriminator import Discriminator

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
# of sizes in (layers, width): LlamaGen's 3B and 7B, which GEAR has not
HEADS = {(24, 3200): 32, (32, 4096): 32}
HEADS |= {(c.layers, c.width): c.heads for c in GENERATORS.values()}


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
    width = told(shapes, ("norm.weight", 0), ("tok_embeddings.weight", 1), ("output.weight", 1))
    codes = told(shapes, ("tok_embeddings.weight", 0), ("output.weight", 0))
    layers = 1 + max(
        (int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d+)\.", name))), default=0
    )
    if (layers, width) not in HEADS and width % 64:
        raise UserError(
            f"{layers} layers of {width}: no table tells how many heads, and the width is no "
            "multiple of 64."
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
        fields |= dict(text_dim=told(shapes, ("cls_embedding.cap_proj.fc1.weight", 1)))
    else:
        fields |= dict(num_classes=told(shapes, ("cls_embedding.embedding_table.weight", 0)) - 1)
    return GeneratorConfig(**fields, condition_rotation="zero"), codes


def _projector_size(shapes):
    """Return ((width, hidden, teacher's width), ...), one a teacher."""
    bank = []
    for e in sorted({int(m[1]) for name in shapes if (m := re.match(r"projs\.(\d+)\.", name))}):
        width = told(shapes, (f"projs.{e}.0.weight", 1))
        hidden = told(
            shapes, *((f"projs.{e}.{i}.{part}", 0) for i in (0, 2) for part in ("bias", "weight"))
        )
        bank.append(
            (width, hidden, told(shapes, (f"projs.{e}.4.bias", 0), (f"projs.{e}.4.weight", 0)))
        )
    return tuple(bank)


def _projectors(size):
    return Projectors(
        Projector(GeneratorConfig(width, heads=1, projector_dim=hidden), out)
        for width, hidden, out in size
    )


def _discriminator_size(shapes):
    norms = [
        int(m[1])
        for name in shapes
        if (m := re.fullmatch(r"main\.(\d+)\.running_(mean|var)", name))
    ]  # 3, 6, ...
    return told(shapes, ("main.0.bias", 0), ("main.0.weight", 0), ("main.2.weight", 1)), max(
        norms, default=3
    ) // 3


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
        _generator_public,
    ),
    Layout(
        "projectors",
        "projector",
        r"projs\.\d+\.",
        _projector_size,
        (),
        _projectors,
        lambda bank: {name: f"projs.{name.replace('.layers.', '.')}" for name in bank.state_dict()},
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
