"""What a run is between two steps: networks, their averages and optimizers, the step; and what an
update sees of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gear.checkpoints import is_file, tokenizer_start
from gear.config import UserError
from gear.data.stream import load
from gear.device import derived_seed
from gear.evaluation.lpips import load_lpips
from gear.generator.model import Generator, Projector, Projectors
from gear.images import check_divides
from gear.runs.run import Run
from gear.teachers import check_grid, load_teachers, side_by_side
from gear.teachers.scenes import ScenesTeacher
from gear.tokenizer.discriminator import Discriminator
from gear.tokenizer.model import Tokenized, Tokenizer, initialise_from_data
from gear.training.fsdp import spread, spread_like
from gear.training.optim import EMA, Optimizer, learning_rate_factor
from gear.training.processes import Processes
from gear.training.stages import AVERAGED
from gear.weights import load_module, load_networks, network

NETWORKS = ("tokenizer", "discriminator", "generator", "projector", "teacher")
INITIAL_IMAGES = 2_000  # what a tokenizer is initialised from


def step_seed(seed, step):
    """Return the seed of a step: every random draw of it is a function of (seed, step).

    Step -1 is the initialisation.
    """
    return derived_seed(seed, step + 1)


@dataclass
class Batch:
    """What one step looks at, computed once: images, labels, teacher features, and either of the
    tokenizer's answers.
    """

    images: torch.Tensor  # (B, 3, H, W); without pixels, (B, 0), where codes are looked up
    labels: torch.Tensor  # (B,)
    target: torch.Tensor | None = None  # f(x) of Eq. 5, standardised, no gradient: (B, L, C)
    tokenized: Tokenized | None = None  # with gradients, where the tokenizer trains
    indices: torch.Tensor | None = None  # (B, L)
    # (B,) bool: whose condition the generator is not told in this step
    dropped: torch.Tensor | None = None
    # of a part of a batch: its mean use of the codes -> that of all of it, (K,)
    mean_use: Callable | None = None


class State:
    """Networks, averages, optimizers and the step of a run on a device.

    A network that the run's stage neither trains nor reads is None; so are `lpips` and what
    concerns the teacher.
    """

    def __init__(self, config, device, parts=1, processes=None, checkpointing=False):
        self.config, self.device, self.step, self.parts = config, device, 0, parts
        self.is_compiled = False
        self.processes = processes or Processes(device, config.batch_size, parts)
        self.skipped = 0  # steps in a row
        self.terms = {}  # {network: {term: the loss of this step so far}}
        self.tokenizer = self.discriminator = self.generator = self.projector = self.teacher = None
        self.averages, self.optimizers = {}, {}
        # teachers stand side by side
        self.teacher_features, self.widths, self.lpips = (None, None, None)
        if config.uses("tokenizer"):
            check_divides((config.data.image_size,) * 2, config.tokenizer.downsampling)
        if config.trains("tokenizer"):
            self._add_tokenizer(checkpointing)
        elif config.uses("tokenizer"):
            self._add_frozen_tokenizer()
        if config.trains("generator"):
            self._add_generator(checkpointing)
        if config.trains("teacher"):
            self.teacher = self._add("teacher", ScenesTeacher())
            self._optimize("teacher", [self.teacher], config.optimizer.generator_lr)

    def _add_tokenizer(self, checkpointing):
        config = self.config
        self.tokenizer = self._add(
            "tokenizer", Tokenizer(config.tokenizer, config.precision, checkpointing)
        )
        objective = config.objective
        sizes = objective.disc_channels, objective.disc_layers, objective.disc_norm
        discriminator = Discriminator(*sizes)
        if self.processes.world > 1 and self.device.type == "cuda":  # BatchNorm of the whole batch
            discriminator = torch.nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        self.discriminator = self._add("discriminator", discriminator)
        self._optimize("tokenizer", [self.tokenizer], config.optimizer.tokenizer_lr)
        self._optimize("discriminator", [self.discriminator], config.optimizer.tokenizer_lr)
        if config.objective.lpips_weight > 0:
            self.lpips = load_lpips(self.device, config.precision)
        # start where the parent ended: live weights, average and discriminator
        if config.tokenizer_run:
            started, _ = tokenizer_start(_finished(config.tokenizer_run))
            averaged = self.averages["tokenizer"].module
            modules = self.networks | {"tokenizer_ema": averaged}
            for name, tensors in started.items():
                load_module(modules[name], tensors, config.tokenizer_run)

    def _add_frozen_tokenizer(self):
        config = self.config
        if not config.tokenizer_run:
            raise UserError(
                f"the stage '{config.stage}' needs a tokenizer: set tokenizer_run to a run's name "
                "or a file."
            )
        started, precision = tokenizer_start(_finished(config.tokenizer_run), frozen=True)
        self.tokenizer = self._add("tokenizer", Tokenizer(config.tokenizer, precision))
        load_module(self.tokenizer, started["tokenizer_ema"], config.tokenizer_run)
        self.tokenizer.eval().requires_grad_(False)

    def _add_generator(self, checkpointing):
        config = self.config
        generator = Generator(config.generator, config.tokenizer.codebook_size, checkpointing)
        self.generator = self._add("generator", generator)
        trained = [self.generator]
        if config.is_aligned:
            stride = config.tokenizer.downsampling
            teachers = load_teachers(config.teacher, config.data, stride)
            for teacher in teachers:
                check_grid(teacher, config.data.image_size, stride)
            self.teacher_features = side_by_side(teachers).to(
                self.device, memory_format=self.layout
            )
            self.widths = [t.dim for t in teachers]
            projectors = [Projector(config.generator, width) for width in self.widths]
            projector = projectors[0] if len(teachers) == 1 else Projectors(projectors)
            self.projector = self._add("projector", projector)
            trained.append(self.projector)
        self._optimize("generator", trained, config.optimizer.generator_lr)

    @property
    def layout(self):
        """The memory format that convolutions like best on this device."""
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def _add(self, name, module):
        """Place a network, with an average of it where it is to have one, on the device; returns
        it.
        """
        copies = [module]
        if name in AVERAGED and self.config.trains(name):
            self.averages[name] = EMA(module, getattr(self.config.optimizer, f"{name}_ema"))
            copies.append(self.averages[name].module)
        for copied in copies:
            # from the CPU: no device has room for the whole
            if self.processes.shard and name == "generator":
                spread(copied.blocks, self.device, self.processes.world)
            copied.to(self.device, memory_format=self.layout)
        return module

    def _optimize(self, name, networks, lr):
        self.optimizers[name] = Optimizer(networks, lr, self.config.optimizer)

    @property
    def networks(self):
        """The networks that there are, {name: module}."""
        found = {name: getattr(self, name) for name in NETWORKS}
        return {name: module for name, module in found.items() if module is not None}

    def start(self, source):
        """Initialise a new run from training images of a Source, where its configuration asks for
        that.
        """
        config = self.config
        if (
            config.trains("tokenizer")
            and config.tokenizer.init_from_data
            and not config.tokenizer_run
        ):
            images, _ = load(source, "train", INITIAL_IMAGES)
            initialise_from_data(self.tokenizer, images, config.seed)
            self.averages["tokenizer"].module.load_state_dict(self.tokenizer.state_dict())

    # -- a step ------------------------------------------------------------------------------------

    def batches(self, images, *others):
        """Yield Batches of this process's rows of the step's batch: one, or the parts whose
        gradients add up to its own.
        """
        parts = list(
            zip(*(given.split(self.processes.share // self.parts) for given in (images, *others)))
        )
        is_shared = len(parts) > 1 or self.processes.world > 1
        mean_use = (
            self._mean_use([x for x, *_ in parts])
            if is_shared and "tokenizer" in self.averages
            else None
        )
        for i, part in enumerate(parts):
            rows = self.processes.rows(i, self.parts)
            if is_shared:  # dropout differs from part to part
                seed = step_seed(self.config.seed, self.step)
                torch.manual_seed(derived_seed(seed, rows.start))
            batch = self.observe(*part)
            batch.mean_use = mean_use
            batch.dropped = self._dropped(len(batch.labels), rows if is_shared else None)
            yield batch

    def _dropped(self, count, rows):
        """Draw which of a batch's conditions are dropped; of a part, those of its `rows` that the
        whole batch would drop.
        """
        share = self.config.generator.class_dropout
        if self.generator is None or share == 0:
            return None
        if rows is None:
            return torch.rand(count, device=self.device) < share
        rng = torch.Generator(self.device).manual_seed(step_seed(self.config.seed, self.step))
        return torch.rand(self.config.batch_size, generator=rng, device=self.device)[rows] < share

    def _mean_use(self, parts):
        """Return what the entropy term needs to know of the rest of the batch: see
        `entropy_loss`.
        """
        if len(parts) == 1:
            return self.processes.mean
        with torch.no_grad(), self.autocast():  # the encoder runs twice
            means = [self.tokenizer.mean_use(x.to(self.device)) for x in parts]
        whole = self.processes.mean(torch.stack(means).mean(0))
        return lambda mean: whole

    def autocast(self):
        """Return the context in which the networks of this run compute."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def observe(self, images, labels, indices=None, target=None):
        """Run the one tokenizer forward and the one teacher forward that every update of this step
        shares.

        Where training.cached looked up what they give, `indices` (B, L) and `target` (B, L, C),
        nothing is left to run.
        """
        batch = Batch(images.to(self.device), labels.to(self.device))
        if indices is not None:
            batch.indices = indices.to(self.device)
            batch.target = None if target is None else target.to(self.device)
            return batch
        if self.teacher_features is not None:
            batch.target = self.features(batch.images)
        if self.config.trains("tokenizer"):
            with self.autocast():
                batch.tokenized = self.tokenizer(batch.images)
            batch.indices = batch.tokenized.quantized.indices
        elif self.tokenizer is not None:
            with torch.no_grad():
                batch.indices = self.tokenizer.encode(batch.images, check=False).flatten(1)
        return batch

    @torch.no_grad()
    def features(self, images):
        """Return what the teacher makes of images (B, 3, H, W): (B, L, C), on a GPU in the run's
        precision.
        """
        is_bf16 = self.device.type == "cuda" and self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
            return self.teacher_features(images, check=False)

    def backward(self, name, losses, weights):
        """Add the gradient of the weighted sum of `losses` to that of the optimizer `name`.

        A term without a weight counts once. Returns the losses as detached scalars.
        """
        with torch.autocast(self.device.type, enabled=False):
            (
                sum(weights.get(term, 1.0) * value for term, value in losses.items()) / self.parts
            ).backward()
        terms = self.terms.setdefault(name, {})
        for term, value in losses.items():
            terms[term] = terms.get(term, 0.0) + value.detach() / self.parts
        return {term: value.detach() for term, value in losses.items()}

    def discard(self):
        """Forget the gradients of this step so far."""
        self.terms = {}
        for optimizer in self.optimizers.values():
            optimizer.clear()

    def descend(self):
        """Step every optimizer that was given a gradient; returns the losses of the step, {term:
        scalar on the device}.

        Raises FloatingPointError naming what is not finite, the first term or else a gradient's
        norm; no network has moved.
        """
        terms, self.terms = self.terms, {}
        for name in terms:
            self.processes.average(self.optimizers[name].gradients)
        told = {
            (name, f"'{term}'"): value
            for name, values in terms.items()
            for term, value in values.items()
        }
        told |= {
            (name, "the norm of the gradient"): self.optimizers[name].clip_gradients()
            for name in terms
        }
        finite = self.processes.mean(
            torch.stack([torch.isfinite(value).float() for value in told.values()])
        )
        # the one time that a step waits for the device
        for (name, what), is_finite in zip(told, finite.tolist()):
            if is_finite < 1:
                self.discard()
                of = "" if what.startswith("'") else f" (of {', '.join(terms[name])})"
                raise FloatingPointError(
                    f"{what} of the {name} is {told[name, what].item()} at step {self.step}{of}"
                )
        for name in terms:
            self.optimizers[name].step(
                learning_rate_factor(self.config.optimizer, self.step, self.config.steps)
            )
        return {term: value for values in terms.values() for term, value in values.items()}

    def finish_step(self):
        for name, average in self.averages.items():
            average.update(self.networks[name])
        self.step += 1

    @property
    def gan_is_on(self):
        objective = self.config.objective
        return objective.gan_weight > 0 and self.step >= objective.gan_start * self.config.steps

    # -- to and from a checkpoint ------------------------------------------------------------------

    @property
    def modules(self):
        """The networks, and their averages as NAME_ema."""
        return self.networks | {
            f"{name}_ema": average.module for name, average in self.averages.items()
        }

    def tensors(self):
        """Return {file: {name: tensor}}: "networks", which are `modules`, and "optimizers".

        Whole to the process that writes, {file: {}} to the others; every process has to ask.
        """
        networks = {
            f"{name}.{k}": v
            for name, module in self.modules.items()
            for k, v in module.state_dict().items()
        }
        optimizers = {
            f"{name}.{k}": v for name, o in self.optimizers.items() for k, v in o.tensors().items()
        }
        return {
            "networks": self.processes.gather(networks),
            "optimizers": self.processes.gather(optimizers),
        }

    def restore(self, run):
        """Go on from the run's newest checkpoint; returns its JSON state."""
        saved = run.load_state()
        weights = load_networks(run)
        for name, module in self.modules.items():
            own = module.state_dict()
            tensors = {
                n: spread_like(t, own.get(n)) for n, t in network(weights, name, run.name).items()
            }
            load_module(module, tensors, run.name)
        moments = load_networks(run, "optimizers")
        for name, optimizer in self.optimizers.items():
            # one that has not stepped yet has none
            optimizer.load_tensors(moments.get(name, {}), f"{run.name}/{name}")
        self.step = saved["step"]
        return saved


def _finished(source):
    """Return a parent, a run's name or a file; raises UserError while a run is still in
    training.
    """
    if is_file(source):
        return source
    run = Run.open(source)
    if run.checkpoint_steps() and not run.is_finished:
        raise UserError(
            f"the parent '{source}' is at step {run.step} of {run.config['steps']}: finish it, "
            f"gear train {source}"
        )
    return source
