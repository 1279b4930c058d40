"""Evaluate a run: draw samples, compare them with a reference, and measure reconstructions. Every
number is written to metrics.json with its protocol.
"""

import functools
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

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
from gear.data import Source, load, open_trained, to_float, to_uint8
from gear.device import open_device
from gear.evaluation import judge
from gear.evaluation.clip import CLIP, read_captions
from gear.evaluation.networks import (
    JUDGES,
    DetectorFeatures,
    load_network_by_name,
    reference_images,
)
from gear.evaluation.reconstruction import file_records, reconstruction_records
from gear.evaluation.scores import (
    compare,
    extract,
    halves_distance,
    protocol_id,
    record,
    report_missing_frechet,
)
from gear.evaluation.sources import (
    balanced_labels,
    draw_samples,
    drawing_protocol,
    open_images,
    read_images,
    reference,
    reference_source,
    samples_folder,
    write_npz,
)
from gear.files import check_target, write_atomically
from gear.generator.sampling import Guidance, Temperature
from gear.images import image_grid
from gear.measures.codes import usage
from gear.runs.records import SHEETS, read_scores
from gear.runs.reference import Record
from gear.runs.run import PANEL_GAP, PANEL_WIDTH, Run
from gear.teachers.weights import file_hash
from gear.tokenizer.model import reconstruct

JUDGED = 1_000  # scenes of the validation split that show what a judged sample can reach


@dataclass(frozen=True)
class Sampling(Checked):
    """Settings for drawing samples; they are part of the protocol of every generation metric."""

    count: Samples = 1_000  # number of samples
    cfg_scale: Guidance = 1.0  # guidance scale; 1: no guidance, 0: unconditional samples
    temperature: Temperature = 1.0  # softmax temperature; 0: always the likeliest token
    top_k: Whole = 0  # sample from the k likeliest tokens only; 0: from all tokens
    top_p: Share = 1.0  # sample from the likeliest tokens with this total probability; 1: from all
    seed: Seed = 0  # seed of the random numbers and of the order of the labels


@dataclass(frozen=True)
class EvaluateOptions(Checked):
    sampling: Sampling = Sampling()
    # feature network: inception, dinov2-l, efficientnet-lite0, efficientnet-lite2, scenes or
    # detector; "": the teacher of the run and the judge to which nothing is aligned
    network: str = ""
    weights: str = ""  # path of the feature network's weights; "": found in a cache or downloaded
    offline: bool = False  # download nothing
    metrics: tuple[str, ...] = ()  # names of metrics; none: all metrics that can be computed
    # reference images: an ADM or GPIC .npz, a folder or a zip; "": the training images of the run
    reference: str = ""
    # number of reference images, and of images to reconstruct; 0: 2,000, or 50,000 for inception
    reference_count: Whole = 0
    # samples to score in place of the run's: a .npz with arr_0, a folder or a zip
    samples: str = ""
    # side in pixels to which samples are resized (bicubic); 0: samples keep their size
    sample_size: Whole = 0
    # text file with one caption per line, in the order of the samples: adds the CLIP score
    captions: str = ""
    clip: str = ""  # folder with CLIP's weights and tokenizer.json; "": found in the hub's cache
    export: str = ""  # .npz file to write the samples to, in the format of the ADM evaluator
    # several values of one sampling option, e.g. cfg_scale=1,1.25,1.5
    sweep: str = ""
    # measure reconstructions of the run's validation images in place of samples
    reconstruction: bool = False
    both: bool = False  # measure samples and reconstructions
    # images to reconstruct in place of the run's, e.g. ImageNet's validation set; a tokenizer file
    # needs them
    images: str = ""
    # side in pixels of --images; 0: the image size of the run, or 256 for a tokenizer file
    image_size: Annotated[int, Range(0, 16_384)] = 0
    # filter that resizes --images; "": that of the run, or bicubic for a tokenizer file
    interpolation: Literal["", "bicubic", "bilinear", "box"] = ""
    out: str = "evaluation.json"  # file that keeps the records of tokenizer files
    # steps of the checkpoints to evaluate (gear train --keep keeps more); none: the newest
    steps: tuple[Count, ...] = ()
    source: str = ""  # new path of the run's images, if they have moved
    device: str = "auto"  # "auto": the GPU if there is one; or "cpu", "cuda", "cuda:1"
    quiet: bool = False  # show no progress bar and no note about missing LPIPS weights


