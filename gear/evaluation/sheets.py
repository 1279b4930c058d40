"""A sheet of images above their reconstructions, with the scores of the reconstructions."""

import torch
from PIL import Image

from gear.images import image_grid, to_uint8
from gear.measures.codes import usage
from gear.measures.reconstruction import l1, psnr
from gear.tokenizer.model import reconstruct

COLUMNS = 8
CHUNK = 8  # images on the tokenizer's device at once


def reconstruction_sheet(tokenizer, images):
    """Return a picture of images (N, 3, H, W) above their reconstructions, and {metric: value}.

    The images are on the CPU; 8 at a time are moved to the tokenizer's device. PSNR is in dB and L1
    in [0, 1] units, both means over images; the entropy of code usage is in nats.
    """
    device = next(tokenizer.parameters()).device
    chunks = [reconstruct(tokenizer, chunk.to(device)) for chunk in images.split(CHUNK)]
    decoded, indices = (torch.cat([part.cpu() for part in parts]) for parts in zip(*chunks))
    code_usage = usage(indices, tokenizer.config.codebook_size)
    metrics = {
        "psnr": float(psnr(decoded, images).mean()),
        "l1": float(l1(decoded, images).mean()),
        "usage_entropy": code_usage.entropy,
        "codes_used": tokenizer.config.codebook_size - code_usage.dead,
        "images": len(images),
        "tokens": code_usage.n,
    }
    rows = [x for pair in zip(images.split(COLUMNS), decoded.split(COLUMNS)) for x in pair]
    if len(images) > COLUMNS:  # a short last row is filled with white
        rows = [torch.cat([x, x.new_ones(COLUMNS - len(x), *x.shape[1:])]) for x in rows]
    grid = image_grid(torch.cat(rows).clamp(-1, 1), min(COLUMNS, len(images)))
    return Image.fromarray(to_uint8(grid[None])[0].numpy()), metrics
