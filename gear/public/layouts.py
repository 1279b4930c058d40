"""The layouts of the public checkpoints: their names for our tensors, and the configuration that
follows from their shapes.

There are layouts of three tokenizers, of the class- or text-conditioned generator, of the
projectors and of the discriminator. A layout is recognised by its tensor names. Loading is strict
in names and shapes.
"""

import re

from gear.config import UserError
from gear.public.generators import GENERATOR_LAYOUTS
from gear.public.tokenizers import TOKENIZER_LAYOUTS

LAYOUTS = (*TOKENIZER_LAYOUTS, *GENERATOR_LAYOUTS)
UNSUPPORTED = {
    r"(^|\.)cls_embedding\.uncond_embedding$": (
        "LlamaGen's own text-to-image model, which is another network than GEAR's hybrid"
    ),
}
# the configuration fields that follow from a public file's shapes or layout; the others concern
# training
ARCHITECTURE = {
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
    "generator": (
        "width",
        "layers",
        "heads",
        "num_classes",
        "condition_rotation",
        "text_dim",
        "dual_layers",
    ),
}


def public_layout(kind, size):
    """Return the Layout in which a network of ours can be stored and read back unchanged, or None.

    A tokenizer with a linear skip, for example, has no such layout.
    """
    family = lambda size: (getattr(size, "quantizer", None), getattr(size, "backbone", None))
    for layout in (layout for layout in LAYOUTS if layout.kind == kind and kind in ARCHITECTURE):
        if family(layout.sizes[0]) == family(size):
            try:
                size_read = layout.read(layout.names(size)[1])
            except UserError:  # the number of heads does not follow from the shapes
                continue
            config, config_read = (s[0] if isinstance(s, tuple) else s for s in (size, size_read))
            if all(getattr(config, f) == getattr(config_read, f) for f in ARCHITECTURE[kind]):
                return layout
    return None


def prefixes(names, source):
    """Return {prefix: Layout} of the public networks among tensor names.

    A prefix is the text before the layout's own names: "model." in "model.encoder.conv_in.weight".
    Raises UserError for a known network that gear does not have.
    """
    for pattern, network in UNSUPPORTED.items():
        if any(re.search(pattern, name) for name in names):
            raise UserError(f"'{source}' holds {network}: gear has no network for it.")
    layouts = {}
    for layout in LAYOUTS:
        pattern = re.compile(rf"((?:[^.]+\.)*?)(?:{layout.marker})")
        for prefix in dict.fromkeys(match[1] for match in map(pattern.match, names) if match):
            layouts.setdefault(prefix, layout)
    return layouts


def recognise(names, source):
    """Return the Layout of public tensor names without a prefix, or None; see `prefixes`."""
    return prefixes(names, source).get("")