def evaluate_run(name, options=EvaluateOptions()):
    """Evaluate the run `name`; return the records of this call and keep them in
    runs/NAME/metrics.json.

    Samples are kept in the run's folder as they are drawn: after an interruption, the same call
    continues with the kept samples. Two calls with the same seed write the same bytes.
    """
    run = Run.open(name)
    if isinstance(run, Record):
        # a record has no weights, and no folder for the results: this raises a UserError
        run.load_checkpoint()
    options = replace(options, device=str(open_device(options.device)))
    clip = _check_options(run, options, _sweep_samplings(options))
    with given_by(options.source and "--source"):
        source = open_trained(run, options.source)

    # with --samples, no network of the run is loaded
    @functools.lru_cache(maxsize=2)  # holds the generator and the tokenizer of one step
    def load_network(load, step):
        return load(run.name, step=step).to(options.device)

    records = []
    for space in _spaces(run, options):
        count = options.reference_count or reference_images(space)
        records += _in_space(
            space, run, source, load_network, replace(options, reference_count=count), clip
        )
    tokenizers = functools.partial(load_network, load_tokenizer)
    if not options.samples:
        if not options.reconstruction:
            for step in options.steps or (run.step,):
                networks = [load_network(load, step) for load in (load_generator, load_tokenizer)]
                records += _likelihood(run, step, networks, source, options.device)
        if _is_judged(run, options):
            records += _ceilings(run, source, tokenizers, options)
    _keep(run, records)
    warnings = (size_mismatch(entry["protocol"]) for entry in records)
    for line in dict.fromkeys(filter(None, warnings)):
        print(line, file=sys.stderr)
    return records


def _spaces(run, options):
    """Return the feature networks whose spaces images are compared in: that of the options, or the
    teacher of the run and a judge to which nothing is aligned, if there is one.
    """
    if options.network:
        return [options.network]
    teacher = own_teacher(run)
    is_asked = teacher in JUDGES and not options.metrics and not options.images
    return [teacher, *([JUDGES[teacher]] if is_asked else [])]


def own_teacher(run):
    """Return the name of a run's first teacher, in whose feature space its generator is aligned."""
    return run.config["teacher"].partition(",")[0].partition("=")[0]


def _is_judged(run, options):
    """Whether the detector reads the images: it can only read scenes."""
    is_asked = options.network in ("", DetectorFeatures.name) and not options.metrics
    return run.config["data"]["source"] == "scenes" and is_asked and not options.images


def _in_space(space, run, source, load_network, options, clip):
    """Return the records of one feature network: of reconstructions, of samples, or of both."""
    config = source.config
    records = []
    if options.reconstruction or options.both:
        # rFID resizes floats, not uint8
        resize = {"resize": "torch"} if space == "inception" else {}
        network = _network(space, options, **resize)
        tokenizer = load_network(load_tokenizer, run.step)
        records += _reconstruction(run, tokenizer, source, network, options)
    if options.reconstruction:
        return records
    network = _network(space, options)
    with given_by(options.reference and "--reference"):
        real = reference(
            options.reference or reference_source(source, options.sample_size),
            network,
            options.sample_size or config.image_size,
            options.reference_count,
            "all" if options.reference else "train",
            options.device,
            config.interpolation,
        )
    if not options.reference:
        # the name in the protocol must not depend on where the images are
        real.name = run.config["data"]["source"]
    for step in options.steps or (run.step,):
        networks = None
        if not options.samples:
            networks = [load_network(load, step) for load in (load_generator, load_tokenizer)]
        for sampling in _sweep_samplings(options):
            records += _generation(
                run, step, networks, config, network, real, options, sampling, clip
            )
    return records + _halves(real, network, config, options)


@torch.no_grad()
def _ceilings(run, source, load_tokenizer_of, options):
    """Return what the detector says of real scenes, and of their reconstructions by the run's
    tokenizer: what a judged sample can reach.
    """
    count = min(JUDGED, source.config.val_images)
    scenes = Source(replace(source.config, labels="class")).split("val")
    positions = np.arange(count)
    images = to_float(torch.from_numpy(scenes.images(positions)))
    objects = torch.from_numpy(scenes.objects(positions))
    detector = DetectorFeatures().to(options.device)
    records = []
    for step in options.steps or (run.step,):
        tokenizer = load_tokenizer_of(step)
        decoded = reconstruct(tokenizer, images)[0].clamp(-1, 1)
        protocol = detector.protocol | {"weights_of": run.name, "step": step, "split": "val"}
        records += judge.ceilings(detector.network, images, decoded, objects, protocol)
    return records


