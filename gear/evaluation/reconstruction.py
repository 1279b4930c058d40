"""What a tokenizer keeps of images: PSNR, SSIM, L1 and LPIPS of each, and the Fréchet distance of
all to the images themselves (Tables 8, 18).
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from gear.checkpoints import load_tokenizer, open_checkpoint
from gear.config import UserError, given_by
from gear.evaluation.lpips import LPIPS_BACKBONE, load_lpips, lpips_backbone
from gear.evaluation.scores import FeatureSet, Unavailable, compare, record, tell_frechet
from gear.evaluation.sources import read_images
from gear.images import check_divides, to_float
from gear.measures.frechet import Moments
from gear.measures.reconstruction import l1, psnr, ssim
from gear.tokenizer.config import TOKENIZERS
from gear.tokenizer.model import reconstruct

TABLE_18 = {"rFID": "rfid", "PSNR": "psnr", "SSIM": "ssim", "L1": "l1"}  # column: our metric
INTERPOLATIONS = "bicubic", "bilinear"  # Table 18's, of the resize to 256 pixels


@torch.no_grad()
def reconstruction_records(name, tokenizer, batches, network, protocol, device="cpu", quiet=False):
    """Measure a tokenizer's reconstructions of `batches` of uint8 images: records, each with its
    protocol.

    Reconstructions are clamped and not rounded. In Inception's space the distance is rFID, which
    needs more images than features; where there are fewer, it is left out, and that is said.
    """
    measures = {"psnr": psnr, "ssim": ssim, "l1": l1}
    if lpips := load_lpips(device):
        measures["lpips"] = lpips
    elif not quiet:
        print(
            f"without LPIPS: VGG16's weights ({lpips_backbone()}) are not on this machine.",
            file=sys.stderr,
        )
    values, moments, count = {metric: [] for metric in measures}, {}, 0
    for images in map(to_float, batches):
        decoded, count = reconstruct(tokenizer, images)[0].clamp(-1, 1), count + len(images)
        for metric, function in measures.items():
            values[metric].append(measure(function, decoded, images, device))
        for side, x in (("decoded", decoded), ("images", images)):
            pool = network(x.to(device))["pool"]
            moments.setdefault(side, Moments(pool.shape[1], device)).update(pool)
    protocol = protocol | {"images": count, "rounding": "none"}
    of_lpips = {"network": "lpips, vgg16", "weights": LPIPS_BACKBONE}
    records = [
        record(metric, torch.cat(parts), protocol | (of_lpips if metric == "lpips" else {}))
        for metric, parts in values.items()
    ]
    sets = [FeatureSet(name, "", count) for _ in moments]
    for features, m in zip(sets, moments.values()):
        if count > 1:
            features.moments["pool"] = m.mean.cpu(), m.covariance.cpu()
    asked, metric = f"fd_{network.name}", f"rfd_{network.name}"
    if network.name == "inception":
        asked, metric = "gfid", "rfid"
    try:
        value, details = compare(*sets, network, [asked])[asked]
    except Unavailable as reason:
        tell_frechet(metric, reason)
        return records
    return [*records, record(metric, value, protocol | network.protocol | details)]


def measure(distance, reconstructions, images, device="cpu"):
    """Return distance(reconstruction, image) of each image, (N,), on a CPU; it is computed on
    `device`, a few at a time.
    """
    pairs = zip(reconstructions.split(16), images.split(16))
    return torch.cat([distance(x.to(device), y.to(device)).cpu() for x, y in pairs])


def file_records(source, images, network, count, size=256, interpolation="bicubic", **options):
    """Measure the tokenizer of a file on `count` images of a folder, zip or tars, resized to `size`
    pixels: see `reconstruction_records`.
    """
    tokenizer = load_tokenizer(source).to(options.get("device", "cpu"))
    check_divides((size, size), tokenizer.config.downsampling)
    protocol = {
        "weights_of": tokenizer.source,
        "tokenizer": named(tokenizer.config),
        "source": Path(images).name,
        "split": "all",
        "image_size": size,
        "resize": interpolation,
    }
    with given_by("--images"):
        batches = read_images(images, size, count, "all", interpolation)
        return reconstruction_records(str(source), tokenizer, batches, network, protocol, **options)


def named(config):
    """Return the public name of a tokenizer's configuration, "" if it has none."""
    return next((name for name, other in TOKENIZERS.items() if other == config), "")


def check_public(source):
    """Raise UserError unless a file holds one of Table 18's tokenizers."""
    if not named(open_checkpoint(source).part("tokenizer")[1].size):
        raise UserError(f"'{source}' is none of Table 18's tokenizers, VQ-16, LFQ-16 and IBQ-16.")


def table_18(records, published):
    """Set what public files gave, by `file_records`, beside the rows "Reproduced" of Table 18.

    `published` is what the paper prints of it. Returns a table: tokenizer, resize, metric, paper,
    measured, images.
    """
    paper, rows = published.set_index(["row", "column"]).value, []
    for entry in records:
        protocol = entry["protocol"]
        row = f"{protocol['tokenizer']}, Reproduced, {protocol['resize']}"
        for column, metric in TABLE_18.items():
            if metric == entry["metric"]:
                cells = protocol["tokenizer"], protocol["resize"], column
                values = float(paper[row, column]), entry["value"], protocol["images"]
                rows.append((*cells, *values))
    columns = ["tokenizer", "resize", "metric", "paper", "measured", "images"]
    return pd.DataFrame(rows, columns=columns)
