"""How much each choice of a protocol moves each number, for one and the same run: why a number
needs its protocol.
"""

from dataclasses import asdict
from functools import partial
from typing import Annotated

import pandas as pd
import torch

from gear.checkpoints import load_generator, load_tokenizer
from gear.config import MOST, Range, check_value
from gear.data import open_trained
from gear.device import open_device
from gear.evaluation.evaluate import Sampling
from gear.evaluation.networks import EfficientNet, load_network_by_name
from gear.evaluation.scores import compare, extract
from gear.evaluation.sources import (
    balanced_labels,
    draw_samples,
    drawing,
    own_images,
    read_images,
    samples_folder,
)
from gear.measures.frechet import InceptionScore

SPLITS = 10  # of the class score


def protocol_sensitivity(run, count=500, network="scenes", device="auto"):
    """Return what the run scores under one protocol and under its neighbours: a table of the run,
    cached with it.

    Columns: choice, setting, metric, value. The base is `count` samples of seed 0 without guidance
    against `count` training images, in the space of `network`; each other setting changes one
    thing: the seed (noise), how many samples, the guidance, the resize filter before EfficientNet,
    the order of the file (a class score in ten splits), the feature space. `device` is what
    computes, see `open_device`. Raises UserError for fewer than eight samples, a quarter of which
    have no statistics.
    """
    check_value("count", count, Annotated[int, Range(8, MOST)])
    parameters = {"count": count, "network": network}
    return run.table(
        "protocols", parameters, lambda: _sensitivity(run, count, network, open_device(device))
    )


def _sensitivity(run, count, name, device):
    source, rows = open_trained(run), []
    config = source.config
    space = load_network_by_name(name).to(device)
    filters = {f: EfficientNet(resize=f).to(device) for f in ("bicubic", "bilinear", "nearest")}
    real = torch.cat(list(read_images(own_images(source), config.image_size, count, "train")))
    draw, compared = partial(_draw, run, device), partial(_compare, device=device)
    drawn = draw(Sampling(count))
    tell = lambda choice, setting, found: rows.extend(
        (choice, setting, key, value) for key, (value, _) in found.items()
    )  # noqa: E731
    base = compared(drawn, real, space)
    for seed in (0, 1, 2):
        tell(
            "seed",
            str(seed),
            base if seed == 0 else compared(draw(Sampling(count, seed=seed)), real, space),
        )
    for part in (count // 4, count // 2, count):
        tell("samples", str(part), compared(drawn[:part], real, space))
    for scale in (1.0, 1.5, 2.0):
        tell(
            "guidance",
            f"{scale:g}",
            base if scale == 1 else compared(draw(Sampling(count, scale)), real, space),
        )
    for kind, network in filters.items():
        tell("resize", kind, compared(drawn, real, network))
    labels, logits = balanced_labels(count, run.config["generator"]["num_classes"], 0), []
    for images in drawn.split(64):
        logits.append(filters["bicubic"](images.to(device))["logits"].cpu())
    for order, rank in (
        ("shuffled", slice(None)),
        ("sorted by class", labels.argsort(stable=True)),
    ):
        score = InceptionScore(max(1, count // SPLITS)).update(torch.cat(logits)[rank]).value()
        rows.append(("order", order, f"score_{EfficientNet.name}", score))
    return pd.DataFrame(rows, columns=["choice", "setting", "metric", "value"])


def _draw(run, device, sampling):
    generator, tokenizer = (load(run.name).to(device) for load in (load_generator, load_tokenizer))
    labels = balanced_labels(sampling.count, generator.config.num_classes, sampling.seed)
    folder = samples_folder(run, asdict(sampling) | {"step": run.step} | drawing(generator))
    chunks = draw_samples(
        folder,
        generator,
        tokenizer,
        labels,
        sampling.seed,
        quiet=True,
        grid=generator.grid,
        cfg_scale=sampling.cfg_scale,
    )
    return torch.cat(list(chunks))


def _compare(fake, real, network, device):
    return compare(
        *(
            extract(name, [x], network, device)
            for name, x in (("samples", fake), ("reference", real))
        ),
        network,
    )
