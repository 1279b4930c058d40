"""Evaluate a run: sample, compare with a reference, reconstruct; every number goes to metrics.json
with its protocol.
"""

import functools
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import torch
import torch.nn.functional as F

from gear.checkpoints import load_generator, load_tokenizer
from gear.config import (
    Checked,
    Count,
    Range,
    Samples,
    Seed,
    Share,
    UserError,
    Whole,
    given_by,
    nearest,
    require,
)
from gear.data import Source, load, open_trained
from gear.device import open_device
from gear.evaluation.clip import CLIP, read_captions
from gear.evaluation.networks import load_network_by_name, reference_images
from gear.evaluation.reconstruction import file_records, reconstruction_records
from gear.evaluation.scores import (
    compare,
    extract,
    halves_distance,
    protocol_id,
    record,
    tell_frechet,
)
from gear.evaluation.sources import (
    balanced_labels,
    draw_samples,
    drawing,
    open_images,
    own_images,
    read_images,
    reference,
    samples_folder,
    write_npz,
)
from gear.files import check_target, write_atomically
from gear.generator.sampling import Guidance, Temperature
from gear.measures.codes import usage
from gear.runs.records import read_scores
from gear.runs.reference import Record
from gear.runs.run import Run
from gear.teachers.weights import file_hash


@dataclass(frozen=True)
class Sampling(Checked):
    """How samples are drawn: part of every generation metric's protocol."""

    count: Samples = 1_000
    cfg_scale: Guidance = 1.0  # guidance; 1 is none, 0 unconditional
    temperature: Temperature = 1.0  # 0 takes the likeliest
    top_k: Whole = 0  # 0 keeps all
    top_p: Share = 1.0  # 1 keeps all
    seed: Seed = 0


@dataclass(frozen=True)
class EvaluateOptions(Checked):
    sampling: Sampling = Sampling()
    # feature network: inception, dinov2-l, efficientnet-lite0, scenes; "": the run's teacher's
    network: str = ""
    weights: str = ""  # the network's weight file, if not in a cache
    offline: bool = False  # make no network call
    metrics: tuple[str, ...] = ()  # none named: all that can be had
    reference: str = ""  # an ADM or GPIC .npz, a folder, a zip; "": the run's own training images
    # images taken from a folder, a zip or the run, or reconstructed; 0: 2,000, of Inception 50,000
    reference_count: Whole = 0
    # someone else's samples, a .npz with arr_0, a folder or a zip, in place of the run's
    samples: str = ""
    sample_size: Whole = 0  # px of a side to which samples are resized, bicubic; 0: as drawn
    captions: str = ""  # a text file, a caption a line in the samples' order: adds the CLIP score
    clip: str = ""  # the folder of CLIP's files, if not in the hub's cache
    export: str = ""  # a .npz to write the samples to, as the ADM evaluator reads it
    sweep: str = ""  # several values of one field of the sampling, e.g. cfg_scale=1,1.25,1.5
    # the tokenizer on the run's validation images, in place of samples
    reconstruction: bool = False
    both: bool = False  # samples and reconstruction
    # of reconstructions: other images than the run's own, as ImageNet's validation set; a file has
    # none of its own
    images: str = ""
    image_size: Annotated[int, Range(0, 16_384)] = 0  # of these, in pixels; 0: the run's, or 256
    interpolation: Literal["", "bicubic", "bilinear", "box"] = ""  # of their resize
    out: str = "evaluation.json"  # of files: where what was measured is kept
    # checkpoints, where they were kept (gear train --keep); none named: the newest
    steps: tuple[Count, ...] = ()
    source: str = ""  # where the run's own images lie, if they have moved
    device: str = "auto"  # the GPU if there is one; or "cpu", "cuda", "cuda:1"
    quiet: bool = False


