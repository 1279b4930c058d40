"""What defines a run: one stage of one method, with everything that its result depends on."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from gear.config import (
    BelowOne,
    Checked,
    Count,
    NonNegative,
    Positive,
    Range,
    Seed,
    Share,
    Tau,
    Whole,
    require,
)
from gear.data import DataConfig
from gear.generator.config import GeneratorConfig
from gear.tokenizer.config import BACKBONES, TokenizerConfig
from gear.tokenizer.model import check_divides
from gear.training.stages import STAGES


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    tokenizer_lr: NonNegative = 1e-4  # also the discriminator's; 0 leaves both as they are
    generator_lr: NonNegative = 1e-4  # also the projector's and the scenes teacher's; see above
    beta2: BelowOne = 0.999  # Adam's
    clip: Positive = 1.0  # largest norm of a network's gradient
    warmup_steps: Whole = 1  # 0 and 1: none
    decay_from: Share = 1.0  # share of the steps after which learning rates fall, linearly,
    decay_to: Share = 0.1  # to this share of themselves
    tokenizer_ema: BelowOne = 0.9999
    generator_ema: BelowOne = 0.9999


@dataclass(frozen=True)
class ObjectiveConfig(Checked):
    """Weights of Eqs. 2, 11 and 12; L_rec, the codebook term and L_NTP have weight 1."""

    lpips_weight: NonNegative = 0.1
    gan_weight: NonNegative = 0.1
    gan_start: Share = 0.0  # share of the steps before the adversarial term sets in
    entropy_weight: NonNegative = 0.05
    # without effect on IBQ, whose codebook term holds a commitment of weight 0.25 already
    commit_weight: NonNegative = 0.25
    align_weight: NonNegative = 0.5  # lambda
    tau: Tau = 0.1  # guidance temperature of the soft read-out
    # what reaches the tokenizer in the stage `joint`
    bridge: Literal["soft", "straight_through", "naive_inputs", "naive", "none"] = "soft"
    disc_channels: Count = 64  # of the discriminator's first layer
    disc_layers: Count = 3  # halvings of the discriminator
    # "batch" as in the public code: an image's logits depend on the others of its batch, and of a
    # batch in parts on those of its part
    disc_norm: Literal["group", "batch"] = "group"


SMALL = 2**19  # pixels of a batch


@dataclass(frozen=True)
class Config(Checked):
    """One run: one stage of one method. Composed in gear/experiments/recipes.py."""

    recipe: str
    stage: Literal["tokenizer", "joint", "generator", "teacher"]
    steps: Annotated[int, Range(1, 9_999_999)]  # a checkpoint's name has seven digits
    seed: Seed = 0
    batch_size: Count = 256
    # of the networks' products; quantizer, read-outs and losses: float32
    precision: Literal["float32", "bf16"] = "float32"
    # the run, or a file of a known layout, whose tokenizer this one starts from, or keeps frozen
    tokenizer_run: str = ""
    teacher: str = "scenes"  # NAME[@LAYER][=PATH] of gear.teachers; several with commas between
    log_every: Count = 100  # steps; a logged loss is the mean since the last line
    eval_every: Count = 5000
    save_every: Count = 5000
    eval_images: Count = 512
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def trains(self, network):
        """Whether this run trains a network: "tokenizer", "discriminator", "generator", "projector"
        or "teacher".
        """
        return network in STAGES[self.stage].trains

    def uses(self, network):
        """Whether this run trains a network or reads it, frozen."""
        return self.trains(network) or network in STAGES[self.stage].frozen

    @property
    def is_aligned(self):
        """Whether this run has a teacher whose features its generator is aligned to."""
        return self.trains("generator") and self.objective.align_weight > 0

    @property
    def is_small(self):
        """Whether a GPU would take longer to launch a step than to compute it: see
        gear/training/running.py.
        """
        return self.batch_size * self.data.image_size**2 <= SMALL

    def __post_init__(self):
        super().__post_init__()
        size, halvings, slots = (
            self.data.image_size,
            self.objective.disc_layers,
            self.generator.text_slots,
        )
        if self.uses("tokenizer"):
            check_divides((size, size), self.tokenizer.downsampling)
            spread = (
                not BACKBONES[self.tokenizer.backbone].adapts or size > self.tokenizer.downsampling
            )
            require(
                spread,
                (
                    f"image_size is {size}: a MAGVIT-2 decoder needs two tokens at least, and that "
                    "is one."
                ),
            )
        if self.trains("discriminator"):
            sees = (
                f"disc_layers is {halvings}: so often halved, images of {size} px do not leave the "
                "discriminator three pixels."
            )
            require(size >> halvings >= 3, sees)
        if self.trains("generator"):
            require(
                slots == 0,
                f"text_slots is {slots}: a run is conditioned on classes, and it has to be 0.",
            )