def _check_options(run, options, samplings):
    """Check all options before any sample is drawn; return CLIP if there are captions, else None.

    Raises UserError for the first option that cannot be used.
    """
    read_metrics(run)  # raises UserError for a damaged file
    if options.steps and (options.samples or options.reconstruction):
        raise UserError(
            "--steps names checkpoints to draw samples from: it cannot be combined with --samples "
            "or --reconstruction."
        )
    if missing_steps := set(options.steps) - set(run.checkpoint_steps()):
        steps_present = ", ".join(map(str, run.checkpoint_steps())) or "none"
        raise UserError(
            f"run '{run.name}' has no checkpoint of step "
            f"{', '.join(map(str, sorted(missing_steps)))}: it has {steps_present}. A run keeps "
            "its two newest checkpoints and the best one while it trains, and more with --keep."
        )
    if options.export and len(samplings) * max(1, len(options.steps)) > 1:
        raise UserError(
            "--export writes one file, but these options draw several sets of samples: export "
            "them one by one."
        )
    _check_images(options)
    clip = None
    if options.captions:
        for sampling in samplings:
            with given_by("--captions"):
                read_captions(options.captions, None if options.samples else sampling.count)
        with given_by("--clip"):
            clip = CLIP(options.clip, options.offline).to(options.device)
    if options.export:
        with given_by("--export"):
            check_target(options.export)
    return clip


def _check_images(options):
    """Raise UserError for options of images that would have no effect."""
    is_reconstructing = options.reconstruction or options.both
    require(
        not options.images or is_reconstructing,
        "--images are the images to reconstruct: add --reconstruction.",
    )
    for name in ("image_size", "interpolation"):
        option = f"--{name.replace('_', '-')}"
        require(
            options.images or not getattr(options, name),
            f"{option} applies to --images only: give --images, or leave {option} out.",
        )


def _network(name, options, **settings):
    with given_by("--weights" if options.weights else "--network"):
        return load_network_by_name(name, options.weights, options.offline, **settings).to(
            options.device
        )


def size_mismatch(protocol):
    """Return a warning if the samples and the reference of a protocol differ in size, "" if not."""
    samples = protocol.get("samples_size", "not stated")
    reference = protocol.get("reference_size", "not stated")
    if samples == reference or "not stated" in (samples, reference):
        return ""
    return f"samples of {samples} px are compared with a reference of {reference} px"


def _sweep_samplings(options):
    """Return one Sampling per value of `options.sweep`, or the only one if there is no sweep."""
    if not options.sweep:
        return [options.sampling]
    key, _, values = options.sweep.partition("=")
    known = {f.name: f.type for f in fields(Sampling)}
    if key not in known or not values:
        raise UserError(
            f"--sweep {options.sweep}: expected one of {', '.join(known)} with its values, as in "
            f"cfg_scale=1,1.25,1.5.{nearest(key, known)}"
        )
    kind = type(getattr(Sampling, key))
    try:
        numbers = [kind(value) for value in values.split(",")]
    except ValueError:
        raise UserError(
            f"--sweep {options.sweep}: '{values}' is no list of numbers for {key}."
        ) from None
    with given_by(f"--sweep {options.sweep}"):
        return [replace(options.sampling, **{key: number}) for number in numbers]


def _samples(run, step, networks, config, options, sampling):
    """Return (origin, labels, batches) of the samples to score: what their protocol states of them,
    the classes (N,) that they are drawn from, and a function that yields them.

    The samples are drawn with `networks`, a generator and a tokenizer. With `options.samples` they
    are read from there instead, and their classes are not known: None.
    """
    if options.samples:
        size = options.sample_size or config.image_size
        origin = {"samples": Path(options.samples).name}
        return origin, None, lambda: open_images(options.samples, size)
    generator, tokenizer = networks
    origin = {
        **asdict(sampling),
        "labels": "balanced, shuffled",
        "weights_of": run.name,
        "step": step,
    } | drawing_protocol(generator)
    if options.sample_size:
        origin["samples_resized"] = options.sample_size
    labels = balanced_labels(sampling.count, generator.config.num_classes, sampling.seed)
    batches = functools.partial(
        draw_samples,
        samples_folder(run, origin),
        generator,
        tokenizer,
        labels,
        sampling.seed,
        options.quiet,
        side=options.sample_size,
        grid=generator.grid,
        **{k: v for k, v in asdict(sampling).items() if k not in ("count", "seed")},
    )
    return origin, labels, batches


