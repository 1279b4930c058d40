"""An estimate of what a run costs: parameters, FLOPs, memory and hours of each part, computed from
networks without weights. gear/cost/counts.py counts the parts.
"""

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

from gear.config import Range, UserError
from gear.cost import counts
from gear.cost.counts import Count
from gear.images import check_divides
from gear.teachers import split
from gear.tokenizer.readout import WHOLE
from gear.training.objectives import PASSES
from gear.training.stages import AVERAGED, STAGES


class GPU(NamedTuple):
    """Peak rates and memory of a GPU, for dense products."""

    bf16: float  # TFLOP/s in bf16, summed in float32
    float32: float  # TFLOP/s in float32 outside the tensor cores
    gigabytes: float


GPUS = {  # from the vendor's data sheets
    "h100": GPU(989.4, 66.9, 80),  # SXM
    "h200": GPU(989.4, 66.9, 141),  # SXM
    "a100": GPU(312.0, 19.5, 80),  # SXM
    "rtx4090": GPU(165.2, 82.6, 24),
}
TRAINED = 16  # bytes per trained parameter: weight, gradient and Adam's two moments
WEIGHT = 4  # bytes per parameter of a frozen network, or of an average
# the share of the data sheet's rate that is reached
Utilisation = Annotated[float, Range(0, 1, without=0)]
# gradients that a backward pass holds at once, in units of the largest activation, as torch's
# allocator showed at 256 px
GRADIENTS = 6
USABLE = 0.9  # share of a GPU's memory; the rest is lost to its libraries and to fragmentation


@dataclass(frozen=True)
class Pass:
    """The work of one part in one update of Algorithm 1."""

    update: str  # name of the update
    part: str  # name of the part of a network
    # "train", "fixed" (only the input gets a gradient) or "forward" (no gradient)
    mode: str
    precision: str  # "float32" or "bf16"
    count: Count  # cost of one image, once
    times: int = 1  # how often the part runs per step

    @property
    def training(self):
        """FLOPs per image and step."""
        return self.times * (self.count.forward + self.count.backward)


