"""Scores of a tokenizer's reconstructions: PSNR, SSIM, L1 and LPIPS per image, and the Fréchet
distance between reconstructions and images (Tables 8, 18).
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from gear.checkpoints import load_tokenizer, open_checkpoint
from gear.config import UserError, given_by
from gear.evaluation.lpips import LPIPS_BACKBONE, load_lpips, lpips_backbone
from gear.evaluation.scores import (
    FeatureSet,
    Unavailable,
    compare,
    record,
    report_missing_frechet,
)
from gear.evaluation.sources import read_images
from gear.images import check_divides, to_float
from gear.measures.frechet import Moments
from gear.measures.reconstruction import l1, psnr, ssim
from gear.tokenizer.config import TOKENIZERS
from gear.tokenizer.model import reconstruct

TABLE_18 = {"rFID": "rfid", "PSNR": "psnr", "SSIM": "ssim", "L1": "l1"}  # {column: our metric}
INTERPOLATIONS = "bicubic", "bilinear"  # filters of Table 18 for the resize to 256 pixels


@torch.no_grad()
def reconstruction_records(name, tokenizer, batches, network, protocol, device="cpu", quiet=False):
    """Measure a tokenizer's reconstructions of `batches` of uint8 images (N, H, W, 3); return
    records, each with its protocol.

    Reconstructions are clamped to [-1, 1] and not rounded. In Inception's space the Fréchet
    distance is rFID, which needs more images than features: with fewer images it is left out, and
    the reason is printed. Unless `quiet`, missing LPIPS weights are reported.
    """
    measures = {"psnr": psnr, "ssim": ssim, "l1": l1}
    if lpips := load_lpips(device):
        measures["lpips"] = lpips
    elif not quiet:
        print(
            f"LPIPS is left out: VGG16's weights ({lpips_backbone()}) are not on this machine.",
            file=sys.stderr,
        )
    values = {metric: [] for metric in measures}
    moments = {}
    count = 0
    for images in map(to_float, batches):
        decoded = reconstruct(tokenizer, images)[0].clamp(-1, 1)
        count += len(images)
        for metric, function in measures.items():
            values[metric].append(measure(function, decoded, images, device))
        for side, x in (("decoded", decoded), ("images", images)):
            pool = network(x.to(device))["pool"]
            moments.setdefault(side, Moments(pool.shape[1], device)).update(pool)
    protocol = protocol | {"images": count, "rounding": "none"}
    lpips_protocol = {"network": "lpips, vgg16", "weights": LPIPS_BACKBONE}
    records = [
        record(metric, torch.cat(parts), protocol | (lpips_protocol if metric == "lpips" else {}))
        for metric, parts in values.items()
    ]
    sets = [FeatureSet(name, "", count) for _ in moments]
    for features, m in zip(sets, moments.values()):
        if count > 1:
            features.moments["pool"] = m.mean.cpu(), m.covariance.cpu()
    # `compare` calls the distance by its name for samples
    is_inception = network.name == "inception"
    sample_metric = "gfid" if is_inception else f"fd_{network.name}"
    metric = "rfid" if is_inception else f"rfd_{network.name}"
    try:
        value, details = compare(*sets, network, [sample_metric])[sample_metric]
    except Unavailable as reason:
        report_missing_frechet(metric, reason)
        return records
    return [*records, record(metric, value, protocol | network.protocol | details)]


def measure(distance, reconstructions, images, device="cpu"):
    """Return distance(reconstruction, image) for each pair, (N,) on the CPU.

    It is computed on `device`, 16 pairs at a time.
    """
    pairs = zip(reconstructions.split(16), images.split(16))
    return torch.cat([distance(x.to(device), y.to(device)).cpu() for x, y in pairs])


def file_records(source, images, network, count, size=256, interpolation="bicubic", **options):
    """Measure the tokenizer of a file on `count` images of a folder, zip or tars, resized to `size`
    pixels; return records as `reconstruction_records` does.
    """
    tokenizer = load_tokenizer(source).to(options.get("device", "cpu"))
    check_divides((size, size), tokenizer.config.downsampling)
    protocol = {
        "weights_of": tokenizer.source,
        "tokenizer": public_name(tokenizer.config),
        "source": Path(images).name,
        "split": "all",
        "image_size": size,
        "resize": interpolation,
    }
    with given_by("--images"):
        batches = read_images(images, size, count, "all", interpolation)
        return reconstruction_records(str(source), tokenizer, batches, network, protocol, **options)


def public_name(config):
    """Return the name of the public tokenizer with this configuration, "" if there is none."""
    return next((name for name, public in TOKENIZERS.items() if public == config), "")


def check_public(source):
    """Raise UserError unless a file holds one of the tokenizers of Table 18."""
    if not public_name(open_checkpoint(source).part("tokenizer")[1].size):
        raise UserError(
            f"'{source}' is none of Table 18's tokenizers: VQ-16, LFQ-16 or IBQ-16 is expected."
        )


def table_18(records, published):
    """Set records of public files (`file_records`) beside the rows "Reproduced" of Table 18.

    `published` is the table as the paper prints it. Returns a table with the columns tokenizer,
    resize, metric, paper, measured and images.
    """
    paper = published.set_index(["row", "column"]).value
    rows = []
    for entry in records:
        protocol = entry["protocol"]
        row = f"{protocol['tokenizer']}, Reproduced, {protocol['resize']}"
        for column, metric in TABLE_18.items():
            if metric == entry["metric"]:
                rows.append(
                    {
                        "tokenizer": protocol["tokenizer"],
                        "resize": protocol["resize"],
                        "metric": column,
                        "paper": float(paper[row, column]),
                        "measured": entry["value"],
                        "images": protocol["images"],
                    }
                )
    columns = ["tokenizer", "resize", "metric", "paper", "measured", "images"]
    return pd.DataFrame(rows, columns=columns)