def _generation(run, step, networks, config, network, real, options, sampling, clip):
    """Compare samples, see `_samples`, with the reference `real` in the space of `network`."""
    origin, labels, batches = _samples(run, step, networks, config, options, sampling)
    with given_by(options.samples and "--samples"):
        fake = extract(options.samples or run.name, batches(), network, options.device)
    if labels is not None and not options.sample_size:
        keep_sheet(run, step, sampling, batches(), labels)
    if options.export:
        write_atomically(
            Path(options.export).expanduser(),
            lambda temporary: write_npz(temporary, batches(), fake.count),
        )
    protocol = {
        **network.protocol,
        **origin,
        "rounding": "uint8",
        "samples_count": fake.count,
        "samples_hash": fake.digest,
        "reference": Path(real.name).name,
        "reference_count": real.count,
        "reference_hash": real.digest,
        "resize": config.interpolation,
        "samples_size": fake.size,
        "reference_size": real.size,
    }
    # samples of a file may have another size than the run's images
    if fake.size == f"{config.image_size} x {config.image_size}":
        protocol["image_size"] = config.image_size
    # beside the teacher's space, that of the judge has one distance
    is_judge = network.name in JUDGES.values() and not options.network
    names = options.metrics or ((f"fd_{network.name}",) if is_judge else None)
    with given_by("--metrics" if options.metrics else ""):
        metrics = compare(fake, real, network, names, on_missing=report_missing_frechet)
    records = [
        record(metric, value, protocol | details) for metric, (value, details) in metrics.items()
    ]
    is_detector = network.name == DetectorFeatures.name
    if is_detector and labels is not None and not options.metrics:
        stated = {k: v for k, v in protocol.items() if not k.startswith("reference")}
        records += judge.sample_records(network.network, batches(), labels, stated)
    return records + _clip_score(batches(), protocol, options, clip) if clip else records


