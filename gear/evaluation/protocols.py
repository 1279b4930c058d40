"""Protocol sensitivity: how much each choice of a protocol changes each score of the same run."""

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
    drawing_protocol,
    read_images,
    reference_source,
    samples_folder,
)
from gear.measures.frechet import InceptionScore

SPLITS = 10  # splits of the class score


def protocol_sensitivity(run, count=500, network="scenes", device="auto"):
    """Score a run under one protocol and under changed protocols; the table is kept with the run.

    Columns: choice, setting, metric, value. The base compares `count` samples of seed 0, without
    guidance, with `count` training images in the feature space of `network`. Each choice changes
    one thing: "seed" (the noise of a score), "samples" (their number), "guidance", "resize" (the
    feature space of EfficientNet and the filter before it), and "order" (the order of the samples,
    which changes a class score in ten splits). All is computed on `device`, see `open_device`.
    Raises UserError for fewer than eight samples, because a quarter of them needs statistics.
    """
    check_value("count", count, Annotated[int, Range(8, MOST)])
    parameters = {"count": count, "network": network}
    return run.table(
        "protocols", parameters, lambda: _sensitivity(run, count, network, open_device(device))
    )


def _sensitivity(run, count, name, device):
    source = open_trained(run)
    config = source.config
    space = load_network_by_name(name).to(device)
    filters = {f: EfficientNet(resize=f).to(device) for f in ("bicubic", "bilinear", "nearest")}
    real = torch.cat(list(read_images(reference_source(source), config.image_size, count, "train")))
    draw = partial(_draw, run, device)
    score = partial(_compare, device=device)
    samples = draw(Sampling(count))
    rows = []

    def add(choice, setting, metrics):
        rows.extend((choice, setting, metric, value) for metric, (value, _) in metrics.items())

    base = score(samples, real, space)
    for seed in (0, 1, 2):
        metrics = base if seed == 0 else score(draw(Sampling(count, seed=seed)), real, space)
        add("seed", str(seed), metrics)
    for size in (count // 4, count // 2, count):
        add("samples", str(size), score(samples[:size], real, space))
    for scale in (1.0, 1.5, 2.0):
        metrics = base if scale == 1 else score(draw(Sampling(count, scale)), real, space)
        add("guidance", f"{scale:g}", metrics)
    for kind, network in filters.items():
        add("resize", kind, score(samples, real, network))
    labels = balanced_labels(count, run.config["generator"]["num_classes"], 0)
    logits = [filters["bicubic"](x.to(device))["logits"].cpu() for x in samples.split(64)]
    for order, positions in (
        ("shuffled", slice(None)),
        ("sorted by class", labels.argsort(stable=True)),
    ):
        class_score = InceptionScore(max(1, count // SPLITS)).update(torch.cat(logits)[positions])
        rows.append(("order", order, f"score_{EfficientNet.name}", class_score.value()))
    return pd.DataFrame(rows, columns=["choice", "setting", "metric", "value"])


def _draw(run, device, sampling):
    generator, tokenizer = (load(run.name).to(device) for load in (load_generator, load_tokenizer))
    labels = balanced_labels(sampling.count, generator.config.num_classes, sampling.seed)
    folder = samples_folder(
        run, asdict(sampling) | {"step": run.step} | drawing_protocol(generator)
    )
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
    fake_features = extract("samples", [fake], network, device)
    real_features = extract("reference", [real], network, device)
    return compare(fake_features, real_features, network)
