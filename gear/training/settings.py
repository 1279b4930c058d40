"""The configuration of a run: one stage of one method, with every setting that its result depends
on.
"""

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
    # learning rate of the tokenizer and the discriminator; 0 leaves both unchanged
    tokenizer_lr: NonNegative = 1e-4
    # learning rate of the generator, the projector and the scenes teacher; 0 leaves them unchanged
    generator_lr: NonNegative = 1e-4
    beta2: BelowOne = 0.999  # of AdamW
    clip: Positive = 1.0  # largest norm of a network's gradient; a larger one is scaled down
    warmup_steps: Whole = 1  # steps of linear learning-rate warm-up; 0 and 1: none
    decay_from: Share = 1.0  # share of the steps after which learning rates decay linearly
    decay_to: Share = 0.1  # learning-rate factor at the end of the decay
    tokenizer_ema: BelowOne = 0.9999  # decay of the tokenizer's moving average
    generator_ema: BelowOne = 0.9999  # decay of the generator's moving average


@dataclass(frozen=True)
class ObjectiveConfig(Checked):
    """Weights of the loss terms of Eqs. 2, 11 and 12; L_rec, the codebook term and L_NTP have
    weight 1.
    """

    lpips_weight: NonNegative = 0.1
    gan_weight: NonNegative = 0.1
    gan_start: Share = 0.0  # share of the steps before the adversarial term starts
    entropy_weight: NonNegative = 0.05
    # without effect on IBQ, whose codebook term already contains a commitment term of weight 0.25
    commit_weight: NonNegative = 0.25
    align_weight: NonNegative = 0.5  # lambda, the weight of both alignment losses
    tau: Tau = 0.1  # guidance temperature of the soft read-out
    # which gradient of the generator reaches the tokenizer in the stage `joint`
    bridge: Literal["soft", "straight_through", "naive_inputs", "naive", "none"] = "soft"
    disc_channels: Count = 64  # channels of the discriminator's first layer
    disc_layers: Count = 3  # layers of the discriminator that halve the resolution
    # normalisation of the discriminator; "batch", as in the public code, makes an image's logits
    # depend on the other images of its batch or micro-batch
    disc_norm: Literal["group", "batch"] = "group"


SMALL = 2**19  # a batch of at most this many pixels makes a small step


@dataclass(frozen=True)
class Config(Checked):
    """One run: one stage of one method. gear/experiments/recipes.py composes Configs."""

    recipe: str
    stage: Literal["tokenizer", "joint", "generator", "teacher", "detector"]
    steps: Annotated[int, Range(1, 9_999_999)]  # at most seven digits, as in a checkpoint's name
    seed: Seed = 0
    batch_size: Count = 256
    # precision of the networks' products; quantizer, read-outs and losses always use float32
    precision: Literal["float32", "bf16"] = "float32"
    # the run, or the checkpoint file, whose tokenizer this run starts from or keeps frozen
    tokenizer_run: str = ""
    teacher: str = (
        "scenes"  # NAME[@LAYER][=PATH], see gear.teachers; several are separated by commas
    )
    log_every: Count = 100  # steps between log lines; a logged loss is the mean since the last line
    eval_every: Count = 5000  # steps between validations
    save_every: Count = 5000  # steps between checkpoints
    eval_images: Count = 512  # images of the validation split that are used
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def trains(self, network):
        """Tell whether this run trains a network: "tokenizer", "discriminator", "generator",
        "projector", "teacher" or "detector".
        """
        return network in STAGES[self.stage].trains

    def uses(self, network):
        """Tell whether this run trains a network, or reads it frozen."""
        return self.trains(network) or network in STAGES[self.stage].frozen

    @property
    def is_aligned(self):
        """Whether this run aligns its generator to a teacher's features."""
        return self.trains("generator") and self.objective.align_weight > 0

    @property
    def is_small(self):
        """Whether a GPU would take longer to launch a step than to compute it (see
        gear/training/running.py).
        """
        return self.batch_size * self.data.image_size**2 <= SMALL

    def __post_init__(self):
        super().__post_init__()
        size = self.data.image_size
        halvings = self.objective.disc_layers
        slots = self.generator.text_slots
        if self.uses("tokenizer"):
            check_divides((size, size), self.tokenizer.downsampling)
            has_enough_tokens = (
                not BACKBONES[self.tokenizer.backbone].adapts or size > self.tokenizer.downsampling
            )
            require(
                has_enough_tokens,
                f"image_size is {size}: this is one token; a MAGVIT-2 decoder needs two tokens.",
            )
        if self.trains("discriminator"):
            require(
                size >> halvings >= 3,
                f"disc_layers is {halvings}: images of {size} px do not leave the discriminator "
                f"three pixels after {halvings} halvings.",
            )
        if self.trains("generator"):
            require(
                slots == 0,
                f"text_slots is {slots}: runs are conditioned on classes, so it has to be 0.",
            )
