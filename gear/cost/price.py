"""What a run would cost: parameters, FLOPs, memory and hours, part by part, from networks without
weights. An estimate. How parts are counted, gear/cost/counts.py says.
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
    """Dense TFLOP/s of products in bf16 (summed in float32), and in float32 outside the tensor
    cores; memory in GB.
    """

    bf16: float
    float32: float
    gigabytes: float


GPUS = {  # from the makers' data sheets
    "h100": GPU(989.4, 66.9, 80),  # SXM
    "h200": GPU(989.4, 66.9, 141),  # SXM
    "a100": GPU(312.0, 19.5, 80),  # SXM
    "rtx4090": GPU(165.2, 82.6, 24),
}
TRAINED = 16  # bytes that a trained parameter takes: weight, gradient, two moments
WEIGHT = 4  # bytes of a frozen one, or an averaged
# the share of a GPU's data sheet that is reached
Utilisation = Annotated[float, Range(0, 1, without=0)]
# of the largest activation, in a backward pass at once: what torch's allocator saw at 256 px
GRADIENTS = 6
USABLE = 0.9  # of a GPU's memory: the rest goes to its libraries and to fragments


@dataclass(frozen=True)
class Pass:
    """What a part does in an update of Algorithm 1, `times` a step: in `mode` "train", "fixed"
    (only its input gets a gradient) or "forward" (nothing does), in `precision`.
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
    """What a run takes: `parameters` {part: number}, the parts that train and those that are
    averaged, and its passes.
    """

    parameters: dict
    trained: tuple
    averaged: tuple
    passes: list
    is_compiled: bool = False

    @property
    def held(self):
        """Bytes of weights, gradients, Adam's moments and averages."""
        return sum(n * self.bytes_of(part) for part, n in self.parameters.items())

    def bytes_of(self, part):
        """Return the bytes that each parameter of a part takes."""
        return (TRAINED if part in self.trained else WEIGHT) + WEIGHT * (part in self.averaged)

    @property
    def saved(self):
        """Bytes of activations an image: what autograd keeps for the backward pass, in the update
        that keeps most.
        """
        updates = {p.update for p in self.passes}
        return max(
            sum(self.saved_in(p) for p in self.passes if p.update == update) for update in updates
        )

    def saved_in(self, work):
        """Return the bytes an image that autograd keeps in a Pass."""
        return work.times * (work.count.saved - self.is_compiled * work.count.fused)

    @property
    def under_way(self):
        """Bytes of gradients an image that a backward pass holds at once: several of the largest
        activations.
        """
        return GRADIENTS * max(p.count.largest for p in self.passes)

    def memory(self, images):
        """Return the peak in bytes with so many images at once."""
        return self.held + images * (self.saved + self.under_way)

    def images_that_fit(self, memory):
        """Return how many images go at once into so many bytes."""
        return max(0, int((USABLE * memory - self.held) // (self.saved + self.under_way)))

    def hours(self, images, gpu, utilisation):
        """Return the hours of so many images, all steps together, on a GPU that does `utilisation`
        of its data sheet.
        """
        rate = lambda p: 1e12 * utilisation * getattr(GPUS[gpu], p.precision)  # noqa: E731
        return images * sum(p.training / rate(p) for p in self.passes) / 3600


def price(config, is_compiled=False):
    """Count what a Config's run takes: a Price; compiled networks keep less. Nothing is loaded,
    fetched or written.

    Raises UserError for sizes that do not fit, an unknown teacher, or one whose library is not
    installed.
    """
    stage = STAGES[config.stage]
    parts = works(config)
    passes = []
    for update, part, mode, times in steps(config):
        precision = precision_of(part, config)
        each = [counts.count(*work, mode, precision) for work in parts[part]]
        passes.append(Pass(update, part, mode, precision, Count(*map(sum, zip(*each))), times))
    held = {part: works for part, works in parts.items() if part not in ("read-out", "guidance")}
    parameters = {
        part: sum(counts.parameters(*work) for work in works) for part, works in held.items()
    }
    trained = parts_of(stage.trains)
    averaged = parts_of(name for name in stage.trains if name in AVERAGED)
    return Price(parameters, trained, averaged, passes, is_compiled)


def parts_of(networks):
    """Return the parts of which networks consist, in price's words."""
    return tuple(part for name in networks for part in TOKENIZER_PARTS.get(name, (name,)))


TOKENIZER_PARTS = {"tokenizer": ("encoder", "quantizer", "decoder")}


def fewest_parts(images, room):
    """Return into how few equal parts so many images go, none larger than `room`; None where there
    is no room for one.
    """
    return next((n for n in range(1, images + 1) if images % n == 0 and images // n <= room), None)


def parts_that_fit(config, images, memory, is_compiled):
    """Return into how few equal parts so many images of a run's step go for each to fit into
    `memory` bytes.

    Raises UserError where not even one image does.
    """
    cost = price(config, is_compiled)
    if parts := fewest_parts(images, cost.images_that_fit(memory)):
        return parts
    needed, free = cost.memory(1) / 1e9, memory / 1e9
    raise UserError(
        f"one image at once needs {needed:.1f} GB, and {USABLE:.0%} of {free:.1f} GB are to be "
        "had: take a smaller "
        f"generator, or --fsdp over several GPUs."
    )


def precision_of(part, config):
    """Return the type of a part's products on a GPU: the run's, but of A and of the read-outs
    float32.
    """
    return "float32" if part in ("quantizer", "read-out") else config.precision


def works(config):
    """Return what there is to run, {part: [(a function below, its arguments)]}; "guidance" is the
    generator held fixed.
    """
    size, objective, generator = config.data.image_size, config.objective, config.generator
    if config.trains("teacher"):
        return {"teacher": [(counts.scenes_teacher, (size,))]}
    check_divides((size, size), config.tokenizer.downsampling)
    side, codes = size // config.tokenizer.downsampling, config.tokenizer.codebook_size
    whole = config.batch_size * side**2 * codes <= WHOLE
    parts = {
        "encoder": [(counts.encoder, (config.tokenizer, size))],
        "quantizer": [(counts.quantizer, (config.tokenizer, side, whole))],
        "decoder": [(counts.decoder, (config.tokenizer, side))],
    }
    if config.trains("discriminator"):
        parts["discriminator"] = [
            (counts.discriminator, (objective.disc_channels, objective.disc_layers, size))
        ]
        parts |= {"LPIPS": [(counts.lpips, (size,))]} if objective.lpips_weight > 0 else {}
    if config.trains("generator"):
        # what evaluation mode is: see `frozen`
        still = replace(generator, dropout=0.0)
        depth = None if objective.bridge.startswith("naive") else generator.tap_layer
        parts["generator"] = [(counts.generator, (generator, codes, side, None, False))]
        parts["guidance"] = [(counts.generator, (still, codes, side, depth, True))]
        parts["read-out"] = [
            (
                counts.readout,
                (
                    objective.bridge == "soft",
                    objective.tau,
                    config.tokenizer,
                    side,
                    generator.width,
                    whole,
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
    """List the passes of a step, (update, part, mode, times): what its updates share, and what each
    runs alone.
    """
    found = [("teacher", "teacher", "forward", 1)] if config.is_aligned else []
    if not config.trains("tokenizer") and config.uses("tokenizer"):
        found += [("tokenizer", part, "forward", 1) for part in ("encoder", "quantizer")]
    for update in STAGES[config.stage].updates:
        name = update.__name__.removesuffix("_update")
        found += [(name, *each) for each in PASSES[update](config)]
    return found
