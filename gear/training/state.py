"""What a run is between two steps: networks, their averages and optimizers, the step; and what an update sees of a batch."""

import contextlib
from dataclasses import dataclass, field
from typing import Literal

import torch

from gear.checkpoints import load_module, load_networks, network
from gear.config import UserError
from gear.data import DataConfig, load
from gear.evaluation.reconstruction import load_lpips
from gear.generator.model import Generator, GeneratorConfig, Projector, Projectors
from gear.run import Run
from gear.teachers import check_grid, load_teachers, side_by_side
from gear.teachers.scenes import ScenesTeacher
from gear.tokenizer.autoencoder import TokenizerConfig
from gear.tokenizer.discriminator import Discriminator
from gear.tokenizer.model import Tokenized, Tokenizer, check_divides, initialise_from_data
from gear.training.optim import EMA, Optimizer, OptimizerConfig, learning_rate_factor

INITIAL_IMAGES = 2_000  # what a tokenizer is initialised from


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


@dataclass
class Batch:
    """What one step looks at, computed once: images, labels, teacher features, and either of the tokenizer's answers."""

    images: torch.Tensor  # (B, 3, H, W); without pixels, (B, 0), where codes are looked up
    labels: torch.Tensor  # (B,)
    target: torch.Tensor | None = None  # f(x) of Eq. 5, standardised, no gradient: (B, L, C)
    tokenized: Tokenized | None = None  # with gradients, where the tokenizer trains
    indices: torch.Tensor | None = None  # (B, L)


