"""Images above their reconstructions on one sheet, and what was lost."""

import torch
from PIL import Image

from gear.images import image_grid, to_uint8
from gear.measures.codes import usage
from gear.measures.reconstruction import l1, psnr
from gear.tokenizer.model import reconstruct

COLUMNS = 8
CHUNK = 8  # images that are on the tokenizer's device at once


def reconstruction_sheet(tokenizer, images):
    """Return a picture of images (N, 3, H, W) above their reconstructions, and {metric: value}.

    The images are on the CPU; a few at a time are on the tokenizer's device. PSNR in dB, mean over
    images; L1 in [0, 1] units; the entropy of code usage in nats.
    """
    device = next(tokenizer.parameters()).device
    chunks = [reconstruct(tokenizer, chunk.to(device)) for chunk in images.split(CHUNK)]
    decoded, indices = (torch.cat([part.cpu() for part in parts]) for parts in zip(*chunks))
    used = usage(indices, tokenizer.config.codebook_size)
    metrics = {
        "psnr": float(psnr(decoded, images).mean()),
        "l1": float(l1(decoded, images).mean()),
        "usage_entropy": used.entropy,
        "codes_used": tokenizer.config.codebook_size - used.dead,
        "images": len(images),
        "tokens": used.n,
    }
    rows = [x for pair in zip(images.split(COLUMNS), decoded.split(COLUMNS)) for x in pair]
    if len(images) > COLUMNS:  # the last row may be short: white fills it
        rows = [torch.cat([x, x.new_ones(COLUMNS - len(x), *x.shape[1:])]) for x in rows]
    grid = image_grid(torch.cat(rows).clamp(-1, 1), min(COLUMNS, len(images)))
    return Image.fromarray(to_uint8(grid[None])[0].numpy()), metrics
