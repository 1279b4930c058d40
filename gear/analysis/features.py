"""Features of tokenizer, generator and teacher on the same images, one row per token, so that they
can be compared.

The features are computed on the network's device, one batch of images at a time, and returned on
the device of the images.
"""

import torch

BATCH = 128


@torch.no_grad()
def generator_features(generator, tokenizer, images, labels, layers):
    """Return the generator's raw residual stream after each layer, {layer: (N, L, D)} (Fig. 5).

    Layer 0 is the output of the embedding. The generator reads the hard indices of the images
    (teacher forcing) and their true labels, in evaluation mode. Row i is the position that predicts
    token i and has not seen it; the alignment pairs this row with patch i.
    """
    parts = []
    device = _device(generator)
    for x, y in zip(images.split(BATCH), labels.split(BATCH)):
        hidden = generator.hidden(tokenizer.encode(x.to(device)).flatten(1), y.to(device), layers)
        parts.append({layer: h.float().to(images.device) for layer, h in hidden.items()})
    return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}


@torch.no_grad()
def tokenizer_features(tokenizer, images):
    """Return the tokenizer's features before and after quantisation, {"pre", "post"}: (N, L,
    code_dim) (Table 4).

    "pre" is the latent that the encoder returns; "post" is the code vector that replaces it.
    """
    parts = {"pre": [], "post": []}
    for x in images.split(BATCH):
        z = tokenizer.latents(x.to(_device(tokenizer)))  # (B, D, h, w)
        indices = tokenizer.quantizer.indices(z).unflatten(1, z.shape[-2:])
        parts["pre"].append(z.to(images.device))
        parts["post"].append(tokenizer.quantizer.lookup(indices).to(images.device))
    return {
        name: torch.cat(maps).flatten(2).transpose(1, 2).float() for name, maps in parts.items()
    }


@torch.no_grad()
def teacher_features(teacher, images):
    """Return the teacher's patch features (N, L, C)."""
    return torch.cat(
        [teacher(x.to(_device(teacher))).float().to(images.device) for x in images.split(BATCH)]
    )


def _device(network):
    return next(network.parameters()).device


def to_grid(rows):
    """Reshape rows (N, L, D) in raster order to the square grid (N, h, w, D)."""
    side = round(rows.shape[1] ** 0.5)
    return rows.unflatten(1, (side, side))