def evaluate_run(name, options=EvaluateOptions()):
    """Evaluate the run `name`; returns the records of this call and keeps them in
    runs/NAME/metrics.json.

    Killed at any moment, the same call goes on from the samples that are there; twice with one seed
    it writes the same bytes.
    """
    run, settings = Run.open(name), _swept(options)
    if isinstance(run, Record):
        # raises: there is nothing to draw with, and no place for what is measured
        run.load_checkpoint()
    options = replace(options, device=str(open_device(options.device)))
    clip = _check_options(run, options, settings)
    with given_by(options.source and "--source"):
        source = open_trained(run, options.source)
    config = source.config
    networks, likelihood = None, []  # of someone else's samples

    @functools.lru_cache(maxsize=2)  # the generator and the tokenizer of one step
    def load_network(load, step):
        return load(run.name, step=step).to(options.device)

    teacher = run.config["teacher"].partition(",")[0].partition("=")[0]
    space = options.network or teacher
    count = options.reference_count or reference_images(space)
    options, records = replace(options, reference_count=count), []
    if options.reconstruction or options.both:
        # rFID's: of floats, not of uint8
        resize = {"resize": "torch"} if space == "inception" else {}
        network = _network(space, options, **resize)
        records += _reconstruction(
            run, load_network(load_tokenizer, run.step), source, network, options
        )
    if not options.reconstruction:
        network, split = _network(space, options), "all" if options.reference else "train"
        with given_by(options.reference and "--reference"):
            real = reference(
                options.reference or own_images(source, options.sample_size),
                network,
                options.sample_size or config.image_size,
                options.reference_count,
                split,
                options.device,
                config.interpolation,
            )
        if not options.reference:
            real.name = run.config["data"]["source"]  # wherever its images have moved
        for step in options.steps or (run.step,):
            if not options.samples:
                networks = [load_network(load, step) for load in (load_generator, load_tokenizer)]
                likelihood = _likelihood(run, step, networks, source, options.device)
            for sampling in settings:
                records += _generation(
                    run, step, networks, config, network, real, options, sampling, clip
                )
            records += likelihood
        records += _halves(real, network, config, options)
    _keep(run, records)
    for line in dict.fromkeys(filter(None, (unlike_sizes(r["protocol"]) for r in records))):
        print(line, file=sys.stderr)
    return records


def _check_options(run, options, settings):
    """Say what is wrong with any option before anything is drawn; returns the CLIP that captions
    ask for, or None.
    """
    read_metrics(run)  # a damaged file is said before anything is drawn
    if options.steps and (options.samples or options.reconstruction):
        raise UserError(
            "--steps are checkpoints to draw samples from: not with --samples or --reconstruction."
        )
    if gone := set(options.steps) - set(run.checkpoint_steps()):
        there = ", ".join(map(str, run.checkpoint_steps())) or "none"
        raise UserError(
            f"run '{run.name}' has no checkpoint of step {', '.join(map(str, sorted(gone)))}: it "
            f"has {there}. A run keeps its "
            f"newest two and the best while it trains, more with --keep."
        )
    if options.export and len(settings) * max(1, len(options.steps)) > 1:
        raise UserError(
            "--export writes one file, and a sweep draws several sets: export them one by one."
        )
    _check_images(options)
    clip = None
    if options.captions:
        for sampling in settings:
            with given_by("--captions"):
                read_captions(options.captions, None if options.samples else sampling.count)
        with given_by("--clip"):
            clip = CLIP(options.clip, options.offline).to(options.device)
    if options.export:
        with given_by("--export"):
            check_target(options.export)
    return clip


def _check_images(options):
    """Raise UserError for options of images that are none, or that nothing would look at."""
    is_rebuilt = options.reconstruction or options.both
    require(
        not options.images or is_rebuilt, "--images are reconstructed: give --reconstruction, too."
    )
    for name in ("image_size", "interpolation"):
        require(
            options.images or not getattr(options, name),
            f"--{name.replace('_', '-')} is that of --images: a run's own images keep theirs.",
        )


def _network(name, options, **settings):
    with given_by("--weights" if options.weights else "--network"):
        return load_network_by_name(name, options.weights, options.offline, **settings).to(
            options.device
        )


def unlike_sizes(protocol):
    """Say that a protocol's samples and reference are of different size, "" where they are not."""
    samples, reference = (
        protocol.get(f"{of}_size", "not stated") for of in ("samples", "reference")
    )
    if samples == reference or "not stated" in (samples, reference):
        return ""
    return f"samples of {samples} px are compared with a reference of {reference} px"


def _swept(options):
    """Return the Samplings that a sweep asks for, or the one."""
    if not options.sweep:
        return [options.sampling]
    key, _, values = options.sweep.partition("=")
    known = {f.name: f.type for f in fields(Sampling)}
    if key not in known or not values:
        raise UserError(
            f"--sweep {options.sweep}: one of {', '.join(known)}, as in "
            f"cfg_scale=1,1.25,1.5.{nearest(key, known)}"
        )
    kind = type(getattr(Sampling, key))
    try:
        numbers = [kind(value) for value in values.split(",")]
    except ValueError:
        raise UserError(f"--sweep {options.sweep}: '{values}' are no numbers of {key}.") from None
    with given_by(f"--sweep {options.sweep}"):
        return [replace(options.sampling, **{key: number}) for number in numbers]