@dataclass(frozen=True)
class Price:
    """The cost of a run."""

    parameters: dict  # {part: number of parameters}
    trained: tuple  # names of the parts that train
    averaged: tuple  # names of the parts of which a moving average is kept
    passes: list  # the Passes of one step
    is_compiled: bool = False  # whether the networks are compiled, and so save fewer activations

    @property
    def held(self):
        """Bytes of weights, gradients, Adam's moments and averages."""
        return sum(n * self.bytes_of(part) for part, n in self.parameters.items())

    def bytes_of(self, part):
        """Return the bytes per parameter of a part."""
        return (TRAINED if part in self.trained else WEIGHT) + WEIGHT * (part in self.averaged)

    @property
    def saved(self):
        """Bytes of activations per image: what autograd saves for the backward pass, in the update
        that saves most.
        """
        updates = {p.update for p in self.passes}
        return max(
            sum(self.saved_in(p) for p in self.passes if p.update == update) for update in updates
        )

    def saved_in(self, step_pass):
        """Return the bytes per image that autograd saves in a Pass."""
        count = step_pass.count
        return step_pass.times * (count.saved - self.is_compiled * count.fused)

    @property
    def under_way(self):
        """Bytes of gradients per image that a backward pass holds at once, estimated as GRADIENTS
        times the largest activation.
        """
        return GRADIENTS * max(p.count.largest for p in self.passes)

    def memory(self, images):
        """Return the peak memory in bytes for `images` images at once."""
        return self.held + images * (self.saved + self.under_way)

    def images_that_fit(self, memory):
        """Return the number of images at once that fit into `memory` bytes."""
        return max(0, int((USABLE * memory - self.held) // (self.saved + self.under_way)))

    def hours(self, images, gpu, utilisation):
        """Return the hours for `images` images in total on a GPU that reaches the share
        `utilisation` of its data sheet's rate.
        """
        rate = lambda p: 1e12 * utilisation * getattr(GPUS[gpu], p.precision)  # noqa: E731
        return images * sum(p.training / rate(p) for p in self.passes) / 3600


def price(config, is_compiled=False):
    """Return the Price of a Config's run, without loading, downloading or writing anything.

    Compiled networks save fewer activations. Raises UserError for sizes that do not fit each other,
    an unknown teacher, or a teacher whose library is not installed.
    """
    stage = STAGES[config.stage]
    parts = works(config)
    passes = []
    for update, part, mode, times in steps(config):
        precision = precision_of(part, config)
        work_counts = [counts.count(*work, mode, precision) for work in parts[part]]
        total = Count(*map(sum, zip(*work_counts)))
        passes.append(Pass(update, part, mode, precision, total, times))
    parameters = {
        part: sum(counts.parameters(*work) for work in part_works)
        for part, part_works in parts.items()
        if part not in ("read-out", "guidance")  # no parameters besides the generator's
    }
    trained = parts_of(stage.trains)
    averaged = parts_of(name for name in stage.trains if name in AVERAGED)
    return Price(parameters, trained, averaged, passes, is_compiled)


def parts_of(networks):
    """Return the names of the parts that the given networks consist of."""
    return tuple(part for name in networks for part in TOKENIZER_PARTS.get(name, (name,)))


TOKENIZER_PARTS = {"tokenizer": ("encoder", "quantizer", "decoder")}


def fewest_parts(images, room):
    """Return the smallest number of equal micro-batches of at most `room` images that `images`
    images can be split into, or None if `room` is less than one image.
    """
    return next((n for n in range(1, images + 1) if images % n == 0 and images // n <= room), None)


def parts_that_fit(config, images, memory, is_compiled):
    """Return the smallest number of equal micro-batches of `images` images that each fit into
    `memory` bytes.

    Raises UserError if not even one image fits.
    """
    cost = price(config, is_compiled)
    if parts := fewest_parts(images, cost.images_that_fit(memory)):
        return parts
    needed, free = cost.memory(1) / 1e9, memory / 1e9
    raise UserError(
        f"one image at once needs {needed:.1f} GB, but only {USABLE:.0%} of {free:.1f} GB can be "
        "used: take a smaller generator, or spread it over several GPUs with --fsdp."
    )


def precision_of(part, config):
    """Return the precision of a part's products on a GPU: float32 for the affinity and the
    read-outs, the run's precision for all other parts.
    """
    return "float32" if part in ("quantizer", "read-out") else config.precision


def works(config):
    """Return the works of each part of a run, {part: [(function of counts.py, its arguments)]}.

    The part "guidance" is the frozen generator.
    """
    size = config.data.image_size
    objective = config.objective
    generator = config.generator
    if config.trains("teacher"):
        return {"teacher": [(counts.scenes_teacher, (size,))]}
    if config.trains("detector"):
        return {"detector": [(counts.detector, (size,))]}
    check_divides((size, size), config.tokenizer.downsampling)
    side = size // config.tokenizer.downsampling
    codes = config.tokenizer.codebook_size
    is_matrix = config.batch_size * side**2 * codes <= WHOLE
    parts = {
        "encoder": [(counts.encoder, (config.tokenizer, size))],
        "quantizer": [(counts.quantizer, (config.tokenizer, side, is_matrix))],
        "decoder": [(counts.decoder, (config.tokenizer, side))],
    }
    if config.trains("discriminator"):
        parts["discriminator"] = [
            (counts.discriminator, (objective.disc_channels, objective.disc_layers, size))
        ]
        parts |= {"LPIPS": [(counts.lpips, (size,))]} if objective.lpips_weight > 0 else {}
    if config.trains("generator"):
        # the frozen generator is in evaluation mode, without dropout: see `objectives.frozen`
        frozen_generator = replace(generator, dropout=0.0)
        depth = None if objective.bridge.startswith("naive") else generator.tap_layer
        parts["generator"] = [(counts.generator, (generator, codes, side, None, False))]
        parts["guidance"] = [(counts.generator, (frozen_generator, codes, side, depth, True))]
        parts["read-out"] = [
            (
                counts.readout,
                (
                    objective.bridge == "soft",
                    objective.tau,
                    config.tokenizer,
                    side,
                    generator.width,
                    is_matrix,
                ),
            )
        ]
    if config.is_aligned:
        teachers = split(config.teacher)
        parts["teacher"] = [
            (counts.teacher, (spec, size, config.tokenizer.downsampling)) for spec in teachers
        ]
        parts["projector"] = [
            (counts.projector, (generator, counts.teacher_dim(spec), side)) for spec in teachers
        ]
    return parts


def steps(config):
    """List the passes of a step as (update, part, mode, times): the forward passes that its updates
    share, then the passes of each update.
    """
    passes = [("teacher", "teacher", "forward", 1)] if config.is_aligned else []
    if not config.trains("tokenizer") and config.uses("tokenizer"):
        passes += [("tokenizer", part, "forward", 1) for part in ("encoder", "quantizer")]
    for update in STAGES[config.stage].updates:
        name = update.__name__.removesuffix("_update")
        passes += [(name, *update_pass) for update_pass in PASSES[update](config)]
    return passes
