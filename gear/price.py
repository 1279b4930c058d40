"""What a run would cost: parameters, FLOPs, memory and hours, part by part, from networks without weights. An estimate.

Every part runs the code that trains, on fake tensors (shapes and types, no memory). Products are counted as
torch.utils.flop_counter counts them: a multiplication and an addition are two, attention is counted in full though causal.
"""

import textwrap
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

from gear import counts
from gear.config import Range, UserError, check_value, nearest, require, to_dict
from gear.counts import Count
from gear.images import check_divides
from gear.run import Run, run_path
from gear.teachers import split
from gear.tokenizer.readout import WHOLE


class GPU(NamedTuple):
    """Dense TFLOP/s of products in bf16 (summed in float32), in TF32, and in float32 outside the tensor cores; memory in GB."""

    bf16: float
    tf32: float
    float32: float
    gigabytes: float


GPUS = {  # from the makers' data sheets
    "h100": GPU(989.4, 494.7, 66.9, 80),  # SXM
    "h200": GPU(989.4, 494.7, 66.9, 141),  # SXM
    "a100": GPU(312.0, 156.0, 19.5, 80),  # SXM
    "rtx4090": GPU(165.2, 82.6, 82.6, 24),
}
TRAINED, WEIGHT = 16, 4  # bytes a trained parameter takes (weight, gradient, two moments), and a frozen or an averaged one
Utilisation = Annotated[float, Range(0, 1, without=0)]  # the share of a GPU's data sheet that is reached
USABLE = 0.9  # of a GPU's memory: the rest goes to its libraries and to fragments


@dataclass(frozen=True)
class Pass:
    """What a part does in an update of Algorithm 1, `times` a step: in `mode` "train", "fixed" (only its input gets a
    gradient) or "forward" (nothing does), in `precision`.
    """

    update: str
    part: str
    mode: str
    precision: str
    count: Count
    times: int = 1

    @property
    def training(self):
        """FLOPs of an image in a step."""
        return self.times * (self.count.forward + self.count.backward)