def _generation(run, step, networks, config, network, real, options, sampling, clip):
    """Draw samples with `networks`, a generator and a tokenizer (or take someone else's), and
    compare with the reference.
    """
    if options.samples:
        drawn = {"samples": Path(options.samples).name}
        size = options.sample_size or config.image_size
        batches = lambda: open_images(options.samples, size)  # noqa: E731
    else:
        generator, tokenizer = networks
        drawn = {
            **asdict(sampling),
            "labels": "balanced, shuffled",
            "weights_of": run.name,
            "step": step,
        } | drawing(generator)
        if options.sample_size:
            drawn["samples_resized"] = options.sample_size
        labels = balanced_labels(sampling.count, generator.config.num_classes, sampling.seed)
        how = {k: v for k, v in asdict(sampling).items() if k not in ("count", "seed")}
        folder = samples_folder(run, drawn)
        batches = lambda: draw_samples(  # noqa: E731
            folder,
            generator,
            tokenizer,
            labels,
            sampling.seed,
            options.quiet,
            side=options.sample_size,
            grid=generator.grid,
            **how,
        )
    with given_by(options.samples and "--samples"):
        fake = extract(options.samples or run.name, batches(), network, options.device)
    if options.export:
        write_atomically(
            Path(options.export).expanduser(),
            lambda temporary: write_npz(temporary, batches(), fake.count),
        )
    protocol = {
        **network.protocol,
        **drawn,
        "rounding": "uint8",
        "samples_count": fake.count,
        "samples_hash": fake.pixels,
        "reference": Path(real.name).name,
        "reference_count": real.count,
        "reference_hash": real.pixels,
        "resize": config.interpolation,
        "samples_size": fake.size,
        "reference_size": real.size,
    }
    # the run's own; another's samples are what they are
    if fake.size == f"{config.image_size} x {config.image_size}":
        protocol["image_size"] = config.image_size
    with given_by("--metrics" if options.metrics else ""):
        found = compare(fake, real, network, options.metrics or None, tell=tell_frechet)
    records = [
        record(metric, value, protocol | details) for metric, (value, details) in found.items()
    ]
    return records + _clip_score(batches(), protocol, options, clip) if clip else records


def _halves(real, network, config, options):
    """What two halves of the reference are apart, where a Fréchet distance is asked for: the part
    of it that the number of images makes.
    """
    metric = "gfid" if network.name == "inception" else f"fd_{network.name}"
    is_asked = not options.metrics or metric in options.metrics
    halves = halves_distance(real, network) if is_asked else None
    if halves is None:
        return []
    distance, count = halves
    protocol = {
        **network.protocol,
        "reference": Path(real.name).name,
        "reference_count": real.count,
        "reference_hash": real.pixels,
        "reference_size": real.size,
        "resize": config.interpolation,
        "half": count,
    }
    return [record(f"{metric}_halves", distance, protocol)]


def _clip_score(batches, protocol, options, network):
    """100 times the mean cosine of the samples and their captions."""
    captions, cosines = read_captions(options.captions, protocol["samples_count"]), []
    for images in batches:
        cosines.append(network(images, captions[: len(images)]).cpu())
        captions = captions[len(images) :]
    told = {
        key: value for key, value in protocol.items() if not key.startswith("reference")
    } | network.protocol
    digest = file_hash(Path(options.captions).expanduser())
    return [record("clip_score", 100 * torch.cat(cosines), told | {"captions": digest[:12]})]


@torch.no_grad()
def _likelihood(run, step, networks, source, device):
    """Next-token loss on validation images, the entropy of their codes, and what of it is predicted
    (H - NTP).
    """
    generator, tokenizer = networks
    images, labels = load(source, "val", run.config["eval_images"])
    indices = torch.cat([tokenizer.encode(x.to(device)) for x in images.split(32)]).flatten(1)
    losses = [
        F.cross_entropy(generator(i, c).transpose(1, 2), i, reduction="none").cpu()
        for i, c in zip(indices.split(32), labels.to(device).split(32))
    ]
    ntp, entropy = (
        torch.cat(losses).double().mean(1),
        usage(indices.cpu(), tokenizer.config.codebook_size).entropy,
    )
    protocol = {
        "weights_of": run.name,
        "step": step,
        "split": "val",
        "images": len(images),
        "unit": "nats a token",
    }
    values = {"ntp_loss": ntp, "usage_entropy": entropy, "predictable": entropy - float(ntp.mean())}
    return [record(metric, value, protocol) for metric, value in values.items()]


