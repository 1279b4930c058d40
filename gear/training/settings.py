"""What defines a run: one stage of one method, with everything that its result depends on."""

from dataclasses import dataclass, field
from typing import Literal

from gear.config import UserError
from gear.data import DataConfig
from gear.generator.model import GeneratorConfig
from gear.tokenizer.autoencoder import TokenizerConfig
from gear.training.optim import OptimizerConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of Eqs. 2, 11 and 12; L_rec, the codebook term and L_NTP have weight 1."""

    lpips_weight: float = 0.1
    gan_weight: float = 0.1
    gan_start: float = 0.0  # share of the steps before the adversarial term sets in
    entropy_weight: float = 0.05
    commit_weight: float = 0.25
    align_weight: float = 0.5  # lambda
    tau: float = 0.1  # guidance temperature of the soft read-out
    bridge: Literal["soft", "straight_through", "naive_inputs", "naive", "none"] = (
        "soft"  # what reaches the tokenizer in the stage `joint`
    )
    disc_channels: int = 64
    disc_layers: int = 3


@dataclass(frozen=True)
class Config:
    """One run: one stage of one method. Composed in gear/recipes.py."""

    recipe: str
    stage: Literal["tokenizer", "joint", "generator", "teacher"]
    steps: int
    seed: int = 0
    batch_size: int = 256
    precision: Literal["float32", "bf16"] = "float32"  # of the networks' products; quantizer, read-outs and losses: float32
    tokenizer_run: str = ""  # the run whose tokenizer this one starts from, or keeps frozen
    teacher: str = "scenes"  # NAME[@LAYER][=PATH] of gear.teachers; several with commas between
    log_every: int = 100  # steps; a logged loss is the mean since the last line
    eval_every: int = 5000
    save_every: int = 5000
    eval_images: int = 512
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "eval_every", "save_every", "eval_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it has to be at least 1.")