@dataclass(frozen=True)
class Price:
    """What a run takes: `parameters` {part: number}, the parts that train and those that are averaged, and its passes."""

    parameters: dict
    trained: tuple
    averaged: tuple
    passes: list

    @property
    def held(self):
        """Bytes of weights, gradients, Adam's moments and averages."""
        return sum(n * self.bytes_of(part) for part, n in self.parameters.items())

    def bytes_of(self, part):
        """Return the bytes that each parameter of a part takes."""
        return (TRAINED if part in self.trained else WEIGHT) + WEIGHT * (part in self.averaged)

    @property
    def saved(self):
        """Bytes of activations an image: what autograd keeps for the backward pass, in the update that keeps most."""
        updates = {p.update for p in self.passes}
        return max(sum(p.times * p.count.saved for p in self.passes if p.update == update) for update in updates)

    def memory(self, images):
        """Return the peak in bytes with so many images at once."""
        return self.held + images * self.saved

    def images_that_fit(self, gpu):
        """Return how many images go at once on a GPU of `GPUS`."""
        return max(0, int((USABLE * GPUS[gpu].gigabytes * 1e9 - self.held) // self.saved))

    def hours(self, images, gpu, utilisation):
        """Return the hours of so many images, all steps together, on a GPU that does `utilisation` of its data sheet."""
        rate = lambda p: 1e12 * utilisation * getattr(GPUS[gpu], p.precision)  # noqa: E731
        return images * sum(p.training / rate(p) for p in self.passes) / 3600


def price(config):
    """Count what a Config's run takes: a Price. Nothing is loaded, fetched or written.

    Raises UserError for sizes that do not fit, an unknown teacher, or one whose library is not installed.
    """
    parts, passes = works(config), []
    for update, part, mode, times in steps(config):
        precision = precision_of(part, mode, config)
        each = [counts.count(*work, mode, precision) for work in parts[part]]
        passes.append(Pass(update, part, mode, precision, Count(*map(sum, zip(*each))), times))
    parameters = {
        part: sum(counts.parameters(*w) for w in parts[part]) for part in parts if part not in ("read-out", "guidance")
    }
    trained = TRAINS[config.stage]
    averaged = [part for part in trained if part not in ("discriminator", "projector", "teacher")]
    return Price(parameters, trained, tuple(averaged), passes)


def precision_of(part, mode, config):
    """Return the type of a part's products: of a teacher, of LPIPS and of A it is float32, whatever the run's precision."""
    if part in ("quantizer", "read-out", "teacher") and config.stage != "teacher":
        return "float32"
    if part == "LPIPS" and config.precision == "bf16":
        return "tf32"  # which float32 convolutions may be there: see gear.device
    return config.precision


def is_aligned(config):
    """Tell whether a run has a teacher and a projector."""
    return config.stage in ("joint", "generator") and config.objective.align_weight > 0


def works(config):
    """Return what there is to run, {part: [(a function below, its arguments)]}; "guidance" is the generator held fixed."""
    size, objective, generator = config.data.image_size, config.objective, config.generator
    if config.stage == "teacher":
        return {"teacher": [(counts.scenes_teacher, (size,))]}
    check_divides((size, size), config.tokenizer.downsampling)
    side, codes = size // config.tokenizer.downsampling, config.tokenizer.codebook_size
    whole = config.batch_size * side**2 * codes <= WHOLE
    parts = {
        "encoder": [(counts.encoder, (config.tokenizer, size))],
        "quantizer": [(counts.quantizer, (config.tokenizer, side, whole))],
        "decoder": [(counts.decoder, (config.tokenizer, side))],
    }
    if config.stage != "generator":
        parts["discriminator"] = [(counts.discriminator, (objective.disc_channels, objective.disc_layers, size))]
        parts |= {"LPIPS": [(counts.lpips, (size,))]} if objective.lpips_weight > 0 else {}
    if config.stage != "tokenizer":
        still = replace(generator, dropout=0.0, class_dropout=0.0)  # what evaluation mode is: see `frozen`
        depth = None if objective.bridge.startswith("naive") else generator.tap_layer
        parts["generator"] = [(counts.generator, (generator, codes, side, None, False))]
        parts["guidance"] = [(counts.generator, (still, codes, side, depth, True))]
        parts["read-out"] = [
            (counts.readout, (objective.bridge == "soft", objective.tau, config.tokenizer, side, generator.width, whole))
        ]
    if is_aligned(config):
        teachers = split(config.teacher)
        parts["teacher"] = [(counts.teacher, (spec, size, config.tokenizer.downsampling)) for spec in teachers]
        parts["projector"] = [(counts.projector, (generator, counts.teacher_dim(spec), side)) for spec in teachers]
    return parts


def steps(config):
    """List the passes of a step, (update, part, mode, times): those of gear/training/objectives.py."""
    objective, aligned, adversarial = config.objective, is_aligned(config), config.objective.gan_weight > 0
    if config.stage == "teacher":
        return [("teacher", "teacher", "train", 1)]
    found = [("teacher", "teacher", "forward", 1)] if aligned else []
    if config.stage == "generator":
        found += [("tokenizer", part, "forward", 1) for part in ("encoder", "quantizer")]
    else:
        found += [("tokenizer", part, "train", 1) for part in ("encoder", "quantizer", "decoder")]
        found += [("tokenizer", "LPIPS", "fixed", 1)] if objective.lpips_weight > 0 else []
        found += [("tokenizer", "discriminator", "fixed", 1)] if adversarial else []
    naive = objective.bridge.startswith("naive")
    if config.stage == "joint" and (naive or aligned and objective.bridge != "none"):
        guidance = ("read-out", "guidance") if naive else ("read-out", "guidance", "projector")
        found += [("tokenizer", part, "fixed", 1) for part in guidance]
    if config.stage != "generator" and adversarial:
        found.append(("discriminator", "discriminator", "train", 2))  # of an image and of its reconstruction
    if config.stage != "tokenizer":
        found += [("generator", part, "train", 1) for part in ("generator", "projector")[: 1 + aligned]]
    return found


TRAINS = {
    "teacher": ("teacher",),
    "tokenizer": ("encoder", "quantizer", "decoder", "discriminator"),
    "joint": ("encoder", "quantizer", "decoder", "discriminator", "generator", "projector"),
    "generator": ("generator", "projector"),
}


# -- in words ----------------------------------------------------------------------------------------------------


def told(name, config, gpu="h100", utilisation=0.4, accumulate=1):
    """Say what the run `name` would cost, its batch in `accumulate` parts, as text; on "cpu" without hours."""
    cost, images = price(config), config.steps * config.batch_size
    head = f"{name}: stage {config.stage}, {config.steps:,} steps of {config.batch_size} images"
    lines = [head + (f", from {config.tokenizer_run}" if config.tokenizer_run else ""), *_resolved(config), ""]
    lines.append("  part            parameters   bytes each")
    for part, n in cost.parameters.items():
        learns = "trained" if part in cost.trained else "frozen"
        averaged = ", averaged" if part in cost.averaged else ""
        lines.append(f"  {part:13} {n:12,}   {cost.bytes_of(part):10}  {learns}{averaged}")
    lines += ["", "  update         part           mode       GFLOP forward   in a step   MB kept   (an image)"]
    for p in cost.passes:
        mode, times = p.mode, f" x{p.times}" if p.times > 1 else ""
        kept = p.times * p.count.saved / 1e6
        lines.append(
            f"  {p.update:14} {p.part:14} {mode + times:10} {p.count.forward / 1e9:13.3f} {p.training / 1e9:11.3f} {kept:9.2f}"
        )
    total = sum(p.training for p in cost.passes)
    lines.append(f"  {'all':40} {total / 1e9:25.3f}" + f"{total * images:14.3g} FLOP in the run")
    lines += [
        "",
        f"  memory, at least: {_memory(cost, config.batch_size // accumulate)}",
        *_on(cost, config, gpu, utilisation, accumulate),
    ]
    return "\n".join(lines)


def _memory(cost, batch):
    whole = f"{cost.memory(batch) / 1e9:.1f} GB"
    return f"{cost.held / 1e9:.1f} GB held + {batch} images x {cost.saved / 1e6:.1f} MB kept for the backward pass = {whole}"


def _on(cost, config, gpu, utilisation, accumulate):
    """Say how many images fit on a GPU, and the hours."""
    if gpu not in GPUS:
        return [f"  hours on a {gpu}: not known, nobody measured it"]
    fit, card = cost.images_that_fit(gpu), GPUS[gpu]
    at_once, parts = config.batch_size // accumulate, [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    enough = next((n for n in parts if config.batch_size // n <= fit), None)
    room = "that fits" if at_once <= fit else f"that does not fit, only {fit} images at once do"
    room += f": --accumulate {enough}" if at_once > fit and enough else ""
    hours = cost.hours(config.steps * config.batch_size, gpu, utilisation)
    return [
        f"  {gpu}, {card.gigabytes} GB: {room}",
        f"  {gpu}, {card.bf16:g} TFLOP/s in bf16, {card.tf32:g} in TF32 and {card.float32:g} in float32, of which "
        f"{utilisation:.0%} is assumed: {hours:.3g} hours",
    ]


def _resolved(config):
    """Spell a Config out, a section a line."""
    sections = {"run": {k: v for k, v in to_dict(config).items() if not isinstance(v, dict)}}
    sections |= {k: v for k, v in to_dict(config).items() if isinstance(v, dict)}
    lines = []
    for section, values in sections.items():
        values = ", ".join(f"{k} {v if v != '' else None}" for k, v in values.items())
        lines += textwrap.wrap(values, 118, initial_indent=f"  {section:10} ", subsequent_indent=" " * 13)
    return lines


def dry_run(planned, gpu="h100", utilisation=0.4, accumulate=1):
    """Print what each of the runs [(name, Config)] would cost and all of them together; those that are finished cost nothing.

    Raises UserError for an unknown GPU, or a utilisation that is no share.
    """
    if gpu not in (*GPUS, "cpu"):
        raise UserError(f"unknown GPU '{gpu}'.{nearest(gpu, GPUS)} Known: {', '.join(GPUS)}; cpu gives no hours.")
    check_value("utilisation", utilisation, Utilisation)
    hours = 0.0
    for name, config in planned:
        divides = f"accumulate is {accumulate}: it has to divide batch_size, which is {config.batch_size} in {name}."
        require(config.batch_size % accumulate == 0, divides)
        run = Run(run_path(name))
        if run.exists and run.is_finished:
            print(f"{name}: finished\n")
            continue
        print(told(name, config, gpu, utilisation, accumulate) + "\n")
        if gpu in GPUS:
            hours += price(config).hours(config.steps * config.batch_size, gpu, utilisation)
    print(f"all on one {gpu}: {hours:.3g} hours\n" * (gpu in GPUS) + CAVEAT)


CAVEAT = """This is an estimate. FLOPs are those of matrix products and convolutions, attention in full, the adversarial term
as if on from the start, without validation; the share of the data sheet that is reached is an assumption; memory is weights,
gradients, Adam's moments, averages, and what autograd keeps in the update that keeps most, without work space.
nothing was trained"""