def _reconstruction(run, tokenizer, source, network, options):
    """Measure the tokenizer on the run's validation images, or on all of those that are named."""
    split = "all" if options.images else "val"
    if options.images:
        images = replace(source.config, source=options.images, labels="class", val_source="")
        if options.image_size:
            images = replace(images, image_size=options.image_size)
        if options.interpolation:
            images = replace(images, interpolation=options.interpolation)
        source = Source(images)
    protocol = {
        "weights_of": run.name,
        "step": run.step,
        "split": split,
        "image_size": source.config.image_size,
        "resize": source.config.interpolation,
    }
    protocol |= {"source": Path(options.images).name} if options.images else {}
    with given_by(options.images and "--images"):
        batches = read_images(source, 0, options.reference_count, split)
        return reconstruction_records(
            run.name, tokenizer, batches, network, protocol, options.device, options.quiet
        )


# what of the options is about the tokenizer of a file
OF_FILES = {"network", "weights", "offline", "reference_count", "reconstruction", "images",
            "image_size", "interpolation", "out", "device", "quiet"}  # fmt: skip


def evaluate_files(names, options=EvaluateOptions(), interpolations=("bicubic",)):
    """Measure the tokenizers of files on the images that `options.images` names, resized each of
    these ways: returns the records, which `options.out` keeps beside those of earlier calls.
    """
    require(
        options.reconstruction and options.images,
        f"'{names[0]}' is a file: gear evaluate FILE --reconstruction --images PATH measures its "
        "tokenizer; generators are scored as runs.",
    )
    for name in (f.name for f in fields(options) if f.name not in OF_FILES):
        is_default = getattr(options, name) == getattr(EvaluateOptions(), name)
        require(is_default, f"--{name.replace('_', '-')} is for runs, and '{names[0]}' is a file.")
    with given_by("--out"):
        out, records = check_target(options.out, ".json"), []
        kept = read_scores(out) if out.exists() else []
    options = replace(options, device=str(open_device(options.device)))
    space = options.network or "inception"
    count = options.reference_count or reference_images(space)
    resize = {"resize": "torch"} if space == "inception" else {}  # rFID's: of floats, not of uint8
    network = _network(space, options, **resize)
    for name in names:
        for interpolation in interpolations:
            size = options.image_size or 256
            how = dict(device=options.device, quiet=options.quiet)
            records += file_records(
                name, options.images, network, count, size, interpolation, **how
            )
            _write_records(out, kept + records)
    return records


def _keep(run, records):
    """Merge records into metrics.json: one of a metric and a protocol replaces the one before
    it.
    """
    _write_records(run.path / "metrics.json", [*read_metrics(run), *records])


def _write_records(path, records):
    """Write records; of several with one metric and protocol the last."""
    latest = {(r["metric"], json.dumps(r["protocol"], sort_keys=True)): r for r in records}
    ordered = [latest[key] for key in sorted(latest)]
    text = json.dumps(ordered, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_metrics(run):
    """Return the records of a run's evaluations, none if there are none; raises UserError if they
    cannot be read.
    """
    return run.scores()


def scores(run):
    """Return the records of a run's metrics.json as a table: metric, value, and a column for every
    field of a protocol.
    """
    lines = [
        {"metric": r["metric"], "value": r["value"], **r["protocol"]} for r in read_metrics(run)
    ]
    return pd.DataFrame(lines, columns=None if lines else ["metric", "value"])


def metrics_table(runs):
    """Return the metrics of runs as a table, a row each and a column for every metric and protocol:
    (table, {id: protocol}).

    Two numbers share a column only if their protocols are equal but for the run's own name, step
    and samples.
    """
    rows, protocols = {}, {}
    for run in runs:
        # the newest stays
        for entry in sorted(read_metrics(run), key=lambda entry: entry["protocol"].get("step", 0)):
            key = protocol_id(entry["protocol"])
            protocols.setdefault(
                key,
                {
                    k: v
                    for k, v in entry["protocol"].items()
                    if k not in ("weights_of", "step", "samples_hash")
                },
            )
            rows.setdefault(run.name, {})[f"{entry['metric']} [{key}]"] = entry["value"]
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table[sorted(table.columns)], protocols


def report(runs):
    """Print `metrics_table`, a metric a line, and each protocol under its id."""
    table, protocols = metrics_table(runs)
    print(table.T.to_string(float_format=lambda value: f"{value:.5g}", na_rep=""))
    for key, protocol in protocols.items():
        words = [f"{name} {value}" for name, value in sorted(protocol.items())]
        print(f"[{key}] " + ", ".join(words + list(filter(None, [unlike_sizes(protocol)]))))