def keep_sheet(run, step, sampling, batches, labels):
    """Keep 24 samples, in the order of the classes and then again from the first one, as a picture:
    runs/NAME/sheets/STEP-SCALE.png.

    batches: uint8 samples (n, H, W, 3) of the labels (N,). A sheet that exists is left as it is.
    Its name states no more than step and guidance, so that other settings than the default ones
    have no sheet, and neither have too few samples.
    """
    path = run.path / SHEETS / f"{step:07d}-{sampling.cfg_scale:g}.png"
    plain = replace(sampling, count=Sampling.count, cfg_scale=Sampling.cfg_scale)
    by_class = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    count = 2 * PANEL_WIDTH
    rounds = -(-count // len(by_class))
    if path.exists() or plain != Sampling() or min(map(len, by_class)) < rounds:
        return
    places = torch.stack([rows[:rounds] for rows in by_class], 1).flatten()[:count]
    samples = to_float(torch.cat(list(batches))[places])
    grid = to_uint8(image_grid(samples, PANEL_WIDTH, PANEL_GAP)[None])[0].numpy()
    write_atomically(path, lambda target: Image.fromarray(grid).save(target, format="PNG"))


def _halves(real, network, config, options):
    """Return a record of the Fréchet distance between two halves of the reference, if a Fréchet
    distance is measured: it shows how much of a distance is due to the number of images.
    """
    metric = "gfid" if network.name == "inception" else f"fd_{network.name}"
    is_measured = not options.metrics or metric in options.metrics
    halves = halves_distance(real, network) if is_measured else None
    if halves is None:
        return []
    distance, count = halves
    protocol = {
        **network.protocol,
        "reference": Path(real.name).name,
        "reference_count": real.count,
        "reference_hash": real.digest,
        "reference_size": real.size,
        "resize": config.interpolation,
        "half": count,
    }
    return [record(f"{metric}_halves", distance, protocol)]


def _clip_score(batches, protocol, options, network):
    """Return a record of the CLIP score: 100 times the mean cosine of samples and captions."""
    captions = read_captions(options.captions, protocol["samples_count"])
    cosines = []
    for images in batches:
        cosines.append(network(images, captions[: len(images)]).cpu())
        captions = captions[len(images) :]
    digest = file_hash(Path(options.captions).expanduser())
    clip_protocol = {
        **{key: value for key, value in protocol.items() if not key.startswith("reference")},
        **network.protocol,
        "captions": digest[:12],
    }
    return [record("clip_score", 100 * torch.cat(cosines), clip_protocol)]


@torch.no_grad()
def _likelihood(run, step, networks, source, device):
    """Return records of the next-token loss on validation images, the entropy H of their codes, and
    the part of H that the generator predicts, H - NTP (all in nats per token).
    """
    generator, tokenizer = networks
    images, labels = load(source, "val", run.config["eval_images"])
    indices = torch.cat([tokenizer.encode(x.to(device)) for x in images.split(32)]).flatten(1)
    losses = [
        F.cross_entropy(generator(i, c).transpose(1, 2), i, reduction="none").cpu()
        for i, c in zip(indices.split(32), labels.to(device).split(32))
    ]
    ntp = torch.cat(losses).double().mean(1)
    entropy = usage(indices.cpu(), tokenizer.config.codebook_size).entropy
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
    """Measure the tokenizer on the run's validation images, or on all of `options.images`."""
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


# the options that apply to tokenizer files
FILE_OPTIONS = {"network", "weights", "offline", "reference_count", "reconstruction", "images",
                "image_size", "interpolation", "out", "device", "quiet"}  # fmt: skip


def evaluate_files(names, options=EvaluateOptions(), interpolations=("bicubic",)):
    """Measure the tokenizers of files on `options.images`, once for each of `interpolations`.

    Returns the records of this call, and adds them to those of earlier calls in `options.out`.
    """
    require(
        options.reconstruction and options.images,
        f"'{names[0]}' is a file: gear evaluate FILE --reconstruction --images PATH measures its "
        "tokenizer. A generator is evaluated by the name of its run.",
    )
    for name in (f.name for f in fields(options) if f.name not in FILE_OPTIONS):
        is_default = getattr(options, name) == getattr(EvaluateOptions(), name)
        require(
            is_default,
            f"--{name.replace('_', '-')} is for runs, and '{names[0]}' is a file: leave it out.",
        )
    with given_by("--out"):
        out = check_target(options.out, ".json")
        earlier_records = read_scores(out) if out.exists() else []
    records = []
    options = replace(options, device=str(open_device(options.device)))
    space = options.network or "inception"
    count = options.reference_count or reference_images(space)
    # rFID resizes floats, not uint8
    resize = {"resize": "torch"} if space == "inception" else {}
    network = _network(space, options, **resize)
    for name in names:
        for interpolation in interpolations:
            records += file_records(
                name,
                options.images,
                network,
                count,
                options.image_size or 256,
                interpolation,
                device=options.device,
                quiet=options.quiet,
            )
            _write_records(out, earlier_records + records)
    return records


def _keep(run, records):
    """Merge records into metrics.json: a record replaces an earlier one with the same metric and
    protocol.
    """
    _write_records(run.path / "metrics.json", [*read_metrics(run), *records])


def _write_records(path, records):
    """Write records as JSON; of several with the same metric and protocol, only the last."""
    latest = {(r["metric"], json.dumps(r["protocol"], sort_keys=True)): r for r in records}
    ordered = [latest[key] for key in sorted(latest)]
    text = json.dumps(ordered, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_metrics(run):
    """Return the records of a run's evaluations, an empty list before the first one.

    Raises UserError if metrics.json cannot be read.
    """
    return run.scores()


def scores(run):
    """Return the records of a run's metrics.json as a table: metric, value, and one column per
    field of the protocols.
    """
    lines = [
        {"metric": r["metric"], "value": r["value"], **r["protocol"]} for r in read_metrics(run)
    ]
    return pd.DataFrame(lines, columns=None if lines else ["metric", "value"])


def metrics_table(runs):
    """Return the metrics of runs as (table, {id: protocol}): one row per run, and one column per
    metric and protocol.

    Two numbers share a column only if their protocols are equal except for the run's name, step and
    samples.
    """
    rows = {}
    protocols = {}
    for run in runs:
        # in the order of steps, so that the newest value stays in the table
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
    """Print `metrics_table`, one line per metric, and below it each protocol with its id; then
    `judge.judge_table`, if there is one.

    A metric in the feature space to which a generator was aligned is marked.
    """
    table, protocols = metrics_table(runs)
    judged = [name for name in table.columns if name.startswith(judge.PREFIX)]
    teachers = {own_teacher(run) for run in runs}
    table = table.drop(columns=judged)
    marks = {
        name: f"{name} *"
        for name in table.columns
        if str(protocols[name[-9:-1]].get("network")) in teachers
    }
    table = table.rename(columns=marks)
    print(table.T.to_string(float_format=lambda value: f"{value:.5g}", na_rep=""))
    if marks:
        print("* in the feature space of a teacher to which these generators were aligned")
    for key, protocol in protocols.items():
        if all(f"[{key}]" not in name for name in table.columns):
            continue
        words = [f"{name} {value}" for name, value in sorted(protocol.items())]
        if warning := size_mismatch(protocol):
            words.append(warning)
        print(f"[{key}] " + ", ".join(words))
    if judged:
        print("\nWhat the detector reads, as shares of images (class: shape and texture):")
        print(
            judge.judge_table(runs).to_string(float_format=lambda value: f"{value:.3f}", na_rep="")
        )