class State:
    """Networks, averages, optimizers and the step of a run on a device."""

    def __init__(self, config, device):
        self.config, self.device, self.step = config, device, 0
        self.networks, self.averages, self.optimizers = {}, {}, {}
        self.teacher_features, self.widths = None, None  # of several teachers, side by side
        self.lpips = None
        BUILDERS[config.stage](self)

    def __getattr__(self, name):
        """Give a network by its name: state.tokenizer, state.generator, ..."""
        try:
            return self.__dict__["networks"][name]
        except KeyError:
            raise AttributeError(name) from None

    # -- one builder a stage ---------------------------------------------------------------------------------

    def _build_teacher(self):
        self._add("teacher", ScenesTeacher())
        self._optimize("teacher", ["teacher"], self.config.optimizer.generator_lr)

    def _build_tokenizer(self):
        config = self.config
        check_divides((config.data.image_size,) * 2, config.tokenizer.downsampling)
        self._add("tokenizer", Tokenizer(config.tokenizer), ema=config.optimizer.tokenizer_ema)
        self._add("discriminator", Discriminator(config.objective.disc_channels, config.objective.disc_layers))
        for name in ("tokenizer", "discriminator"):
            self._optimize(name, [name], config.optimizer.tokenizer_lr)
        if config.objective.lpips_weight > 0:
            self.lpips = load_lpips(self.device)
        if config.tokenizer_run:  # start where the parent ended: live weights, average and discriminator
            weights = load_networks(_finished(config.tokenizer_run))
            averaged = self.averages["tokenizer"].module
            started = {"tokenizer": self.tokenizer, "tokenizer_ema": averaged, "discriminator": self.discriminator}
            for name, module in started.items():
                load_module(module, network(weights, name, config.tokenizer_run), config.tokenizer_run)

    def _build_joint(self):
        self._build_tokenizer()
        self._add_generator()

    def _build_generator(self):
        if not self.config.tokenizer_run:
            raise UserError("the stage 'generator' needs a tokenizer: set tokenizer_run to a run's name.")
        check_divides((self.config.data.image_size,) * 2, self.config.tokenizer.downsampling)
        self._add("tokenizer", Tokenizer(self.config.tokenizer))
        run = _finished(self.config.tokenizer_run)
        weights = network(load_networks(run), "tokenizer_ema", run.name)
        load_module(self.tokenizer, weights, run.name).eval().requires_grad_(False)
        self._add_generator()

    def _add_generator(self):
        config = self.config
        self._add("generator", Generator(config.generator, config.tokenizer.codebook_size), config.optimizer.generator_ema)
        trained = ["generator"]
        if config.objective.align_weight > 0:
            stride = config.tokenizer.downsampling
            teachers = load_teachers(config.teacher, config.data, stride)
            for teacher in teachers:
                check_grid(teacher, config.data.image_size, stride)
            self.teacher_features, self.widths = side_by_side(teachers).to(self.device), [t.dim for t in teachers]
            projectors = [Projector(config.generator, width) for width in self.widths]
            self._add("projector", projectors[0] if len(teachers) == 1 else Projectors(projectors))
            trained.append("projector")
        self._optimize("generator", trained, config.optimizer.generator_lr)

    def _add(self, name, module, ema=None):
        self.networks[name] = module.to(self.device)
        if ema is not None:
            self.averages[name] = EMA(self.networks[name], ema)

    def _optimize(self, name, networks, lr):
        self.optimizers[name] = Optimizer([self.networks[n] for n in networks], lr, self.config.optimizer)

    def start(self):
        """Initialise a new run from training images, where its configuration asks for that."""
        config = self.config
        if config.stage in ("tokenizer", "joint") and config.tokenizer.init_from_data and not config.tokenizer_run:
            images, _ = load(config.data, "train", INITIAL_IMAGES)
            initialise_from_data(self.tokenizer, images, config.seed)
            self.averages["tokenizer"].module.load_state_dict(self.tokenizer.state_dict())

    # -- a step ----------------------------------------------------------------------------------------------

    def observe(self, images, labels, indices=None, target=None):
        """Run the one tokenizer forward and the one teacher forward that every update of this step shares.

        Where training.cached looked up what they give, `indices` (B, L) and `target` (B, L, C), nothing is left to run.
        """
        batch = Batch(images.to(self.device), labels.to(self.device))
        if indices is not None:
            batch.indices = indices.to(self.device)
            batch.target = None if target is None else target.to(self.device)
            return batch
        if self.teacher_features is not None:
            with torch.no_grad():
                batch.target = self.teacher_features(batch.images)
        if self.config.stage == "generator":
            with torch.no_grad():
                batch.indices = self.tokenizer.encode(batch.images).flatten(1)
        elif self.config.stage in ("tokenizer", "joint"):
            batch.tokenized = self.tokenizer(batch.images)
            batch.indices = batch.tokenized.quantized.indices
        return batch

    def descend(self, name, losses, weights):
        """Take one step of the optimizer `name` down the weighted sum of `losses`; a term without a weight counts once.

        Returns the losses as detached scalars. Raises FloatingPointError naming the first term that is not finite.
        """
        for term, value in losses.items():
            if not torch.isfinite(value):
                raise FloatingPointError(f"'{term}' of the {name} is {value.item()} at step {self.step}")
        loss = sum(weights.get(term, 1.0) * value for term, value in losses.items())
        try:
            self.optimizers[name].step(loss, learning_rate_factor(self.config.optimizer, self.step, self.config.steps))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} in the {name} at step {self.step} (terms: {', '.join(losses)})") from None
        return {term: value.detach() for term, value in losses.items()}

    def finish_step(self):
        for name, average in self.averages.items():
            average.update(self.networks[name])
        self.step += 1

    @property
    def gan_is_on(self):
        objective = self.config.objective
        return objective.gan_weight > 0 and self.step >= objective.gan_start * self.config.steps

    # -- to and from a checkpoint ----------------------------------------------------------------------------

    def tensors(self):
        """Return {file: {name: tensor}}: "networks" (with averages as NAME_ema) and "optimizers"."""
        modules = self.networks | {f"{name}_ema": average.module for name, average in self.averages.items()}
        networks = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
        optimizers = {f"{name}.{k}": v for name, o in self.optimizers.items() for k, v in o.tensors().items()}
        return {"networks": networks, "optimizers": optimizers}

    def restore(self, run):
        """Go on from the run's newest checkpoint; returns its JSON state."""
        saved = run.load_state()
        weights = load_networks(run)
        for name, module in self.networks.items():
            load_module(module, network(weights, name, run.name), run.name)
        for name, average in self.averages.items():
            load_module(average.module, network(weights, f"{name}_ema", run.name), run.name)
        moments = load_networks(run, "optimizers")
        for name, optimizer in self.optimizers.items():
            optimizer.load_tensors(moments.get(name, {}), f"{run.name}/{name}")  # one that has not stepped yet has none
        self.step = saved["step"]
        return saved


BUILDERS = {
    "teacher": State._build_teacher,
    "tokenizer": State._build_tokenizer,
    "joint": State._build_joint,
    "generator": State._build_generator,
}


def _finished(name):
    """Open a parent run; raises UserError while it is still in training."""
    run = Run.open(name)
    if run.checkpoint_steps() and not run.is_finished:
        raise UserError(f"the parent '{name}' is at step {run.step} of {run.config['steps']}: finish it, gear train {name}")
    return run


@contextlib.contextmanager
def frozen(*modules):
    """Hold networks fixed inside the block: evaluation mode (no dropout, no label dropped), no gradient to their weights."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.train(mode).requires_grad_(True)
