"""The layouts of the public checkpoints: how each names our tensors, and which configuration its
shapes speak of.

Three tokenizers, one generator, class- or text-conditioned, the projectors and the discriminator. A
layout is recognised by its names; loading is strict in shape and name.
"""

import re

from gear.config import UserError
from gear.public.generators import GENERATOR_LAYOUTS
from gear.public.tokenizers import TOKENIZER_LAYOUTS

LAYOUTS = (*TOKENIZER_LAYOUTS, *GENERATOR_LAYOUTS)
UNSUPPORTED = {
    r"(^|\.)cls_embedding\.uncond_embedding$": (
        "LlamaGen's own text-to-image model, another network than GEAR's hybrid"
    ),
}
# the fields that a public file tells by its shapes or its layout; the others concern training
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
    """Return the Layout from which a network of our own would be read back as it is, or None: no
    linear skip, say.
    """
    family = lambda size: (getattr(size, "quantizer", None), getattr(size, "backbone", None))
    for layout in (layout for layout in LAYOUTS if layout.kind == kind and kind in ARCHITECTURE):
        if family(layout.sizes[0]) == family(size):
            try:
                read = layout.read(layout.names(size)[1])
            except UserError:  # heads that no table tells
                continue
            ours, read = (s[0] if isinstance(s, tuple) else s for s in (size, read))
            if all(getattr(ours, f) == getattr(read, f) for f in ARCHITECTURE[kind]):
                return layout
    return None


def prefixes(names, source):
    """Return {prefix: Layout} of the public networks among tensor names: what stands before the
    names that a layout has.

    Raises UserError for a network that is known and has no counterpart here.
    """
    for pattern, what in UNSUPPORTED.items():
        if any(re.search(pattern, name) for name in names):
            raise UserError(f"'{source}' holds {what}: gear has no network for it.")
    places = {}
    for layout in LAYOUTS:
        pattern = re.compile(rf"((?:[^.]+\.)*?)(?:{layout.marker})")
        for place in dict.fromkeys(match[1] for match in map(pattern.match, names) if match):
            places.setdefault(place, layout)
    return places


def recognise(names, source):
    """Return the Layout of public tensor names, or None; see `prefixes`."""
    return prefixes(names, source).get("")
